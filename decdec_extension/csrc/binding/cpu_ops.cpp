// The CPU implementations of decdec's ops: check arguments, fill plain structs, run csrc/cpu.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "binding/compensation.h"
#include "cpu/dequantize.h"
#include "cpu/gemv.h"
#include "cpu/quantize.h"
#include "cpu/select.h"

namespace decdec {

namespace {

using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

cpu::BaseWeights codebook_weights(const Tensor& qweight, const Tensor& codebook, const Tensor& scale, int64_t d_in) {
  cpu::BaseWeights w{};
  w.qweight = data<uint32_t>(qweight);
  w.bits = static_cast<int>(qweight.size(2));
  w.d_out = codebook.size(0);
  w.d_in = d_in;
  w.codebook = data<int16_t>(codebook);
  w.scale = data<float>(scale);
  return w;
}

cpu::BaseWeights uniform_weights(const Tensor& qweight, const Tensor& scales, const Tensor& zeros, int64_t d_in) {
  cpu::BaseWeights w{};
  w.qweight = data<uint32_t>(qweight);
  w.bits = static_cast<int>(qweight.size(2));
  w.d_out = scales.size(1);
  w.d_in = d_in;
  w.scales = data<cpu::Half>(scales);
  w.zeros = data<cpu::Half>(zeros);
  w.group_size = d_in / scales.size(0);
  return w;
}

cpu::Residual packed_residual(const Tensor& residual, const OptionalTensor& scale, int64_t bits, bool nested,
                              int64_t d_out) {
  cpu::Residual r{};
  r.rows = data<uint8_t>(residual);
  r.scale = scale ? data<cpu::Half>(*scale) : nullptr;
  r.bits = static_cast<int>(bits);
  r.nested = nested;
  r.d_in = residual.size(0);
  r.d_out = d_out;
  r.row_bytes = residual.size(1);
  r.group_size = scale ? r.d_in / scale->size(0) : r.d_in;
  return r;
}

// x in float32, less the center if there is one.
std::vector<float> float_activations(const Tensor& x, const OptionalTensor& center) {
  const int64_t d_in = x.size(1);
  std::vector<float> floats(x.numel());
  cpu::load_floats(x.data_ptr(), x.scalar_type(), 0, x.numel(), floats.data());
  if (center) {
    const float* c = data<float>(*center);
    for (int64_t row = 0; row < x.size(0); ++row) {
      for (int64_t i = 0; i < d_in; ++i) floats[row * d_in + i] -= c[i];
    }
  }
  return floats;
}

// Writes the indices of all rows, (batch, selected_channels(d_in, k_chunk)).
void select_all(const float* x, int64_t batch, int64_t d_in, int64_t k_chunk, const std::optional<double>& b_0,
                const std::optional<double>& b_15, int32_t* indices) {
  std::optional<cpu::Buckets> buckets;
  if (b_0) buckets.emplace(*b_0, *b_15);
  const int64_t chunks = k_chunk ? ceil_div(d_in, kChunk) : 0, selected = selected_channels(d_in, k_chunk);
  torch::stable::parallel_for(0, batch * chunks, 8, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t row = i / chunks, chunk = i % chunks, first = chunk * kChunk;
      const int64_t width = std::min(kChunk, d_in - first);
      cpu::select_chunk(x + row * d_in + first, width, ceil_div(k_chunk * width, kChunk), buckets ? &*buckets : nullptr,
                        static_cast<int32_t>(first), indices + row * selected + chunk * k_chunk);
    }
  });
}

// The non-negative ones of (batch, k) indices with what the residual's rows there are multiplied with.
cpu::Selected gather(const float* x, int64_t batch, int64_t d_in, const int32_t* indices, int64_t k,
                     const OptionalTensor& row_scale) {
  const float* factor = row_scale ? data<float>(*row_scale) : nullptr;
  cpu::Selected selected;
  selected.indices.reserve(batch * k);
  selected.values.reserve(batch * k);
  selected.begin.push_back(0);
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      const int32_t index = indices[row * k + i];
      if (index < 0) continue;
      selected.indices.push_back(index);
      selected.values.push_back(x[row * d_in + index] * (factor ? factor[index] : 1.0f));
    }
    selected.begin.push_back(static_cast<int64_t>(selected.indices.size()));
  }
  return selected;
}

