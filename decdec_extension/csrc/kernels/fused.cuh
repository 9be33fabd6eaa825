// The GEMV kernel: the first n_tb blocks select and fetch, the others run the base GEMV, and whoever comes second to an
// output adds the two sums and writes it. No block waits for another, so any number of blocks may be resident.

#pragma once

#include "gemv.cuh"
#include "residual.cuh"
#include "select.cuh"

namespace decdec::cuda {

// The way out of a thread's outputs of one row, up to kPlaces at a time. In a compensated GEMV the two roles' sums meet
// in the workspace: whoever comes second takes the other's sum out and writes the output. One atomic exchange carries a
// sum and the mark that it is there, so neither fence nor counter is needed, and the sum of two numbers does not depend
// on their order. Negative outputs are none.
template <int kPlaces>
struct Outputs {
  const GemvParams& p;
  int row = 0;
  uint64_t found[kPlaces] = {};

  __device__ __forceinline__ explicit Outputs(const GemvParams& p) : p(p) {}

  __device__ __forceinline__ unsigned long long* place(int output) const {
    return reinterpret_cast<unsigned long long*>(p.compensation.workspace) + int64_t{row} * p.weights.d_out + output;
  }

  // Looks whether the other role's sums of the outputs that are put next are there, for the role that mostly comes
  // second: an exchange takes about a microsecond, a look while the own sums are still being made costs nothing.
  __device__ __forceinline__ void expect(const int (&outputs)[kPlaces]) {
#pragma unroll
    for (int n = 0; n < kPlaces; ++n) {
      if (outputs[n] >= 0) found[n] = load_relaxed(place(outputs[n]));
    }
  }

  __device__ __forceinline__ void put(const int (&outputs)[kPlaces], const float (&values)[kPlaces]) {
#pragma unroll
    for (int n = 0; n < kPlaces; ++n) {
      if (outputs[n] >= 0 && found[n] == 0) {
        found[n] = atomicExch(place(outputs[n]), uint64_t{1} << 32 | __float_as_uint(values[n]));
      }
    }
#pragma unroll
    for (int n = 0; n < kPlaces; ++n) {
      if (outputs[n] >= 0 && found[n] != 0) {
        store_short(p.out, int64_t{row} * p.weights.d_out + outputs[n], p.dtype,
                    values[n] + __uint_as_float(uint32_t(found[n])));
        *place(outputs[n]) = 0;
      }
      found[n] = 0;
    }
  }
};

// The selected channels' product for row `row`, whose activations are x, and its way out. `values`: what they are
// multiplied with, or null.
template <int kBits, bool kGrouped>
__device__ __forceinline__ void fetch(const GemvParams& p, int row, const uint16_t* x, float* sums,
                                      const uint16_t* channels, const float* values) {
  const Compensation& c = p.compensation;
  Outputs<kEmitted> out(p);
  out.row = row;
  residual_gemv<kBits, kGrouped>(
      c, p.weights.d_out, c.selected, blockIdx.x, c.n_tb, sums,
      [&](int i, float& factor) {
        const int channel = channels[i];
        if (channel == kMaxInputs - 1) return -1;
        factor = values ? values[i] : row_factor(c, load_element(x, channel, p.dtype), channel);
        return channel;
      },
      out);
}

// A function of its own: of all bits' instances in one the compiler spills a thousand bytes a thread.
template <int kBits>
__device__ __noinline__ void fetch_apart(const GemvParams& p, int row, const uint16_t* x, float* sums,
                                         const uint16_t* channels, const float* values) {
  fetch<kBits, true>(p, row, x, sums, channels, values);
}

template <bool kGrouped>
__device__ inline void compensate(const GemvParams& p, uint8_t* shared) {
  const Compensation& c = p.compensation;
  const int d_in = p.weights.d_in;
  float* sums = reinterpret_cast<float*>(shared);
  const bool kept = c.kept;
  float* values = sums + 32 * kSumStride;
  uint16_t* channels = reinterpret_cast<uint16_t*>(values + (kept ? c.selected : 0));
  const int warp = threadIdx.x / 32;
  uint16_t* own = reinterpret_cast<uint16_t*>(shared + normed_bytes(c.selected, kept, 0));
  // What will be wanted when the channels are known: scales, offsets.
#pragma unroll 1
  for (int i = 32 * (blockIdx.x * kThreads + threadIdx.x); i < d_in; i += 32 * c.n_tb * kThreads) {
    if (c.row_scale) prefetch_far(c.row_scale + i);
    if (c.center) prefetch_far(c.center + i);
  }
  const int64_t scales = c.residual_scale ? int64_t{c.groups} * p.weights.d_out : 0;
#pragma unroll 1
  for (int64_t i = 64 * (blockIdx.x * kThreads + threadIdx.x); i < scales; i += 64 * c.n_tb * kThreads) {
    prefetch_far(c.residual_scale + i);
  }
  wait_for_last_kernel();
#pragma unroll 1
  for (int i = 32 * threadIdx.x; i < p.batch * d_in; i += 32 * kThreads) {  // while the selection's code is fetched
    prefetch(static_cast<const uint16_t*>(p.x) + i);
  }
  for (int row = 0; row < p.batch; ++row) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + int64_t{row} * d_in;
    __syncthreads();
    if (p.norm) {
      const float factor = norm_factor(p, row_squares(p, row), sums);
      for (int i = threadIdx.x; i < d_in / 8; i += kThreads) {
        reinterpret_cast<uint4*>(own)[i] = normed(reinterpret_cast<const uint4*>(x)[i],
                                                  __ldg(static_cast<const uint4*>(p.norm) + i), factor, p.dtype);
      }
      x = own;
      __syncthreads();
    }
    for (int chunk = warp; chunk * kChunk < d_in; chunk += kWarps) {
      select_row_chunk(x, 0, d_in, chunk * kChunk, p.dtype, c, reinterpret_cast<uint16_t*>(sums) + warp * kChunk,
                       [&](int i, int channel, uint16_t bits) {
                         channels[chunk * c.k_chunk + i] = uint16_t(channel);
                         if (kept) values[chunk * c.k_chunk + i] = to_float(bits, p.dtype);
                       });
    }
    __syncthreads();
    if (kept && (c.center || c.row_scale)) {  // loaded side by side, which a lane's channels above would not be
      for (int i = threadIdx.x; i < c.selected; i += kThreads) {
        if (channels[i] != kMaxInputs - 1) values[i] = row_factor(c, values[i], channels[i]);
      }
      __syncthreads();
    }
    with_residual_bits<kGrouped>(c.bits, [&](auto bits) {
      if constexpr (kGrouped) fetch_apart<bits>(p, row, x, sums, channels, kept ? values : nullptr);
      else fetch<bits, false>(p, row, x, sums, channels, kept ? values : nullptr);
    });
  }
}

