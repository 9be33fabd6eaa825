// Activations as exact operands of the integer tensor cores.
//
// The warps of a block turn a panel of the inputs into fixed point together: X = round(x 2**e), |X| <= 2**22, one
// exponent e for panel and row, then three balanced base-256 digits. The rounding is 2**-23 of the panel's largest |x|,
// what float32 sums lose. Digit j of row 2 n + r is column 4 r + j of row pair n's B operand; the fourth column is not
// used. A row's digits lie unit by unit as [digit][t][b0, b1 of k-step 0, b0, b1 of k-step 1].

#pragma once

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

  __device__ __forceinline__ void load(const GemvParams& p, int row, int unit, int s, int t) {
    const int d_in = p.weights.d_in;
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + int64_t{row} * d_in;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int input = unit * kUnitInputs + 32 * s + 16 * h + 4 * t;
      if (d_in % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % 8 == 0) {
        half[h] = make_uint2(0, 0);
        if (input < d_in) {
          asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(half[h].x), "=r"(half[h].y) : "l"(from + input));
        }
      } else {
        uint16_t v[4];
        for (int i = 0; i < 4; ++i) v[i] = input + i < d_in ? from[input + i] : 0;
        half[h] = make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
      }
    }
  }

  __device__ __forceinline__ uint4 all() const { return make_uint4(half[0].x, half[0].y, half[1].x, half[1].y); }

  // The weights of a norm for inputs that `load` would load.
  __device__ __forceinline__ void load_norm(const GemvParams& p, int unit, int s, int t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int input = unit * kUnitInputs + 32 * s + 16 * h + 4 * t;
      half[h] = make_uint2(0, 0);
      if (input < p.weights.d_in) half[h] = __ldg(static_cast<const uint2*>(p.norm) + input / 4);
    }
  }

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

// What the staging of a panel leaves in shared memory besides digits and sums.
struct RowFacts {
  int exponent[kMaxBatch];  // of the row's digits
  float factor[kMaxBatch];  // 1 / rms, where there is a norm
  uint32_t largest[kMaxBatch][kWarps];
};
static_assert(sizeof(RowFacts) == kFactBytes);

// A panel's inputs from unit `first` on become digits, by the whole block. arrive() is called before the first
// activations are read, between() when they are on the way. Returns whether all inputs are finite.
template <bool kPairedInputs, Sums kSums, class Arrive, class Between>
__device__ __forceinline__ bool stage_panel(const GemvParams& p, int first, int units, uint8_t* digits, int* sums,
                                            RowFacts& facts, Arrive arrive, Between between) {
  constexpr int kAhead = 3, kStep = 4 * kWarps;  // a warp loads four units at a time; four would spill registers
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = lane / 4 % 2, t = lane % 4;
  const int own = 4 * warp + lane / 8;
  const uint32_t infinity = p.dtype == Dtype::kHalf ? 0x7c00 : 0x7f80;
  const auto load = [&](int row, int unit, float factor) {
    Octet octet, weights;
    octet.load(p, row, first + unit, s, t);
    if (p.norm) {
      weights.load_norm(p, first + unit, s, t);
      octet.norm(weights, factor, p.dtype);
    }
    return octet;
  };
  Octet weights[kAhead] = {};
  if (p.norm) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (4 * warp + i * kStep < units) weights[i].load_norm(p, first + min(own + i * kStep, units - 1), s, t);
    }
  }
  arrive();
  Octet ahead[kAhead] = {};  // the lane's first octets of a row
  for (int row = 0; row < p.batch; ++row) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (4 * warp + i * kStep < units) ahead[i].load(p, row, first + min(own + i * kStep, units - 1), s, t);
    }
    if (row == 0) between();
    float factor = 1;
    if (p.norm) {
      float squares = 0;
      if (p.plan.panels == 1) {  // the panel is the whole row
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (own + i * kStep < units) squares += square_sum(ahead[i].all(), p.dtype);
        }
        Octet octet;
#pragma unroll 1
        for (int unit = own + kAhead * kStep; unit < units; unit += kStep) {
          octet.load(p, row, first + unit, s, t);
          squares += square_sum(octet.all(), p.dtype);
        }
      } else {
        squares = row_squares(p, row);
      }
      factor = norm_factor(p, squares, reinterpret_cast<float*>(facts.largest[row]));
      if (threadIdx.x == 0) facts.factor[row] = factor;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (4 * warp + i * kStep < units) ahead[i].norm(weights[i], factor, p.dtype);
      }
    }
    uint32_t pair = 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) pair = ahead[i].largest(pair);
#pragma unroll 1
    for (int unit = own + kAhead * kStep; unit < units; unit += kStep) pair = load(row, unit, factor).largest(pair);
    uint32_t most = __reduce_max_sync(0xffffffff, max(pair & 0xffff, pair >> 16));
    if (most >= infinity) {
      pair = 0;
#pragma unroll 1
      for (int unit = own; unit < units; unit += kStep) {
        Octet octet = load(row, unit, factor);
        octet.drop_non_finite(infinity);
        pair = octet.largest(pair);
      }
      most = __reduce_max_sync(0xffffffff, max(pair & 0xffff, pair >> 16)) | 1 << 16;
    }
    if (lane == 0) facts.largest[row][warp] = most;
  }
  __syncthreads();
  const bool kept = p.batch == 1;  // the first octets are in registers still
  bool finite = true;
  for (int row = 0; row < p.batch; ++row) {
    const uint32_t of_warp = facts.largest[row][lane % kWarps];
    const bool row_finite = __all_sync(0xffffffff, of_warp < 1 << 16);
    const int exponent = exponent_of(__reduce_max_sync(0xffffffff, of_warp & 0xffff), p.dtype);
    const float scale = power_of_two(exponent);
    finite = finite && row_finite;
    if (threadIdx.x == 0) facts.exponent[row] = exponent;
    const auto write = [&](Octet& octet, int unit) {  // by whole warps
      if (!row_finite) octet.drop_non_finite(infinity);
      const int at = row * p.plan.panel_units + unit;
      octet.write<kPairedInputs, kSums>(p.dtype, scale, s, t, digits + at * kUnitBytes, sums + 4 * at);
    };
    if (kept) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (4 * warp + i * kStep < units) write(ahead[i], min(own + i * kStep, units - 1));
      }
    }
#pragma unroll 1
    for (int group = 4 * warp + (kept ? kAhead * kStep : 0); group < units; group += kStep) {
      const int unit = min(group + lane / 8, units - 1);
      Octet octet = load(row, unit, facts.factor[row]);
      write(octet, unit);
    }
  }
  __syncthreads();
  return finite;
}

}  // namespace decdec::cuda
