// The base GEMV of one block: o = W_q x for the row tiles block, block + blocks, ...
//
// Every warp multiplies its own slice of the inputs. It stages that slice's activations once, and streams its part of
// tile after tile through a ring of shared-memory buffers that it fills and empties alone; only the sums of a tile meet
// in the block, in fixed order. Integer products and sums are exact, so the result does not depend on timing.

#pragma once

#include <type_traits>

#include "activations.cuh"
#include "codes.cuh"
#include "norm.cuh"

namespace decdec::cuda {

// Sum of W[o, i] x[row, i] over the inputs that are NaN or Inf, whose product the tensor cores cannot give.
template <class Weight>
__device__ inline float non_finite_terms(const void* x, int row, int d_in, Dtype dtype, int o, Weight weight) {
  float sum = 0;
  for (int i = 0; i < d_in; ++i) {
    const float v = load_element(x, int64_t{row} * d_in + i, dtype);
    if (!isfinite(v)) sum += weight(o, i) * v;
  }
  return sum;
}

// The weight that a code stands for, and the weight of output o and input i.
template <Format kFormat, int kBits>
__device__ __forceinline__ float weight_of(const Weights& w, int o, int i, int code) {
  if constexpr (kFormat == Format::kCodebook) {
    return float(w.codebook[int64_t{o} * (1 << kBits) + code]) * w.scale[o];
  } else {
    const int64_t at = int64_t{i / w.group_size} * w.d_out + o;
    return half_to_float(w.scales[at]) * (code - half_to_float(w.zeros[at]));
  }
}

template <Format kFormat, int kBits>
__device__ __forceinline__ float weight_at(const Weights& w, int o, int i) {
  return weight_of<kFormat, kBits>(w, o, i, code_at<kBits>(w.qweight, (w.d_in + kUnitInputs - 1) / kUnitInputs, o, i));
}

// A warp's copies, batch after batch in the order of the products, across tiles and panels.
template <class Tile, int kBits, int kBatchUnits>
struct Stream {
  static constexpr int kUnitBytesPacked = kBits * 128;
  static constexpr int kBufferBytes = kBatchUnits * kUnitBytesPacked + Tile::kSideBytes;

  const GemvParams& p;
  uint8_t* ring;
  uint64_t* barriers;
  int units, tiles, lane, warp, block;
  int panel, tile, unit, begin, end;  // what is copied next
  int fill = 0;                       // into this buffer

  __device__ __forceinline__ Stream(const GemvParams& p, int block, uint8_t* ring, uint64_t* barriers)
      : p(p),
        ring(ring),
        barriers(barriers),
        units((p.weights.d_in + kUnitInputs - 1) / kUnitInputs),
        tiles((p.weights.d_out + kTileRows - 1) / kTileRows),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        block(block) {
    enter_panel(0);
    if (lane == 0) {
      for (int s = 0; s < p.plan.stages; ++s) BufferBarrier(barriers + s).init();
    }
    __syncwarp();
  }

  // The warp's slice of the inputs in a panel; it may be empty.
  __device__ __forceinline__ void slice(int panel, int& begin, int& end) const {
    begin = min((panel * kWarps + warp) * p.plan.units_per_warp, units);
    end = min(begin + p.plan.units_per_warp, units);
  }

  __device__ __forceinline__ void enter_panel(int next) {
    panel = next, tile = block;
    slice(panel, begin, end);
    unit = begin;
  }

  __device__ __forceinline__ void copy_next() {
    if (unit >= end) {
      tile += p.plan.blocks, unit = begin;
      while (tile >= tiles || begin >= end) {
        if (panel + 1 >= p.plan.panels) {
          unit = end, tile = tiles;
          return;
        }
        enter_panel(panel + 1);
      }
    }
    uint8_t* buffer = ring + fill * kBufferBytes;
    const BufferBarrier barrier(barriers + fill);
    const int count = min(kBatchUnits, end - unit);
    barrier.copy_bulk(buffer, p.weights.qweight + (int64_t{tile} * units + unit) * (kUnitBytesPacked / 4),
                      count * kUnitBytesPacked, lane);
    Tile::copy_side(buffer + kBatchUnits * kUnitBytesPacked, p.weights, tile, unit, unit == begin, lane);
    barrier.arrive_copies();
    fill = fill + 1 == p.plan.stages ? 0 : fill + 1;
    unit += kBatchUnits;
  }
};

// kRowPairs: pairs of batch rows the instance multiplies at once. emit(row, o, value) takes every output once.
template <Format kFormat, int kBits, int kRowPairs, class Emit>
__device__ __forceinline__ void base_gemv(const GemvParams& p, int block, uint8_t* shared, Emit emit) {
  using Tile =
      std::conditional_t<kFormat == Format::kCodebook, CodebookTile<kBits, kRowPairs>, UniformTile<kBits, kRowPairs>>;
  constexpr int kBatchUnits = batch_units(kFormat, kBits);
  using Stream = Stream<Tile, kBits, kBatchUnits>;
  const Weights& w = p.weights;
  const GemvPlan& plan = p.plan;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = (w.d_out + kTileRows - 1) / kTileRows;
  const int slot_inputs = Tile::slot_size(w.group_size);

  const int row_digits = plan.units_per_warp * kUnitBytes;  // bytes of one batch row in the warp's slice
  uint8_t* digits = shared + warp * p.batch * row_digits;
  float* sums = reinterpret_cast<float*>(shared + plan.x_sums + warp * p.batch * plan.units_per_warp * kUnitSumBytes);
  uint8_t* ring = shared + plan.ring + warp * plan.stages * Stream::kBufferBytes;
  float* partials = reinterpret_cast<float*>(shared + plan.partials);
  float* carry = reinterpret_cast<float*>(shared + plan.carry);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + plan.barriers) + warp * plan.stages;

