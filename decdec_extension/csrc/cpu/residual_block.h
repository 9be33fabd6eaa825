// The product of one 16-byte column block of selected residual rows.

#pragma once

#include <algorithm>

#include "cpu/simd.h"
#include "cpu/weights.h"

namespace decdec::cpu {

constexpr int kBlockBytes = 16;

constexpr int block_outputs(int bits) { return 8 * kBlockBytes / bits; }

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef float Floats16 __attribute__((vector_size(64)));

// sum[i] += values * codes of selected rows, for the block_outputs(bits) outputs of the block at byte `at` of a row.
// sum is laid out by slot: outputs slot, slot + per_byte, ... are contiguous.
template <int bits>
inline void add_rows(const Residual& r, int64_t at, const int32_t* indices, const float* values, int64_t n,
                     float* sum) {
  if constexpr (bits == 16) {
    float row[block_outputs(16)];
    for (int64_t i = 0; i < n; ++i) {
      half_to_float(reinterpret_cast<const Half*>(r.rows + indices[i] * r.row_bytes + at), block_outputs(16), row);
      for (int o = 0; o < block_outputs(16); ++o) sum[o] += values[i] * row[o];
    }
  } else {
    constexpr int slots = 8 / bits;
    Floats16 slot_sum[slots] = {};
    const float offset = r.offset();
    for (int64_t i = 0; i < n; ++i) {
      const Words16 bytes = __builtin_convertvector(load<Bytes16>(r.rows + indices[i] * r.row_bytes + at), Words16);
      for (int slot = 0; slot < slots; ++slot) {
        const Words16 code = (bytes >> (slot * bits)) & ((1u << bits) - 1);
        slot_sum[slot] += values[i] * (__builtin_convertvector(code, Floats16) - offset);
      }
    }
    for (int slot = 0; slot < slots; ++slot) {
      store(sum + slot * kBlockBytes, load<Floats16>(sum + slot * kBlockBytes) + slot_sum[slot]);
    }
  }
}

// out[o] += residual product of the block's outputs o (those below d_out).
template <int bits>
void multiply_block(const Residual& r, int64_t block, const int32_t* indices, const float* values, int64_t k,
                    float* out) {
  constexpr int outputs = block_outputs(bits);
  constexpr int per_byte = bits < 8 ? 8 / bits : 1;
  constexpr int64_t kRows = 128;  // rows summed before the total: short chains round less
  const int64_t first = block * outputs, count = std::min<int64_t>(outputs, r.d_out - first);
  int64_t begin = 0;
  while (begin < k) {
    const int64_t group = indices[begin] / r.group_size, limit = std::min(k, begin + kRows);
    int64_t end = begin + 1;
    while (end < limit && indices[end] / r.group_size == group) ++end;
    alignas(64) float sum[outputs] = {};
    add_rows<bits>(r, block * kBlockBytes, indices + begin, values + begin, end - begin, sum);
    float step[outputs];
    if (r.scale) {
      half_to_float(r.scale + group * r.d_out + first, count, step);
      for (int o = 0; o < count; ++o) step[o] *= r.step_factor();
    } else {
      std::fill_n(step, outputs, 1.0f);
    }
    for (int o = 0; o < count; ++o) {
      out[o] += step[o] * sum[bits < 8 ? (o % per_byte) * kBlockBytes + o / per_byte : o];
    }
    begin = end;
  }
}

}  // namespace decdec::cpu
