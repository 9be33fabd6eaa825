// The product of one 16-row tile of base weights with up to a few rows of activations.
//
// Every tile row has a table of its 2**bits weights: the codebook's entries, or (code - zero) * scale of the current
// group. A vector holds codes of kLanes / 4 rows, and one or two permutes look all of them up in those rows' tables.

#pragma once

#include <algorithm>

#include "cpu/simd.h"
#include "cpu/weights.h"

namespace decdec::cpu {

constexpr int kParts = 32 / kLanes;  // vectors of one word of a unit

// x of one half unit in the order of the packed codes: code (., j) of lane 4 g + t meets element 4 j + t.
constexpr int permuted_input(int element) {
  const int j = element / 4, t = element % 4;
  return 16 * (j / 4) + 4 * t + j % 4;
}

// Activations (n,) to that order, padded with zeros to whole units.
inline void permute_inputs(const float* x, int64_t n, float* permuted) {
  for (int64_t start = 0; start < (n + kUnitInputs - 1) / kUnitInputs * kUnitInputs; start += kHalfUnit) {
    for (int e = 0; e < kHalfUnit; ++e) {
      const int64_t input = start + permuted_input(e);
      permuted[start + e] = input < n ? x[input] : 0.0f;
    }
  }
}

template <int bits>
struct Tables {
  alignas(64) float entry[kTileRows][1 << bits];

  // Raw codebook entries; the row's scale multiplies the finished sum.
  void fill_codebook(const BaseWeights& w, int64_t tile) {
    for (int row = 0; row < kTileRows; ++row) {
      const int64_t o = std::min(tile * kTileRows + row, w.d_out - 1);
      for (int c = 0; c < 1 << bits; ++c) entry[row][c] = w.codebook[(o << bits) + c];
    }
  }

  void fill_uniform(const BaseWeights& w, int64_t tile, int64_t group) {
    float scale[kTileRows] = {}, zero[kTileRows] = {};
    const int64_t start = tile * kTileRows, rows = std::min<int64_t>(kTileRows, w.d_out - start);
    half_to_float(w.scales + group * w.d_out + start, rows, scale);
    half_to_float(w.zeros + group * w.d_out + start, rows, zero);
    for (int row = 0; row < kTileRows; ++row) {
      for (int c = 0; c < 1 << bits; ++c) entry[row][c] = (static_cast<float>(c) - zero[row]) * scale[row];
    }
  }
};

// Vector `part` of the codes of group q; code j of each lane is (result >> 4 j) & (2**bits - 1).
template <int bits>
inline Words code_words(const uint32_t* unit, int q, int part) {
  const auto word = [&](int m) { return load<Words>(unit + 32 * m + kLanes * part); };
  if constexpr (bits == 4) return word(q);
  if constexpr (bits == 2) return word(q % 2) >> (2 * (q / 2));
  if (q < 3) return word(q);
  Words gathered = {};
  for (int m = 0; m < 3; ++m) gathered |= ((word(m) >> 3) & 0x11111111u) << m;
  return gathered;
}

// Looks up one code a lane in the tables of the vector's rows.
template <int bits>
inline Floats look_up(const float* table, Words code) {
  Words row;
  for (int lane = 0; lane < kLanes; ++lane) row[lane] = (lane / 4) << bits;
  const Words index = code | row;
  const auto entries = [&](int n) { return load<Floats>(table + kLanes * n); };
  if constexpr (bits == 2) return __builtin_shuffle(entries(0), index);
  const Floats low = __builtin_shuffle(entries(0), entries(1), index);
  if constexpr (bits == 3) return low;
  const Floats high = __builtin_shuffle(entries(2), entries(3), index);
  // With several rows a vector the row alone decides, and the mask is a constant.
  const Words upper = (kLanes == 4 ? index : row) & static_cast<uint32_t>(2 * kLanes);
  return upper != 0 ? high : low;
}

template <int batch>
struct Sums {
  Floats lanes[batch][2][kParts] = {};

  void add_and_clear(Sums& from) {
    for (int b = 0; b < batch; ++b) {
      for (int h = 0; h < 2; ++h) {
        for (int part = 0; part < kParts; ++part) {
          lanes[b][h][part] += from.lanes[b][h][part];
          from.lanes[b][h][part] = Floats{};
        }
      }
    }
  }
};

// sums += half s of a unit times x[b] (32 permuted activations each).
template <int bits, int batch>
inline void multiply_half_unit(const uint32_t* unit, int s, const Tables<bits>& tables, const float* const (&x)[batch],
                               Sums<batch>& sums) {
  for (int h = 0; h < 2; ++h) {
    for (int part = 0; part < kParts; ++part) {
      const Words words = code_words<bits>(unit, 2 * s + h, part);
      const float* table = tables.entry[8 * h + part * (kLanes / 4)];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const Floats weight = look_up<bits>(table, (words >> (4 * j)) & ((1u << bits) - 1));
        for (int b = 0; b < batch; ++b) sums.lanes[b][h][part] += weight * repeat4(x[b] + 4 * j);
      }
    }
  }
}

// out[b][row] = product of the tile's rows with activations b (permuted, stride x_stride); out_stride floats between b.
template <int bits, int batch>
void multiply_tile(const BaseWeights& w, int64_t tile, const float* x, int64_t x_stride, float* out,
                   int64_t out_stride) {
  constexpr int kFlush = 16;  // half units summed in one lane before the total: short chains round less
  Tables<bits> tables;
  Sums<batch> total, sums;
  const bool uniform = !w.codebook;
  const int64_t group_size = uniform ? w.group_size : w.d_in;
  if (!uniform) tables.fill_codebook(w, tile);
  int64_t filled = -1;
  for (int64_t half = 0; half * kHalfUnit < w.d_in; ++half) {
    const uint32_t* unit = w.unit(tile, half / 2);
    const int64_t start = half * kHalfUnit, end = std::min(start + kHalfUnit, w.d_in);
    for (int64_t group = start / group_size; group * group_size < end; ++group) {
      const int64_t from = group * group_size - start, to = from + group_size;  // of the group, within the half unit
      const float* inputs[batch];
      float masked[batch][kHalfUnit];
      for (int b = 0; b < batch; ++b) {
        inputs[b] = x + b * x_stride + start;
        if (from > 0 || to < end - start) {  // the half unit spans several groups: a pass for each
          for (int e = 0; e < kHalfUnit; ++e) {
            const int input = permuted_input(e);
            masked[b][e] = input >= from && input < to ? inputs[b][e] : 0.0f;
          }
          inputs[b] = masked[b];
        }
      }
      if (uniform && group != filled) tables.fill_uniform(w, tile, filled = group);
      multiply_half_unit<bits, batch>(unit, half % 2, tables, inputs, sums);
    }
    if (half % kFlush == kFlush - 1) total.add_and_clear(sums);
  }
  total.add_and_clear(sums);
  for (int b = 0; b < batch; ++b) {
    alignas(64) float lanes[kTileRows][4];
    std::memcpy(lanes, total.lanes[b], sizeof lanes);
    for (int row = 0; row < kTileRows; ++row) {
      const float sum = (lanes[row][0] + lanes[row][1]) + (lanes[row][2] + lanes[row][3]);
      const int64_t o = std::min(tile * kTileRows + row, w.d_out - 1);
      out[b * out_stride + row] = uniform ? sum : sum * w.scale[o];
    }
  }
}

}  // namespace decdec::cpu
