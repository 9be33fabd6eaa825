#include "gemv.cuh"

namespace decdec::cuda {

template void launch_gemv_format<Format::kCodebook, 3>(const GemvParams&, int, cudaStream_t);

}  // namespace decdec::cuda
