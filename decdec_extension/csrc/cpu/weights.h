// What the CPU kernels read: plain pointers and sizes, filled by the binding after its checks.

#pragma once

#include <cstdint>
#include <vector>

#include "cpu/convert.h"

namespace decdec::cpu {

constexpr int kTileRows = 16;
constexpr int kUnitInputs = 64;
constexpr int kHalfUnit = 32;  // inputs of one half of a unit, s of decdec/packing.py

// Base weights in the tile layout: with a codebook, or uniform if `codebook` is null.
struct BaseWeights {
  const uint32_t* qweight;  // (tiles, units, bits, 32)
  int bits;
  int64_t d_out, d_in;
  const int16_t* codebook;  // (d_out, 2**bits)
  const float* scale;       // (d_out,), of the codebook
  const Half* scales;       // (d_in / group_size, d_out), uniform
  const Half* zeros;
  int64_t group_size;

  int64_t units() const { return (d_in + kUnitInputs - 1) / kUnitInputs; }
  const uint32_t* unit(int64_t tile, int64_t index) const { return qweight + (tile * units() + index) * bits * 32; }
};

// A residual in the row layout. Its value is (unsigned code - offset) * step.
struct Residual {
  const uint8_t* rows;  // (d_in, row_bytes)
  const Half* scale;    // (d_in / group_size, d_out), null at 16 bits
  int bits;
  bool nested;
  int64_t d_out, d_in, row_bytes, group_size;

  float offset() const { return static_cast<float>(1 << (bits - 1)) - (nested ? 0.5f : 0.0f); }
  // What the scale is multiplied with to give the step: a nested code divides the base grid's step.
  float step_factor() const { return nested ? 1.0f / static_cast<float>(1 << bits) : 1.0f; }
  // At 3 bits a row holds the codes' high two bits in its first bytes, their low bits behind.
  int64_t high_bytes() const { return (d_out * 2 + 127) / 128 * 16; }
  // The unsigned code of one output in a row of 1 to 8 bits.
  int code(const uint8_t* row, int64_t o) const {
    const auto field = [o](const uint8_t* from, int width) {
      return from[o * width / 8] >> (o * width % 8) & ((1 << width) - 1);
    };
    return bits == 3 ? 2 * field(row, 2) + field(row + high_bytes(), 1) : field(row, bits);
  }
};

// The selected channels of every batch row, and the activations there.
struct Selected {
  std::vector<int32_t> indices;  // those of row b are begin[b] to begin[b + 1]
  std::vector<float> values;
  std::vector<int64_t> begin;
};

}  // namespace decdec::cpu