Tensor empty_like_x(const Tensor& x, int64_t d_out) { return torch::stable::new_empty(x, {x.size(0), d_out}); }

// out = base product + residual product + bias, for the parts that there are.
Tensor multiply(const Tensor& x, const cpu::BaseWeights* base, const OptionalTensor& bias,
                const cpu::Residual* residual, const cpu::Selected* selected, int64_t d_out) {
  cpu::Gemv g{};
  g.batch = x.size(0);
  g.d_in = x.size(1);
  g.d_out = d_out;
  std::vector<float> permuted;
  if (base) {
    permuted.resize(g.batch * ceil_div(g.d_in, kUnitInputs) * kUnitInputs);
    cpu::permute_activations(float_activations(x, std::nullopt).data(), g.batch, g.d_in, permuted.data());
    g.base = base;
    g.x = permuted.data();
  }
  g.residual = residual;
  g.selected = selected;
  g.bias = bias ? bias->data_ptr() : nullptr;
  g.dtype = x.scalar_type();
  Tensor out = empty_like_x(x, d_out);
  g.out = out.data_ptr();
  cpu::gemv(g);
  return out;
}

Tensor multiply_compensated(const char* op, const Tensor& x, const cpu::BaseWeights& base, const OptionalTensor& bias,
                            const CompensationArguments& c) {
  check_bias(op, bias, base.d_out, x);
  c.check(op, base.d_in, base.d_out, x);
  const cpu::Residual residual = packed_residual(c.residual, c.residual_scale, c.residual_bits, c.nested, base.d_out);
  const std::vector<float> floats = float_activations(x, c.center);
  const int64_t k = selected_channels(base.d_in, c.k_chunk);
  std::vector<int32_t> indices(x.size(0) * k);
  select_all(floats.data(), x.size(0), base.d_in, c.k_chunk, c.b_0, c.b_15, indices.data());
  const cpu::Selected selected = gather(floats.data(), x.size(0), base.d_in, indices.data(), k, c.row_scale);
  return multiply(x, &base, bias, &residual, &selected, base.d_out);
}

Tensor dequantize(const Tensor& like, const cpu::BaseWeights& w, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(like, {w.d_out, w.d_in}, dtype);
  cpu::dequantize_base(w, dtype, out.data_ptr());
  return out;
}

}  // namespace

Tensor codebook_dequantize(const Tensor& qweight, const Tensor& codebook, const Tensor& scale, int64_t d_in,
                           ScalarType dtype) {
  const char* op = "codebook_dequantize";
  check_codebook(op, qweight, codebook, scale, d_in, qweight);
  check_out_dtype(op, dtype);
  return dequantize(qweight, codebook_weights(qweight, codebook, scale, d_in), dtype);
}

Tensor uniform_dequantize(const Tensor& qweight, const Tensor& scales, const Tensor& zeros, int64_t d_in,
                          ScalarType dtype) {
  const char* op = "uniform_dequantize";
  check_uniform(op, qweight, scales, zeros, d_in, qweight);
  check_out_dtype(op, dtype);
  return dequantize(qweight, uniform_weights(qweight, scales, zeros, d_in), dtype);
}

