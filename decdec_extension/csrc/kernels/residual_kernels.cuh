// The parts of the compensation as kernels of their own: selection, residual GEMV, and the residual's dequantization.

#pragma once

#include "residual.cuh"
#include "select.cuh"

namespace decdec::cuda {

// (d_in, d_out) of the residual; one thread a piece.
template <int kBits>
__global__ void residual_dequantize_kernel(const Compensation c, int d_in, int d_out, void* out, Dtype dtype) {
  using P = Piece<kBits>;
  const int pieces = row_pieces(d_out, kBits);
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= int64_t{d_in} * pieces) return;
  const int64_t channel = at / pieces;
  const int piece = int(at % pieces);
  P data;
  data.copy(c.residual + channel * c.row_bytes, piece, d_out, [](uint32_t* to, const void* from, auto bytes) {
    load_streaming<bytes / 4>(reinterpret_cast<uint32_t(&)[bytes / 4]>(*to), from);
  });
#pragma unroll
  for (int n = 0; n < P::kOutputs; ++n) {
    const int o = piece * P::kOutputs + n;
    if (o >= d_out) break;
    float v = data.code(n);
    if constexpr (kBits != 16) {
      const float step = half_to_float(c.residual_scale[channel / c.group_size * d_out + o]);
      v = c.nested ? (v + 0.5f) * (step * (1.f / (1 << kBits))) : v * step;
    }
    store_element(out, channel * d_out + o, dtype, v);
  }
}

// (batch, selected) channels; one warp a chunk of a row, a block kWarps chunks.
static __global__ void select_kernel(const void* x, int d_in, Dtype dtype, const Compensation c, int32_t* indices) {
  __shared__ __align__(16) uint16_t scratch[kWarps][kChunk];
  const int warp = threadIdx.x / 32, chunk = blockIdx.x * kWarps + warp, row = blockIdx.y;
  if (chunk * kChunk >= d_in) return;
  int32_t* to = indices + int64_t{row} * c.selected + int64_t{chunk} * c.k_chunk;
  select_row_chunk(x, row, d_in, chunk * kChunk, dtype, c, scratch[warp],
                   [&](int i, int channel, uint16_t) { to[i] = channel; });
}

// The way out of outputs that are written as they are.
struct Stores {
  void* out;
  int64_t first;
  Dtype dtype;

  __device__ __forceinline__ void expect(const int (&)[kEmitted]) {}
  __device__ __forceinline__ void put(const int (&outputs)[kEmitted], const float (&values)[kEmitted]) {
#pragma unroll
    for (int n = 0; n < kEmitted; ++n) {
      if (outputs[n] >= 0) store_element(out, first + outputs[n], dtype, values[n]);
    }
  }
};

// (batch, d_out) of given channels; block x of a row has a slice of the outputs. Indices outside 0..d_in-1 are skipped.
template <int kBits, bool kGrouped>
__global__ __launch_bounds__(kThreads) void residual_gemv_kernel(const void* x, int d_in, int d_out, Dtype dtype,
                                                                 const Compensation c, const int32_t* indices,
                                                                 void* out) {
  extern __shared__ __align__(16) float shared_sums[];
  const int64_t row = blockIdx.y;
  const int32_t* mine = indices + row * c.selected;
  const auto find = [&](int i, float& factor) {
    const int channel = __ldg(mine + i);
    if (channel < 0 || channel >= d_in) return -1;
    factor = row_factor(c, load_element(x, row * d_in + channel, dtype), channel);
    return channel;
  };
  // Found once and kept: a thread would find them again with every row, and wait for each.
  const bool kept = c.kept;
  float* values = shared_sums + 32 * kSumStride;
  uint16_t* channels = reinterpret_cast<uint16_t*>(values + c.selected);
  for (int i = 64 * threadIdx.x; c.residual_scale && !kGrouped && i < d_out; i += 64 * kThreads) {
    prefetch_far(c.residual_scale + i);
  }
  for (int i = threadIdx.x; kept && i < c.selected; i += kThreads) channels[i] = uint16_t(find(i, values[i]));
  __syncthreads();
  residual_gemv<kBits, kGrouped>(
      c, d_out, c.selected, blockIdx.x, gridDim.x, shared_sums,
      [&](int i, float& factor) {
        if (!kept) return find(i, factor);
        factor = values[i];
        return channels[i] == kMaxInputs - 1 ? -1 : int(channels[i]);
      },
      Stores{out, row * d_out, dtype});
}

}  // namespace decdec::cuda
