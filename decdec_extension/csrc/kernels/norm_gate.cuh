// RMSNorm and the gate of the MLP, rounded where Hugging Face's modules round.

#pragma once

#include "decode_params.h"
#include "instructions.cuh"
#include "vectors.cuh"

namespace decdec::cuda {

constexpr int kNormThreads = 1024;
constexpr int kNormVectors = 4;  // of eight numbers a thread keeps: rows of up to 32768

// One row a block.
template <Dtype kDtype>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const __grid_constant__ NormParams p) {
  __shared__ float sums[32];
  allow_next_kernel();
  const int vectors = p.width / 8;
  uint4 weight[kNormVectors], x[kNormVectors];
#pragma unroll
  for (int n = 0; n < kNormVectors; ++n) {
    const int i = threadIdx.x + n * blockDim.x;
    if (i < vectors) weight[n] = __ldg(static_cast<const uint4*>(p.weight) + i);
  }
  wait_for_last_kernel();
  const int64_t row = int64_t{blockIdx.x} * vectors;
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kNormVectors; ++n) {
    const int i = threadIdx.x + n * blockDim.x;
    if (i >= vectors) continue;
    x[n] = static_cast<const uint4*>(p.x)[row + i];
    float v[8];
    unpack<kDtype>(x[n], v);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(v[j], v[j], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.f);
  const float factor = rsqrtf(sum / float(p.width) + p.eps);
#pragma unroll
  for (int n = 0; n < kNormVectors; ++n) {
    const int i = threadIdx.x + n * blockDim.x;
    if (i >= vectors) continue;
    float v[8], w[8];
    unpack<kDtype>(x[n], v);
    unpack<kDtype>(weight[n], w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = rounded<kDtype>(v[j] * factor) * w[j];
    static_cast<uint4*>(p.out)[row + i] = pack<kDtype>(v);
  }
}

// silu(gate) * up, eight numbers a thread.
template <Dtype kDtype>
__global__ void gate_kernel(const __grid_constant__ GateParams p) {
  allow_next_kernel();
  wait_for_last_kernel();
  const int vectors = p.width / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  const uint4* x = static_cast<const uint4*>(p.x) + int64_t{blockIdx.y} * 2 * vectors;
  float gate[8], up[8];
  unpack<kDtype>(x[i], gate);
  unpack<kDtype>(x[vectors + i], up);
#pragma unroll
  for (int j = 0; j < 8; ++j) gate[j] = rounded<kDtype>(gate[j] / (1.f + __expf(-gate[j]))) * up[j];
  static_cast<uint4*>(p.out)[int64_t{blockIdx.y} * vectors + i] = pack<kDtype>(gate);
}

}  // namespace decdec::cuda
