// Selection of the salient channels of one 1024-wide chunk by one warp, in registers.
//
// A lane holds 32 neighbouring channels as keys, larger for more salient ones: the bits of |x|, or the bucket of the
// paper's section 4.3. The count-th largest key is searched by bisection and usually met early, as soon as some key has
// exactly `count` keys at or above it. Ties are cut at the lowest channel; NaN and Inf have no key.

#pragma once

#include <type_traits>

#include "numbers.cuh"

namespace decdec::cuda {

constexpr int kLaneChannels = kChunk / 32;

// Channels that the chunk starting at `start` contributes, and all chunks before it (all but the last are full).
__device__ __forceinline__ int chunk_count(int d_in, int start, int k_chunk) {
  const int width = min(kChunk, d_in - start);
  return (k_chunk * width + kChunk - 1) / kChunk;
}

// Keys as integers, for centered values and buckets; -1 is none.
struct WideKeys {
  int keys[kLaneChannels];

  __device__ __forceinline__ int largest() const {
    int most = -1;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) most = max(most, keys[i]);
    return most;
  }
  __device__ __forceinline__ int count_at_least(int bound) const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) count += keys[i] >= bound;
    return count;
  }
  // Bit i: whether key i is at least `bound`, or equal to it.
  template <bool kEqual>
  __device__ __forceinline__ uint32_t mask(int bound) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) bits |= uint32_t(kEqual ? keys[i] == bound : keys[i] >= bound) << i;
    return bits;
  }
};

// The bits of |x| two to a register, compared as the numbers that they are: half the instructions. NaN, which no
// comparison holds for, is none. Pair: __half2 or __nv_bfloat162.
template <class Pair>
struct PackedKeys {
  static constexpr uint32_t kInfinity = std::is_same_v<Pair, __half2> ? 0x7c00 : 0x7f80;
  static constexpr uint32_t kUnit = std::is_same_v<Pair, __half2> ? 0x6400 : 0x4300;  // 1024 or 128
  Pair keys[kLaneChannels / 2];

