// Attention of one token: q/k norm, rotary positions, its key and value into the cache, and the live places attended.
//
// A block serves query heads that share a key/value head, for a slice of the places; the slices follow the live length,
// which is read on the device, so one captured launch serves any length and blocks without a slice leave at once.
// Groups of lanes walk over places, each with its own running softmax; these are merged in the block, and the blocks'
// in the last of them to finish. Earlier keys and values are fetched while the kernel ahead still makes the new ones.

#pragma once

#include "decode_params.h"
#include "instructions.cuh"
#include "vectors.cuh"

namespace decdec::cuda {

static_assert(kMaxSplits == 32);  // a lane for every part

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, mask));
  return v;
}

// Sine and cosine of any angle a position makes. Short, since a step's kernels live in one instruction cache: the half
// turns are taken off exactly (pi in two parts), and the rest is small enough for the fast functions.
__device__ __forceinline__ void sine_and_cosine(float angle, float* sine, float* cosine) {
  const float turns = rintf(angle * 0.318309886f);
  const float rest = fmaf(turns, 8.74227766e-8f, fmaf(turns, -3.14159274f, angle));
  const float sign = int(turns) % 2 ? -1.f : 1.f;
  *sine = sign * __sinf(rest), *cosine = sign * __cosf(rest);
}

// What a lane turns: pairs lane, lane + 32, ... of a head.
template <int kTurns>
struct Turn {
  float cosine[kTurns], sine[kTurns];

  __device__ __forceinline__ Turn(const AttendParams& p, int64_t position) {
    const int pairs = p.rotary / 2;
    const float* frequencies = p.frequencies + (position >= p.long_from ? pairs : 0);
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      const int i = threadIdx.x % 32 + 32 * n;
      if (i >= pairs) break;
      sine_and_cosine(float(position) * __ldg(frequencies + i), sine + n, cosine + n);
      sine[n] *= p.rotary_scaling, cosine[n] *= p.rotary_scaling;
    }
  }
};

// One head's vector by one warp: read, normed if there is a norm, turned by the position; left in `to` as floats, zeros
// beyond it.
template <Dtype kDtype, int kWide, int kTurns>
__device__ __forceinline__ void prepare_head(const AttendParams& p, int from_head, const void* norm,
                                             const Turn<kTurns>& turn, float* to) {
  const int lane = threadIdx.x % 32, pairs = p.rotary / 2;
  float square = 0;
#pragma unroll
  for (int d = lane; d < kWide; d += 32) {
    const float v = d < p.head_dim ? load_element(p.qkv, int64_t{from_head} * p.head_dim + d, kDtype) : 0.f;
    to[d] = v;
    square = fmaf(v, v, square);
  }
  if (norm) {
    const float factor = rsqrtf(warp_sum(square) / float(p.head_dim) + p.eps);
#pragma unroll 1
    for (int d = lane; d < p.head_dim; d += 32) {
      to[d] = rounded<kDtype>(rounded<kDtype>(to[d] * factor) * load_element(norm, d, kDtype));
    }
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kTurns; ++n) {
    const int i = lane + 32 * n;
    if (i >= pairs) break;
    const float a = to[i], b = to[pairs + i];
    to[i] = a * turn.cosine[n] - b * turn.sine[n];
    to[pairs + i] = b * turn.cosine[n] + a * turn.sine[n];
  }
  __syncwarp();
}

