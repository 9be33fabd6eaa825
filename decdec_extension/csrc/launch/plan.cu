#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace decdec::cuda {

namespace {

constexpr int kMaxBlocksPerSm = 2;  // as the kernel's registers allow
constexpr int kReserved = 1024;     // bytes of shared memory a block that the driver keeps
// Batches of weights on the way, as many as keep the memory busy: more only delay what queues behind them. With 7
// batches of four units 3-bit 4096x28672 took 28 us, with 3 20 us (H100, 2026-11-22). Scales that come with every batch
// count as well.
constexpr int stages_of(Format format, int bits) {
  return format == Format::kCodebook && batch_units(format, bits) == 4 ? 3 : 2;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Fits the work into blocks of at most `budget` bytes of shared memory; false if it cannot be.
bool fit(GemvPlan& plan, int budget, Format format, int bits, const Weights& weights, int batch) {
  const int units = ceil_div(weights.d_in, kUnitInputs), tiles = ceil_div(weights.d_out, kTileRows);
  const bool uniform = format == Format::kUniform;
  const int align = uniform ? 2 : 1;  // a batch of units begins where a pair of units does: scales are read in pairs
  const int buffer_bytes = batch_units(format, bits) * bits * 128 + side_bytes(format, bits);
  const int stage_bytes = kWarps * (buffer_bytes + 8);  // with its barrier
  const int unit_bytes = kWarps * batch * (kUnitBytes + (uniform ? kUnitSumBytes : 0));
  const int partial_bytes = 2 * kWarps * kTileRows * batch * 4;
  const int whole = round_up(ceil_div(units, kWarps), align);
  for (int panels = 1;; ++panels) {
    plan.units_per_warp = round_up(ceil_div(whole, panels), align);
    plan.panels = ceil_div(units, kWarps * plan.units_per_warp);
    const int carry_bytes = plan.panels == 1 ? 0 : ceil_div(tiles, plan.blocks) * kTileRows * batch * 4;
    const int rest = budget - plan.units_per_warp * unit_bytes - partial_bytes - carry_bytes;
    plan.stages = std::min(rest / stage_bytes, stages_of(format, bits));
    if (plan.stages < 2) {
      if (plan.units_per_warp > align) continue;
      return false;
    }
    plan.x_sums = kWarps * batch * plan.units_per_warp * kUnitBytes;
    plan.ring = plan.units_per_warp * unit_bytes;
    plan.partials = plan.ring + plan.stages * kWarps * buffer_bytes;
    plan.carry = plan.partials + partial_bytes;
    plan.barriers = plan.carry + carry_bytes;
    plan.bytes = plan.barriers + plan.stages * kWarps * 8;
    return true;
  }
}

}  // namespace

GemvPlan plan_gemv(const Device& device, Format format, int bits, const Weights& weights, int batch, int n_tb) {
  const int tiles = ceil_div(weights.d_out, kTileRows);
  GemvPlan plan{};
  plan.generic = format == Format::kUniform && (weights.group_size % 32 != 0 || weights.d_out % 2 != 0);
  plan.early = device.early_launch;
  for (int resident = kMaxBlocksPerSm; resident > 0; --resident) {
    const int budget = std::min(device.shared_per_sm / resident - kReserved, device.shared_per_block);
    plan.blocks = std::max(std::min(resident * device.sms - n_tb, tiles), 1);
    // A kernel that started early waits for its activations anyhow and may fetch weights meanwhile. But behind those
    // the activations come late, which costs more where a block has one row tile only (H100, 3 bits: 4096x6144 6.9 us
    // instead of 7.6, but 4096x4096 5.7 instead of 5.3).
    plan.weights_first = plan.early && tiles > plan.blocks;
    if (fit(plan, budget, format, bits, weights, batch)) return plan;
  }
  throw std::runtime_error("decdec: the device has too little shared memory for this layer and batch");
}

}  // namespace decdec::cuda
