// The base GEMV of one block: o = W_q x for a run of row tiles.
//
// The run's batches, tile after tile, are dealt to the warps in equal consecutive shares, so that a warp ends one tile
// and begins another as seldom as can be: that costs it as much as eight units of products. It streams its share
// through shared-memory buffers that it fills and empties alone. Only the sums of a tile's segments, the parts of a
// tile in one share, meet, once all is multiplied, in fixed order. Integer products and sums are exact, so the result
// does not depend on timing.

#pragma once

#include <type_traits>

#include "codes.cuh"

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

// A warp's share of a block's batches in one panel: [begin, end) of tiles * per_tile.
struct Share {
  int first, units;  // of the panel, in units of 64 inputs
  int per_tile;      // batches
  int size;          // of every warp's share but the last ones'
  int begin, end;
  int tile, unit;    // where it begins

  __device__ __forceinline__ Share(const GemvPlan& plan, int panel, int all_units, int tiles, int warp) {
    first = panel * plan.panel_units;
    units = min(plan.panel_units, all_units - first);
    per_tile = (units + kBatchUnits - 1) / kBatchUnits;
    const int total = tiles * per_tile;
    size = (total + kWarps - 1) / kWarps;
    begin = min(warp * size, total);
    end = min(begin + size, total);
    tile = unsigned(begin) / unsigned(per_tile);
    unit = (begin - tile * per_tile) * kBatchUnits;
  }
};

// A warp's copies of its share, batch after batch in the order of the products.
template <class Tile, int kBits>
struct Stream {
  static constexpr int kCodeBytes = kBatchUnits * kBits * 128;

  const Weights& w;
  const uint32_t* from;  // the lane's first piece of what is copied next
  int tile, unit;        // of the next; units count within the panel
  int first, units;      // of the panel

  __device__ __forceinline__ Stream(const Weights& w, const Share& share, int all_units, int first_tile, int lane)
      : w(w), units(share.units), first(share.first) {
    tile = first_tile + share.tile;
    unit = share.unit;
    from = w.qweight + (int64_t{tile} * all_units + first + unit) * (kBits * 32) + 4 * lane;
  }

  // `wanted`: whether the share has a batch more; `begins`: whether it is the first.
  __device__ __forceinline__ void copy_next(uint8_t* buffer, int all_units, int lane, bool wanted, bool begins) {
    if (wanted) {
      const int count = min(kBatchUnits, units - unit);
      constexpr int kPieces = kBatchUnits * kBits * 8 / 32;  // of 16 bytes, a lane
      if (count == kBatchUnits) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) copy_streaming(buffer + 16 * lane + 512 * i, from + 128 * i);
      } else {
#pragma unroll 1
        for (int i = 0; lane + 32 * i < count * kBits * 8; ++i) {
          copy_streaming(buffer + 16 * lane + 512 * i, from + 128 * i);
        }
      }
      Tile::copy_side(buffer + kCodeBytes, w, tile, first + unit, begins || unit == 0, lane);
      from += count * kBits * 32;
      unit += kBatchUnits;
      if (unit >= units) unit = 0, ++tile, from += int64_t{all_units - units} * (kBits * 32);
    }
    close_copies();
  }
};