Tensor residual_dequantize(const Tensor& residual, const OptionalTensor& residual_scale, int64_t residual_bits,
                           bool nested, int64_t d_out, ScalarType dtype) {
  const char* op = "residual_dequantize";
  if (residual.dim() != 2 || residual.size(0) < 1) fail(op, "residual", "uint8 (d_in, row bytes)", describe(residual));
  check_residual(op, residual, residual_scale, residual_bits, residual.size(0), d_out, residual);
  check_out_dtype(op, dtype);
  Tensor out = torch::stable::new_empty(residual, {residual.size(0), d_out}, dtype);
  cpu::dequantize_residual(packed_residual(residual, residual_scale, residual_bits, nested, d_out), dtype,
                           out.data_ptr());
  return out;
}

std::tuple<Tensor, Tensor> residual_quantize(const Tensor& residual, int64_t residual_bits) {
  const char* op = "residual_quantize";
  const int64_t bits = residual_bits;
  if (bits != 2 && bits != 4 && bits != 8) fail(op, "residual_bits", "2, 4 or 8", bits);
  if (residual.dim() != 2 || residual.size(1) < 1 || residual.size(1) >= 1 << 17) {
    fail(op, "residual", "float32 (d_out, d_in) with d_in below 131072", describe(residual));
  }
  const int64_t d_out = residual.size(0), d_in = residual.size(1);
  check_tensor(op, "residual", residual, ScalarType::Float, {d_out, d_in}, residual);
  Tensor codes = torch::stable::new_empty(residual, {d_out, d_in}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(residual, {d_out}, ScalarType::Half);
  const int64_t bad = cpu::quantize_residual(data<float>(residual), d_out, d_in, (1 << (bits - 1)) - 1,
                                             static_cast<int8_t*>(codes.data_ptr()),
                                             static_cast<cpu::Half*>(scale.data_ptr()));
  if (bad >= 0) fail(op, "residual", "finite values", "NaN or Inf in row " + std::to_string(bad));
  return {codes, scale};
}

// A GPU's GEMV norms its input itself to save a launch; here that would save nothing.
void check_no_norm(const char* op, const OptionalTensor& norm) {
  if (norm) fail(op, "norm", "None on the CPU (decode_ops.rms_norm first)", describe(*norm));
}

Tensor codebook_gemv(const Tensor& x, const Tensor& qweight, const Tensor& codebook, const Tensor& scale,
                     const OptionalTensor& bias, const OptionalTensor& norm, double) {
  const char* op = "codebook_gemv";
  check_no_norm(op, norm);
  check_x(op, x);
  const int64_t d_out = check_codebook(op, qweight, codebook, scale, x.size(1), x);
  check_bias(op, bias, d_out, x);
  const cpu::BaseWeights base = codebook_weights(qweight, codebook, scale, x.size(1));
  return multiply(x, &base, bias, nullptr, nullptr, d_out);
}

Tensor uniform_gemv(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& zeros,
                    const OptionalTensor& bias, const OptionalTensor& norm, double) {
  const char* op = "uniform_gemv";
  check_no_norm(op, norm);
  check_x(op, x);
  const int64_t d_out = check_uniform(op, qweight, scales, zeros, x.size(1), x);
  check_bias(op, bias, d_out, x);
  const cpu::BaseWeights base = uniform_weights(qweight, scales, zeros, x.size(1));
  return multiply(x, &base, bias, nullptr, nullptr, d_out);
}

Tensor select_channels(const Tensor& x, int64_t k_chunk, const std::optional<double>& b_0,
                       const std::optional<double>& b_15, const OptionalTensor& center) {
  const char* op = "select_channels";
  check_x(op, x);
  check_selection(op, x, k_chunk, b_0, b_15, center);
  Tensor out = torch::stable::new_empty(x, {x.size(0), selected_channels(x.size(1), k_chunk)}, ScalarType::Int);
  select_all(float_activations(x, center).data(), x.size(0), x.size(1), k_chunk, b_0, b_15,
             static_cast<int32_t*>(out.data_ptr()));
  return out;
}

Tensor residual_gemv(const Tensor& x, const Tensor& indices, const Tensor& residual,
                     const OptionalTensor& residual_scale, int64_t residual_bits, bool nested, int64_t d_out,
                     const OptionalTensor& center, const OptionalTensor& row_scale) {
  const char* op = "residual_gemv";
  check_x(op, x);
  check_residual(op, residual, residual_scale, residual_bits, x.size(1), d_out, x);
  check_indices(op, indices, x);
  check_center(op, center, x);
  check_row_scale(op, row_scale, x);
  const int32_t* index = data<int32_t>(indices);
  for (int64_t i = 0; i < indices.numel(); ++i) {
    if (index[i] >= x.size(1)) fail(op, "indices", "values below d_in = " + std::to_string(x.size(1)), index[i]);
  }
  const cpu::Residual packed = packed_residual(residual, residual_scale, residual_bits, nested, d_out);
  const cpu::Selected selected =
      gather(float_activations(x, center).data(), x.size(0), x.size(1), index, indices.size(1), row_scale);
  return multiply(x, nullptr, std::nullopt, &packed, &selected, d_out);
}

Tensor codebook_gemv_compensated(const Tensor& x, const Tensor& qweight, const Tensor& codebook, const Tensor& scale,
                                 const OptionalTensor& bias, const Tensor& residual,
                                 const OptionalTensor& residual_scale, int64_t residual_bits, bool nested,
                                 int64_t k_chunk, const std::optional<double>& b_0, const std::optional<double>& b_15,
                                 const OptionalTensor& center, int64_t n_tb,
                                 const OptionalTensor& workspace, const OptionalTensor& norm, double,
                                 const OptionalTensor& row_scale) {
  const char* op = "codebook_gemv_compensated";
  check_no_norm(op, norm);
  check_x(op, x);
  check_codebook(op, qweight, codebook, scale, x.size(1), x);
  return multiply_compensated(op, x, codebook_weights(qweight, codebook, scale, x.size(1)), bias,
                              {residual, residual_scale, residual_bits, nested, k_chunk, b_0, b_15, center, n_tb,
                               workspace, row_scale});
}

Tensor uniform_gemv_compensated(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& zeros,
                                const OptionalTensor& bias, const Tensor& residual,
                                const OptionalTensor& residual_scale, int64_t residual_bits, bool nested,
                                int64_t k_chunk, const std::optional<double>& b_0, const std::optional<double>& b_15,
                                const OptionalTensor& center, int64_t n_tb,
                                const OptionalTensor& workspace, const OptionalTensor& norm, double,
                                const OptionalTensor& row_scale) {
  const char* op = "uniform_gemv_compensated";
  check_no_norm(op, norm);
  check_x(op, x);
  check_uniform(op, qweight, scales, zeros, x.size(1), x);
  return multiply_compensated(op, x, uniform_weights(qweight, scales, zeros, x.size(1)), bias,
                              {residual, residual_scale, residual_bits, nested, k_chunk, b_0, b_15, center, n_tb,
                               workspace, row_scale});
}

}  // namespace decdec

STABLE_TORCH_LIBRARY_IMPL(decdec, CPU, m) {
  m.impl("codebook_dequantize", TORCH_BOX(&decdec::codebook_dequantize));
  m.impl("uniform_dequantize", TORCH_BOX(&decdec::uniform_dequantize));
  m.impl("residual_dequantize", TORCH_BOX(&decdec::residual_dequantize));
  m.impl("residual_quantize", TORCH_BOX(&decdec::residual_quantize));
  m.impl("codebook_gemv", TORCH_BOX(&decdec::codebook_gemv));
  m.impl("uniform_gemv", TORCH_BOX(&decdec::uniform_gemv));
  m.impl("select_channels", TORCH_BOX(&decdec::select_channels));
  m.impl("residual_gemv", TORCH_BOX(&decdec::residual_gemv));
  m.impl("codebook_gemv_compensated", TORCH_BOX(&decdec::codebook_gemv_compensated));
  m.impl("uniform_gemv_compensated", TORCH_BOX(&decdec::uniform_gemv_compensated));
}
