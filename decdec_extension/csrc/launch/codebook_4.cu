#include "gemv.cuh"

namespace decdec::cuda {

template void launch_gemv_format<Format::kCodebook, 4>(const GemvParams&, int, cudaStream_t);
template void launch_dequantize_format<Format::kCodebook, 4>(const Weights&, void*, Dtype, cudaStream_t);

}  // namespace decdec::cuda