  Stream stream(p, block, ring, barriers);
  const uint8_t* lane_digits[kRowPairs];
  const float* lane_sums[kRowPairs];
#pragma unroll
  for (int n = 0; n < kRowPairs; ++n) {
    lane_digits[n] =
        digits + min(2 * n + lane / 16, p.batch - 1) * row_digits + digit_offset(min(lane / 4 % 4, 2), lane % 4);
    lane_sums[n] = sums + min(2 * n + lane % 4 / 2, p.batch - 1) * plan.units_per_warp * 4 + lane % 2 * 2;
  }

  // Weights of the norm, for the pieces that the warp's lanes will read in the first panel.
  constexpr int kNormPieces = 4;
  uint4 norm[kNormPieces];
  const uint4* all_norms = static_cast<const uint4*>(p.norm);
  if (p.norm) {
    int begin, end;
    stream.slice(0, begin, end);
#pragma unroll
    for (int n = 0; n < kNormPieces; ++n) {
      const int piece = 8 * begin + lane + 32 * n;
      if (piece < min(8 * end, w.d_in / 8)) norm[n] = __ldg(all_norms + piece);
    }
  }
  __shared__ float scratch[kWarps];
  float factor = 0;  // of the last row
  bool finite = true;
  int exponent[kRowPairs];   // of the batch row 2 n + lane % 4 / 2
  int totals[kRowPairs][2];  // of its digits: 0 and 1, or 2 in odd lanes
  int stage = 0, parity = 0, turn = 0;
  for (int panel = 0; panel < plan.panels; ++panel) {
    int begin, end;
    stream.slice(panel, begin, end);
    const bool fill = panel == 0;
    if (fill && plan.weights_first) {
      for (int s = 0; s < plan.stages; ++s) stream.copy_next();
    }
    if (fill) wait_for_last_kernel();
    for (int row = 0; row < p.batch; ++row) load_row(p.x, row, w.d_in, begin, end, digits + row * row_digits, lane);
    if (fill && !plan.weights_first) {
      for (int s = 0; s < plan.stages; ++s) stream.copy_next();
    }
    for (int row = 0; row < p.batch; ++row) {
      if (p.norm) {
        const int pieces = min(8 * (end - begin), w.d_in / 8 - 8 * begin);
        const auto raw = [&](int piece) -> uint4& {
          return *reinterpret_cast<uint4*>(digits + row * row_digits + piece / 8 * kUnitBytes + kRawOffset +
                                           piece % 8 * 16);
        };
        if (plan.panels == 1) {  // all of the row is in the block's slices
          float squares = 0;
          for (int piece = lane; piece < pieces; piece += 32) squares += square_sum(raw(piece), p.dtype);
          factor = norm_factor(p, squares, scratch);
        } else if (fill || p.batch > 1) {
          factor = norm_factor(p, row_squares(p, row), scratch);
        }
        for (int piece = lane, n = 0; piece < pieces; piece += 32, ++n) {
          uint4& x = raw(piece);
          const uint4 weight = !fill || n >= kNormPieces ? __ldg(all_norms + 8 * begin + piece)
                               : n == 0                  ? norm[0]
                               : n == 1                  ? norm[1]
                               : n == 2                  ? norm[2]
                                                         : norm[3];
          x = normed(x, weight, factor, p.dtype);
        }
        __syncwarp();
      }
      const Slice slice = stage_row<Tile::kPairedInputs, Tile::kStepSums>(
          p.dtype, end - begin, digits + row * row_digits, sums + row * plan.units_per_warp * 4, lane, finite);
#pragma unroll
      for (int n = 0; n < kRowPairs; ++n) {
        if (row != 0 && row != 2 * n + lane % 4 / 2) continue;
        exponent[n] = slice.exponent;
        totals[n][0] = lane % 2 ? slice.totals[2] : slice.totals[0];
        totals[n][1] = lane % 2 ? 0 : slice.totals[1];
      }
    }

    for (int tile = block; tile < tiles; tile += plan.blocks, ++turn) {
      Tile sum;
      for (int unit = begin; unit < end; unit += kBatchUnits) {
        const uint8_t* buffer = ring + stage * Stream::kBufferBytes;
        const uint8_t* side = buffer + kBatchUnits * Stream::kUnitBytesPacked;
        const uint32_t* codes = reinterpret_cast<const uint32_t*>(buffer) + lane;
        BufferBarrier(barriers + stage).wait(parity);
        if (unit == begin) sum.begin(side, lane);
        const int count = min(end - unit, kBatchUnits);
        const auto multiply = [&](int u, int parity) {
          uint32_t words[kBits];
#pragma unroll
          for (int i = 0; i < kBits; ++i) words[i] = codes[(u * kBits + i) * 32];
          const int at = unit - begin + u;
          sum.multiply(
              words, [&](int n) { return *reinterpret_cast<const uint4*>(lane_digits[n] + at * kUnitBytes); },
              [&](int n) { return *reinterpret_cast<const float2*>(lane_sums[n] + at * 4); }, side, u, parity,
              u + 1 == count, slot_inputs, lane);
        };
        int u = 0;
#pragma unroll 1
        for (; u + 4 <= count; u += 4) {
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply(u + j, j % 2);
        }
#pragma unroll 1
        for (; u < count; ++u) multiply(u, u % 2);
        if (++stage == plan.stages) stage = 0, parity ^= 1;
        __syncwarp();  // the buffer has been read: it may be filled again
        stream.copy_next();
      }
      // Lanes 4 g + t hold digits 0, 1 (even t) or 2 (odd t) of batch row 2 n + t / 2, in rows g and g + 8 of the tile.
      float* mine = partials + ((turn & 1) * kWarps + warp) * kTileRows * p.batch;
#pragma unroll
      for (int n = 0; n < kRowPairs; ++n) {
        const float scale = lane % 2 ? 65536.f : 1.f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float v = sum.value(n, h, lane, totals[n]) * scale;
          v += __shfl_xor_sync(0xffffffff, v, 1);
          const int row = 2 * n + lane % 4 / 2;
          v *= power_of_two(-exponent[n]);
          if (lane % 2 == 0 && row < p.batch) mine[row * kTileRows + lane / 4 + 8 * h] = v;
        }
      }
      const bool all_finite = __syncthreads_and(finite);
      if (warp != turn % kWarps) continue;
      const float* all = partials + (turn & 1) * kWarps * kTileRows * p.batch;
      for (int i = lane; i < kTileRows * p.batch; i += 32) {
        float v = 0;
#pragma unroll
        for (int from = 0; from < kWarps; ++from) v += all[from * kTileRows * p.batch + i];
        float* carried = carry + int64_t{(tile - block) / plan.blocks} * kTileRows * p.batch + i;
        if (panel > 0) v += *carried;
        const int o = tile * kTileRows + i % kTileRows, row = i / kTileRows;
        if (panel + 1 < plan.panels) {
          *carried = v;
        } else if (o < w.d_out) {
          if (!all_finite && p.norm) {
            v = NAN;  // a norm of numbers that are not finite leaves none
          } else if (!all_finite) {
            v += non_finite_terms(p.x, row, w.d_in, p.dtype, o,
                                  [&](int o, int i) { return weight_at<kFormat, kBits>(w, o, i); });
          }
          emit(row, o, v);
        }
      }
    }
  }
}

// The same for uniform weights whose groups cut a k-step of the tensor cores: one warp an output, scalar products.
template <int kBits, class Emit>
__device__ inline void generic_gemv(const GemvParams& p, int block, Emit emit) {
  const Weights& w = p.weights;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int o = block * kWarps + warp; o < w.d_out; o += p.plan.blocks * kWarps) {
    for (int row = 0; row < p.batch; ++row) {
      float sum = 0;
      for (int i = lane; i < w.d_in; i += 32) {
        sum += weight_at<Format::kUniform, kBits>(w, o, i) * load_element(p.x, int64_t{row} * w.d_in + i, p.dtype);
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffff, sum, mask);
      if (lane == 0) emit(row, o, sum);
    }
  }
}

}  // namespace decdec::cuda
