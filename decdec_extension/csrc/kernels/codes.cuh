// Reading the tile layout of decdec/packing.py: one scalar code, and the words of a lane as operands of the tensor
// cores.
//
// A lane's `bits` words of a unit hold four groups q = 2 s + h of eight codes: k-step s, row half h. The low half of a
// group is the A register of its row and the first sixteen inputs of the k-step, the high half that of the second
// sixteen.

#pragma once

#include "primitives.cuh"

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
// the other table the selector's top bit makes a permute repeat the entry's sign, which is 0: both tables' products are
// summed and no selection is needed, a third fewer instructions than with one.
template <int kBits>
struct RowTable {
  static constexpr int kEntryWords = 1 << (kBits - 1);
  static constexpr int kWords = kBits == 2 ? 1 : kEntryWords / 2;
  uint32_t high[kWords], low[kWords];

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

// Codebook weights: A is looked up twice, the products of high and low bytes are summed apart and joined once a row
// tile.
template <int kBits, int kRowPairs>
struct CodebookTile {
  static constexpr bool kPairedInputs = false;  // see stage_activations
  static constexpr bool kStepSums = false;
  static constexpr int kParts = kBits == 4 ? 2 : 1;
  static constexpr int kEntryWords = 1 << (kBits - 1);
  static constexpr int kRowBytes = 4 * kEntryWords;
  static constexpr int kSideBytes = side_bytes(Format::kCodebook, kBits);  // the tile's codebook and scales

  // Copies what the products need besides the codes: with a tile's first batch, its tables.
  __device__ __forceinline__ static void copy_side(uint8_t* side, const Weights& w, int tile, int, bool first,
                                                   int lane) {
    if (!first) return;
    constexpr int kBytes = kBits == 2 ? 8 : 16, kPieces = kRowBytes / kBytes;
    const auto row = [&](int r) { return min(tile * kTileRows + r, w.d_out - 1); };
    if (lane < kTileRows * kPieces) {
      const char* table = reinterpret_cast<const char*>(w.codebook + int64_t{row(lane / kPieces)} * (1 << kBits));
      copy_async<kBytes>(side + lane * kBytes, table + lane % kPieces * kBytes);
    }
    if (lane < kTileRows) copy_async<4>(side + kTileRows * kRowBytes + 4 * lane, w.scale + row(lane));
  }

  __device__ __forceinline__ static int slot_size(int) { return 0; }

  RowTable<kBits> table[2];
  float scale[2];
  int high[kRowPairs][4], low[kRowPairs][4];

  __device__ __forceinline__ CodebookTile() : scale{} {
#pragma unroll
    for (int n = 0; n < kRowPairs; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) high[n][c] = low[n][c] = 0;
    }
  }

  __device__ __forceinline__ void begin(const uint8_t* side, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t entries[kEntryWords];
      const uint32_t* from = reinterpret_cast<const uint32_t*>(side + (lane / 4 + 8 * h) * kRowBytes);
#pragma unroll
      for (int i = 0; i < kEntryWords; ++i) entries[i] = from[i];
      table[h].load(entries);
      scale[h] = *reinterpret_cast<const float*>(side + kTileRows * kRowBytes + 4 * (lane / 4 + 8 * h));
    }
  }

  // Multiplies unit u of a batch. digits(n): the B registers (b0, b1 of k-step 0, b0, b1 of k-step 1) of row pair n.
  template <class Digits, class Sums>
  __device__ __forceinline__ void multiply(const uint32_t (&words)[kBits], Digits digits, Sums, const uint8_t*, int,
                                           int, bool, int, int) {
    uint32_t groups[4];
    split_groups<kBits>(words, groups);
    uint4 b[kRowPairs];
#pragma unroll
    for (int n = 0; n < kRowPairs; ++n) b[n] = digits(n);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t a_high[4], a_low[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {  // register r: row half r % 2, inputs' half r / 2
          const RowTable<kBits>& t = table[r % 2];
          const uint32_t group = part ? groups[2 * s + r % 2] ^ 0x88888888 : groups[2 * s + r % 2];
          const uint32_t codes = r < 2 ? group : group >> 16;
          constexpr int kSecond = kBits == 2 ? 0 : 1;
          a_high[r] = permute(t.high[2 * part], t.high[2 * part + kSecond], codes);
          a_low[r] = permute(t.low[2 * part], t.low[2 * part + kSecond], codes);
        }
#pragma unroll
        for (int n = 0; n < kRowPairs; ++n) {
          mma<true>(high[n], a_high, s ? b[n].z : b[n].x, s ? b[n].w : b[n].y);
          mma<false>(low[n], a_low, s ? b[n].z : b[n].x, s ? b[n].w : b[n].y);
        }
      }
    }
  }

  // The lane's part of row half h: its two digit columns joined, the lower one of weight 1. Odd lanes have but one
  // digit. `totals`: the sums of the two digits over the slice.
  __device__ __forceinline__ float value(int n, int h, int lane, const int (&totals)[2]) const {
    float column[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (kBits == 4) {
        column[j] = fmaf(512.f, float(high[n][2 * h + j] - 64 * totals[j]),
                         fmaf(4.f, float(low[n][2 * h + j]), 1.5f * totals[j]));
      } else {
        column[j] = fmaf(256.f, float(high[n][2 * h + j]), float(low[n][2 * h + j]));
      }
    }
    return fmaf(lane % 2 ? 0.f : 256.f, column[1], column[0]) * scale[h];
  }
};

