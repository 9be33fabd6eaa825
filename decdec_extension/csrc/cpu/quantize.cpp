// All candidate scales are steps of a 32nd of the largest one, so every border between two codes, of any candidate, is a
// whole multiple of a 64th of it. One histogram of |residual| in that unit, of counts and of sums, gives each candidate's
// error, and a row is read once instead of 32 times.

#include "cpu/quantize.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <vector>

namespace decdec::cpu {

namespace {

constexpr int kGrid = 32;
constexpr int kFraction = 17;    // bits below the point of a value in units
constexpr int kSumBits = 47;     // of a bin: its low bits sum fewer than 2^17 values below 2^30, those above count them
// A row with no more than this is zero: its scale vanishes in float16, and from 3.2e-30 down (at 8 bits) the number of units in
// a value of 1 would be infinite.
constexpr float kTiny = 1e-29f;
constexpr uint32_t kInfinity = 0x7F800000;

// Largest |value| of a row as its bits, which order as the values do and NaN above all.
uint32_t largest_bits(const float* row, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(row[i]) & 0x7FFFFFFF);
  return largest;
}

class RowQuantizer {
 public:
  RowQuantizer(int64_t d_in, int levels) : n_(d_in), levels_(levels), bins_(2 * kGrid * levels + 1), units_(d_in),
                                           even_(bins_), odd_(bins_), count_(bins_ + 1), sum_(bins_ + 1) {}

  // Returns the scale.
  float operator()(const float* row, float largest, int8_t* codes) {
    if (!(largest > kTiny)) {
      std::fill_n(codes, n_, 0);
      return 0;
    }
    const float step = largest / static_cast<float>(levels_);
    build_histogram(row, step);
    const int best = best_candidate();
    // From both ends towards the middle, which is how torch.linspace rounds.
    const float lowest = step / kGrid, stride = (step - lowest) / (kGrid - 1);
    const float scale = best < kGrid / 2 ? lowest + stride * best : step - stride * (kGrid - 1 - best);
    const float top = static_cast<float>(levels_);
    for (int64_t i = 0; i < n_; ++i) {
      codes[i] = static_cast<int8_t>(std::max(-top, std::min(top, std::nearbyint(row[i] / scale))));
    }
    return scale;
  }

 private:
  // count_[b] and sum_[b]: number and sum, in units, of the values of b units or more.
  void build_histogram(const float* row, float step) {
    const float per_value = 2 * kGrid / step * (1 << kFraction);
    const int32_t top = (bins_ - 1) << kFraction;
    for (int64_t i = 0; i < n_; ++i) {
      units_[i] = std::min(static_cast<int32_t>(std::fabs(row[i]) * per_value), top);
    }
    std::fill(even_.begin(), even_.end(), 0);
    std::fill(odd_.begin(), odd_.end(), 0);
    // Two histograms, lest neighbours that share a bin wait for each other.
    const uint64_t one = uint64_t{1} << kSumBits;
    for (int64_t i = 0; i < n_; ++i) (i % 2 ? odd_ : even_)[units_[i] >> kFraction] += one + units_[i];
    for (int b = bins_ - 1; b >= 0; --b) {
      const uint64_t bin = even_[b] + odd_[b];
      count_[b] = count_[b + 1] + static_cast<double>(bin >> kSumBits);
      sum_[b] = sum_[b + 1] + static_cast<double>(bin & (one - 1)) / (1 << kFraction);
    }
  }

  // The candidate of least squared error, the first of equals; it is candidate + 1 32nds of the largest.
  int best_candidate() const {
    int best = 0;
    double least = HUGE_VAL;
    for (int candidate = 1; candidate <= kGrid; ++candidate) {
      // sum((|r| - S q)^2) less sum(r^2), level by level: a value reaches level j at (2 j - 1) / 2 steps.
      double squares = 0, product = 0;
      for (int j = 1; j <= levels_; ++j) {
        const int border = (2 * j - 1) * candidate;
        squares += (2 * j - 1) * count_[border];
        product += sum_[border];
      }
      const double scale = 2.0 * candidate, error = scale * (scale * squares - 2 * product);
      if (error < least) least = error, best = candidate - 1;
    }
    return best;
  }

  int64_t n_;
  int levels_, bins_;
  std::vector<int32_t> units_;
  std::vector<uint64_t> even_, odd_;
  std::vector<double> count_, sum_;
};

}  // namespace

int64_t quantize_residual(const float* residual, int64_t d_out, int64_t d_in, int levels, int8_t* codes,
                          torch::headeronly::Half* scales) {
  std::atomic<int64_t> bad = -1;
  torch::stable::parallel_for(0, d_out, 1 + (1 << 15) / d_in, [&](int64_t from, int64_t to) {
    RowQuantizer quantize(d_in, levels);
    for (int64_t o = from; o < to; ++o) {
      const uint32_t largest = largest_bits(residual + o * d_in, d_in);
      if (largest >= kInfinity) {
        bad = o;
        return;
      }
      scales[o] = quantize(residual + o * d_in, std::bit_cast<float>(largest), codes + o * d_in);
    }
  });
  return bad;
}

}  // namespace decdec::cpu
