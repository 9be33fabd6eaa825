// The residual GEMV of one block: a slice of output columns for all selected rows, by zero-copy loads.
//
// A thread owns a piece, the up to 16 bytes of a row that hold its outputs, and every so many of the rows. It keeps
// several copies to shared memory in flight, since the link to the host answers after more than a microsecond, and
// consumes them in a short loop: this code runs cold, once a launch, and unrolled it would wait longer for its
// instructions than for the rows. Sums are float32, joined in fixed order.

#pragma once

#include <type_traits>

#include "primitives.cuh"

namespace decdec::cuda {

// A piece holds at most 32 outputs, so that a thread's sums fit in registers.
template <int kBits>
struct alignas(kBits < 4 ? 4 * kBits : 16) Piece {
  static constexpr int kOutputs = kBits <= 4 ? 32 : 128 / kBits;
  static constexpr int kWords = kOutputs * kBits / 32;
  uint32_t words[kWords];

  // What `shifted` is above the code: the code lies in the top bits of the mantissa of a number whose leading bit is
  // 2**kBits.
  static constexpr float kOffset = kBits == 16 ? 0.f : float((1 << kBits % 16) + (1 << (kBits % 16 - 1)));

  // Output n's signed code plus kOffset, in two instructions; the residual itself at 16 bits.
  __device__ __forceinline__ float shifted(int n) const {
    if constexpr (kBits == 16) {
      return half_to_float(words[n / 2] >> (n % 2 * 16) & 0xffff);
    } else {
      constexpr uint32_t kMask = ((1u << kBits) - 1) << (23 - kBits);
      const uint32_t word = words[n * kBits / 32];
      const int up = 23 - kBits - n * kBits % 32;
      return __uint_as_float(((up >= 0 ? word << up : word >> -up) & kMask) | uint32_t(127 + kBits) << 23);
    }
  }

