// Where the largest of many numbers is: the lowest of equals, NaN above all.

#pragma once

#include "decode_params.h"
#include "instructions.cuh"

namespace decdec::cuda {

__device__ __forceinline__ uint64_t argmax_key(float v, int index) {
  const uint32_t bits = isnan(v) ? 0x7fffffffu : v == 0 ? 0 : __float_as_uint(v);  // both zeros are equal
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | ~uint32_t(index);
}

__global__ void __launch_bounds__(kThreads) argmax_kernel(const __grid_constant__ ArgmaxParams p) {
  __shared__ uint64_t warps[kWarps];
  allow_next_kernel();
  wait_for_last_kernel();
  uint64_t best = 0;
  const int each = 4 * gridDim.x * kThreads;
  for (int i = 4 * (blockIdx.x * kThreads + threadIdx.x); i < p.width; i += each) {
    if (i + 4 <= p.width) {
      const float4 v = *reinterpret_cast<const float4*>(p.x + i);
      best = max(best, max(max(argmax_key(v.x, i), argmax_key(v.y, i + 1)),
                           max(argmax_key(v.z, i + 2), argmax_key(v.w, i + 3))));
    } else {
      for (int j = i; j < p.width; ++j) best = max(best, argmax_key(p.x[j], j));
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) best = max(best, __shfl_xor_sync(0xffffffff, best, mask));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kWarps; ++w) best = max(best, warps[w]);
  auto* workspace = reinterpret_cast<unsigned long long*>(p.workspace);
  atomicMax(workspace, best);
  __threadfence();
  if (atomicAdd(workspace + 1, 1ull) + 1 < gridDim.x) return;
  *p.out = ~uint32_t(atomicExch(workspace, 0ull));
  workspace[1] = 0;
}

}  // namespace decdec::cuda
