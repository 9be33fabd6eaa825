// RMSNorm of activations on their way into a GEMV: every block norms what it reads, which saves a kernel of its own.

#pragma once

#include "vectors.cuh"

namespace decdec::cuda {

// Sum of the squares of eight numbers.
__device__ __forceinline__ float square_sum(const uint4& v, Dtype dtype) {
  const float4 a = unpack_four({v.x, v.y}, dtype), b = unpack_four({v.z, v.w}, dtype);
  return a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
}

// The calling thread's part of a row's squares; d_in is a multiple of 8.
__device__ inline float row_squares(const GemvParams& p, int row) {
  const uint4* x = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.x) + int64_t{row} * p.weights.d_in);
  float sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.weights.d_in / 8; i += kThreads) sum += square_sum(x[i], p.dtype);
  return sum;
}

// 1 / rms of a row from the threads' parts, by the whole block. `scratch`: kWarps floats, free before and after.
__device__ inline float norm_factor(const GemvParams& p, float squares, float* scratch) {
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) squares += scratch[w];
  __syncthreads();
  return rsqrtf(squares / float(p.weights.d_in) + p.norm_eps);
}

// Eight numbers, rounded where Hugging Face's module rounds.
__device__ __forceinline__ uint4 normed(const uint4& x, const uint4& weight, float factor, Dtype dtype) {
  const auto with = [&](auto typed) {
    constexpr Dtype kDtype = decltype(typed)::value;
    float v[8], w[8];
    unpack<kDtype>(x, v);
    unpack<kDtype>(weight, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = rounded<kDtype>(v[j] * factor) * w[j];
    return pack<kDtype>(v);
  };
  if (dtype == Dtype::kHalf) return with(std::integral_constant<Dtype, Dtype::kHalf>{});
  return with(std::integral_constant<Dtype, Dtype::kBfloat16>{});
}

}  // namespace decdec::cuda
