// The launcher of attention for one dtype; each is instantiated in a file of its own.

#pragma once

#include <algorithm>

#include "../kernels/attend.cuh"
#include "decode.h"
#include "early.cuh"

namespace decdec::cuda {

template <Dtype kDtype, int kLanes>
void launch_attend_lanes(const AttendParams& p, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    launch_early(kernel, dim3(p.splits, p.kv_heads * p.groups), kAttendThreads, 0, p, stream, "launch of attention");
  };
  constexpr int kAtOnce = 4;
  constexpr int kAllAtOnce = 8;  // more take so many registers that the next kernel cannot start beside it
  if (p.few) return run(attend_kernel<kDtype, kLanes, 1, kAllAtOnce>);
  switch (attend_heads(kLanes, p.heads / p.kv_heads)) {
    case 1:
      return run(attend_kernel<kDtype, kLanes, 1, kAtOnce>);
    case 2:
      return run(attend_kernel<kDtype, kLanes, 2, kAtOnce>);
    case 4:
      return run(attend_kernel<kDtype, kLanes, 4, kAtOnce / 2>);
    default:
      if constexpr (kLanes < 32) run(attend_kernel<kDtype, kLanes, 8, kAtOnce / 2>);
  }
}

template <Dtype kDtype>
void launch_attend_dtype(const AttendParams& p, cudaStream_t stream) {
  switch (attend_lanes(p.head_dim)) {
    case 8:
      return launch_attend_lanes<kDtype, 8>(p, stream);
    case 16:
      return launch_attend_lanes<kDtype, 16>(p, stream);
    default:
      return launch_attend_lanes<kDtype, 32>(p, stream);
  }
}

}  // namespace decdec::cuda
