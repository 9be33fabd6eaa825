// What the launchers take: plain pointers and sizes, no torch. Meanings, layouts and shapes are those of decdec/ops.py.

#pragma once

#include <cstdint>

namespace decdec::cuda {

enum class Format : int { kCodebook, kUniform };

constexpr int kMaxBatch = 8;
constexpr int kTileRows = 16;
constexpr int kUnitInputs = 64;
constexpr int kChunk = 1024;
constexpr int kBuckets = 32;
constexpr int kWarps = 16;  // of every block of the GEMV kernels
constexpr int kThreads = 32 * kWarps;

// Units that a warp copies and multiplies at a time, a batch.
constexpr int kBatchUnits = 4;

// Weight buffers of a warp. Of codebooks of up to three bits, three: gu 16.6 us instead of 17.6 (H100). Where a third would
// leave the next kernel's blocks no room, two: uniform weights of four bits, qkv 6.1 us instead of 6.5.
constexpr int stages(Format format, int bits) { return format == Format::kCodebook && bits <= 3 ? 3 : 2; }

// Bytes of a buffer's side data: a row tile's codebook, or the scales and zero points of a batch.
constexpr int side_bytes(Format format, int bits) {
  return format == Format::kCodebook ? kTileRows * (2 << bits)
                                     : kBatchUnits * kUnitInputs / 32 * 4 * kTileRows;
}
// Whether the products need sums of the activations' digits.
constexpr bool needs_sums(Format format, int bits) { return format == Format::kUniform || bits == 4; }
constexpr int kUnitBytes = 192;           // of the activations' digits of a unit of one batch row (activations.cuh)
constexpr int kUnitSumBytes = 16;         // and of their sums
constexpr int kFactBytes = 4 * kMaxBatch * (1 + kWarps) + 12;  // of Facts
constexpr int kSumStride = kThreads + 1;  // of a fetching block's sums: neighbouring outputs lie in different banks
constexpr int kMaxFetchBlocks = 4096;     // more have no slice of their own
constexpr int kMaxValues = 8192;          // of selected channels that a fetching block keeps; more are read again

// Shared memory of a fetching block: sums, and the selected channels, with their values if these are kept.
constexpr int fetch_bytes(int selected, bool kept) {
  return 32 * kSumStride * 4 + (kept ? 4 * selected : 0) + 2 * selected;
}
// And of its activations, where it norms them itself.
constexpr int normed_bytes(int selected, bool kept, int d_in) {
  return (fetch_bytes(selected, kept) + 15) / 16 * 16 + 2 * d_in;
}
constexpr int kMaxInputs =
    1 << 16;  // a selected channel is a 16-bit number in shared memory; 65535 marks an empty place

// 16-bit vectors of the caller: activations, bias, outputs.
enum class Dtype : int { kHalf, kBfloat16, kFloat };

// Base weights of a (d_out, d_in) matrix in the tile layout of decdec/packing.py.
struct Weights {
  const uint32_t* qweight;
  const int16_t* codebook;  // (d_out, 2**bits), codebook weights
  const float* scale;       // (d_out,), codebook weights
  const uint16_t* scales;   // float16 (groups, d_out), uniform weights
  const uint16_t* zeros;
  int group_size;
  int group_shift;  // its logarithm, or -1 if it is no power of two
  int d_out;
  int d_in;
};

// How a launch is cut; made by plan_gemv, the same numbers for host and device.
struct GemvPlan {
  int blocks;       // base blocks, each with its run of row tiles:
  int tiles_each;   // so many,
  int tiles_more;   // the first so many blocks one more
  int panels;       // the inputs are multiplied panel by panel, so that a panel's activations fit in shared memory
  int panel_units;  // inputs of a panel, in units of 64
  int early;        // 1: launched so that it may start before the kernel ahead of it has ended
  int generic;      // uniform weights whose groups the tensor-core path does not serve
  // Offsets in dynamic shared memory, bytes.
  int x_sums;
  int ring;
  int partials;
  int carry;
  int facts;  // Facts (activations.cuh)
  int bytes;
};

// The residual and its selection.
struct Compensation {
  const uint8_t* residual;         // (d_in, row_bytes), GPU memory or mapped host memory
  const uint16_t* residual_scale;  // float16 (groups, d_out)
  const float* row_scale;          // (d_in,), what the rows as they are stored are multiplied with, or null
  const float* center;             // (d_in,) or null
  uint64_t* workspace;             // (batch, d_out), all zero between calls
  int64_t row_bytes;
  int bits;
  int groups;
  int group_size;  // inputs that share a row of residual_scale
  int nested;
  int k_chunk;
  int selected;  // channels of one row: all chunks' counts
  int kept;      // 1: a fetching block keeps their values in shared memory; set by the launchers
  int n_tb;      // blocks that compensate
  int buckets;   // 1: the paper's selection by `floors`, 0: exact
  float floors[kBuckets];
};

// What a kernel does besides the base GEMV: nothing, or compensate with residuals of one scale an output, or of one for
// every group of inputs.
enum class Role { kBase, kCompensated, kGrouped };

// Residuals of 16 bits have no scales.
inline Role role_of(const Compensation& c) {
  if (c.n_tb == 0) return Role::kBase;
  return c.groups <= 1 || c.bits == 16 ? Role::kCompensated : Role::kGrouped;
}

struct GemvParams {
  Weights weights;
  const void* x;     // (batch, d_in)
  const void* bias;  // (d_out,) or null
  void* out;         // (batch, d_out)
  const void* norm;  // (d_in,), weight of an RMSNorm that x passes first, or null
  float norm_eps;
  int batch;
  Dtype dtype;
  GemvPlan plan;
  Compensation compensation;  // n_tb = 0: base GEMV alone
};

}  // namespace decdec::cuda