// The base role: its blocks come after those that compensate. emit(row, o, value) takes every output once.
template <Format kFormat, int kBits, int kRowPairs, class Emit>
__device__ __forceinline__ void multiply(const GemvParams& p, int block, uint8_t* shared, Emit emit) {
  const auto with_bias = [&](int row, int o, float sum) {
    emit(row, o, p.bias ? sum + load_element(p.bias, o, p.dtype) : sum);
  };
  if constexpr (kFormat == Format::kUniform) {
    if (p.plan.generic) {
      wait_for_last_kernel();
      return generic_gemv<kBits>(p, block, with_bias);
    }
  }
  base_gemv<kFormat, kBits, kRowPairs>(p, block, shared, with_bias);
}

// Registers for two blocks an SM, of this kernel or of the next one, which begins early. A kernel that compensates would
// spill, to a first-level cache that shared memory leaves little of: d at k_chunk 8 took 16.3 us instead of 14.7 (H100).
template <Format kFormat, int kBits, int kRowPairs, Role kRole>
__global__ __launch_bounds__(kThreads, kRowPairs == 1 && kRole == Role::kBase ? 2 : 1) void gemv_kernel(
    const __grid_constant__ GemvParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  allow_next_kernel();
  if constexpr (kRole != Role::kBase) {
    const int n_tb = p.compensation.n_tb;
    if (blockIdx.x < n_tb) {
      return compensate<kRole == Role::kGrouped>(p, shared);
    }
    Outputs<1> out(p);
    multiply<kFormat, kBits, kRowPairs>(p, blockIdx.x - n_tb, shared, [&](int row, int o, float value) {
      out.row = row;
      out.put({o}, {value});
    });
  } else {
    multiply<kFormat, kBits, kRowPairs>(p, blockIdx.x, shared, [&](int row, int o, float value) {
      store_short(p.out, int64_t{row} * p.weights.d_out + o, p.dtype, value);
    });
  }
}

}  // namespace decdec::cuda
