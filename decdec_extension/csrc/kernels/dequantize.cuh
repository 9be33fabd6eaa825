// Dequantization of base weights, for prefill.

#pragma once

#include "gemv.cuh"

namespace decdec::cuda {

// (d_out, d_in) of the weights; one warp a unit, a lane the 32 codes of its words.
template <Format kFormat, int kBits>
__global__ void dequantize_kernel(const Weights w, void* out, Dtype dtype) {
  const int units = (w.d_in + kUnitInputs - 1) / kUnitInputs, tiles = (w.d_out + kTileRows - 1) / kTileRows;
  const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (warp >= int64_t{tiles} * units) return;
  const int lane = threadIdx.x % 32, tile = int(warp / units), unit = int(warp % units);
  uint32_t words[kBits], groups[4];
#pragma unroll
  for (int i = 0; i < kBits; ++i) words[i] = w.qweight[(warp * kBits + i) * 32 + lane];
  split_groups<kBits>(words, groups);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int o = tile * kTileRows + lane / 4 + q % 2 * 8;
    if (o >= w.d_out) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int i = unit * kUnitInputs + q / 2 * 32 + j / 4 * 16 + lane % 4 * 4 + j % 4;
      if (i >= w.d_in) continue;
      store_element(out, int64_t{o} * w.d_in + i, dtype, weight_of<kFormat, kBits>(w, o, i, groups[q] >> (4 * j) & 15));
    }
  }
}

}  // namespace decdec::cuda
