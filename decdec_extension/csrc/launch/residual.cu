#include <algorithm>

#include "../kernels/residual_kernels.cuh"
#include "launch.h"

namespace decdec::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kBlocks = 16;  // saturate the link; more only disturb each other (H100, PCIe 5)

template <int kBits>
void dequantize(const Compensation& c, int d_in, int d_out, void* out, Dtype dtype, cudaStream_t stream) {
  const int64_t threads = int64_t{d_in} * row_pieces(d_out, kBits);
  residual_dequantize_kernel<kBits>
      <<<unsigned((threads + kBlock - 1) / kBlock), kBlock, 0, stream>>>(c, d_in, d_out, out, dtype);
}

template <int kBits, bool kGrouped>
void gemv(const void* x, int batch, int d_in, int d_out, Dtype dtype, const Compensation& c, const int32_t* indices,
          void* out, cudaStream_t stream) {
  const auto kernel = residual_gemv_kernel<kBits, kGrouped>;
  Compensation own = c;
  own.kept = keeps_values(current_device(), c.selected, fetch_bytes(c.selected, true));
  const int bytes = fetch_bytes(own.kept ? c.selected : 0, own.kept);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "shared memory of the residual GEMV");
  const int pieces = row_pieces(d_out, kBits);
  const int slices = std::min(kBlocks, (pieces + slice_pieces(1, 1, kBits) - 1) / slice_pieces(1, 1, kBits));
  kernel<<<dim3(slices, batch), kThreads, bytes, stream>>>(x, d_in, d_out, dtype, own, indices, out);
}

}  // namespace

void launch_residual_dequantize(const Compensation& c, int d_in, int d_out, void* out, Dtype dtype,
                                cudaStream_t stream) {
  const auto run = [&](auto launch) { launch(c, d_in, d_out, out, dtype, stream); };
  switch (c.bits) {
    case 1:
      run(dequantize<1>);
      break;
    case 2:
      run(dequantize<2>);
      break;
    case 3:
      run(dequantize<3>);
      break;
    case 4:
      run(dequantize<4>);
      break;
    case 8:
      run(dequantize<8>);
      break;
    default:
      run(dequantize<16>);
  }
  check(cudaGetLastError(), "launch of the residual's dequantization");
}

void launch_select(const void* x, int batch, int d_in, Dtype dtype, const Compensation& c, int32_t* indices,
                   cudaStream_t stream) {
  const int blocks = (d_in + kChunk * kWarps - 1) / (kChunk * kWarps);
  select_kernel<<<dim3(blocks, batch), kThreads, 0, stream>>>(x, d_in, dtype, c, indices);
  check(cudaGetLastError(), "launch of the selection");
}

void launch_residual_gemv(const void* x, int batch, int d_in, int d_out, Dtype dtype, const Compensation& c,
                          const int32_t* indices, void* out, cudaStream_t stream) {
  const bool grouped = c.groups > 1;
  const auto run = [&](auto plain, auto with_groups) {
    (grouped ? with_groups : plain)(x, batch, d_in, d_out, dtype, c, indices, out, stream);
  };
  switch (c.bits) {
    case 1:
      run(gemv<1, false>, gemv<1, true>);
      break;
    case 2:
      run(gemv<2, false>, gemv<2, true>);
      break;
    case 3:
      run(gemv<3, false>, gemv<3, true>);
      break;
    case 4:
      run(gemv<4, false>, gemv<4, true>);
      break;
    case 8:
      run(gemv<8, false>, gemv<8, true>);
      break;
    default:
      run(gemv<16, false>, gemv<16, false>);
  }
  check(cudaGetLastError(), "launch of the residual GEMV");
}

}  // namespace decdec::cuda
