#include "gemv.cuh"

namespace decdec::cuda {

template void launch_gemv_format<Format::kUniform, 4>(const GemvParams&, int, cudaStream_t);

}  // namespace decdec::cuda
