// The caller's 16-bit numbers as floats, and back.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace decdec::cuda {

// 2**n for -126 <= n <= 127.
__device__ __forceinline__ float power_of_two(int n) { return __int_as_float((n + 127) << 23); }

__device__ __forceinline__ float to_float(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::kHalf ? __half2float(__ushort_as_half(bits)) : __uint_as_float(uint32_t{bits} << 16);
}

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Element i of a vector of the caller's.
__device__ __forceinline__ float load_element(const void* vector, int64_t i, Dtype dtype) {
  return to_float(static_cast<const uint16_t*>(vector)[i], dtype);
}

__device__ __forceinline__ void store_element(void* vector, int64_t i, Dtype dtype, float value) {
  if (dtype == Dtype::kFloat) {
    static_cast<float*>(vector)[i] = value;
  } else if (dtype == Dtype::kHalf) {
    static_cast<__half*>(vector)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(vector)[i] = __float2bfloat16_rn(value);
  }
}

// The same for 16-bit elements, without a branch.
__device__ __forceinline__ void store_short(void* vector, int64_t i, Dtype dtype, float value) {
  const uint16_t half = __half_as_ushort(__float2half_rn(value)), brain = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  static_cast<uint16_t*>(vector)[i] = dtype == Dtype::kHalf ? half : brain;
}

// Four neighbouring elements of a caller's vector.
__device__ __forceinline__ float4 unpack_four(uint2 v, Dtype dtype) {
  return {to_float(v.x & 0xffff, dtype), to_float(v.x >> 16, dtype), to_float(v.y & 0xffff, dtype),
          to_float(v.y >> 16, dtype)};
}

}  // namespace decdec::cuda
