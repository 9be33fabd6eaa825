#include "../kernels/dequantize.cuh"

#include <stdexcept>
#include <string>

#include "launch.h"

namespace decdec::cuda {

namespace {

template <Format kFormat, int kBits, class Number>
void launch(const Weights& w, void* out, cudaStream_t stream) {
  const int64_t units = (w.d_in + kUnitInputs - 1) / kUnitInputs, tiles = (w.d_out + kTileRows - 1) / kTileRows;
  const int64_t warps = tiles * ((units + kDequantizeUnits - 1) / kDequantizeUnits);
  dequantize_kernel<kFormat, kBits, Number>
      <<<unsigned((warps + kWarps - 1) / kWarps), kThreads, 0, stream>>>(w, static_cast<Number*>(out));
  check(cudaGetLastError(), "launch of the dequantization");
}

template <Format kFormat, int kBits>
void launch_dtype(const Weights& w, void* out, Dtype dtype, cudaStream_t stream) {
  (dtype == Dtype::kFloat  ? launch<kFormat, kBits, float>
   : dtype == Dtype::kHalf ? launch<kFormat, kBits, __half>
                           : launch<kFormat, kBits, __nv_bfloat16>)(w, out, stream);
}

template <Format kFormat>
void launch_bits(int bits, const Weights& w, void* out, Dtype dtype, cudaStream_t stream) {
  switch (bits) {
    case 2:
      return launch_dtype<kFormat, 2>(w, out, dtype, stream);
    case 3:
      return launch_dtype<kFormat, 3>(w, out, dtype, stream);
    case 4:
      return launch_dtype<kFormat, 4>(w, out, dtype, stream);
    default:
      throw std::runtime_error("decdec: no CUDA kernel for " + std::to_string(bits) + "-bit weights");
  }
}

}  // namespace

void launch_dequantize(Format format, int bits, const Weights& weights, void* out, Dtype dtype, cudaStream_t stream) {
  (format == Format::kCodebook ? launch_bits<Format::kCodebook> : launch_bits<Format::kUniform>)(bits, weights, out,
                                                                                                 dtype, stream);
}

}  // namespace decdec::cuda
