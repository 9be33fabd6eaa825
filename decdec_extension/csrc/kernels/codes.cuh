// Reading the tile layout of decdec/packing.py: one scalar code, and the words of a lane as operands of the tensor
// cores.
//
// A lane's `bits` words of a unit hold four groups q = 2 s + h of eight codes: k-step s, row half h. The low half of a
// group is the A register of its row and the first sixteen inputs of the k-step, the high half that of the second
// sixteen.

#pragma once

#include "activations.cuh"

namespace decdec::cuda {

// The code of output o and input i.
template <int kBits>
__device__ inline int code_at(const uint32_t* qweight, int units, int o, int i) {
  const int row = o % kTileRows, input = i % kUnitInputs;
  const int q = 2 * (input / 32) + row / 8;
  const int j = 4 * (input / 16 % 2) + input % 4;
  const int lane = 4 * (row % 8) + input / 4 % 4;
  const uint32_t* words = qweight + (int64_t{o / kTileRows} * units + i / kUnitInputs) * kBits * 32 + lane;
  const auto nibble = [&](int word) { return words[32 * word] >> (4 * j) & 15; };
  if constexpr (kBits == 4) {
    return nibble(q);
  } else if constexpr (kBits == 3) {
    if (q < 3) return nibble(q) & 7;
    return nibble(0) >> 3 | nibble(1) >> 3 << 1 | nibble(2) >> 3 << 2;
  } else {
    return nibble(q % 2) >> (2 * (q / 2)) & 3;
  }
}

// The four groups of a lane's words, one code in each nibble.
template <int kBits>
__device__ __forceinline__ void split_groups(const uint32_t (&words)[kBits], uint32_t (&groups)[4]) {
  if constexpr (kBits == 4) {
#pragma unroll
    for (int q = 0; q < 4; ++q) groups[q] = words[q];
  } else if constexpr (kBits == 3) {
#pragma unroll
    for (int q = 0; q < 3; ++q) groups[q] = words[q] & 0x77777777;
    groups[3] = (words[0] >> 3 & 0x11111111) | (words[1] >> 2 & 0x22222222) | (words[2] >> 1 & 0x44444444);
  } else {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      groups[q] = words[q] & 0x33333333;
      groups[q + 2] = words[q] >> 2 & 0x33333333;
    }
  }
}

// The codebook of one row, in parts that are looked up four codes at a time by byte permutes.
//
// Two and three bits: an entry is 256 high + low, a signed and an unsigned byte.
// Four bits: one permute sees only eight entries. An entry v becomes 128 high + low + 1/2 - 8192 = (v - 1/2) / 4 with
// two seven-bit numbers (off by at most 1.5 of 32767, less than float16 loses), in two tables of eight. For a code of
// the other table the selector's top bit makes a permute repeat the entry's sign, which is 0: the sum of both is the
// entry's.
template <int kBits>
struct RowTable {
  static constexpr int kEntryWords = 1 << (kBits - 1);
  static constexpr int kWords = kBits == 2 ? 1 : kEntryWords / 2;
  uint32_t high[kWords], low[kWords];

  // The parts of the four entries that the nibbles of `selector` name.
  __device__ __forceinline__ static uint32_t look_up(const uint32_t (&part)[kWords], uint32_t selector) {
    if constexpr (kBits == 4) {
      return permute(part[0], part[1], selector) + permute(part[2], part[3], selector ^ 0x8888);
    } else {
      return permute(part[0], part[kWords - 1], selector);
    }
  }

  __device__ __forceinline__ void load(const uint32_t* entries) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      high[i] = permute(entries[2 * i], entries[2 * i + 1], 0x7531);
      low[i] = permute(entries[2 * i], entries[2 * i + 1], 0x6420);
      if constexpr (kBits == 4) {
        const uint32_t positive = high[i] ^ 0x80808080;
        low[i] = (low[i] >> 2 & 0x3f3f3f3f) | (positive << 6 & 0x40404040);
        high[i] = positive >> 1 & 0x7f7f7f7f;
      }
    }
  }
};

// Codebook weights: A is looked up twice, the products of high and low bytes are summed apart and joined once a
// segment, a warp's run of batches in one row tile.
template <int kBits, int kRowPairs>
struct CodebookTile {
  static constexpr bool kPairedInputs = false;  // see Octet::write
  static constexpr Sums kSums = kBits == 4 ? Sums::kDigits : Sums::kNone;
  static constexpr int kEntryWords = 1 << (kBits - 1);
  static constexpr int kRowBytes = 4 * kEntryWords;

  // Copies what the products need besides the codes: with a segment's first batch, its tables.
  __device__ __forceinline__ static void copy_side(uint8_t* side, const Weights& w, int tile, int, bool first,
                                                   int lane) {
    if (!first) return;
    constexpr int kBytes = kBits == 2 ? 8 : 16, kPieces = kRowBytes / kBytes;
    const auto row = [&](int r) { return min(tile * kTileRows + r, w.d_out - 1); };
    if (lane < kTileRows * kPieces) {
      const char* table = reinterpret_cast<const char*>(w.codebook + int64_t{row(lane / kPieces)} * (1 << kBits));
      copy_async<kBytes>(side + lane * kBytes, table + lane % kPieces * kBytes);
    }
  }

