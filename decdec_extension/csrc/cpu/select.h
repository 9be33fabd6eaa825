// Channel selection (section 4.3 of the paper).

#pragma once

#include <cstdint>

namespace decdec::cpu {

// Lower bounds of the 32 buckets, descending.
struct Buckets {
  float floor[32];
  Buckets(double b_0, double b_15);
};

// Selects `count` >= 1 of `width` <= 1024 activations: those of largest |x|, or of the highest buckets if `buckets` is
// given. Writes their indices plus `first`, ascending, and -1 behind them where there are fewer finite activations.
void select_chunk(const float* x, int64_t width, int64_t count, const Buckets* buckets, int32_t first,
                  int32_t* indices);

}  // namespace decdec::cpu
