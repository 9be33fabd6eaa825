#include "attend.cuh"

namespace decdec::cuda {

template void launch_attend_dtype<Dtype::kHalf>(const AttendParams&, cudaStream_t);

}  // namespace decdec::cuda
