#include "cpu/convert.h"

#include <bit>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace decdec::cpu {

namespace {

void float_to_half(const float* from, int64_t n, Half* to) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
#endif
  for (; i < n; ++i) to[i] = Half(from[i]);
}

void bfloat16_to_float(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i]) << 16);
}

void float_to_bfloat16(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(from[i]);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

}  // namespace

void half_to_float(const Half* from, int64_t n, float* to) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

void load_floats(const void* from, ScalarType dtype, int64_t offset, int64_t n, float* to) {
  if (dtype == ScalarType::Half) {
    half_to_float(static_cast<const Half*>(from) + offset, n, to);
  } else if (dtype == ScalarType::BFloat16) {
    bfloat16_to_float(static_cast<const uint16_t*>(from) + offset, n, to);
  } else {
    std::memcpy(to, static_cast<const float*>(from) + offset, n * sizeof(float));
  }
}

void store_floats(const float* from, int64_t n, void* to, ScalarType dtype, int64_t offset) {
  if (dtype == ScalarType::Half) {
    float_to_half(from, n, static_cast<Half*>(to) + offset);
  } else if (dtype == ScalarType::BFloat16) {
    float_to_bfloat16(from, n, static_cast<uint16_t*>(to) + offset);
  } else {
    std::memcpy(static_cast<float*>(to) + offset, from, n * sizeof(float));
  }
}

}  // namespace decdec::cpu
