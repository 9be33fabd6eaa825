// How a GEMV is cut for a device: one function lays out shared memory for the launch and the kernel.

#pragma once

#include <optional>

#include "../kernels/params.h"

namespace decdec::cuda {

// What a device, or the part of it that the caller's context may use, offers.
struct Device {
  int sms;
  int shared_per_sm;     // bytes
  int shared_per_block;  // bytes, at most, with the opt-in
  bool early_launch;     // programmatic serialization: from Hopper on
};

// A base block an SM, less the n_tb blocks that compensate (0: none); without these and for up to two rows, two where each
// gets many row tiles. None where `batch` rows do not fit into the shared memory of a block; one row always does.
std::optional<GemvPlan> plan_gemv(const Device& device, Format format, int bits, const Weights& weights, int batch,
                                  int n_tb);

}  // namespace decdec::cuda