// kRowPairs: pairs of batch rows the instance multiplies at once. emit(row, o, value) takes every output once.
template <Format kFormat, int kBits, int kRowPairs, class Emit>
__device__ __forceinline__ void base_gemv(const GemvParams& p, int block, uint8_t* shared, Emit emit) {
  using Tile =
      std::conditional_t<kFormat == Format::kCodebook, CodebookTile<kBits, kRowPairs>, UniformTile<kBits, kRowPairs>>;
  static_assert(needs_sums(kFormat, kBits) == (Tile::kSums != Sums::kNone));
  using Stream = Stream<Tile, kBits>;
  constexpr int kBufferBytes = Stream::kCodeBytes + side_bytes(kFormat, kBits), kStages = stages(kFormat, kBits);
  const Weights& w = p.weights;
  const GemvPlan& plan = p.plan;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int all_units = (w.d_in + kUnitInputs - 1) / kUnitInputs;
  const int first_tile = block * plan.tiles_each + min(block, plan.tiles_more);
  const int tiles = plan.tiles_each + (block < plan.tiles_more);
  const int tile_sums = kTileRows * p.batch;

  uint8_t* digits = shared;
  int* sums = reinterpret_cast<int*>(shared + plan.x_sums);
  uint8_t* ring = shared + plan.ring + warp * kStages * kBufferBytes;
  float* partials = reinterpret_cast<float*>(shared + plan.partials);
  float* carry = reinterpret_cast<float*>(shared + plan.carry);
  Facts& facts = *reinterpret_cast<Facts*>(shared + plan.facts);

  for (int panel = 0; panel < plan.panels; ++panel) {
    const Share share(plan, panel, all_units, tiles, warp);
    Stream stream(w, share, all_units, first_tile, lane);
    // A kernel that started early waits for its activations anyhow and may copy weights meanwhile; but the activations
    // should not queue behind more of them than must be (H200, 3 bits: 4096x6144 6.6 us with two batches, 6.0 with one).
    int left = share.end - share.begin;
    stream.copy_next(ring, all_units, lane, left > 0, true);
    const unsigned non_finite = stage_panel<Tile::kPairedInputs, Tile::kSums, kStages - 1>(
        p, share.first, share.units, digits, sums, facts,
        [&] {
          if (panel == 0) wait_for_last_kernel();
        },
        [&] {
          for (int s = 1; s < kStages; ++s) {
            stream.copy_next(ring + s * kBufferBytes, all_units, lane, left > s, false);
          }
        });
    if (threadIdx.x == 0) {
      facts.non_finite = non_finite | (panel == 0 ? 0 : facts.non_finite);
      facts.per_tile = share.per_tile, facts.share = share.size;
    }
    if (panel == 0 && threadIdx.x < tiles * kTileRows) {  // their latency would lie bare at the end
      const int o = first_tile * kTileRows + threadIdx.x;
      if (o < w.d_out && p.bias) prefetch(static_cast<const uint16_t*>(p.bias) + o);
      if (o < w.d_out && Tile::output_scale(w, o)) prefetch(Tile::output_scale(w, o));
    }
    // Lane 4 c + t has column c of B, digit c % 4 (0 to 2, and one unused) of batch row 2 n + c / 4; of the products
    // lanes 4 g + t hold digits 0, 1 (even t) or 2 (odd t) of batch row 2 n + t / 2, in rows g and g + 8 of the tile.
    const uint8_t* lane_digits[kRowPairs];
    const int* lane_sums[kRowPairs];
#pragma unroll
    for (int n = 0; n < kRowPairs; ++n) {
      lane_digits[n] = digits + min(2 * n + lane / 16, p.batch - 1) * plan.panel_units * kUnitBytes +
                       digit_offset(min(lane / 4 % 4, 2), lane % 4);
      lane_sums[n] = sums + min(2 * n + lane % 4 / 2, p.batch - 1) * plan.panel_units * 4 + lane % 2 * 2;
    }
    const auto wait_oldest = [] {  // of the batches on the way, which the warp then may read
      wait_copies<kStages - 1>();
      __syncwarp();
    };
    int stage = 0, begin = share.unit;  // of the segment, in units
#pragma unroll 1
    for (int tile = share.tile; left > 0; ++tile, begin = 0) {
      int unit = begin;
      Tile sum;
      wait_oldest();
      sum.begin(ring + stage * kBufferBytes + Stream::kCodeBytes, lane);
#pragma unroll 1
      while (true) {
        uint8_t* buffer = ring + stage * kBufferBytes;
        const uint32_t* codes = reinterpret_cast<const uint32_t*>(buffer) + lane;
        sum.multiply(
            min(kBatchUnits, share.units - unit),
            [&](int u, uint32_t (&words)[kBits]) {
#pragma unroll
              for (int i = 0; i < kBits; ++i) words[i] = codes[(u * kBits + i) * 32];
            },
            [&](int u, int n) { return *reinterpret_cast<const uint4*>(lane_digits[n] + (unit + u) * kUnitBytes); },
            [&](int u, int n) { return *reinterpret_cast<const int2*>(lane_sums[n] + (unit + u) * 4); },
            buffer + Stream::kCodeBytes, w.group_size, lane);
        __syncwarp();  // the buffer has been read: it may be filled again
        stream.copy_next(buffer, all_units, lane, left > kStages, false);
        stage = stage + 1 == kStages ? 0 : stage + 1;
        unit += kBatchUnits;
        if (--left == 0 || unit >= share.units) break;
        wait_oldest();
      }
      float* mine = partials + (tile + warp) * tile_sums + lane / 4;
#pragma unroll
      for (int n = 0; n < kRowPairs; ++n) {
        const float2 both = sum.values(
            n, min(unit, share.units) - begin,
            [&](int u, int n) { return *reinterpret_cast<const int2*>(lane_sums[n] + (begin + u) * 4); }, lane);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float v = (h == 0 ? both.x : both.y) * (lane % 2 ? 65536.f : 1.f);
          v += __shfl_xor_sync(0xffffffff, v, 1);
          const int row = 2 * n + lane % 4 / 2;
          if (lane % 2 == 0 && row < p.batch) mine[row * kTileRows + 8 * h] = v;
        }
      }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < tiles * tile_sums; i += kThreads) {
      const unsigned tile = p.batch == 1 ? i / kTileRows : i / tile_sums;
      const int row = p.batch == 1 ? 0 : i % tile_sums / kTileRows, o = (first_tile + tile) * kTileRows + i % kTileRows;
      float v = 0;
      for (unsigned from = tile * facts.per_tile / facts.share; from * facts.share < (tile + 1) * facts.per_tile;
           ++from) {
        v += partials[from * tile_sums + i];
      }
      if (o < w.d_out && Tile::output_scale(w, o)) v *= __ldg(Tile::output_scale(w, o));
      v *= power_of_two(-facts.exponent[row]);
      if (panel > 0) v += carry[i];
      if (panel + 1 < plan.panels) {
        carry[i] = v;
      } else if (o < w.d_out) {
        const bool non_finite = facts.non_finite >> row & 1;
        if (non_finite && p.norm) {
          v = NAN;  // a norm of numbers that are not finite leaves none
        } else if (non_finite) {
          v += non_finite_terms(p.x, row, w.d_in, p.dtype, o,
                                [&](int o, int i) { return weight_at<kFormat, kBits>(w, o, i); });
        }
        emit(row, o, v);
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
