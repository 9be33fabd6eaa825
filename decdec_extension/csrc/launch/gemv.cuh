// The launcher of one format and width; each is instantiated in a file of its own.

#pragma once

#include "../kernels/fused.cuh"
#include "launch.h"

namespace decdec::cuda {

template <Format kFormat, int kBits, int kRowPairs, Role kRole>
void launch_gemv_kernel(const GemvParams& params, int shared_bytes, cudaStream_t stream) {
  const auto kernel = gemv_kernel<kFormat, kBits, kRowPairs, kRole>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "shared memory of the GEMV");
  // All of it as shared memory, so that blocks of two kernels fit, and never another split between two kernels.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "shared memory of the GEMV");
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = params.plan.blocks + params.compensation.n_tb;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = params.plan.early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), "launch of the GEMV");
}

template <Format kFormat, int kBits, int kRowPairs>
void launch_gemv_rows(const GemvParams& params, int shared_bytes, cudaStream_t stream) {
  switch (role_of(params.compensation)) {
    case Role::kBase:
      return launch_gemv_kernel<kFormat, kBits, kRowPairs, Role::kBase>(params, shared_bytes, stream);
    case Role::kCompensated:
      return launch_gemv_kernel<kFormat, kBits, kRowPairs, Role::kCompensated>(params, shared_bytes, stream);
    case Role::kGrouped:
      return launch_gemv_kernel<kFormat, kBits, kRowPairs, Role::kGrouped>(params, shared_bytes, stream);
  }
}

// One width of one format: adding one is a line here, a line in dispatch.cu and a file.
template <Format kFormat, int kBits>
void launch_gemv_format(const GemvParams& params, int shared_bytes, cudaStream_t stream) {
  if (params.batch <= 2) {
    launch_gemv_rows<kFormat, kBits, 1>(params, shared_bytes, stream);
  } else {
    launch_gemv_rows<kFormat, kBits, kMaxBatch / 2>(params, shared_bytes, stream);
  }
}

}  // namespace decdec::cuda
