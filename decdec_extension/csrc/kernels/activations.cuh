// Activations as exact operands of the integer tensor cores.
//
// The warps of a block turn a panel of the inputs into fixed point together: X = round(x 2**e), |X| <= 2**22, one
// exponent e for panel and row, then three balanced base-256 digits. The rounding is 2**-23 of the panel's largest |x|,
// what float32 sums lose. Digit j of row 2 n + r is column 4 r + j of row pair n's B operand; the fourth column is not
// used. A row's digits lie unit by unit as [digit][t][b0, b1 of k-step 0, b0, b1 of k-step 1].

#pragma once

#include "instructions.cuh"
#include "norm.cuh"

namespace decdec::cuda {

// Where in a unit's digits are the 16 bytes with digit j for the lanes with lane % 4 == t.
__device__ __forceinline__ int digit_offset(int j, int t) { return (j * 4 + t) * 16; }

// w[j]: byte j of each of four words, for j < 3.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
  const uint32_t a = permute(w[0], w[1], 0x5140), b = permute(w[2], w[3], 0x5140);
  const uint32_t c = permute(w[0], w[1], 0x7362), d = permute(w[2], w[3], 0x7362);
  w[0] = permute(a, b, 0x5410), w[1] = permute(a, b, 0x7632);
  w[2] = permute(c, d, 0x5410);
}

// The exponent e for numbers of up to this magnitude: |x| < 2**(22 - e). Below 2**-104 (bfloat16 only) the digits hold
// fewer significant bits.
__device__ __forceinline__ int exponent_of(uint32_t largest, Dtype dtype) {
  const int magnitude = max(int(__float_as_uint(to_float(largest, dtype)) >> 23), 1) - 126;
  return min(22 - magnitude, 126);
}

// What the products need of a unit's digits besides: their sums, four numbers of which even lanes read the first two
// and odd lanes the others, as they own the columns of digits 0 and 1 or of digit 2.
enum class Sums {
  kNone,
  kDigits,  // of digits 0, 1 and 2
  kSteps,   // of digit 0 + 256 digit 1 in both k-steps, of digit 2 in both k-steps
};

// The eight inputs of one k-step of a unit that are lane t's of four: two times four neighbours.
struct Octet {
  uint2 half[2];

