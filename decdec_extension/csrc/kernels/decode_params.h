// What the launchers of the small kernels of a decoding step take: plain pointers and sizes, no torch. Meanings and
// shapes are those of decdec/decode_ops.py.

#pragma once

#include "params.h"

namespace decdec::cuda {

constexpr int kAttendWarps = 8;
constexpr int kAttendThreads = 32 * kAttendWarps;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxSplits = 32;  // blocks that share the cached places of a key/value head
constexpr int kMinPlaces = 64;  // of a block: fewer are not worth the meeting of blocks

constexpr int kShort = 256;     // live places up to which a block of its own for every query head is fastest

// Lanes that read a cached key together, eight numbers each.
constexpr int attend_lanes(int head_dim) { return head_dim <= 64 ? 8 : head_dim <= 128 ? 16 : 32; }

// Query heads that a block serves at once, of those that share a key/value head.
constexpr int attend_heads(int lanes_a_row, int sharing) {
  const int most = lanes_a_row == 32 ? 4 : 8;
  const int wanted = sharing <= 1 ? 1 : sharing <= 2 ? 2 : sharing <= 4 ? 4 : 8;
  return wanted < most ? wanted : most;
}

struct NormParams {
  const void* x;       // (rows, width)
  const void* weight;  // (width,)
  void* out;           // (rows, width)
  int rows;
  int width;  // a multiple of 8
  float eps;
  Dtype dtype;
};

struct GateParams {
  const void* x;  // (rows, 2 width): gate, then up
  void* out;      // (rows, width)
  int rows;
  int width;  // a multiple of 8
  Dtype dtype;
};

struct AttendParams {
  const void* qkv;           // (heads + 2 kv_heads, head_dim)
  const int64_t* position;   // (1,)
  const float* frequencies;  // (1 or 2, rotary / 2)
  const void* q_norm;        // (head_dim,) or null
  const void* k_norm;
  void* keys;  // (kv_heads, places, head_dim)
  void* values;
  void* out;           // (heads, head_dim)
  float* partials;     // (heads, splits, head_dim + 2): sums, their largest score, their weight
  uint32_t* counters;  // (kv_heads * groups,), all zero between calls
  int heads;
  int kv_heads;
  int groups;  // blocks' worth of query heads that share a key/value head
  int head_dim;
  int rotary;
  int64_t places;
  int64_t window;     // last places seen, 0: all
  int64_t long_from;  // positions from here on take the second row of frequencies
  int splits;
  int few;  // 1: for short sequences
  float rotary_scaling;
  float scaling;
  float eps;
  Dtype dtype;
};

struct ArgmaxParams {
  const float* x;       // (width,)
  int64_t* out;         // (1,)
  uint64_t* workspace;  // (2,), all zero between calls: the best so far, blocks that are done
  int width;
};

struct HeadParams {
  const void* x;       // (width,)
  const void* weight;  // (rows, width), of dtype or int8
  const float* scale;  // (rows,), of int8 weights, or null
  float* out;          // (rows,)
  int rows;
  int width;  // a multiple of 8, or of 16 for int8
  Dtype dtype;
};

}  // namespace decdec::cuda
