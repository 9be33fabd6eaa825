// Activations as exact operands of the integer tensor cores.
//
// Each warp multiplies its own slice of the inputs, so it alone turns that slice into fixed point: X = round(x 2**e),
// |X| <= 2**22, one exponent e for slice and row, then three balanced base-256 digits. The rounding is 2**-23 of the
// slice's largest |x|, what float32 sums lose. Digit j of row 2 n + r is column 4 r + j of row pair n's B operand; the
// fourth column is not used. A row's digits lie unit by unit as [digit][t][b0, b1 of k-step 0, b0, b1 of k-step 1].

#pragma once

#include "primitives.cuh"

namespace decdec::cuda {

constexpr int kRawOffset = 64;  // in a unit's digits, of its inputs until they are turned into digits

// Where in a unit's digits are the 16 bytes with digit j for the lanes with lane % 4 == t.
__device__ __forceinline__ int digit_offset(int j, int t) { return (j * 4 + t) * 16; }

// w[j]: byte j of each of four words, for j < 3.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
  const uint32_t a = permute(w[0], w[1], 0x5140), b = permute(w[2], w[3], 0x5140);
  const uint32_t c = permute(w[0], w[1], 0x7362), d = permute(w[2], w[3], 0x7362);
  w[0] = permute(a, b, 0x5410), w[1] = permute(a, b, 0x7632);
  w[2] = permute(c, d, 0x5410);
}

// Loads the inputs of one row's units [begin, end) to where their digits will be, by one warp.
__device__ inline void load_row(const void* x, int row, int d_in, int begin, int end, uint8_t* digits, int lane) {
  const uint16_t* from = static_cast<const uint16_t*>(x) + int64_t{row} * d_in;
  const auto to = [&](int piece) {  // eight inputs
    return reinterpret_cast<uint16_t*>(digits + piece / 8 * kUnitBytes + kRawOffset) + piece % 8 * 8;
  };
  const int pieces = 8 * (end - begin), whole = d_in % 8 == 0 ? max(min(d_in / 8 - 8 * begin, pieces), 0) : 0;
#pragma unroll 4
  for (int piece = lane; piece < whole; piece += 32) {
    *reinterpret_cast<uint4*>(to(piece)) = __ldg(reinterpret_cast<const uint4*>(from + 64 * begin) + piece);
  }
#pragma unroll 1
  for (int i = 8 * whole + lane; i < 8 * pieces; i += 32) {
    const int input = begin * kUnitInputs + i;
    to(i / 8)[i % 8] = input < d_in ? from[input] : 0;
  }
  __syncwarp();
}

// What a warp knows of its slice of one row: x is the number of the digits times 2**-exponent.
struct Slice {
  int exponent;
  int totals[3];  // sums of the digits, digit by digit
};

// Turns what load_row brought into digits, by one warp. NaN and Inf count as 0 and clear `finite`; non_finite_terms
// adds them. kStepSums: writes for every unit the sums of digits 0 and 1, as one number, and of digit 2 in both k-steps
// to `sums`. kPairedInputs: b0 of a k-step holds the even of its inputs and b1 the odd ones (UniformTile), else its
// halves.
template <bool kPairedInputs, bool kStepSums>
__device__ inline Slice stage_row(Dtype dtype, int units, uint8_t* digits, float* sums, int lane, bool& finite) {
  const auto load = [&](int task, int part) {  // four inputs of a lane's 16: part 2 s + half
    return *reinterpret_cast<const uint2*>(digits + task / 4 * kUnitBytes + kRawOffset + 32 * part + 8 * (task % 4));
  };
  const uint32_t infinity = dtype == Dtype::kHalf ? 0x7c00 : 0x7f80;
  const int tasks = 4 * units;
  uint32_t pair = 0;  // the largest magnitudes of two columns of 16-bit numbers, as integers
  for (int task = lane; task < tasks; task += 32) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const uint2 v = load(task, part);
      pair = __vmaxu2(__vmaxu2(pair, v.x & 0x7fff7fff), v.y & 0x7fff7fff);
    }
  }
  uint32_t largest = __reduce_max_sync(0xffffffff, max(pair & 0xffff, pair >> 16));
  if (largest >= infinity) {
    finite = false;
    largest = 0;
    for (int task = lane; task < tasks; task += 32) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        uint8_t* at = digits + task / 4 * kUnitBytes + kRawOffset + 32 * (i / 4) + 8 * (task % 4) + 2 * (i % 4);
        uint16_t& v = *reinterpret_cast<uint16_t*>(at);
        if ((v & 0x7fff) >= infinity) v = 0;
        largest = max(largest, v & 0x7fff);
      }
    }
    largest = __reduce_max_sync(0xffffffff, largest);
  }
  // |x| < 2**(22 - exponent). Below 2**-104 (bfloat16 only) the digits hold fewer significant bits.
  const int magnitude = max(int(__float_as_uint(to_float(largest, dtype)) >> 23), 1) - 126;
  Slice slice{min(22 - magnitude, 126), {}};
  const float scale = power_of_two(slice.exponent);
  for (int first = 0; first < tasks; first += 32) {
    const int task = min(first + lane, tasks - 1);  // lanes past the end repeat the last task
    uint32_t w[4][4];                               // part, input
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float4 v = unpack_four(load(task, part), dtype);
      const float* e = &v.x;
      // 1.5 * 2**23 rounds to an integer, which the low bits of the sum then hold.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[part][i] = (__float_as_uint(fmaf(e[i], scale, 12582912.f)) + (0x808080u - 0x4b400000u)) ^ 0x808080u;
      }
    }
    __syncwarp();  // the units' inputs have been read: their digits may take the place
    if constexpr (kPairedInputs) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t (&p)[4] = w[2 * s], (&q)[4] = w[2 * s + 1];
        const uint32_t even[4] = {p[0], p[2], q[0], q[2]}, odd[4] = {p[1], p[3], q[1], q[3]};
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = even[i], q[i] = odd[i];
      }
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) transpose_bytes(w[part]);
    int step_sums[2][3];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      *reinterpret_cast<uint4*>(digits + task / 4 * kUnitBytes + digit_offset(j, task % 4)) =
          make_uint4(w[0][j], w[1][j], w[2][j], w[3][j]);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        step_sums[s][j] = __dp4a(int(w[2 * s][j]), 0x01010101, __dp4a(int(w[2 * s + 1][j]), 0x01010101, 0));
      }
      if (first + lane < tasks) slice.totals[j] += step_sums[0][j] + step_sums[1][j];
    }
    if constexpr (kStepSums) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        int low = step_sums[s][0] + 256 * step_sums[s][1], high = step_sums[s][2];
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
          low += __shfl_xor_sync(0xffffffff, low, mask);
          high += __shfl_xor_sync(0xffffffff, high, mask);
        }
        if (task % 4 == 0) {
          float* to = sums + (task / 4) * 4 + s;
          to[0] = float(low), to[2] = float(high);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 3; ++j) slice.totals[j] = __reduce_add_sync(0xffffffff, slice.totals[j]);
  __syncwarp();
  return slice;
}

}  // namespace decdec::cuda
