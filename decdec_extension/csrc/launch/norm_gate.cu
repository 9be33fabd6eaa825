#include "../kernels/norm_gate.cuh"

#include <algorithm>

#include "decode.h"
#include "early.cuh"

namespace decdec::cuda {

void launch_norm(const NormParams& p, cudaStream_t stream) {
  const int threads = std::min((p.width / 8 + 31) / 32 * 32, kNormThreads);
  launch_early(p.dtype == Dtype::kHalf ? norm_kernel<Dtype::kHalf> : norm_kernel<Dtype::kBfloat16>, p.rows, threads, 0,
               p, stream, "launch of the norm");
}

void launch_gate(const GateParams& p, cudaStream_t stream) {
  constexpr int kBlock = 128;  // small, so that a wide MLP's numbers spread over many SMs
  const dim3 grid((p.width / 8 + kBlock - 1) / kBlock, p.rows);
  launch_early(p.dtype == Dtype::kHalf ? gate_kernel<Dtype::kHalf> : gate_kernel<Dtype::kBfloat16>, grid, kBlock, 0, p,
               stream, "launch of the gate");
}

}  // namespace decdec::cuda