  __device__ __forceinline__ void load(const void* unit, int s, int t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) half[h] = static_cast<const uint2*>(unit)[8 * s + 4 * h + t];
  }
  __device__ __forceinline__ void store(void* unit, int s, int t) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) static_cast<uint2*>(unit)[8 * s + 4 * h + t] = half[h];
  }

  // The weights of a norm for inputs that `load` would load.
  __device__ __forceinline__ void load_norm(const GemvParams& p, int unit, int s, int t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int input = unit * kUnitInputs + 32 * s + 16 * h + 4 * t;
      half[h] = make_uint2(0, 0);
      if (input < p.weights.d_in) half[h] = __ldg(static_cast<const uint2*>(p.norm) + input / 4);
    }
  }

  __device__ __forceinline__ uint4 all() const { return make_uint4(half[0].x, half[0].y, half[1].x, half[1].y); }

  __device__ __forceinline__ void norm(const Octet& weights, float factor, Dtype dtype) {
    const uint4 v = normed(all(), weights.all(), factor, dtype);
    half[0] = make_uint2(v.x, v.y), half[1] = make_uint2(v.z, v.w);
  }

  // NaN and Inf become 0: non_finite_terms adds them.
  __device__ __forceinline__ void drop_non_finite(uint32_t infinity) {
    uint32_t* words = &half[0].x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((words[i] & 0x7fff) >= infinity) words[i] &= 0xffff0000;
      if ((words[i] >> 16 & 0x7fff) >= infinity) words[i] &= 0xffff;
    }
  }

  // The larger of `pair` and the magnitudes, as integers, in two columns of 16-bit numbers.
  __device__ __forceinline__ uint32_t largest(uint32_t pair) const {
    const uint32_t* words = &half[0].x;
#pragma unroll
    for (int i = 0; i < 4; ++i) pair = __vmaxu2(pair, words[i] & 0x7fff7fff);
    return pair;
  }

  // Writes the digits, and the sums of the unit's or k-step's; the eight lanes of a unit are neighbours. kPairedInputs:
  // b0 of a k-step holds the even of its inputs and b1 the odd ones (UniformTile), else its halves.
  template <bool kPairedInputs, Sums kSums>
  __device__ __forceinline__ void write(Dtype dtype, float scale, int s, int t, uint8_t* digits, int* sums) const {
    uint32_t w[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 v = unpack_four(half[h], dtype);
      const float* e = &v.x;
      // 1.5 * 2**23 rounds to an integer, which the low bits of the sum then hold.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 4 * h + i;
        w[kPairedInputs ? n % 2 : h][kPairedInputs ? n / 2 : i] =
            (__float_as_uint(fmaf(e[i], scale, 12582912.f)) + (0x808080u - 0x4b400000u)) ^ 0x808080u;
      }
    }
    transpose_bytes(w[0]);
    transpose_bytes(w[1]);
    int sum[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      *reinterpret_cast<uint2*>(digits + digit_offset(j, t) + 8 * s) = make_uint2(w[0][j], w[1][j]);
      if constexpr (kSums != Sums::kNone) {
        sum[j] = __dp4a(int(w[0][j]), 0x01010101, __dp4a(int(w[1][j]), 0x01010101, 0));
      }
    }
    if constexpr (kSums != Sums::kNone) {
      if constexpr (kSums == Sums::kSteps) sum[0] += 256 * sum[1];
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (kSums == Sums::kSteps && j == 1) continue;
#pragma unroll
        for (int mask = 1; mask < (kSums == Sums::kSteps ? 4 : 8); mask *= 2) {
          sum[j] += __shfl_xor_sync(0xffffffff, sum[j], mask);
        }
      }
      if constexpr (kSums == Sums::kSteps) {
        if (t == 0) sums[s] = sum[0], sums[2 + s] = sum[2];
      } else {
        if (t == 0 && s == 0) *reinterpret_cast<int4*>(sums) = make_int4(sum[0], sum[1], sum[2], 0);
      }
    }
  }
};

// What is known of a panel, in shared memory: registers are scarcer.
struct Facts {
  int exponent[kMaxBatch];  // of the rows' digits
  uint32_t largest[kMaxBatch][kWarps];
  unsigned non_finite;  // bit r: row r has NaN or Inf, up to this panel
  unsigned per_tile, share;  // batches of a tile, and of a warp
};
static_assert(sizeof(Facts) == kFactBytes);

constexpr int kPieces = kUnitInputs / 8;  // of 16 bytes, a unit's inputs

// Copies the inputs of a row's units from `first` on, each unit's to where its digits will be, kUnitBytes apart. Inputs
// beyond the row are 0. The copies are asynchronous; a unit's are of the same warp that makes its digits.
__device__ __forceinline__ void copy_inputs(const GemvParams& p, int row, int first, int units, uint8_t* to) {
  const int d_in = p.weights.d_in;
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + int64_t{row} * d_in;
  const bool wide = d_in % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < units * kPieces; i += kThreads) {
    const int input = first * kUnitInputs + 8 * i;
    uint8_t* piece = to + i / kPieces * kUnitBytes + i % kPieces * 16;
    if (wide) {
      copy_async<16>(piece, x + (input < d_in ? input : 0), input < d_in);
    } else {
      for (int n = 0; n < 8; ++n) reinterpret_cast<uint16_t*>(piece)[n] = input + n < d_in ? x[input + n] : 0;
    }
  }
}

