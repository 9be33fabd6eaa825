// kernels/instructions.cuh on the CPU: the same functions, by their meaning in the PTX manual.

#pragma once

#include <cstdint>
#include <cstring>

namespace decdec::cuda {

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    d |= byte << (8 * i);
  }
  return d;
}

// Operands as they lie in the lanes: of the 16 x 32 matrix lane 4 g + t has rows g and g + 8, inputs 4 t to 4 t + 3 and
// sixteen on; of the 32 x 8 one column g, the same inputs; of the product rows g and g + 8, columns 2 t and 2 t + 1.
template <bool kSigned>
inline void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint8_t a[4][4];
    int8_t b[2][4];
  } mine;
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b[0], &b0, 4);
  std::memcpy(mine.b[1], &b1, 4);
  const Operands* all = emulated::exchange(emulated::Meeting::kProduct, mine);
  const int g = emulated::lane() / 4, t = emulated::lane() % 4;
  for (int n = 0; n < 4; ++n) {
    const int column = 2 * t + n % 2, half = n / 2;
    for (int lane = 0; lane < 4; ++lane) {
      const Operands &left = all[4 * g + lane], &right = all[4 * column + lane];
      for (int part = 0; part < 2; ++part) {
        for (int i = 0; i < 4; ++i) {
          const uint8_t v = left.a[2 * part + half][i];
          d[n] += (kSigned ? int(int8_t(v)) : int(v)) * right.b[part][i];
        }
      }
    }
  }
}

template <int kWords>
inline void load_streaming(uint32_t (&d)[kWords], const void* p) {
  std::memcpy(d, p, 4 * kWords);
}

inline uint64_t load_relaxed(const void* p) { return *static_cast<const uint64_t*>(p); }

inline void prefetch(const void*) {}
inline void prefetch_far(const void*) {}

inline void allow_next_kernel() {}
inline void wait_for_last_kernel() {}

inline void copy_streaming(void* shared, const void* global) { emulated::copy_async(shared, global, 16, true); }

template <int kBytes>
inline void copy_async(void* shared, const void* global, bool wanted = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulated::copy_async(shared, global, kBytes, wanted);
}

inline void close_copies() { emulated::close_copies(); }
template <int kNewest>
inline void wait_copies() {
  emulated::wait_copies(kNewest);
}

}  // namespace decdec::cuda