// Group-wise uniform weights: A is the codes, whose integer sums meet scale and zero point once a group.
template <int kBits, int kRowPairs>
struct UniformTile {
  static constexpr bool kPairedInputs = true;
  static constexpr bool kStepSums = true;
  static constexpr int kSlotBytes = 4 * kTileRows;  // float16 scales of the tile's rows, then zero points
  static constexpr int kSideBytes = side_bytes(Format::kUniform, kBits);

  float sum[kRowPairs][2];

  __device__ __forceinline__ UniformTile() {
#pragma unroll
    for (int n = 0; n < kRowPairs; ++n) {
      sum[n][0] = sum[n][1] = x_sum[n] = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) products[n][c] = 0;
    }
  }

  // Inputs whose scale is entered at once: a slot lies within a group and within a batch.
  __device__ __forceinline__ static int slot_size(int group_size) {
    return group_size % 128 == 0 ? 128 : group_size % 64 == 0 ? 64 : 32;
  }

  // Copies what the products need besides the codes: scales and zero points of the slots from `unit` on.
  __device__ __forceinline__ static void copy_side(uint8_t* side, const Weights& w, int tile, int unit, bool,
                                                   int lane) {
    const int slot_inputs = slot_size(w.group_size);
    const int row = tile * kTileRows + 2 * (lane % 8);
    const uint16_t* p = lane % 16 < 8 ? w.scales : w.zeros;
    for (int slot = lane / 16; slot * slot_inputs < batch_units(Format::kUniform, kBits) * kUnitInputs; slot += 2) {
      const int input = unit * kUnitInputs + slot * slot_inputs;
      const bool inside = input < w.d_in && row < w.d_out;
      const int64_t at = inside ? int64_t{input / w.group_size} * w.d_out + row : 0;
      copy_async<4>(side + slot * kSlotBytes + lane % 16 * 4, p + at, inside);
    }
  }

  __device__ __forceinline__ void begin(const uint8_t*, int) {}

  float scale[2], zero[2];  // of rows lane / 4 and lane / 4 + 8, in the current slot

  __device__ __forceinline__ void enter_slot(const uint8_t* side, int slot, int lane) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(side + slot * kSlotBytes) + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scale[h] = half_to_float(from[8 * h]);
      zero[h] = half_to_float(from[kTileRows + 8 * h]);
    }
  }

  int products[kRowPairs][4];  // of the current slot so far, and the sums of its activations
  float x_sum[kRowPairs];

  __device__ __forceinline__ void leave_slot(int lane) {
#pragma unroll
    for (int n = 0; n < kRowPairs; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Odd lanes have but one digit. At most 128 * 15 * 128 * 257 < 2**26: nothing overflows.
        const float product = float(products[n][2 * h] + (lane % 2 ? 0 : 256) * products[n][2 * h + 1]);
        sum[n][h] = fmaf(scale[h], fmaf(-zero[h], x_sum[n], product), sum[n][h]);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) products[n][c] = 0;
      x_sum[n] = 0;
    }
  }

  // Multiplies unit u of a batch; `parity` is u % 2, `last` whether none follows. x_sums(n): the sums of the lane's
  // digits in both k-steps.
  template <class Digits, class Sums>
  __device__ __forceinline__ void multiply(const uint32_t (&words)[kBits], Digits digits, Sums x_sums,
                                           const uint8_t* side, int u, int parity, bool last, int slot_inputs,
                                           int lane) {
    uint32_t a[2][4];
    operands(words, a);
    if (slot_inputs == 64) enter_slot(side, u, lane);
    if (slot_inputs == 128 && parity == 0) enter_slot(side, u / 2, lane);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (slot_inputs == 32) enter_slot(side, 2 * u + s, lane);
#pragma unroll
      for (int n = 0; n < kRowPairs; ++n) {
        const uint4 b = digits(n);
        const float2 x = x_sums(n);
        mma<false>(products[n], a[s], s ? b.z : b.x, s ? b.w : b.y);
        x_sum[n] += s ? x.y : x.x;
      }
      if (slot_inputs == 32 && s == 0) leave_slot(lane);
    }
    if (slot_inputs != 128 || parity == 1 || last) leave_slot(lane);
  }

  __device__ __forceinline__ float value(int n, int h, int, const int (&)[2]) const { return sum[n][h]; }

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
