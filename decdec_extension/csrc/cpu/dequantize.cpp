#include "cpu/dequantize.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/base_tile.h"
#include "cpu/residual_block.h"

namespace decdec::cpu {

namespace {

constexpr int64_t kWeightsPerTask = 1 << 15;

// One unit of a tile by table: weights[row][input].
template <int bits>
void look_up_unit(const uint32_t* unit, const Tables<bits>& tables, float (&weights)[kTileRows][kUnitInputs]) {
  for (int q = 0; q < 4; ++q) {
    const int s = q / 2, h = q % 2;
    for (int part = 0; part < kParts; ++part) {
      const Words words = code_words<bits>(unit, q, part);
      const int row = 8 * h + part * (kLanes / 4);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const Floats weight = look_up<bits>(tables.entry[row], (words >> (4 * j)) & ((1u << bits) - 1));
        for (int lane = 0; lane < kLanes; ++lane) {
          weights[row + lane / 4][kHalfUnit * s + permuted_input(4 * j + lane % 4)] = weight[lane];
        }
      }
    }
  }
}

template <int bits>
void dequantize_tile(const BaseWeights& w, int64_t tile, ScalarType dtype, void* out) {
  const int64_t first = tile * kTileRows, rows = std::min<int64_t>(kTileRows, w.d_out - first);
  const int64_t group_size = w.codebook ? w.d_in : w.group_size;
  Tables<bits> tables;
  alignas(64) float weights[kTileRows][kUnitInputs];
  if (w.codebook) {
    tables.fill_codebook(w, tile);
    for (int64_t row = 0; row < rows; ++row) {
      for (float& entry : tables.entry[row]) entry *= w.scale[first + row];
    }
  }
  int64_t filled = -1;
  for (int64_t start = 0; start < w.d_in; start += kUnitInputs) {
    const int64_t end = std::min(start + kUnitInputs, w.d_in);
    for (int64_t from = start; from < end;) {  // from group to group within the unit
      const int64_t group = from / group_size, to = std::min(end, (group + 1) * group_size);
      if (!w.codebook && group != filled) tables.fill_uniform(w, tile, filled = group);
      look_up_unit<bits>(w.unit(tile, start / kUnitInputs), tables, weights);
      for (int64_t row = 0; row < rows; ++row) {
        store_floats(weights[row] + from - start, to - from, out, dtype, (first + row) * w.d_in + from);
      }
      from = to;
    }
  }
}

template <int bits>
void dequantize_row(const Residual& r, int64_t input, ScalarType dtype, void* out) {
  constexpr int outputs = block_outputs(bits);
  const int64_t group = input / r.group_size;
  const uint8_t* row = r.rows + input * r.row_bytes;
  for (int64_t first = 0; first < r.d_out; first += outputs) {
    const int64_t count = std::min<int64_t>(outputs, r.d_out - first);
    float value[outputs], step[outputs];
    if constexpr (bits == 16) {
      half_to_float(reinterpret_cast<const Half*>(row) + first, count, value);
    } else {
      half_to_float(r.scale + group * r.d_out + first, count, step);
      for (int o = 0; o < count; ++o) {
        value[o] = (static_cast<float>(r.code(row, first + o)) - r.offset()) * (step[o] * r.step_factor());
      }
    }
    store_floats(value, count, out, dtype, input * r.d_out + first);
  }
}

template <class Function>
void for_each(int64_t n, int64_t weights_each, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kWeightsPerTask / weights_each);
  torch::stable::parallel_for(0, n, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) function(i);
  });
}

}  // namespace

void dequantize_base(const BaseWeights& w, ScalarType dtype, void* out) {
  const auto tile = w.bits == 2 ? dequantize_tile<2> : w.bits == 3 ? dequantize_tile<3> : dequantize_tile<4>;
  for_each((w.d_out + kTileRows - 1) / kTileRows, kTileRows * w.d_in, [&](int64_t i) { tile(w, i, dtype, out); });
}

void dequantize_residual(const Residual& r, ScalarType dtype, void* out) {
  const auto row = r.bits == 1   ? dequantize_row<1>
                   : r.bits == 2 ? dequantize_row<2>
                   : r.bits == 3 ? dequantize_row<3>
                   : r.bits == 4 ? dequantize_row<4>
                   : r.bits == 8 ? dequantize_row<8>
                                 : dequantize_row<16>;
  for_each(r.d_in, r.d_out, [&](int64_t i) { row(r, i, dtype, out); });
}

}  // namespace decdec::cpu
