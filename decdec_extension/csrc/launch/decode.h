// Launchers of the small kernels of a decoding step. They throw std::runtime_error where CUDA refuses.

#pragma once

#include <cuda_runtime_api.h>

#include "../kernels/decode_params.h"
#include "launch.h"

namespace decdec::cuda {

void launch_norm(const NormParams& params, cudaStream_t stream);
void launch_gate(const GateParams& params, cudaStream_t stream);
void launch_head(const HeadParams& params, cudaStream_t stream);
void launch_argmax(const ArgmaxParams& params, cudaStream_t stream);

// Blocks' worth of query heads that share a key/value head, and blocks that share its places.
struct AttendGrid {
  int groups;
  int splits;
};
AttendGrid attend_grid(int heads, int kv_heads, int head_dim, int64_t places, bool few);
void launch_attend(const AttendParams& params, cudaStream_t stream);

}  // namespace decdec::cuda
