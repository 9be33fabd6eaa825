// The bfloat16 numbers that the kernels use, on the CPU.

#pragma once

#include "cuda_fp16.h"

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) {  // to the nearest, to even at a tie
    const uint32_t all = std::bit_cast<uint32_t>(v);
    bits = std::isnan(v) ? 0x7fff : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
};

template <>
inline float value(__nv_bfloat16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }

inline float __bfloat162float(__nv_bfloat16 v) { return value(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }

using __nv_bfloat162 = Pair<__nv_bfloat16>;
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