// kLanes lanes read a place's key or value, eight numbers each; kHeads query heads are served; kAtOnce keys and values
// are on the way to a lane.
template <Dtype kDtype, int kLanes, int kHeads, int kAtOnce>
__global__ void __launch_bounds__(kAttendThreads, kHeads <= 4 ? 2 : 1)
    attend_kernel(const __grid_constant__ AttendParams p) {
  constexpr int kWide = 8 * kLanes;  // head_dim, rounded up
  constexpr int kRows = 32 / kLanes;
  constexpr bool kEarlyKeys = kAtOnce <= 4;  // the next keys are fetched while these are weighed, if registers allow
  __shared__ float queries[kHeads][kWide];
  __shared__ float merged[kAttendWarps][kHeads][kWide];
  __shared__ float2 weights[kAttendWarps][kHeads];  // largest score, weight
  __shared__ float key[kWide];
  __shared__ __align__(16) uint16_t new_key[kWide], new_value[kWide];
  __shared__ float shares[kHeads][kMaxSplits];
  __shared__ bool last_block;
  allow_next_kernel();

  // Position and earlier places are not the kernel ahead's work.
  const int64_t position = *p.position;
  const int live = int(min(position + 1, p.places)), begin = int(p.window ? max(live - p.window, int64_t{0}) : 0);
  const int span = live - begin;
  const int slice = max(kMinPlaces, ((span + p.splits - 1) / p.splits + 15) / 16 * 16);
  const int active = (span + slice - 1) / slice;
  const int split = blockIdx.x;
  if (split >= active) return;
  const int first = begin + split * slice, end = min(first + slice, live);

  const int kv_head = blockIdx.y / p.groups, sharing = p.heads / p.kv_heads;
  const int head = kv_head * sharing + blockIdx.y % p.groups * kHeads;
  const int heads = min(kHeads, sharing - blockIdx.y % p.groups * kHeads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = p.head_dim;
  uint16_t* keys = static_cast<uint16_t*>(p.keys) + int64_t{kv_head} * p.places * dim;
  uint16_t* values = static_cast<uint16_t*>(p.values) + int64_t{kv_head} * p.places * dim;
  const int piece = lane % kLanes;
  const bool reads = 8 * piece < dim;
  const uint16_t *own_keys = keys + 8 * piece, *own_values = values + 8 * piece;
  const int known = reads ? min(end, live - 1) : 0;  // places before it are in the cache
  constexpr int kStride = kAttendWarps * kRows;
  int start = first + warp * kRows + lane / kLanes;
  uint4 k[kAtOnce] = {}, v[kAtOnce] = {};
  const auto fetch = [&](bool some_keys, bool some_values) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      // Where none is, what was there stays: finite, and weighed with 0.
      const int place = start + u * kStride;
      if (place >= known) continue;
      const int64_t at = int64_t{place} * dim;
      if (some_keys) k[u] = *reinterpret_cast<const uint4*>(own_keys + at);
      if (some_values) v[u] = *reinterpret_cast<const uint4*>(own_values + at);
    }
  };
  fetch(true, true);
  const Turn<(kWide / 2 + 31) / 32> turn(p, position);
  wait_for_last_kernel();

  // A warp for every query head, one for the new key, one for the new value; every group of heads writes the same.
