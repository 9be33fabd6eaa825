// The GEMV kernel: the first n_tb blocks select and fetch, the others run the base GEMV, and whoever comes second to an output
// adds the two sums and writes it. No block waits for another, so any number of blocks may be resident.

#pragma once

#include "gemv.cuh"
#include "residual.cuh"
#include "select.cuh"

namespace decdec::cuda {

// An output's way out. In a compensated GEMV the two roles' sums meet in the workspace: whoever comes second takes the other's
// sum out and writes the output. One atomic exchange carries a sum and the mark that it is there, so neither fence nor counter
// is needed, and the sum of two numbers does not depend on their order.
struct Output {
  const GemvParams& p;
  int64_t at = -1;  // of a sum that was left, until finish() has seen what was there
  uint64_t found;
  float value;

  __device__ __forceinline__ explicit Output(const GemvParams& p) : p(p) {}

  __device__ __forceinline__ void put(int row, int o, float sum) {
    const int64_t place = int64_t{row} * p.weights.d_out + o;
    if (p.compensation.n_tb == 0) return store_element(p.out, place, p.dtype, sum);
    finish();
    at = place, value = sum;
    found = atomicExch(reinterpret_cast<unsigned long long*>(p.compensation.workspace) + place,
                       uint64_t{1} << 32 | __float_as_uint(sum));
  }

  // To be called some time after the last put: the exchange's answer takes about a microsecond.
  __device__ __forceinline__ void finish() {
    if (at >= 0 && found != 0) {
      store_element(p.out, at, p.dtype, value + __uint_as_float(uint32_t(found)));
      p.compensation.workspace[at] = 0;
    }
    at = -1;
  }
};

__device__ inline void compensate(const GemvParams& p, uint8_t* shared) {
  const Compensation& c = p.compensation;
  const int d_in = p.weights.d_in, d_out = p.weights.d_out;
  float* sums = reinterpret_cast<float*>(shared);
  const bool kept = c.selected <= kMaxValues;
  float* values = sums + 32 * kSumStride;
  uint16_t* channels = reinterpret_cast<uint16_t*>(values + (kept ? c.selected : 0));
  const int warp = threadIdx.x / 32;
  const auto value = [&](int row, int channel) {
    return load_element(p.x, int64_t{row} * d_in + channel, p.dtype) - (c.center ? __ldg(c.center + channel) : 0.f);
  };
  Output output(p);
  for (int row = 0; row < p.batch; ++row) {
    __syncthreads();
    for (int chunk = warp; chunk * kChunk < d_in; chunk += kWarps) {
      select_row_chunk(p.x, row, d_in, chunk * kChunk, p.dtype, c, reinterpret_cast<uint16_t*>(sums) + warp * kChunk,
                       [&](int i, int channel) {
                         channels[chunk * c.k_chunk + i] = uint16_t(channel);
                         if (kept) values[chunk * c.k_chunk + i] = channel < 0 ? 0.f : value(row, channel);
                       });
    }
    __syncthreads();
    with_residual_format(c, [&](auto bits, auto grouped) {
      residual_gemv<bits, grouped>(
          c, d_out, c.selected, blockIdx.x, c.n_tb, sums,
          [&](int i, float& factor) {
            const int channel = channels[i];
            if (channel == kMaxInputs - 1) return -1;
            factor = kept ? values[i] : value(row, channel);
            return channel;
          },
          [&](int o, float sum) { output.put(row, o, sum); });
    });
  }
  output.finish();
}

template <Format kFormat, int kBits, int kRowPairs>
__global__ __launch_bounds__(kThreads, 2) void gemv_kernel(const __grid_constant__ GemvParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const Compensation& c = p.compensation;
  allow_next_kernel();
  if (blockIdx.x < c.n_tb) {
    wait_for_last_kernel();
    compensate(p, shared);
    return;
  }
  const int block = blockIdx.x - c.n_tb;
  Output output(p);
  const auto emit = [&](int row, int o, float sum) {
    output.put(row, o, p.bias ? sum + load_element(p.bias, o, p.dtype) : sum);
  };
  if constexpr (kFormat == Format::kUniform) {
    if (p.plan.generic) {
      wait_for_last_kernel();
      generic_gemv<kBits>(p, block, emit);
      output.finish();
      return;
    }
  }
  base_gemv<kFormat, kBits, kRowPairs>(p, block, shared, emit);
  output.finish();
}

}  // namespace decdec::cuda
