// Selection of the salient channels of one 1024-wide chunk by one warp, in registers.
//
// A lane holds 32 neighbouring channels as integer keys, larger for more salient ones: the bits of |x|, or the bucket
// of the paper's section 4.3. The count-th largest key is searched by bisection and usually met early, as soon as some
// key has exactly `count` keys at or above it. Ties are cut at the lowest channel; NaN and Inf have no key.

#pragma once

#include "primitives.cuh"

namespace decdec::cuda {

constexpr int kLaneChannels = kChunk / 32;

// Channels that the chunk starting at `start` contributes, and all chunks before it (all but the last are full).
__device__ __forceinline__ int chunk_count(int d_in, int start, int k_chunk) {
  const int width = min(kChunk, d_in - start);
  return (k_chunk * width + kChunk - 1) / kChunk;
}

__device__ __forceinline__ int count_at_least(const int (&keys)[kLaneChannels], int bound) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) count += keys[i] >= bound;
  return __reduce_add_sync(0xffffffff, count);
}

// The key of a centered value, or its bucket: the first of the descending floors that it reaches.
__device__ __forceinline__ int channel_key(float v, const Compensation& c) {
  const float magnitude = fabsf(v);
  if (!isfinite(magnitude)) return -1;
  if (!c.buckets) return __float_as_int(magnitude);
  int low = 0, high = kBuckets - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (magnitude >= c.floors[middle]) high = middle;
    else low = middle + 1;
  }
  return kBuckets - 1 - low;
}

// Keys of the lane's 32 channels. `scratch`: 2 KB of shared memory of the warp's own.
__device__ inline void load_keys(int (&keys)[kLaneChannels], const void* x, int row, int d_in, int start, Dtype dtype,
                                 const Compensation& c, uint16_t* scratch) {
  const int lane = threadIdx.x % 32;
  const uint16_t* from = static_cast<const uint16_t*>(x) + int64_t{row} * d_in + start;
  const uint4* mine = reinterpret_cast<const uint4*>(from) + lane * (kLaneChannels / 8);
  if (d_in % 8 != 0 || start + kChunk > d_in) {
    for (int i = lane; i < kChunk; i += 32) scratch[i] = start + i < d_in ? from[i] : 0x7fff;  // NaN: no key
    __syncwarp();
    mine = reinterpret_cast<const uint4*>(scratch) + lane * (kLaneChannels / 8);
  }
  const int infinity = dtype == Dtype::kHalf ? 0x7c00 : 0x7f80;
  uint4 raw[kLaneChannels / 8];
#pragma unroll
  for (int i = 0; i < kLaneChannels / 8; ++i) raw[i] = mine[i];
  const uint32_t* words = &raw[0].x;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const int magnitude = words[i / 2] >> (i % 2 * 16) & 0x7fff;  // ordered like |x|
    keys[i] = magnitude >= infinity ? -1 : magnitude;
  }
  __syncwarp();
  if (c.buckets || c.center) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int channel = start + lane * kLaneChannels + i;
      const uint16_t bits = words[i / 2] >> (i % 2 * 16) & 0xffff;
      if (keys[i] >= 0) {
        keys[i] = channel_key(to_float(bits, dtype) - (c.center ? __ldg(c.center + channel) : 0.f), c);
      }
    }
  }
}

// Bit i of the result: whether channel start + 32 lane + i is selected. `count` channels are, or all finite ones if
// fewer. `octave`: by how much keys of numbers differ that differ by a factor of 2, or 0.
__device__ inline uint32_t select_chunk(const int (&keys)[kLaneChannels], int count, int octave) {
  int largest = -1;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) largest = max(largest, keys[i]);
  largest = __reduce_max_sync(0xffffffff, largest);
  const int finite = count_at_least(keys, 0);
  int low = 0, high = largest + 1;  // at least `count` keys reach low, fewer reach high
  int at_high = 0;                  // how many reach high
  bool met = finite <= count;
  // The first guess is an octave below the largest, where few of many normally distributed numbers are left.
  int middle = octave && largest > octave ? largest - octave : high / 2;
  while (!met && high - low > 1) {
    const int reached = count_at_least(keys, middle);
    if (reached >= count) low = middle;
    if (reached < count) high = middle, at_high = reached;
    met = reached == count;
    middle = low + (high - low) / 2;
  }
  uint32_t chosen = 0;
  const int bound = met ? low : high;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) chosen |= uint32_t(keys[i] >= bound) << i;
  if (met) return chosen;
  uint32_t tied = 0;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) tied |= uint32_t(keys[i] == low) << i;
  // Of the keys equal to the count-th largest, those of the lowest channels.
  const int lane = threadIdx.x % 32;
  int before = __popc(tied);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffff, before, step);
    if (lane >= step) before += below;
  }
  int room = count - at_high - (before - __popc(tied));
  for (; room > 0 && tied; --room, tied &= tied - 1) chosen |= tied & -tied;
  return chosen;
}

// Calls write(place, channel) for `count` places of the chunk: selected channels ascending, then -1.
template <class Write>
__device__ inline void write_selected(uint32_t chosen, int count, int start, Write write) {
  const int lane = threadIdx.x % 32;
  int place = __popc(chosen);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffff, place, step);
    if (lane >= step) place += below;
  }
  const int total = __shfl_sync(0xffffffff, place, 31);
  place -= __popc(chosen);
  for (; chosen; chosen &= chosen - 1) write(place++, start + lane * kLaneChannels + __ffs(chosen) - 1);
  for (int i = total + lane; i < count; i += 32) write(i, -1);
}

// Selects for one chunk of one row by the calling warp.
template <class Write>
__device__ inline void select_row_chunk(const void* x, int row, int d_in, int start, Dtype dtype, const Compensation& c,
                                        uint16_t* scratch, Write write) {
  int keys[kLaneChannels];
  load_keys(keys, x, row, d_in, start, dtype, c, scratch);
  const int count = chunk_count(d_in, start, c.k_chunk);
  const int octave = c.buckets ? 0 : c.center ? 1 << 23 : dtype == Dtype::kHalf ? 1 << 10 : 1 << 7;
  write_selected(select_chunk(keys, count, octave), count, start, write);
}

}  // namespace decdec::cuda
