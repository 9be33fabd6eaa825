// Quantized weights and residuals back to dense matrices.

#pragma once

#include "cpu/weights.h"

namespace decdec::cpu {

// (d_out, d_in) of dtype.
void dequantize_base(const BaseWeights& w, ScalarType dtype, void* out);

// (d_in, d_out) of dtype, transposed as residuals are stored.
void dequantize_residual(const Residual& r, ScalarType dtype, void* out);

}  // namespace decdec::cpu
