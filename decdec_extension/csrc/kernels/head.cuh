// The output head: one number of the vocabulary for every row of a 16-bit or 8-bit matrix, streamed once.

#pragma once

#include "decode_params.h"
#include "instructions.cuh"
#include "vectors.cuh"

namespace decdec::cuda {

constexpr int kHeadWarps = 8;    // of a block
constexpr int kHeadThreads = 32 * kHeadWarps;
constexpr int kHeadRows = 2;     // that a warp multiplies at once, with the same inputs
constexpr int kHeadUnroll = 4;   // 16-byte loads of each row on the way

// Sixteen signed bytes as floats: a byte moved into the low end of 2**23 is exact, and no conversion unit is needed.
__device__ __forceinline__ void unpack_bytes(const uint4& v, float (&to)[16]) {
  const uint32_t* words = &v.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t offset = words[i] ^ 0x80808080u;
#pragma unroll
    for (int j = 0; j < 4; ++j) to[4 * i + j] = __uint_as_float(permute(offset, 0x4b000000u, 0x7650 | j)) - 8388736.f;
  }
}

// Dynamic shared memory: `width` floats.
template <Dtype kDtype, bool kBytes>
__global__ void __launch_bounds__(kHeadThreads) head_kernel(const __grid_constant__ HeadParams p) {
  extern __shared__ __align__(16) float4 pieces[];  // piece q of load i at q * loads + i: no bank conflicts
  constexpr int kEach = kBytes ? 16 : 8;            // weights of a load
  const int loads = p.width / kEach;
  allow_next_kernel();
  wait_for_last_kernel();
  for (int i = threadIdx.x; i < p.width / 8; i += kHeadThreads) {
    float v[8];
    unpack<kDtype>(static_cast<const uint4*>(p.x)[i], v);
    constexpr int kPerLoad = kEach / 8;
    pieces[(i % kPerLoad * 2) * loads + i / kPerLoad] = make_float4(v[0], v[1], v[2], v[3]);
    pieces[(i % kPerLoad * 2 + 1) * loads + i / kPerLoad] = make_float4(v[4], v[5], v[6], v[7]);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int stride = gridDim.x * kHeadWarps * kHeadRows;
  for (int row = (blockIdx.x * kHeadWarps + threadIdx.x / 32) * kHeadRows; row < p.rows; row += stride) {
    const uint4* weights[kHeadRows];
#pragma unroll
    for (int r = 0; r < kHeadRows; ++r) {
      weights[r] = static_cast<const uint4*>(p.weight) + int64_t{min(row + r, p.rows - 1)} * loads;
    }
    float sum[kHeadRows] = {};
    for (int first = lane; first < loads; first += 32 * kHeadUnroll) {
      uint32_t raw[kHeadRows][kHeadUnroll][4];
#pragma unroll
      for (int u = 0; u < kHeadUnroll; ++u) {
#pragma unroll
        for (int r = 0; r < kHeadRows; ++r) {
          if (first + 32 * u < loads) load_streaming<4>(raw[r][u], weights[r] + first + 32 * u);
        }
      }
#pragma unroll
      for (int u = 0; u < kHeadUnroll; ++u) {
        const int at = first + 32 * u;
        if (at >= loads) break;
#pragma unroll
        for (int half = 0; half < kEach / 8; ++half) {
          const float4 a = pieces[2 * half * loads + at], b = pieces[(2 * half + 1) * loads + at];
          const float xs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
          for (int r = 0; r < kHeadRows; ++r) {
            const uint4 words = make_uint4(raw[r][u][0], raw[r][u][1], raw[r][u][2], raw[r][u][3]);
            if constexpr (kBytes) {
              float w[16];
              unpack_bytes(words, w);
#pragma unroll
              for (int j = 0; j < 8; ++j) sum[r] = fmaf(w[8 * half + j], xs[j], sum[r]);
            } else {
              float w[8];
              unpack<kDtype>(words, w);
#pragma unroll
              for (int j = 0; j < 8; ++j) sum[r] = fmaf(w[j], xs[j], sum[r]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kHeadRows; ++r) {
      const float v = warp_sum(sum[r]);
      if (lane == 0 && row + r < p.rows) p.out[row + r] = p.scale ? v * __ldg(p.scale + row + r) : v;
    }
  }
}

}  // namespace decdec::cuda
