// Eight neighbouring 16-bit numbers as floats, and back.

#pragma once

#include <type_traits>

#include "numbers.cuh"

namespace decdec::cuda {

template <Dtype kDtype>
__device__ __forceinline__ void unpack(const uint4& v, float (&to)[8]) {
  const uint32_t* words = &v.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kDtype == Dtype::kHalf) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(words + i));
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    } else {
      to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

template <Dtype kDtype>
__device__ __forceinline__ uint4 pack(const float (&from)[8]) {
  uint4 v;
  uint32_t* words = &v.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kDtype == Dtype::kHalf) {
      *reinterpret_cast<__half2*>(words + i) = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
    } else {
      *reinterpret_cast<__nv_bfloat162*>(words + i) = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    }
  }
  return v;
}

// Rounded to the caller's type and back.
template <Dtype kDtype>
__device__ __forceinline__ float rounded(float v) {
  return kDtype == Dtype::kHalf ? __half2float(__float2half_rn(v)) : __bfloat162float(__float2bfloat16_rn(v));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffff, v, mask);
  return v;
}

}  // namespace decdec::cuda
