// Base GEMV, residual GEMV, or both in one pass over the outputs.

#pragma once

#include "cpu/weights.h"

namespace decdec::cpu {

struct Gemv {
  int64_t batch, d_in, d_out;
  const BaseWeights* base;   // null: residual only
  const float* x;            // for the base: (batch, units * 64), permuted by permute_inputs
  const Residual* residual;  // null: base only
  const Selected* selected;  // for the residual
  const void* bias;          // (d_out,) of dtype, or null
  ScalarType dtype;          // of bias and out
  void* out;                 // (batch, d_out)
};

// Deterministic: every output is summed by one thread in an order that depends on the shapes alone.
void gemv(const Gemv& g);

// x of all rows for `gemv`: (batch, d_in) to (batch, units * 64).
void permute_activations(const float* x, int64_t batch, int64_t d_in, float* permuted);

}  // namespace decdec::cpu
