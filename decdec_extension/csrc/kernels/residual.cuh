// The residual GEMV of one block: a slice of output columns for all selected rows, by zero-copy loads.
//
// A thread owns a piece, the up to 16 bytes of a row that hold its outputs, and every so many of the rows. It keeps
// several copies to shared memory in flight, since the link to the host answers after more than a microsecond, and
// consumes them in a short loop: this code runs cold, once a launch, and unrolled it would wait longer for its
// instructions than for the rows. Sums are float32, joined in fixed order.

#pragma once

#include <type_traits>

#include "instructions.cuh"
#include "numbers.cuh"

namespace decdec::cuda {

// A piece holds at most 32 outputs, so that a thread's sums fit in registers. At 3 bits the high two bits of all its
// codes come first, then the low ones, as they lie in two parts of the row.
template <int kBits>
struct alignas(kBits < 3 ? 4 * kBits : 16) Piece {
  static constexpr int kOutputs = kBits <= 4 ? 32 : 128 / kBits;
  static constexpr int kWords = kOutputs * kBits / 32;
  // In flight a thread: 32 KB a block, enough for 8 to 16 blocks to saturate the link. Rows of fewer bits are cut into
  // fewer slices (slice_pieces), whose blocks have to keep more on the way.
  static constexpr int kLoads = kBits < 4 ? 128 / (kBits < 3 ? 4 * kBits : 16) : 4;
  uint32_t words[kWords];

  // Where in the mantissa `shifted` leaves code n. Codes of half a byte are moved together; those that end up lower get
  // a smaller exponent. (Those of a byte would save more shifts, but a leading bit of 256 rounds the sums visibly.)
  __host__ __device__ static constexpr int place(int n) {
    return kBits == 3 ? 20 : kBits == 8 ? 15 : 19 + n * kBits % 4;
  }

  // What `shifted(n)` is above the code: the leading bit, and the codes' own offset.
  __host__ __device__ static constexpr float offset(int n) {
    return kBits == 16 ? 0.f : float((1 << (23 - place(n))) + (1 << (kBits % 16 - 1)));
  }

  // `width` bits of a word, moved from bit `from` to bit `to`.
  __device__ __forceinline__ static uint32_t field(uint32_t word, int width, int from, int to) {
    return (to >= from ? word << (to - from) : word >> (from - to)) & ((1u << width) - 1) << to;
  }

  // Output n's signed code plus offset(n), in little more than one instruction (five at 3 bits); the residual itself at
  // 16 bits.
  __device__ __forceinline__ float shifted(int n) const {
    const uint32_t leading = uint32_t(127 + 23 - place(n)) << 23;
    if constexpr (kBits == 16) {
      return half_to_float(words[n / 2] >> (n % 2 * 16) & 0xffff);
    } else if constexpr (kBits == 3) {
      return __uint_as_float(field(words[n / 16], 2, n % 16 * 2, 21) | field(words[2], 1, n, 20) | leading);
    } else {
      return __uint_as_float(field(words[n * kBits / 32], kBits, n * kBits % 32, place(n)) | leading);
    }
  }

  __device__ __forceinline__ float code(int n) const { return shifted(n) - offset(n); }