#pragma unroll 1
  for (int h = warp; h < kHeads + 2; h += kAttendWarps) {
    const int64_t newest = int64_t{live - 1} * dim;
    if (h == kHeads + 1) {
      for (int d = lane; d < (end == live ? dim : 0); d += 32) {
        new_value[d] = static_cast<const uint16_t*>(p.qkv)[int64_t{p.heads + p.kv_heads + kv_head} * dim + d];
        values[newest + d] = new_value[d];
      }
      continue;
    }
    const bool is_key = h == kHeads;
    if (is_key ? end != live : h >= heads) continue;
    float* to = is_key ? key : queries[h];
    prepare_head<kDtype, kWide>(p, is_key ? p.heads + kv_head : head + h, is_key ? p.k_norm : p.q_norm, turn, to);
    for (int d = lane; d < dim; d += 32) {
      if (is_key) {
        store_element(new_key, d, kDtype, to[d]);
        keys[newest + d] = new_key[d];
      } else {
        to[d] *= p.scaling * 1.44269504f;  // scores are powers of two from here on
      }
    }
  }
  __syncthreads();

  float query[kHeads][8], sum[kHeads][8], largest[kHeads], weight[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    largest[h] = -1e30f, weight[h] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) query[h][j] = queries[h][8 * piece + j], sum[h][j] = 0;
  }
  while (start - lane / kLanes < end) {
    const int now = start;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      // Not where another block has it: these would be whatever lay there, and even weighed with 0 a NaN stays one.
      if (now + u * kStride == live - 1 && end == live && reads) {
        k[u] = *reinterpret_cast<const uint4*>(new_key + 8 * piece);
        v[u] = *reinterpret_cast<const uint4*>(new_value + 8 * piece);
      }
    }
    float score[kAtOnce][kHeads];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float numbers[8];
      unpack<kDtype>(k[u], numbers);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) dot = fmaf(query[h][j], numbers[j], dot);
        score[u][h] = dot;
      }
    }
    start += kStride * kAtOnce;
    if (kEarlyKeys) fetch(true, false);
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) score[u][h] += __shfl_xor_sync(0xffffffff, score[u][h], mask);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float top = largest[h];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (now + u * kStride >= end) score[u][h] = -INFINITY;
        top = fmaxf(top, score[u][h]);
      }
      const float shrink = exp2f(largest[h] - top);
      largest[h] = top;
      weight[h] *= shrink;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[h][j] *= shrink;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) weight[h] += score[u][h] = exp2f(score[u][h] - top);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float numbers[8];
      unpack<kDtype>(v[u], numbers);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[h][j] = fmaf(score[u][h], numbers[j], sum[h][j]);
      }
    }
    fetch(!kEarlyKeys, true);
  }

  // The groups of lanes of a warp, then the warps.
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int mask = kLanes; mask < 32; mask *= 2) {
      const float other = __shfl_xor_sync(0xffffffff, largest[h], mask), top = fmaxf(largest[h], other);
      const float mine = exp2f(largest[h] - top), theirs = exp2f(other - top);
      largest[h] = top;
      weight[h] = weight[h] * mine + __shfl_xor_sync(0xffffffff, weight[h], mask) * theirs;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum[h][j] = sum[h][j] * mine + __shfl_xor_sync(0xffffffff, sum[h][j], mask) * theirs;
      }
    }
    if (lane < kLanes) {
#pragma unroll
      for (int j = 0; j < 8; ++j) merged[warp][h][8 * piece + j] = sum[h][j];
    }
    if (lane == 0) weights[warp][h] = make_float2(largest[h], weight[h]);
  }
  __syncthreads();
  float* parts = p.partials;
  const int part = dim + 2;
  for (int i = threadIdx.x; i < heads * dim; i += kAttendThreads) {
    const int h = kHeads == 1 ? 0 : i / dim, d = i - h * dim;
    float top = -1e30f, total = 0, share = 0;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) top = fmaxf(top, weights[w][h].x);
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      const float factor = exp2f(weights[w][h].x - top);
      total += merged[w][h][d] * factor, share += weights[w][h].y * factor;
    }
    if (active == 1) {
      store_element(p.out, int64_t{head} * dim + i, kDtype, __fdividef(total, share));
    } else {
      float* to = parts + (int64_t{head + h} * p.splits + split) * part;
      to[d] = total;
      if (d == 0) to[dim] = top, to[dim + 1] = share;
    }
  }
  if (active == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last_block = atomicAdd(p.counters + blockIdx.y, 1u) == active - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last_block) return;
  if (threadIdx.x == 0) p.counters[blockIdx.y] = 0;
  // A warp a head finds the shares of its parts, one a lane; then all parts are read at once.
  for (int h = warp; h < heads; h += kAttendWarps) {
    const float* from = parts + (int64_t{head + h} * p.splits + lane) * part + dim;
    const float score = lane < active ? __ldcg(from) : -INFINITY, weight = lane < active ? __ldcg(from + 1) : 0.f;
    const float factor = exp2f(score - warp_max(score));
    shares[h][lane] = factor / warp_sum(weight * factor);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * dim; i += kAttendThreads) {
    const int h = kHeads == 1 ? 0 : i / dim, d = i - h * dim;
    const float* from = parts + int64_t{head + h} * p.splits * part + d;
    float total = 0;
#pragma unroll 16
    for (int s = 0; s < active; ++s) total = fmaf(__ldcg(from + s * part), shares[h][s], total);
    store_element(p.out, int64_t{head} * dim + i, kDtype, total);
  }
}

}  // namespace decdec::cuda
