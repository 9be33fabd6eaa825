#include "cpu/select.h"

#include <algorithm>
#include <bit>

namespace decdec::cpu {

Buckets::Buckets(double b_0, double b_15) {
  for (int i = 0; i < 15; ++i) floor[i] = static_cast<float>(b_0 + (b_15 - b_0) * i / 15);
  floor[15] = static_cast<float>(b_15);
  for (int i = 16; i < 32; ++i) floor[i] = static_cast<float>(b_15 * (31 - i) / 16);
}

namespace {

constexpr int64_t kChunk = 1024;
constexpr uint32_t kInfinity = 0x7F800000;

// Ranks of the activations: larger ones are selected first, 0 (NaN and Inf) never. Returns the bits a rank may need.
int rank_all(const float* x, int64_t width, const Buckets* buckets, uint32_t* rank) {
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFF;
    rank[i] = magnitude < kInfinity ? magnitude + 1 : 0;
  }
  if (!buckets) return 31;
  uint32_t bucket_rank[kChunk];
  for (int64_t i = 0; i < width; ++i) bucket_rank[i] = 0;
  // From the lowest bucket up, so that the first floor reached, counted from b_0, has the last word.
  for (int b = 31; b >= 0; --b) {
    const uint32_t floor_rank = (std::bit_cast<uint32_t>(buckets->floor[b]) & 0x7FFFFFFF) + 1;
    for (int64_t i = 0; i < width; ++i) bucket_rank[i] = rank[i] >= floor_rank ? 32 - b : bucket_rank[i];
  }
  std::copy_n(bucket_rank, width, rank);
  return 6;
}

int64_t count_at_least(const uint32_t* rank, int64_t width, uint32_t bound) {
  int32_t count = 0;
  for (int64_t i = 0; i < width; ++i) count += rank[i] >= bound;
  return count;
}

}  // namespace

void select_chunk(const float* x, int64_t width, int64_t count, const Buckets* buckets, int32_t first,
                  int32_t* indices) {
  uint32_t rank[kChunk];
  const int bits = rank_all(x, width, buckets, rank);
  // The count-th largest rank, bit by bit from the top: branch-free counting beats a partial sort of 1024 keys.
  uint32_t cut = 0;
  for (int bit = bits - 1; bit >= 0; --bit) {
    const uint32_t bound = cut | (1u << bit);
    if (count_at_least(rank, width, bound) >= count) cut = bound;
  }
  cut = std::max(cut, 1u);
  int64_t ties = count - count_at_least(rank, width, cut + 1);  // places left for ranks equal to the cut
  int64_t kept = 0;
  for (int64_t i = 0; i < width && kept < count; ++i) {
    if (rank[i] > cut || (rank[i] == cut && ties-- > 0)) indices[kept++] = first + static_cast<int32_t>(i);
  }
  std::fill(indices + kept, indices + count, -1);
}

}  // namespace decdec::cpu