  __device__ __forceinline__ static Pair pair(uint32_t bits) { return *reinterpret_cast<const Pair*>(&bits); }
  __device__ __forceinline__ static uint32_t bits(Pair pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

  __device__ __forceinline__ int largest() const {
    Pair most = keys[0];  // NaN only if both are
#pragma unroll
    for (int i = 1; i < kLaneChannels / 2; ++i) most = __hmax2(most, keys[i]);
    const int low = bits(most) & 0xffff, high = bits(most) >> 16, infinity = kInfinity;
    return max(low < infinity ? low : -1, high < infinity ? high : -1);
  }
  __device__ __forceinline__ int count_at_least(int bound) const {
    // Counted from the number whose last bit is worth one, so that the counts are the low bits of the sums.
    const Pair bounds = pair(bound * 0x10001u), start = pair(kUnit * 0x10001u);
    Pair counts[4] = {start, pair(0), pair(0), pair(0)};
#pragma unroll
    for (int i = 0; i < kLaneChannels / 2; ++i) counts[i % 4] = __hadd2(counts[i % 4], __hge2(keys[i], bounds));
    const uint32_t sum = bits(__hadd2(__hadd2(counts[0], counts[1]), __hadd2(counts[2], counts[3])));
    return (sum & 63) + (sum >> 16 & 63);
  }
  template <bool kEqual>
  __device__ __forceinline__ uint32_t mask(int bound) const {
    const Pair bounds = pair(bound * 0x10001u);
    uint32_t result = 0;
#pragma unroll
    for (int i = 0; i < kLaneChannels / 2; ++i) {
      const uint32_t both = kEqual ? __heq2_mask(keys[i], bounds) : __hge2_mask(keys[i], bounds);
      result |= (both & 1) << (2 * i) | both >> 31 << (2 * i + 1);
    }
    return result;
  }
};

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

// The sums of the lanes' counts, at most 32 each, of the lanes before and of all.
__device__ __forceinline__ void count_before(int count, int& before, int& all) {
  const uint32_t lower = (1u << threadIdx.x % 32) - 1;
  before = all = 0;
#pragma unroll
  for (int bit = 0; bit < 6; ++bit) {
    const uint32_t lanes = __ballot_sync(0xffffffff, count >> bit & 1);
    before += __popc(lanes & lower) << bit;
    all += __popc(lanes) << bit;
  }
}

// Bit i of the result: whether channel start + 32 lane + i is selected. `count` channels are, or all finite ones if
// fewer. `octave`: by how much keys of numbers differ that differ by a factor of 2, or 0.
template <class Keys>
__device__ __forceinline__ uint32_t select_chunk(const Keys& keys, int count, int octave) {
  const int largest = __reduce_max_sync(0xffffffff, keys.largest());
  // At least `count` keys reach low, or low is 0, and fewer reach high.
  int low = 0, high = largest + 1;
  int at_high = 0;                  // how many reach high
  bool met = false;
  // The first guess is an octave below the largest, where few of many normally distributed numbers are left.
  int middle = octave && largest > octave ? largest - octave : high / 2;
#pragma unroll 1
  while (!met && high - low > 1) {
    const int reached = __reduce_add_sync(0xffffffff, keys.count_at_least(middle));
    if (reached >= count) low = middle;
    if (reached < count) high = middle, at_high = reached;
    met = reached == count;
    middle = low + (high - low) / 2;
  }
  uint32_t chosen = keys.template mask<false>(met ? low : high);
  if (met) return chosen;
  uint32_t tied = keys.template mask<true>(low);
  // Of the keys equal to the count-th largest, those of the lowest channels.
  int before, all;
  count_before(__popc(tied), before, all);
  int room = count - at_high - before;
  for (; room > 0 && tied; --room, tied &= tied - 1) chosen |= tied & -tied;
  return chosen;
}

template <class Pair>
__device__ __forceinline__ uint32_t select_packed(const uint4 (&raw)[kLaneChannels / 8], int count, int octave) {
  PackedKeys<Pair> keys;
  const uint32_t* words = &raw[0].x;
  constexpr uint32_t infinity = PackedKeys<Pair>::kInfinity;
#pragma unroll
  for (int i = 0; i < kLaneChannels / 2; ++i) {
    const uint32_t magnitudes = words[i] & 0x7fff7fff;
    // Inf becomes NaN; NaN stays one.
    const uint32_t low = (magnitudes & 0xffff) == infinity, high = (magnitudes >> 16) == infinity;
    keys.keys[i] = keys.pair(magnitudes | low | high << 16);
  }
  return select_chunk(keys, count, octave);
}

// Calls write(place, channel, x) for `count` places of the chunk: selected channels ascending with the bits of x there,
// then -1.
template <class Write>
__device__ inline void write_selected(uint32_t chosen, int count, int start, const uint16_t* x, Write write) {
  const int lane = threadIdx.x % 32;
  int place, total;
  count_before(__popc(chosen), place, total);
  for (; chosen; chosen &= chosen - 1) {
    const int i = lane * kLaneChannels + __ffs(chosen) - 1;
    write(place++, start + i, x[i]);
  }
  for (int i = total + lane; i < count; i += 32) write(i, -1, 0);
}

// Selects for one chunk of one row by the calling warp. `scratch`: 2 KB of shared memory of the warp's own, aligned to
// 16 bytes.
template <class Write>
__device__ inline void select_row_chunk(const void* x, int row, int d_in, int start, Dtype dtype, const Compensation& c,
                                        uint16_t* scratch, Write write) {
  const int lane = threadIdx.x % 32, count = chunk_count(d_in, start, c.k_chunk);
  const uint16_t* from = static_cast<const uint16_t*>(x) + int64_t{row} * d_in + start;
  uint4* mine = reinterpret_cast<uint4*>(scratch) + lane * (kLaneChannels / 8);
  uint4 raw[kLaneChannels / 8];
  if (d_in % 8 != 0 || reinterpret_cast<uintptr_t>(x) % 16 != 0 || start + kChunk > d_in) {
    for (int i = lane; i < kChunk; i += 32) scratch[i] = start + i < d_in ? from[i] : 0x7fff;  // NaN: no key
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLaneChannels / 8; ++i) raw[i] = mine[i];
  } else {
#pragma unroll
    for (int i = 0; i < kLaneChannels / 8; ++i) {
      raw[i] = reinterpret_cast<const uint4*>(from)[lane * (kLaneChannels / 8) + i];
    }
#pragma unroll
    for (int i = 0; i < kLaneChannels / 8; ++i) mine[i] = raw[i];
  }
  uint32_t chosen;
  if (c.buckets || c.center) {
    WideKeys keys;
    const uint32_t* words = &raw[0].x;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int channel = min(start + lane * kLaneChannels + i, d_in - 1);  // beyond are NaN
      const uint16_t bits = words[i / 2] >> (i % 2 * 16) & 0xffff;
      keys.keys[i] = channel_key(to_float(bits, dtype) - (c.center ? __ldg(c.center + channel) : 0.f), c);
    }
    chosen = select_chunk(keys, count, c.buckets ? 0 : 1 << 23);
  } else if (dtype == Dtype::kHalf) {
    chosen = select_packed<__half2>(raw, count, 1 << 10);
  } else {
    chosen = select_packed<__nv_bfloat162>(raw, count, 1 << 7);
  }
  __syncwarp();
  write_selected(chosen, count, start, scratch, write);
}

}  // namespace decdec::cuda
