#include "../kernels/head.cuh"

#include <algorithm>

#include "decode.h"
#include "early.cuh"

namespace decdec::cuda {

namespace {

template <Dtype kDtype, bool kBytes>
void launch(const HeadParams& p, cudaStream_t stream) {
  constexpr int kBlocksPerSm = 4;
  const int bytes = p.width * 4, rows = kHeadWarps * kHeadRows;
  const auto kernel = head_kernel<kDtype, kBytes>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory of the head");
  const int blocks = std::min((p.rows + rows - 1) / rows, kBlocksPerSm * current_device().sms);
  launch_early(kernel, blocks, kHeadThreads, bytes, p, stream, "launch of the head");
}

}  // namespace

void launch_head(const HeadParams& p, cudaStream_t stream) {
  if (p.scale) {
    (p.dtype == Dtype::kHalf ? launch<Dtype::kHalf, true> : launch<Dtype::kBfloat16, true>)(p, stream);
  } else {
    (p.dtype == Dtype::kHalf ? launch<Dtype::kHalf, false> : launch<Dtype::kBfloat16, false>)(p, stream);
  }
}

}  // namespace decdec::cuda
