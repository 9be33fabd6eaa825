// The float16 numbers that the kernels use, on the CPU.

#pragma once

#include "emulator.h"

inline float half_bits_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  const float magnitude = exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25) : std::ldexp(float(fraction), -24);
  return sign ? -magnitude : magnitude;
}

// To the nearest, to even at a tie.
inline uint16_t float_to_half_bits(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float magnitude = std::fabs(v);
  if (std::isnan(v)) return 0x7fff;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int step = magnitude > 0 ? std::max(exponent - 11, -24) : -24;  // a unit in the last place is 2**step
  const int units = int(std::nearbyint(std::ldexp(magnitude, -step)));
  return sign | uint16_t(units + ((step + 24) << 10));
}

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float v) : bits(float_to_half_bits(v)) {}
};

inline float __half2float(__half v) { return half_bits_to_float(v.bits); }
inline __half __float2half_rn(float v) { return __half(v); }
inline uint16_t __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(uint16_t bits) { return std::bit_cast<__half>(bits); }

// Two numbers of a type, with the functions that compare and add them.
template <class T>
struct alignas(4) Pair {
  T x, y;
};

template <class T>
float value(T v);
template <>
inline float value(__half v) { return half_bits_to_float(v.bits); }

template <class T>
T larger(T a, T b) {  // the one that is a number
  if (std::isnan(value(a))) return b;
  return std::isnan(value(b)) || value(a) >= value(b) ? a : b;
}
template <class T>
Pair<T> __hmax2(Pair<T> a, Pair<T> b) { return {larger(a.x, b.x), larger(a.y, b.y)}; }
template <class T>
Pair<T> __hadd2(Pair<T> a, Pair<T> b) { return {T(value(a.x) + value(b.x)), T(value(a.y) + value(b.y))}; }
template <class T>
Pair<T> __hge2(Pair<T> a, Pair<T> b) { return {T(value(a.x) >= value(b.x)), T(value(a.y) >= value(b.y))}; }
template <class T>
unsigned __hge2_mask(Pair<T> a, Pair<T> b) {
  return (value(a.x) >= value(b.x) ? 0xffffu : 0) | (value(a.y) >= value(b.y) ? 0xffff0000u : 0);
}
template <class T>
unsigned __heq2_mask(Pair<T> a, Pair<T> b) {
  return (value(a.x) == value(b.x) ? 0xffffu : 0) | (value(a.y) == value(b.y) ? 0xffff0000u : 0);
}

using __half2 = Pair<__half>;
inline float2 __half22float2(__half2 v) { return {value(v.x), value(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
