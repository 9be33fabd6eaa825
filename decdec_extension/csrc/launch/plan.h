// How a GEMV is cut for a device: one function lays out shared memory for the launch and the kernel.

#pragma once

#include "../kernels/params.h"

namespace decdec::cuda {

// What a device, or the part of it that the caller's context may use, offers.
struct Device {
  int sms;
  int shared_per_sm;     // bytes
  int shared_per_block;  // bytes, at most, with the opt-in
  bool early_launch;     // programmatic serialization: from Hopper on
};

// A base block an SM, less the n_tb blocks that compensate (0: none), or two where each gets many row tiles. `batch`
// rows. Throws std::runtime_error where nothing fits.
GemvPlan plan_gemv(const Device& device, Format format, int bits, const Weights& weights, int batch, int n_tb);

}  // namespace decdec::cuda
