// Dequantization of base weights, for prefill.

#pragma once

#include "codes.cuh"

namespace decdec::cuda {

constexpr int kDequantizeUnits = 8;  // of a row tile that a warp takes: they share its table

// (d_out, d_in) of the weights. A lane has the codes of eight runs of four inputs in a unit; four lanes' runs lie side
// by side, so that every sector is written whole. Codebooks are looked up in shared memory, in the output's type.
template <Format kFormat, int kBits, class Number>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Weights w, Number* out) {
  constexpr int kEntries = kFormat == Format::kCodebook ? 1 << kBits : 1;
  constexpr int kRun = 4;
  struct alignas(kRun * sizeof(Number)) Run {
    Number numbers[kRun];
  };
  __shared__ Number tables[kWarps][kTileRows * kEntries];
  const int units = (w.d_in + kUnitInputs - 1) / kUnitInputs, tiles = (w.d_out + kTileRows - 1) / kTileRows;
  const int shares = (units + kDequantizeUnits - 1) / kDequantizeUnits;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (warp >= int64_t{tiles} * shares) return;
  const int lane = threadIdx.x % 32, tile = int(warp / shares), first = int(warp % shares) * kDequantizeUnits;
  Number* table = tables[threadIdx.x / 32];
  if constexpr (kFormat == Format::kCodebook) {
    for (int e = lane; e < kTileRows * kEntries; e += 32) {
      const int64_t o = min(tile * kTileRows + e / kEntries, w.d_out - 1);
      table[e] = Number(float(w.codebook[o * kEntries + e % kEntries]) * w.scale[o]);
    }
    __syncwarp();
  }
#pragma unroll 2
  for (int unit = first; unit < min(first + kDequantizeUnits, units); ++unit) {
    uint32_t words[kBits], groups[4];
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[i] = w.qweight[((int64_t{tile} * units + unit) * kBits + i) * 32 + lane];
    split_groups<kBits>(words, groups);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int q = n / 2, row = lane / 4 + q % 2 * 8, o = tile * kTileRows + row;
      const int i = unit * kUnitInputs + q / 2 * 32 + n % 2 * 16 + lane % 4 * kRun;
      if (o >= w.d_out || i >= w.d_in) continue;
      Run run;
      float scale = 0, zero = 0;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const int code = groups[q] >> (16 * (n % 2) + 4 * j) & 15;
        if constexpr (kFormat == Format::kCodebook) {
          run.numbers[j] = table[row * kEntries + code];
        } else {
          if (j == 0 || w.group_size % kRun) {  // else the run lies in one group
            const int64_t at = int64_t{min(i + j, w.d_in - 1) / w.group_size} * w.d_out + o;
            scale = half_to_float(__ldg(w.scales + at)), zero = half_to_float(__ldg(w.zeros + at));
          }
          run.numbers[j] = Number(scale * (code - zero));
        }
      }
      Number* to = out + int64_t{o} * w.d_in + i;
      if (w.d_in % kRun == 0) {
        *reinterpret_cast<Run*>(to) = run;
      } else {
        for (int j = 0; j < min(kRun, w.d_in - i); ++j) to[j] = run.numbers[j];
      }
    }
  }
}

}  // namespace decdec::cuda
