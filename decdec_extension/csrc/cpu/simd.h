// One vector of float32 lanes, as wide as the machine's, in GCC's portable vector types.
//
// The tile layout puts 4 inputs of one row side by side in lanes, so a vector of kLanes holds kLanes / 4 rows.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace decdec::cpu {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <class Vector, class T>
inline Vector load(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector, class T>
inline void store(T* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

// Four floats, repeated over all lanes.
inline Floats repeat4(const float* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(from));
#elif defined(__AVX2__)
  return (Floats)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
#else
  return load<Floats>(from);
#endif
}

}  // namespace decdec::cpu
