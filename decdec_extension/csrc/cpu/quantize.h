// The paper's residual quantization (section 4.2), a scale per output channel.

#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace decdec::cpu {

// Codes int8 and scales of float32 `residual` (d_out, d_in), `levels` steps to either side of zero. Returns the first row
// that holds NaN or Inf, -1 if none does.
int64_t quantize_residual(const float* residual, int64_t d_out, int64_t d_in, int levels, int8_t* codes,
                          torch::headeronly::Half* scales);

}  // namespace decdec::cpu
