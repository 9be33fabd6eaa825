// Launchers of the kernels: plain params and a stream. They throw std::runtime_error where CUDA refuses.

#pragma once

#include <cuda_runtime_api.h>

#include "../kernels/params.h"
#include "plan.h"

namespace decdec::cuda {

// Throws with CUDA's own words if `status` is an error.
void check(cudaError_t status, const char* what);

// Facts of the device that is current; its SMs are those of the current context where that is a green one.
Device current_device();

// Whether a fetching block keeps the values of so many selected channels, which with them needs `bytes` of shared memory.
bool keeps_values(const Device& device, int selected, int bytes);

// Base GEMV, compensated where params.compensation.n_tb > 0; of more than kMaxBatch rows, or where fewer do not fit, in several
// launches. Sets params.plan and params.compensation.kept itself.
void launch_gemv(Format format, int bits, GemvParams params, cudaStream_t stream);

// out: (d_out, d_in) of dtype.
void launch_dequantize(Format format, int bits, const Weights& weights, void* out, Dtype dtype, cudaStream_t stream);

// out: (d_in, d_out) of dtype.
void launch_residual_dequantize(const Compensation& c, int d_in, int d_out, void* out, Dtype dtype,
                                cudaStream_t stream);

// indices: (batch, c.selected).
void launch_select(const void* x, int batch, int d_in, Dtype dtype, const Compensation& c, int32_t* indices,
                   cudaStream_t stream);

// out: (batch, d_out) of dtype; c.selected channels a row.
void launch_residual_gemv(const void* x, int batch, int d_in, int d_out, Dtype dtype, const Compensation& c,
                          const int32_t* indices, void* out, cudaStream_t stream);

}  // namespace decdec::cuda