  __device__ __forceinline__ float code(int n) const { return shifted(n) - kOffset; }
};

constexpr int kPieceLoads = 4;   // in flight a thread: 16 KB a block; 8 to 16 blocks then saturate the link
constexpr int kEmitted = 4;      // outputs of a thread that are written together
constexpr int kSlicePieces = 8;  // slices are multiples of 128 bytes at 4 bits and more: whole lines of the link

// Pieces of a row, and of each of `blocks` slices.
__host__ __device__ constexpr int row_pieces(int d_out, int bits) {
  const int outputs = bits <= 4 ? 32 : 128 / bits;
  return (d_out + outputs - 1) / outputs;
}
__host__ __device__ constexpr int slice_pieces(int pieces, int blocks) {
  const int even = (pieces + blocks - 1) / blocks;
  return (even + kSlicePieces - 1) / kSlicePieces * kSlicePieces;
}

// channel(i, factor) is the i-th of `selected` channels, or negative; emit(outputs, values) takes every output of the
// slice once, kEmitted at a time, negative ones being none. `sums`: 32 * kSumStride floats of shared memory. Called by
// the whole block. kGrouped: the scale depends on the channel (or is nested), so that it enters every product instead
// of the sums.
template <int kBits, bool kGrouped, class Channel, class Emit>
__device__ __forceinline__ void residual_gemv(const Compensation& c, int d_out, int selected, int slice, int slices,
                                              float* sums, Channel channel, Emit emit) {
  using P = Piece<kBits>;
  P* ring = reinterpret_cast<P*>(sums);
  const int pieces = row_pieces(d_out, kBits), per_slice = slice_pieces(pieces, slices);
  const int begin = slice * per_slice, end = min(begin + per_slice, pieces);
  if constexpr (!kGrouped && kBits != 16) {  // they are wanted when the last row has come
    for (int o = begin * P::kOutputs + 64 * threadIdx.x; o < min(end * P::kOutputs, d_out); o += 64 * kThreads) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(c.residual_scale + o));
    }
  }
  for (int first = begin; first < end; first += kThreads) {
    const int width = min(end - first, kThreads), rows = kThreads / width;  // rows at a time
    const int piece = threadIdx.x % width, row = threadIdx.x / width;
    const bool busy = row < rows;
    const int output = (first + piece) * P::kOutputs;
    const uint8_t* column = c.residual + int64_t{first + piece} * (P::kWords * 4);
    float sum[P::kOutputs] = {}, factors = 0;
    int fill = 0, empty = 0;  // places in the thread's part of the ring
    const auto load = [&](int i) {
      float factor;
      const int at = busy && i < selected ? channel(i, factor) : -1;
      if (at >= 0) {
        copy_async<P::kWords * 4>(ring + fill * kThreads + threadIdx.x, column + at * c.row_bytes);
        if constexpr (kGrouped) {
          asm volatile(
              "prefetch.global.L2 [%0];" ::"l"(c.residual_scale + int64_t{at / c.group_size} * d_out + output));
        }
      }
      close_copies();
      fill = (fill + 1) % kPieceLoads;
    };
#pragma unroll 1
    for (int n = 0; n < kPieceLoads; ++n) load(row + n * rows);
#pragma unroll 1
    for (int i = row; i < selected; i += rows) {
      wait_copies<kPieceLoads - 1>();
      float factor = 0;
      const int at = busy ? channel(i, factor) : -1;
      if (at >= 0) {
        const P data = ring[empty * kThreads + threadIdx.x];
        if constexpr (!kGrouped) {
          // The offset is taken off the sums once: it is of the codes' size, so no precision is lost to it.
          factors += factor;
#pragma unroll
          for (int n = 0; n < P::kOutputs; ++n) sum[n] = fmaf(data.shifted(n), factor, sum[n]);
        } else {
          const uint16_t* scale = c.residual_scale + int64_t{at / c.group_size} * d_out + output;
          const float offset = c.nested ? 0.5f : 0.f;
#pragma unroll
          for (int n = 0; n < P::kOutputs; ++n) {
            const float step = output + n < d_out ? half_to_float(__ldg(scale + n)) : 0.f;
            sum[n] = fmaf((data.code(n) + offset) * step, factor, sum[n]);
          }
        }
      }
      empty = (empty + 1) % kPieceLoads;
      load(i + kPieceLoads * rows);
    }
    __syncthreads();  // all have emptied their part of the ring, whose place the sums take
    if (busy) {
#pragma unroll
      for (int n = 0; n < P::kOutputs; ++n) sums[n * kSumStride + threadIdx.x] = fmaf(-P::kOffset, factors, sum[n]);
    }
    __syncthreads();
    // Several outputs a thread at once: the answers to their loads and exchanges are waited for together.
    for (int i = threadIdx.x; i < width * P::kOutputs; i += kEmitted * kThreads) {
      float value[kEmitted];
      int outputs[kEmitted];
#pragma unroll
      for (int n = 0; n < kEmitted; ++n) {
        const int at = i + n * kThreads, o = first * P::kOutputs + at;
        outputs[n] = at < width * P::kOutputs && o < d_out ? o : -1;
        value[n] = 0;
        if (outputs[n] < 0) continue;
        const float scale = kGrouped || kBits == 16 ? 1.f : half_to_float(__ldg(c.residual_scale + o));
        const float* from = sums + at % P::kOutputs * kSumStride + at / P::kOutputs;
#pragma unroll 4
        for (int r = 0; r < rows; ++r) value[n] += from[r * width];
        value[n] *= kGrouped && c.nested ? 1.f / (1 << kBits) : scale;
      }
      emit(outputs, value);
    }
    __syncthreads();  // the sums have been read
  }
}

// The instance of run-time bits and scales: call(bits, grouped), both integral constants.
template <class Call>
__device__ __forceinline__ void with_residual_format(const Compensation& c, Call call) {
  const auto with_bits = [&](auto bits) {
    if (c.nested || c.groups > 1) {
      call(bits, std::true_type());
    } else {
      call(bits, std::false_type());
    }
  };
  switch (c.bits) {
    case 1:
      return with_bits(std::integral_constant<int, 1>());
    case 2:
      return with_bits(std::integral_constant<int, 2>());
    case 4:
      return with_bits(std::integral_constant<int, 4>());
    case 8:
      return with_bits(std::integral_constant<int, 8>());
    default:
      return call(std::integral_constant<int, 16>(), std::false_type());
  }
}

}  // namespace decdec::cuda