  // What the sums of output o are multiplied with.
  __device__ __forceinline__ static const float* output_scale(const Weights& w, int o) { return w.scale + o; }

  RowTable<kBits> table[2];
  int high[kRowPairs][4], low[kRowPairs][4];

  // Begins a segment.
  __device__ __forceinline__ void begin(const uint8_t* side, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t entries[kEntryWords];
      const uint32_t* from = reinterpret_cast<const uint32_t*>(side + (lane / 4 + 8 * h) * kRowBytes);
#pragma unroll
      for (int i = 0; i < kEntryWords; ++i) entries[i] = from[i];
      table[h].load(entries);
    }
#pragma unroll
    for (int n = 0; n < kRowPairs; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) high[n][c] = low[n][c] = 0;
    }
  }

  // Multiplies `count` units of a batch. codes(u, words), digits(u, n): the B registers (b0, b1 of k-step 0, b0, b1 of
  // k-step 1) of row pair n, sums(u, n): what Octet::write leaves for the lane.
  template <class Codes, class Digits, class DigitSums>
  __device__ __forceinline__ void multiply(int count, Codes codes, Digits digits, DigitSums, const uint8_t*, int,
                                           int) {
    const auto unit = [&](int u) {
      uint32_t words[kBits];
      codes(u, words);
      uint32_t groups[4];
      split_groups<kBits>(words, groups);
      uint4 b[kRowPairs];
#pragma unroll
      for (int n = 0; n < kRowPairs; ++n) {
        b[n] = digits(u, n);
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t a_high[4], a_low[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {  // register r: row half r % 2, inputs' half r / 2
          const RowTable<kBits>& t = table[r % 2];
          const uint32_t group = groups[2 * s + r % 2], selector = r < 2 ? group : group >> 16;
          a_high[r] = t.look_up(t.high, selector);
          a_low[r] = t.look_up(t.low, selector);
        }
#pragma unroll
        for (int n = 0; n < kRowPairs; ++n) {
          mma<true>(high[n], a_high, s ? b[n].z : b[n].x, s ? b[n].w : b[n].y);
          mma<false>(low[n], a_low, s ? b[n].z : b[n].x, s ? b[n].w : b[n].y);
        }
      }
    };
    if (count == kBatchUnits) {
#pragma unroll
      for (int u = 0; u < kBatchUnits; ++u) unit(u);
    } else {
#pragma unroll 1
      for (int u = 0; u < count; ++u) unit(u);
    }
  }

  // The lane's part of both row halves: its two digit columns joined, the lower one of weight 1. Odd lanes have but one
  // digit. `count`: units of the segment, sums(u, n) as above.
  template <class DigitSums>
  __device__ __forceinline__ float2 values(int n, int count, DigitSums sums, int lane) const {
    int2 total = {0, 0};  // of the lane's digits: 0 and 1, or 2 in odd lanes
    if constexpr (kSums == Sums::kDigits) {
      for (int u = lane / 4; u < count; u += 8) {  // the lanes of a column share them
        const int2 t = sums(u, n);
        total.x += t.x, total.y += t.y;
      }
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        total.x += __shfl_xor_sync(0xffffffff, total.x, mask);
        total.y += __shfl_xor_sync(0xffffffff, total.y, mask);
      }
    }
    return {value(n, 0, total, lane), value(n, 1, total, lane)};
  }

  __device__ __forceinline__ float value(int n, int h, const int2& total, int lane) const {
    float column[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (kBits == 4) {
        const int digits = j == 0 ? total.x : total.y;
        column[j] = fmaf(512.f, float(high[n][2 * h + j] - 64 * digits),
                         fmaf(4.f, float(low[n][2 * h + j]), 1.5f * digits));
      } else {
        column[j] = fmaf(256.f, float(high[n][2 * h + j]), float(low[n][2 * h + j]));
      }
    }
    return fmaf(lane % 2 ? 0.f : 256.f, column[1], column[0]);
  }
};

// Group-wise uniform weights: A is the codes, whose integer sums meet scale and zero point once a slot of inputs, which
// lies within a group and within a batch.
template <int kBits, int kRowPairs>
struct UniformTile {
  static constexpr bool kPairedInputs = true;
  static constexpr Sums kSums = Sums::kSteps;
  static constexpr int kSlotBytes = 4 * kTileRows;  // float16 scales of the tile's rows, then zero points

  __device__ __forceinline__ static const float* output_scale(const Weights&, int) { return nullptr; }

  float sum[kRowPairs][2];

  __device__ __forceinline__ static int slot_size(int group_size) {
    return group_size % 128 == 0 ? 128 : group_size % 64 == 0 ? 64 : 32;
  }

