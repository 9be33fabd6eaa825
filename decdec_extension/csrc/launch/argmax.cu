#include "../kernels/argmax.cuh"

#include <algorithm>

#include "decode.h"
#include "early.cuh"

namespace decdec::cuda {

void launch_argmax(const ArgmaxParams& p, cudaStream_t stream) {
  const int blocks = std::min((p.width + 4 * kThreads - 1) / (4 * kThreads), current_device().sms);
  launch_early(argmax_kernel, blocks, kThreads, 0, p, stream, "launch of the argmax");
}

}  // namespace decdec::cuda
