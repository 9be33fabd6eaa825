// The product of one 16-byte column block of selected residual rows.

#pragma once

#include <algorithm>

#include "cpu/simd.h"
#include "cpu/weights.h"

namespace decdec::cpu {

constexpr int kBlockBytes = 16;

// Outputs of one column block: those of 16 bytes; at 3 bits two blocks of the high bits and one of the low bits.
constexpr int block_outputs(int bits) { return 8 * kBlockBytes / (bits == 3 ? 1 : bits); }

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef float Floats16 __attribute__((vector_size(64)));

// Where output o of a block lies in its sums: by slot, outputs slot, slot + per_byte, ... being contiguous.
template <int bits>
constexpr int sum_index(int o) {
  constexpr int per_byte = bits < 8 ? 8 / bits : 1;
  return bits > 8 ? o : o % per_byte * kBlockBytes + o / per_byte;
}

// sum += values * (codes - offset) of selected rows, for the outputs of the 16 bytes at byte `at` of a row.
template <int bits>
inline void add_rows(const Residual& r, int64_t at, float offset, const int32_t* indices, const float* values, int64_t n,
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

// sum[o] = values * (codes - offset) of selected rows, for the block's outputs o in order.
template <int bits>
inline void sum_block(const Residual& r, int64_t block, const int32_t* indices, const float* values, int64_t n,
                      float (&sum)[block_outputs(bits)]) {
  constexpr int outputs = block_outputs(bits);
  if constexpr (bits == 3) {  // the code is 2 * high + low; so is its offset
    const float low_offset = r.nested ? 0.5f : 0.0f;
    alignas(64) float high[2][outputs / 2] = {}, low[outputs] = {};
    // Of an odd number of high blocks the last one is followed by low bits; those outputs are beyond d_out.
    for (int part = 0; part < 2; ++part) {
      add_rows<2>(r, (2 * block + part) * kBlockBytes, (r.offset() - low_offset) / 2, indices, values, n, high[part]);
    }
    add_rows<1>(r, r.high_bytes() + block * kBlockBytes, low_offset, indices, values, n, low);
    for (int o = 0; o < outputs; ++o) {
      sum[o] = 2.0f * high[o / (outputs / 2)][sum_index<2>(o % (outputs / 2))] + low[sum_index<1>(o)];
    }
  } else {
    alignas(64) float by_slot[outputs] = {};
    add_rows<bits>(r, block * kBlockBytes, r.offset(), indices, values, n, by_slot);
    for (int o = 0; o < outputs; ++o) sum[o] = by_slot[sum_index<bits>(o)];
  }
}

// out[o] += residual product of the block's outputs o (those below d_out).
template <int bits>
void multiply_block(const Residual& r, int64_t block, const int32_t* indices, const float* values, int64_t k,
                    float* out) {
  constexpr int outputs = block_outputs(bits);
  constexpr int64_t kRows = 128;  // rows summed before the total: short chains round less
  const int64_t first = block * outputs, count = std::min<int64_t>(outputs, r.d_out - first);
  int64_t begin = 0;
  while (begin < k) {
    const int64_t group = indices[begin] / r.group_size, limit = std::min(k, begin + kRows);
    int64_t end = begin + 1;
    while (end < limit && indices[end] / r.group_size == group) ++end;
    float sum[outputs], step[outputs];
    sum_block<bits>(r, block, indices + begin, values + begin, end - begin, sum);
    if (r.scale) {
      half_to_float(r.scale + group * r.d_out + first, count, step);
      for (int o = 0; o < count; ++o) step[o] *= r.step_factor();
    } else {
      std::fill_n(step, outputs, 1.0f);
    }
    for (int o = 0; o < count; ++o) out[o] += step[o] * sum[o];
    begin = end;
  }
}

}  // namespace decdec::cpu