// A panel's inputs from unit `first` on become digits, by the whole block. arrive() is called before the first
// activations are read, between() when they are on the way; it closes kLater groups of copies. Returns the rows that have
// NaN or Inf, one a bit.
template <bool kPairedInputs, Sums kSums, int kLater, class Arrive, class Between>
__device__ __forceinline__ unsigned stage_panel(const GemvParams& p, int first, int units, uint8_t* digits, int* sums,
                                            Facts& facts, Arrive arrive, Between between) {
  constexpr int kStep = 4 * kWarps;  // a warp takes four units at a time
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = lane / 4 % 2, t = lane % 4;
  const uint32_t infinity = p.dtype == Dtype::kHalf ? 0x7c00 : 0x7f80;
  const auto place = [&](int row, int unit) { return digits + (row * p.plan.panel_units + unit) * kUnitBytes; };
  // call(unit) for the warp's units, whole warps at a time: lanes beyond the last unit repeat it.
  const auto each = [&](auto call) {
#pragma unroll 1
    for (int group = 4 * warp; group < units; group += kStep) call(min(group + lane / 8, units - 1));
  };
  // call(piece) for eight inputs at a time, those that the thread copied.
  const auto each_piece = [&](int row, auto call) {
#pragma unroll 4
    for (int i = threadIdx.x; i < units * kPieces; i += kThreads) {
      const uint2* from = reinterpret_cast<const uint2*>(place(row, i / kPieces) + i % kPieces * 16);
      call(Octet{from[0], from[1]});
    }
  };
  if (p.norm) {  // its weights are wanted when the squares are known
    each([&](int unit) {
      const int input = (first + unit) * kUnitInputs;
      if (input < p.weights.d_in) prefetch(static_cast<const uint16_t*>(p.norm) + input);
    });
  }
  arrive();
  for (int row = 0; row < p.batch; ++row) copy_inputs(p, row, first, units, place(row, 0));
  close_copies();
  between();
  wait_copies<kLater>();
  __syncwarp();
  for (int row = 0; row < p.batch; ++row) {
    if (p.norm) {
      float squares = 0;
      if (p.plan.panels > 1) squares = row_squares(p, row);
      else each_piece(row, [&](const Octet& piece) { squares += square_sum(piece.all(), p.dtype); });
      const float factor = norm_factor(p, squares, reinterpret_cast<float*>(facts.largest[row]));
      each([&](int unit) {
        Octet octet, weights;
        octet.load(place(row, unit), s, t);
        weights.load_norm(p, first + unit, s, t);
        octet.norm(weights, factor, p.dtype);
        __syncwarp();
        octet.store(place(row, unit), s, t);
      });
      __syncwarp();
    }
    const auto largest = [&](bool finite) {
      uint32_t pair = 0;
      each_piece(row, [&](Octet piece) {
        if (!finite) piece.drop_non_finite(infinity);
        pair = piece.largest(pair);
      });
      return __reduce_max_sync(0xffffffff, max(pair & 0xffff, pair >> 16));
    };
    uint32_t most = largest(true);
    if (most >= infinity) most = largest(false) | 1 << 16;
    if (lane == 0) facts.largest[row][warp] = most;
  }
  __syncthreads();
  unsigned non_finite = 0;
  for (int row = 0; row < p.batch; ++row) {
    const uint32_t of_warp = facts.largest[row][lane % kWarps];
    const bool row_finite = __all_sync(0xffffffff, of_warp < 1 << 16);
    const int exponent = exponent_of(__reduce_max_sync(0xffffffff, of_warp & 0xffff), p.dtype);
    const float scale = power_of_two(exponent);
    non_finite |= unsigned(!row_finite) << row;
    if (threadIdx.x == 0) facts.exponent[row] = exponent;
    each([&](int unit) {
      Octet octet;
      octet.load(place(row, unit), s, t);
      if (!row_finite) octet.drop_non_finite(infinity);
      __syncwarp();  // all have taken theirs
      octet.write<kPairedInputs, kSums>(p.dtype, scale, s, t, place(row, unit),
                                        sums + 4 * (row * p.plan.panel_units + unit));
    });
  }
  __syncthreads();
  return non_finite;
}

}  // namespace decdec::cuda