  // Calls copy(to, from, bytes), bytes an integral constant, for the parts of piece `index` of a row.
  template <class Copy>
  __device__ __forceinline__ void copy(const uint8_t* row, int index, int d_out, Copy copy) {
    if constexpr (kBits == 3) {
      copy(words, row + 8 * index, std::integral_constant<int, 8>());
      copy(words + 2, row + (d_out + 63) / 64 * 16 + 4 * index, std::integral_constant<int, 4>());
    } else {
      copy(words, row + 4 * kWords * index, std::integral_constant<int, 4 * kWords>());
    }
  }
};

constexpr int kEmitted = 4;  // outputs of a thread that are written together

// Pieces of a row, and of each of `blocks` slices.
__host__ __device__ constexpr int row_pieces(int d_out, int bits) {
  const int outputs = bits <= 4 ? 32 : 128 / bits;
  return (d_out + outputs - 1) / outputs;
}
// Slices are multiples of 128 bytes, of 64 in the low part of 3 bits: whole lines of the link.
__host__ __device__ constexpr int slice_pieces(int pieces, int blocks, int bits) {
  const int line = bits == 1 ? 32 : bits <= 3 ? 16 : 8, even = (pieces + blocks - 1) / blocks;
  return (even + line - 1) / line * line;
}

// What row `channel` of the residual is multiplied with, for activation x.
__device__ __forceinline__ float row_factor(const Compensation& c, float x, int channel) {
  const float value = x - (c.center ? __ldg(c.center + channel) : 0.f);
  return c.row_scale ? value * __ldg(c.row_scale + channel) : value;
}

// channel(i, factor) is the i-th of `selected` channels, ascending in each chunk, or negative. emit.put(outputs, values)
// takes every output of the slice once, kEmitted at a time, negative ones being none; emit.expect(outputs) announces
// them. `sums`: 32 * kSumStride floats of shared memory. Called by the whole block. kGrouped: each
// group of channels has scales of its own, so that they enter the sums of a group's rows instead of those of all.
template <int kBits, bool kGrouped, class Channel, class Emit>
__device__ __forceinline__ void residual_gemv(const Compensation& c, int d_out, int selected, int slice, int slices,
                                              float* sums, Channel channel, Emit&& emit) {
  using P = Piece<kBits>;
  P* ring = reinterpret_cast<P*>(sums);
  const int pieces = row_pieces(d_out, kBits), per_slice = slice_pieces(pieces, slices, kBits);
  const int begin = slice * per_slice, end = min(begin + per_slice, pieces);
  const bool wide_scales = d_out % 8 == 0 && reinterpret_cast<uintptr_t>(c.residual_scale) % 16 == 0;
  const float middle = c.nested ? 0.5f : 0.f, step = c.nested ? 1.f / (1 << kBits % 16) : 1.f;
  for (int first = begin; first < end; first += kThreads) {
    const int width = min(end - first, kThreads), rows = kThreads / width;  // rows at a time
    const int piece = threadIdx.x % width, row = threadIdx.x / width;
    const bool busy = row < rows;
    const int output = (first + piece) * P::kOutputs;
    // A thread's rows are neighbours, since those mostly share a group.
    const int share = (selected + rows - 1) / rows, last = busy ? min((row + 1) * share, selected) : 0;
    const int filled = min(rows, selected);  // rows at a time that have any
    float sum[P::kOutputs] = {}, factors = 0;
    float total[kGrouped ? P::kOutputs : 1] = {};  // of the groups before the current one, with their scales
    uint4 scales[kGrouped ? P::kOutputs / 8 : 1] = {};  // the current group's, on their way while its rows are summed
    int group_begin = 0, group_end = 0;
    const auto close_group = [&] {
#pragma unroll
      for (int n = 0; n < (kGrouped ? P::kOutputs : 0); ++n) {
        const float value = fmaf(middle - P::offset(n), factors, sum[n]);
        const float scale = half_to_float(reinterpret_cast<const uint16_t*>(scales)[n]);
        total[n] = fmaf(value, scale, total[n]);
        sum[n] = 0;
      }
      factors = 0;
    };
    const auto open_group = [&](int channel) {
      const int group = channel / c.group_size;
      group_begin = group * c.group_size, group_end = group_begin + c.group_size;
      const uint16_t* from = c.residual_scale + int64_t{group} * d_out + output;
#pragma unroll
      for (int part = 0; part < (kGrouped ? P::kOutputs : 0); part += 8) {
        if (wide_scales) {
          if (output + part < d_out) scales[part / 8] = __ldg(reinterpret_cast<const uint4*>(from + part));
        } else {
#pragma unroll
          for (int n = part; n < part + 8; ++n) {
            reinterpret_cast<uint16_t*>(scales)[n] = output + n < d_out ? __ldg(from + n) : 0;
          }
        }
      }
    };
    int next = row * share, fill = 0, empty = 0;  // the next row to load, and places in the thread's part of the ring
    const auto load = [&] {
      float factor;
      const int at = next < last ? channel(next, factor) : -1;
      if (at >= 0) {
        ring[fill * kThreads + threadIdx.x].copy(
            c.residual + at * c.row_bytes, first + piece, d_out,
            [](void* to, const void* from, auto bytes) { copy_async<bytes>(to, from); });
      }
      close_copies();
      ++next;
      fill = (fill + 1) % P::kLoads;
    };
#pragma unroll 1
    for (int n = 0; n < P::kLoads; ++n) load();
#pragma unroll 1
    for (int i = row * share; i < last; ++i) {
      float factor = 0;
      const int at = channel(i, factor);
      if constexpr (kGrouped) {
        if (at >= 0 && (at < group_begin || at >= group_end)) {
          close_group();
          open_group(at);
        }
      }
      wait_copies<P::kLoads - 1>();
      if (at >= 0) {
        const P data = ring[empty * kThreads + threadIdx.x];
        // The offset is taken off the sums once: it is of the codes' size, so no precision is lost to it.
        factors += factor;
#pragma unroll
        for (int n = 0; n < P::kOutputs; ++n) sum[n] = fmaf(data.shifted(n), factor, sum[n]);
      }
      empty = (empty + 1) % P::kLoads;
      load();
    }
    if constexpr (kGrouped) close_group();
    // Several outputs a thread at once: the answers to their loads and exchanges are waited for together, and to the
    // first ones while the sums are joined.
    int outputs[kEmitted];
    float scale[kEmitted];
    const auto expect = [&](int i) {
#pragma unroll
      for (int n = 0; n < kEmitted; ++n) {
        const int at = i + n * kThreads, o = first * P::kOutputs + at;
        outputs[n] = at < width * P::kOutputs && o < d_out ? o : -1;
        scale[n] = 1;
        if (!kGrouped && kBits != 16 && outputs[n] >= 0) scale[n] = half_to_float(__ldg(c.residual_scale + o));
      }
      emit.expect(outputs);
    };
    expect(threadIdx.x);
    __syncthreads();  // all have emptied their part of the ring, whose place the sums take
    if (row < filled) {
#pragma unroll
      for (int n = 0; n < P::kOutputs; ++n) {
        float value;
        if constexpr (kGrouped) value = total[n];
        else value = fmaf(middle - P::offset(n), factors, sum[n]);
        sums[n * kSumStride + threadIdx.x] = value;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width * P::kOutputs;) {
      const float* from[kEmitted];
      float value[kEmitted] = {};
#pragma unroll
      for (int n = 0; n < kEmitted; ++n) {
        const int at = outputs[n] < 0 ? 0 : i + n * kThreads;
        from[n] = sums + at % P::kOutputs * kSumStride + at / P::kOutputs;
      }
#pragma unroll 4
      for (int r = 0; r < filled; ++r) {
#pragma unroll
        for (int n = 0; n < kEmitted; ++n) value[n] += from[n][r * width];
      }
#pragma unroll
      for (int n = 0; n < kEmitted; ++n) value[n] *= step * scale[n];
      emit.put(outputs, value);
      i += kEmitted * kThreads;
      if (i < width * P::kOutputs) expect(i);
    }
    __syncthreads();  // the sums have been read
  }
}

// The instance of run-time bits, an integral constant: call(bits). Residuals of 16 bits have no scales.
template <bool kGrouped, class Call>
__device__ __forceinline__ void with_residual_bits(int bits, Call call) {
  switch (bits) {
    case 1:
      return call(std::integral_constant<int, 1>());
    case 2:
      return call(std::integral_constant<int, 2>());
    case 3:
      return call(std::integral_constant<int, 3>());
    case 4:
      return call(std::integral_constant<int, 4>());
    case 8:
      return call(std::integral_constant<int, 8>());
    default:
      if constexpr (!kGrouped) call(std::integral_constant<int, 16>());
  }
}

}  // namespace decdec::cuda
