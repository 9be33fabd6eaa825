#include "cpu/gemv.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/base_tile.h"
#include "cpu/residual_block.h"

namespace decdec::cpu {

namespace {

constexpr int kMaxBatch = 4;                       // activations multiplied with a tile for one look-up of its weights
constexpr int64_t kMaxOutputs = block_outputs(1);  // outputs of the widest residual block
constexpr int64_t kWeightsPerTask = 1 << 16;       // less is not worth waking a thread for

using TileFunction = void (*)(const BaseWeights&, int64_t, const float*, int64_t, float*, int64_t);
using BlockFunction = void (*)(const Residual&, int64_t, const int32_t*, const float*, int64_t, float*);

template <int batch>
TileFunction tile_function(int bits) {
  switch (bits) {
    case 2: return multiply_tile<2, batch>;
    case 3: return multiply_tile<3, batch>;
    default: return multiply_tile<4, batch>;
  }
}

BlockFunction block_function(int bits) {
  switch (bits) {
    case 1: return multiply_block<1>;
    case 2: return multiply_block<2>;
    case 3: return multiply_block<3>;
    case 4: return multiply_block<4>;
    case 8: return multiply_block<8>;
    default: return multiply_block<16>;
  }
}

// sums[b][o] of batch rows first_row up and of the base's outputs `start` to `start + outputs`.
void multiply_base(const Gemv& g, int64_t first_row, int rows, int64_t start, int64_t outputs, float* sums) {
  const TileFunction tile = rows == 4   ? tile_function<4>(g.base->bits)
                            : rows == 2 ? tile_function<2>(g.base->bits)
                                        : tile_function<1>(g.base->bits);
  const int64_t stride = g.base->units() * kUnitInputs;
  for (int64_t o = 0; o < outputs; o += kTileRows) {
    tile(*g.base, (start + o) / kTileRows, g.x + first_row * stride, stride, sums + o, kMaxOutputs);
  }
}

void add_residual(const Gemv& g, int64_t row, int64_t start, int64_t outputs, float* sums) {
  const BlockFunction block = block_function(g.residual->bits);
  const int64_t per_block = block_outputs(g.residual->bits), begin = g.selected->begin[row];
  for (int64_t o = 0; o < outputs; o += per_block) {
    block(*g.residual, (start + o) / per_block, g.selected->indices.data() + begin, g.selected->values.data() + begin,
          g.selected->begin[row + 1] - begin, sums + o);
  }
}

}  // namespace

void gemv(const Gemv& g) {
  const int64_t span = std::max<int64_t>(kTileRows, g.residual ? block_outputs(g.residual->bits) : 0);
  const int64_t spans = (g.d_out + span - 1) / span;
  const int64_t grain = std::max<int64_t>(1, kWeightsPerTask / (span * g.d_in * std::max<int64_t>(1, g.batch)));
  torch::stable::parallel_for(0, spans, grain, [&](int64_t from, int64_t to) {
    for (int64_t start = from * span; start < std::min(to * span, g.d_out); start += span) {
      const int64_t outputs = std::min(span, g.d_out - start);
      float bias[kMaxOutputs] = {};
      if (g.bias) load_floats(g.bias, g.dtype, start, outputs, bias);
      for (int64_t row = 0; row < g.batch;) {
        const int rows = g.batch - row >= kMaxBatch ? kMaxBatch : g.batch - row >= 2 ? 2 : 1;
        alignas(64) float sums[kMaxBatch][kMaxOutputs] = {};
        if (g.base) multiply_base(g, row, rows, start, outputs, sums[0]);
        for (int b = 0; b < rows; ++b) {
          if (g.residual) add_residual(g, row + b, start, outputs, sums[b]);
          for (int64_t o = 0; o < outputs; ++o) sums[b][o] += bias[o];
          store_floats(sums[b], outputs, g.out, g.dtype, (row + b) * g.d_out + start);
        }
        row += rows;
      }
    }
  });
}

void permute_activations(const float* x, int64_t batch, int64_t d_in, float* permuted) {
  const int64_t stride = (d_in + kUnitInputs - 1) / kUnitInputs * kUnitInputs;
  for (int64_t row = 0; row < batch; ++row) permute_inputs(x + row * d_in, d_in, permuted + row * stride);
}

}  // namespace decdec::cpu
