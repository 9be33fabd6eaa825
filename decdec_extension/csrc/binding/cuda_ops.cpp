// The CUDA implementations of decdec's ops: check arguments, fill plain structs, launch on the caller's stream.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "binding/compensation.h"
#include "binding/cuda_call.h"

namespace decdec {

namespace {

using cuda::Compensation;
using cuda::Dtype;
using cuda::Format;
using cuda::GemvParams;
using cuda::Weights;

void check_cuda_x(const char* op, const Tensor& x) {
  check_x(op, x);
  if (x.scalar_type() == ScalarType::Float) fail(op, "x", "float16 or bfloat16 on CUDA", describe(x));
  if (x.size(1) >= cuda::kMaxInputs) fail(op, "x", "fewer than 65536 inputs on CUDA", describe(x));
}

Weights codebook_weights(const char* op, const Tensor& qweight, const Tensor& codebook, const Tensor& scale,
                         int64_t d_in) {
  check_aligned(op, "qweight", qweight);
  check_aligned(op, "codebook", codebook);
  Weights w{};
  w.qweight = data<uint32_t>(qweight);
  w.codebook = data<int16_t>(codebook);
  w.scale = data<float>(scale);
  w.group_size = 1;
  w.d_out = static_cast<int>(codebook.size(0));
  w.d_in = static_cast<int>(d_in);
  return w;
}

Weights uniform_weights(const char* op, const Tensor& qweight, const Tensor& scales, const Tensor& zeros,
                        int64_t d_in) {
  check_aligned(op, "qweight", qweight);
  const int64_t pair = scales.size(1) % 2 == 0 ? 4 : 2;
  check_aligned(op, "scales", scales, pair);
  check_aligned(op, "zeros", zeros, pair);
  Weights w{};
  w.qweight = data<uint32_t>(qweight);
  w.scales = data<uint16_t>(scales);
  w.zeros = data<uint16_t>(zeros);
  w.group_size = static_cast<int>(d_in / scales.size(0));
  w.group_shift = std::has_single_bit(unsigned(w.group_size)) ? std::countr_zero(unsigned(w.group_size)) : -1;
  w.d_out = static_cast<int>(scales.size(1));
  w.d_in = static_cast<int>(d_in);
  return w;
}

void set_residual(const char* op, Compensation& c, const Tensor& residual, const OptionalTensor& scale, int64_t bits,
                  bool nested, const OptionalTensor& row_scale) {
  check_aligned(op, "residual", residual);
  c.residual = data<uint8_t>(residual);
  c.residual_scale = data<uint16_t>(scale);
  c.row_bytes = residual.size(1);
  c.bits = static_cast<int>(bits);
  c.groups = scale ? static_cast<int>(scale->size(0)) : 1;
  c.group_size = static_cast<int>(residual.size(0)) / c.groups;
  c.nested = nested && bits != 16;
  c.row_scale = data<float>(row_scale);
}

// Floors of the paper's 32 buckets, as decdec/reference.py has them.
void set_selection(Compensation& c, int64_t d_in, int64_t k_chunk, const std::optional<double>& b_0,
                   const std::optional<double>& b_15, const OptionalTensor& center) {
  c.k_chunk = static_cast<int>(k_chunk);
  c.selected = static_cast<int>(selected_channels(d_in, k_chunk));
  c.center = data<float>(center);
  c.buckets = b_0.has_value();
  if (!c.buckets) return;
  for (int i = 0; i < 15; ++i) c.floors[i] = static_cast<float>(*b_0 + (*b_15 - *b_0) * i / 15);
  c.floors[15] = static_cast<float>(*b_15);
  for (int i = 16; i < cuda::kBuckets; ++i) c.floors[i] = static_cast<float>(*b_15 * (31 - i) / 16);
}

Tensor empty_like_x(const Tensor& x, int64_t d_out) { return torch::stable::new_empty(x, {x.size(0), d_out}); }

void run(GemvParams& p, Format format, int64_t bits, const Tensor& x, const OptionalTensor& bias, Tensor& out,
         cudaStream_t stream) {
  p.x = x.data_ptr();
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.batch = static_cast<int>(x.size(0));
  p.dtype = dtype_of(x.scalar_type());
  if (p.batch > 0) cuda::launch_gemv(format, static_cast<int>(bits), p, stream);
}

// An RMSNorm that x passes on its way.
struct NormArguments {
  const OptionalTensor& weight;
  double eps;
};

void set_norm(const char* op, GemvParams& p, const Tensor& x, Format format, const NormArguments& norm) {
  if (!norm.weight) return;
  check_tensor(op, "norm", *norm.weight, x.scalar_type(), {x.size(1)}, x);
  if (x.size(1) % 8 != 0 || (format == Format::kUniform && (p.weights.group_size % 32 || p.weights.d_out % 2))) {
    fail(op, "norm", "None on CUDA for this shape", describe(*norm.weight));
  }
  check_aligned(op, "norm", *norm.weight);
  check_aligned(op, "x", x);  // without a norm read in smaller pieces where it has to be
  p.norm = norm.weight->data_ptr();
  p.norm_eps = static_cast<float>(norm.eps);
}

Tensor multiply(const char* op, const Tensor& x, Format format, int64_t bits, const Weights& weights,
                const OptionalTensor& bias, const NormArguments& norm) {
  check_bias(op, bias, weights.d_out, x);
  const OnDevice device(x);
  Tensor out = empty_like_x(x, weights.d_out);
  GemvParams p{};
  p.weights = weights;
  set_norm(op, p, x, format, norm);
  run(p, format, bits, x, bias, out, device.stream);
  return out;
}

Tensor multiply_compensated(const char* op, const Tensor& x, Format format, int64_t bits, const Weights& weights,
                            const OptionalTensor& bias, const CompensationArguments& a,
                            const NormArguments& norm) {
  check_bias(op, bias, weights.d_out, x);
  a.check(op, weights.d_in, weights.d_out, x);
  const OnDevice device(x);
  Tensor out = empty_like_x(x, weights.d_out);
  GemvParams p{};
  p.weights = weights;
  set_norm(op, p, x, format, norm);
  OptionalTensor workspace;  // held until the launch
  if (a.k_chunk > 0 && x.size(0) > 0) {
    Compensation& c = p.compensation;
    set_residual(op, c, a.residual, a.residual_scale, a.residual_bits, a.nested, a.row_scale);
    set_selection(c, weights.d_in, a.k_chunk, a.b_0, a.b_15, a.center);
    workspace = zeroed_workspace(op, a.workspace, x.size(0) * weights.d_out * 8, x);
    c.workspace = static_cast<uint64_t*>(workspace->data_ptr());
    c.n_tb = static_cast<int>(std::min<int64_t>(a.n_tb, cuda::kMaxFetchBlocks));
  }
  run(p, format, bits, x, bias, out, device.stream);
  return out;
}

Tensor dequantize(const Tensor& like, Format format, int64_t bits, const Weights& w, ScalarType dtype) {
  const OnDevice device(like);
  Tensor out = torch::stable::new_empty(like, {w.d_out, w.d_in}, dtype);
  cuda::launch_dequantize(format, static_cast<int>(bits), w, out.data_ptr(), dtype_of(dtype), device.stream);
  return out;
}

Tensor codebook_dequantize(const Tensor& qweight, const Tensor& codebook, const Tensor& scale, int64_t d_in,
                           ScalarType dtype) {
  const char* op = "codebook_dequantize";
  check_codebook(op, qweight, codebook, scale, d_in, qweight);
  check_out_dtype(op, dtype);
  return dequantize(qweight, Format::kCodebook, qweight.size(2), codebook_weights(op, qweight, codebook, scale, d_in),
                    dtype);
}

Tensor uniform_dequantize(const Tensor& qweight, const Tensor& scales, const Tensor& zeros, int64_t d_in,
                          ScalarType dtype) {
  const char* op = "uniform_dequantize";
  check_uniform(op, qweight, scales, zeros, d_in, qweight);
  check_out_dtype(op, dtype);
  return dequantize(qweight, Format::kUniform, qweight.size(2), uniform_weights(op, qweight, scales, zeros, d_in),
                    dtype);
}

Tensor residual_dequantize(const Tensor& residual, const OptionalTensor& residual_scale, int64_t residual_bits,
                           bool nested, int64_t d_out, ScalarType dtype) {
  const char* op = "residual_dequantize";
  if (residual.dim() != 2 || residual.size(0) < 1) fail(op, "residual", "uint8 (d_in, row bytes)", describe(residual));
  check_residual(op, residual, residual_scale, residual_bits, residual.size(0), d_out, residual);
  check_out_dtype(op, dtype);
  const OnDevice device(residual);
  Tensor out = torch::stable::new_empty(residual, {residual.size(0), d_out}, dtype);
  Compensation c{};
  set_residual(op, c, residual, residual_scale, residual_bits, nested, std::nullopt);
  cuda::launch_residual_dequantize(c, static_cast<int>(residual.size(0)), static_cast<int>(d_out), out.data_ptr(),
                                   dtype_of(dtype), device.stream);
  return out;
}

Tensor codebook_gemv(const Tensor& x, const Tensor& qweight, const Tensor& codebook, const Tensor& scale,
                     const OptionalTensor& bias, const OptionalTensor& norm, double norm_eps) {
  const char* op = "codebook_gemv";
  check_cuda_x(op, x);
  check_codebook(op, qweight, codebook, scale, x.size(1), x);
  return multiply(op, x, Format::kCodebook, qweight.size(2), codebook_weights(op, qweight, codebook, scale, x.size(1)),
                  bias, {norm, norm_eps});
}

Tensor uniform_gemv(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& zeros,
                    const OptionalTensor& bias, const OptionalTensor& norm, double norm_eps) {
  const char* op = "uniform_gemv";
  check_cuda_x(op, x);
  check_uniform(op, qweight, scales, zeros, x.size(1), x);
  return multiply(op, x, Format::kUniform, qweight.size(2), uniform_weights(op, qweight, scales, zeros, x.size(1)),
                  bias, {norm, norm_eps});
}

Tensor select_channels(const Tensor& x, int64_t k_chunk, const std::optional<double>& b_0,
                       const std::optional<double>& b_15, const OptionalTensor& center) {
  const char* op = "select_channels";
  check_cuda_x(op, x);
  check_selection(op, x, k_chunk, b_0, b_15, center);
  const OnDevice device(x);
  Compensation c{};
  set_selection(c, x.size(1), k_chunk, b_0, b_15, center);
  Tensor out = torch::stable::new_empty(x, {x.size(0), c.selected}, ScalarType::Int);
  if (out.numel() > 0) {
    cuda::launch_select(x.data_ptr(), static_cast<int>(x.size(0)), static_cast<int>(x.size(1)),
                        dtype_of(x.scalar_type()), c, static_cast<int32_t*>(out.data_ptr()), device.stream);
  }
  return out;
}

Tensor residual_gemv(const Tensor& x, const Tensor& indices, const Tensor& residual,
                     const OptionalTensor& residual_scale, int64_t residual_bits, bool nested, int64_t d_out,
                     const OptionalTensor& center, const OptionalTensor& row_scale) {
  const char* op = "residual_gemv";
  check_cuda_x(op, x);
  check_residual(op, residual, residual_scale, residual_bits, x.size(1), d_out, x);
  check_indices(op, indices, x);
  check_center(op, center, x);
  check_row_scale(op, row_scale, x);
  const OnDevice device(x);
  Tensor out = empty_like_x(x, d_out);
  Compensation c{};
  set_residual(op, c, residual, residual_scale, residual_bits, nested, row_scale);
  c.center = data<float>(center);
  c.selected = static_cast<int>(indices.size(1));
  if (out.numel() > 0) {
    cuda::launch_residual_gemv(x.data_ptr(), static_cast<int>(x.size(0)), static_cast<int>(x.size(1)),
                               static_cast<int>(d_out), dtype_of(x.scalar_type()), c, data<int32_t>(indices),
                               out.data_ptr(), device.stream);
  }
  return out;
}

Tensor codebook_gemv_compensated(const Tensor& x, const Tensor& qweight, const Tensor& codebook, const Tensor& scale,
                                 const OptionalTensor& bias, const Tensor& residual,
                                 const OptionalTensor& residual_scale, int64_t residual_bits, bool nested,
                                 int64_t k_chunk, const std::optional<double>& b_0, const std::optional<double>& b_15,
                                 const OptionalTensor& center, int64_t n_tb, const OptionalTensor& workspace,
                                 const OptionalTensor& norm, double norm_eps, const OptionalTensor& row_scale) {
  const char* op = "codebook_gemv_compensated";
  check_cuda_x(op, x);
  check_codebook(op, qweight, codebook, scale, x.size(1), x);
  return multiply_compensated(
      op, x, Format::kCodebook, qweight.size(2), codebook_weights(op, qweight, codebook, scale, x.size(1)), bias,
      {residual, residual_scale, residual_bits, nested, k_chunk, b_0, b_15, center, n_tb, workspace, row_scale},
      {norm, norm_eps});
}

Tensor uniform_gemv_compensated(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& zeros,
                                const OptionalTensor& bias, const Tensor& residual,
                                const OptionalTensor& residual_scale, int64_t residual_bits, bool nested,
                                int64_t k_chunk, const std::optional<double>& b_0, const std::optional<double>& b_15,
                                const OptionalTensor& center, int64_t n_tb, const OptionalTensor& workspace,
                                const OptionalTensor& norm, double norm_eps, const OptionalTensor& row_scale) {
  const char* op = "uniform_gemv_compensated";
  check_cuda_x(op, x);
  check_uniform(op, qweight, scales, zeros, x.size(1), x);
  return multiply_compensated(
      op, x, Format::kUniform, qweight.size(2), uniform_weights(op, qweight, scales, zeros, x.size(1)), bias,
      {residual, residual_scale, residual_bits, nested, k_chunk, b_0, b_15, center, n_tb, workspace, row_scale},
      {norm, norm_eps});
}

}  // namespace

}  // namespace decdec

STABLE_TORCH_LIBRARY_IMPL(decdec, CUDA, m) {
  m.impl("codebook_dequantize", TORCH_BOX(&decdec::codebook_dequantize));
  m.impl("uniform_dequantize", TORCH_BOX(&decdec::uniform_dequantize));
  m.impl("residual_dequantize", TORCH_BOX(&decdec::residual_dequantize));
  m.impl("codebook_gemv", TORCH_BOX(&decdec::codebook_gemv));
  m.impl("uniform_gemv", TORCH_BOX(&decdec::uniform_gemv));
  m.impl("select_channels", TORCH_BOX(&decdec::select_channels));
  m.impl("residual_gemv", TORCH_BOX(&decdec::residual_gemv));
  m.impl("codebook_gemv_compensated", TORCH_BOX(&decdec::codebook_gemv_compensated));
  m.impl("uniform_gemv_compensated", TORCH_BOX(&decdec::uniform_gemv_compensated));
}
