// A launch that may start before the kernel ahead of it has ended, from Hopper on.

#pragma once

#include "launch.h"

namespace decdec::cuda {

template <class Params>
void launch_early(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, const Params& params,
                  cudaStream_t stream, const char* what) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = current_device().early_launch ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), what);
}

}  // namespace decdec::cuda