  // Copies what the products need besides the codes: scales and zero points of the slots from `unit` on.
  __device__ __forceinline__ static void copy_side(uint8_t* side, const Weights& w, int tile, int unit, bool,
                                                   int lane) {
    const int slot_inputs = slot_size(w.group_size);
    const int row = tile * kTileRows + 2 * (lane % 8);
    const uint16_t* p = lane % 16 < 8 ? w.scales : w.zeros;
#pragma unroll 1
    for (int slot = lane / 16; slot * slot_inputs < kBatchUnits * kUnitInputs; slot += 2) {
      const int input = unit * kUnitInputs + slot * slot_inputs;
      const bool inside = input < w.d_in && row < w.d_out;
      const int group = w.group_shift >= 0 ? input >> w.group_shift : input / w.group_size;
      copy_async<4>(side + slot * kSlotBytes + lane % 16 * 4, p + (inside ? int64_t{group} * w.d_out + row : 0),
                    inside);
    }
  }

  __device__ __forceinline__ void begin(const uint8_t*, int) {
#pragma unroll
    for (int n = 0; n < kRowPairs; ++n) sum[n][0] = sum[n][1] = 0;
  }

  // As CodebookTile's; sums(u, n) are of the lane's digits in both k-steps.
  template <class Codes, class Digits, class DigitSums>
  __device__ __forceinline__ void multiply(int count, Codes codes, Digits digits, DigitSums sums, const uint8_t* side,
                                           int group_size, int lane) {
    const int slot_inputs = slot_size(group_size);
    if (slot_inputs == 128) {
      multiply_slots<4>(count, codes, digits, sums, side, lane);
    } else if (slot_inputs == 64) {
      multiply_slots<2>(count, codes, digits, sums, side, lane);
    } else {
      multiply_slots<1>(count, codes, digits, sums, side, lane);
    }
  }

  template <int kSlotSteps, class Codes, class Digits, class DigitSums>
  __device__ __forceinline__ void multiply_slots(int count, Codes codes, Digits digits, DigitSums sums,
                                                 const uint8_t* side, int lane) {
    const uint16_t* factors = reinterpret_cast<const uint16_t*>(side) + lane / 4;
    int products[kRowPairs][4], x_sum[kRowPairs];  // of the current slot so far
    const auto unit = [&](int u) {
      uint32_t words[kBits], a[2][4];
      codes(u, words);
      operands(words, a);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int step = 2 * u + s;
        if (step % kSlotSteps == 0) {
#pragma unroll
          for (int n = 0; n < kRowPairs; ++n) {
            products[n][0] = products[n][1] = products[n][2] = products[n][3] = x_sum[n] = 0;
          }
        }
#pragma unroll
        for (int n = 0; n < kRowPairs; ++n) {
          const uint4 b = digits(u, n);
          const int2 x = sums(u, n);
          mma<false>(products[n], a[s], s ? b.z : b.x, s ? b.w : b.y);
          x_sum[n] += s ? x.y : x.x;
        }
        if (step % kSlotSteps != kSlotSteps - 1) continue;
        const uint16_t* from = factors + step / kSlotSteps * (kSlotBytes / 2);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float scale = half_to_float(from[8 * h]), zero = half_to_float(from[kTileRows + 8 * h]);
#pragma unroll
          for (int n = 0; n < kRowPairs; ++n) {
            // Odd lanes have but one digit. At most 128 * 15 * 128 * 257 < 2**26: nothing overflows.
            const float product = float(products[n][2 * h] + (lane % 2 ? 0 : 256) * products[n][2 * h + 1]);
            sum[n][h] = fmaf(scale, fmaf(-zero, float(x_sum[n]), product), sum[n][h]);
          }
        }
      }
    };
    if (count == kBatchUnits) {
#pragma unroll
      for (int u = 0; u < kBatchUnits; ++u) unit(u);
    } else {
#pragma unroll 1
      for (int u = 0; u < count; ++u) unit(u);
    }
  }

  template <class DigitSums>
  __device__ __forceinline__ float2 values(int n, int, DigitSums, int) const {
    return {sum[n][0], sum[n][1]};
  }

  // A registers of both k-steps: the even nibbles of a group first, then the odd ones.
  __device__ __forceinline__ static void operands(const uint32_t (&words)[kBits], uint32_t (&a)[2][4]) {
    constexpr uint32_t kMask = 0x01010101 * ((1 << kBits) - 1);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint32_t source, shift = 0;
      if constexpr (kBits == 4) {
        source = words[q];
      } else if constexpr (kBits == 3) {
        source = q < 3 ? words[q % 3]
                       : (words[0] >> 3 & 0x11111111) | (words[1] >> 2 & 0x22222222) | (words[2] >> 1 & 0x44444444);
      } else {
        source = words[q % 2], shift = 2 * (q / 2);
      }
      a[q / 2][q % 2] = source >> shift & kMask;
      a[q / 2][q % 2 + 2] = source >> (shift + 4) & kMask;
    }
  }
};

}  // namespace decdec::cuda
