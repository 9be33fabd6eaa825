#include "plan.h"

#include <algorithm>

namespace decdec::cuda {

namespace {

constexpr int kReserved = 1024;      // bytes of shared memory a block that the driver keeps
constexpr int kMaxPartials = 16384;  // bytes of the sums of a block's segments
// From so many row tiles an SM on it takes two base blocks: there latency counts more than that the next kernel's
// blocks find room (H100, 3 bits: 4096x28672, 13.6 tiles, 18.1 us instead of 19.7; 4096x6144, 2.9 tiles, 6.9 instead of
// 6.4, in an earlier cut). Kernels that compensate have registers for one block (fused.cuh).
constexpr int kManyTiles = 8;

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Fits the work into blocks of at most `budget` bytes of shared memory and at most `max_panels` panels; false if it
// cannot be.
bool fit(GemvPlan& plan, int budget, Format format, int bits, const Weights& weights, int batch, int max_panels) {
  const int units = ceil_div(weights.d_in, kUnitInputs), tiles = ceil_div(weights.d_out, kTileRows);
  const int ring_bytes = stages(format, bits) * kWarps * (kBatchUnits * bits * 128 + side_bytes(format, bits));
  const int unit_bytes = batch * (kUnitBytes + (needs_sums(format, bits) ? kUnitSumBytes : 0));
  const int block_tiles = ceil_div(tiles, plan.blocks), tile_bytes = kTileRows * batch * 4;
  const int partial_bytes = (block_tiles + kWarps - 1) * tile_bytes;
  for (int panels = 1; panels <= max_panels; ++panels) {
    plan.panel_units = round_up(ceil_div(units, panels), kBatchUnits);
    plan.panels = ceil_div(units, plan.panel_units);
    const int carry_bytes = plan.panels == 1 ? 0 : block_tiles * tile_bytes;
    plan.x_sums = batch * plan.panel_units * kUnitBytes;
    plan.ring = plan.panel_units * unit_bytes;
    plan.partials = plan.ring + ring_bytes;
    plan.carry = plan.partials + partial_bytes;
    plan.facts = plan.carry + carry_bytes;
    plan.bytes = plan.facts + kFactBytes;
    if (plan.bytes <= budget) return true;
  }
  return false;
}

}  // namespace

std::optional<GemvPlan> plan_gemv(const Device& device, Format format, int bits, const Weights& weights, int batch,
                                  int n_tb) {
  const int units = ceil_div(weights.d_in, kUnitInputs), tiles = ceil_div(weights.d_out, kTileRows);
  const int most_tiles = std::max(kMaxPartials / (kTileRows * batch * 4) - kWarps + 1, 1);  // of a block
  GemvPlan plan{};
  plan.generic = format == Format::kUniform && (weights.group_size % 32 != 0 || weights.d_out % 2 != 0);
  plan.early = device.early_launch;
  const auto cut = [&](int blocks_per_sm, int shared_blocks, int max_panels) {
    plan.blocks = std::clamp(blocks_per_sm * device.sms - n_tb, std::max(1, ceil_div(tiles, most_tiles)), tiles);
    plan.tiles_each = tiles / plan.blocks;
    plan.tiles_more = tiles % plan.blocks;
    const int budget = std::min(device.shared_per_sm / shared_blocks - kReserved, device.shared_per_block);
    return fit(plan, budget, format, bits, weights, batch, max_panels);
  };
  if (n_tb == 0 && tiles >= kManyTiles * device.sms && batch <= 2 && cut(2, 2, 1)) return plan;
  // Half an SM's shared memory where it suffices, so that the next kernel's blocks find room while this one's run.
  if (cut(1, 2, 1) || plan.generic) return plan;  // the generic path needs none
  // Where the sums of a block's row tiles take too much of it, more blocks than run at once.
  for (int blocks_per_sm = 1; !cut(blocks_per_sm, 1, units); blocks_per_sm *= 2) {
    if (plan.blocks == tiles) return std::nullopt;
  }
  return plan;
}

}  // namespace decdec::cuda
