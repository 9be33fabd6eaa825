// The residual GEMV of one block: a slice of output columns for all selected rows, by zero-copy loads.
//
// A thread owns a piece, the up to 16 bytes of a row that hold its outputs, and every so many of the rows. It keeps several
// copies to shared memory in flight, since the link to the host answers after more than a microsecond, and consumes them in
// a short loop: this code runs cold, once a launch, and unrolled it would wait longer for its instructions than for the rows.
// Sums are float32, joined in fixed order.

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

  // Output n's code less its bias, or the residual itself at 16 bits.
  __device__ __forceinline__ float code(int n) const {
    if constexpr (kBits == 16) {
      return half_to_float(words[n / 2] >> (n % 2 * 16) & 0xffff);
    } else {
      constexpr uint32_t kMask = (1u << kBits) - 1;
      const uint32_t bits = words[n * kBits / 32] >> (n * kBits % 32) & kMask;
      // The code as the low bits of 2**23, an exact subtraction instead of an integer conversion.
      return __uint_as_float(bits | 0x4b000000) - (8388608.f + (1 << (kBits - 1)));
    }
  }
};

constexpr int kPieceLoads = 4;        // in flight a thread: 16 KB a block; 8 to 16 blocks then saturate the link
constexpr int kSlicePieces = 8;       // slices are multiples of 128 bytes at 4 bits and more: whole lines of the link

// Pieces of a row, and of each of `blocks` slices.
__host__ __device__ constexpr int row_pieces(int d_out, int bits) {
  const int outputs = bits <= 4 ? 32 : 128 / bits;
  return (d_out + outputs - 1) / outputs;
}
__host__ __device__ constexpr int slice_pieces(int pieces, int blocks) {
  const int even = (pieces + blocks - 1) / blocks;
  return (even + kSlicePieces - 1) / kSlicePieces * kSlicePieces;
}

// channel(i) is the i-th of `selected` channels or negative; emit(o, value) takes every output of the slice once. `sums`:
// 32 * kSumStride floats of shared memory. Called by all threads of the block.
// kGrouped: the scale depends on the channel (or is nested), so that it enters every product instead of the sums.
template <int kBits, bool kGrouped, class Channel, class Emit>
__device__ __forceinline__ void residual_gemv(const Compensation& c, int d_out, int selected, int slice, int slices,
                                              float* sums, Channel channel, Emit emit) {
  using P = Piece<kBits>;
  P* ring = reinterpret_cast<P*>(sums);
  const int pieces = row_pieces(d_out, kBits), per_slice = slice_pieces(pieces, slices);
  const int begin = slice * per_slice, end = min(begin + per_slice, pieces);
  for (int first = begin; first < end; first += kThreads) {
    const int width = min(end - first, kThreads), rows = kThreads / width;  // rows at a time
    const int piece = threadIdx.x % width, row = threadIdx.x / width;
    const bool busy = row < rows;
    const int output = (first + piece) * P::kOutputs;
    const uint8_t* column = c.residual + int64_t{first + piece} * (P::kWords * 4);
    float sum[P::kOutputs] = {};
    const auto load = [&](int i) {
      float factor;
      const int at = busy && i < selected ? channel(i, factor) : -1;
      if (at >= 0) {
        copy_async<P::kWords * 4>(ring + i / rows % kPieceLoads * kThreads + threadIdx.x, column + at * c.row_bytes);
        if constexpr (kGrouped) {
          asm volatile("prefetch.global.L2 [%0];" ::"l"(c.residual_scale + int64_t{at / c.group_size} * d_out + output));
        }
      }
      close_copies();
    };
#pragma unroll 1
    for (int n = 0; n < kPieceLoads; ++n) load(row + n * rows);
#pragma unroll 1
    for (int i = row; i < selected; i += rows) {
      wait_copies<kPieceLoads - 1>();
      float factor = 0;
      const int at = busy ? channel(i, factor) : -1;
      if (at >= 0) {
        const P data = ring[i / rows % kPieceLoads * kThreads + threadIdx.x];
        if constexpr (!kGrouped) {
#pragma unroll
          for (int n = 0; n < P::kOutputs; ++n) sum[n] = fmaf(data.code(n), factor, sum[n]);
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
      load(i + kPieceLoads * rows);
    }
    __syncthreads();  // all have emptied their part of the ring, whose place the sums take
    if (busy) {
#pragma unroll
      for (int n = 0; n < P::kOutputs; ++n) sums[n * kSumStride + threadIdx.x] = sum[n];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width * P::kOutputs; i += kThreads) {
      const int o = first * P::kOutputs + i;
      if (o >= d_out) break;
      const float* from = sums + i % P::kOutputs * kSumStride + i / P::kOutputs;
      float v = 0;
      for (int r = 0; r < rows; ++r) v += from[r * width];
      if (!kGrouped && kBits != 16) v *= half_to_float(__ldg(c.residual_scale + o));
      if (kGrouped && c.nested) v *= 1.f / (1 << kBits);
      emit(o, v);
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
    case 1: return with_bits(std::integral_constant<int, 1>());
    case 2: return with_bits(std::integral_constant<int, 2>());
    case 4: return with_bits(std::integral_constant<int, 4>());
    case 8: return with_bits(std::integral_constant<int, 8>());
    default: return call(std::integral_constant<int, 16>(), std::false_type());
  }
}

}  // namespace decdec::cuda
