#include "attend.cuh"

namespace decdec::cuda {

template void launch_attend_dtype<Dtype::kBfloat16>(const AttendParams&, cudaStream_t);

}  // namespace decdec::cuda
