// The schemas of decdec's ops, in the argument order of decdec/ops.py and decdec/decode_ops.py, which document them.
//
// Every op but attend, which writes into its caches, is functional. A workspace is written while a call runs but is all
// zero before and after it, so no caller sees a mutation; marked as one, it would be copied by torch.compile, and
// inductor (torch 2.13) fails where it is None.

#include <torch/csrc/stable/library.h>

namespace {

bool has_cuda() {
#ifdef DECDEC_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(decdec, m) {
  m.def("has_cuda() -> bool");

  m.def("codebook_dequantize(Tensor qweight, Tensor codebook, Tensor scale, int d_in, ScalarType dtype) -> Tensor");
  m.def("uniform_dequantize(Tensor qweight, Tensor scales, Tensor zeros, int d_in, ScalarType dtype) -> Tensor");
  m.def(
      "residual_dequantize(Tensor residual, Tensor? residual_scale, int residual_bits, bool nested, int d_out, "
      "ScalarType dtype) -> Tensor");

  m.def("residual_quantize(Tensor residual, int residual_bits) -> (Tensor, Tensor)");

  m.def(
      "codebook_gemv(Tensor x, Tensor qweight, Tensor codebook, Tensor scale, Tensor? bias=None, Tensor? norm=None, "
      "float norm_eps=0) -> Tensor");
  m.def(
      "uniform_gemv(Tensor x, Tensor qweight, Tensor scales, Tensor zeros, Tensor? bias=None, Tensor? norm=None, "
      "float norm_eps=0) -> Tensor");

  m.def(
      "select_channels(Tensor x, int k_chunk, float? b_0=None, float? b_15=None, Tensor? center=None) -> Tensor");
  m.def(
      "residual_gemv(Tensor x, Tensor indices, Tensor residual, Tensor? residual_scale, int residual_bits, "
      "bool nested, int d_out, Tensor? center=None, Tensor? row_scale=None) -> Tensor");

  m.def(
      "codebook_gemv_compensated(Tensor x, Tensor qweight, Tensor codebook, Tensor scale, Tensor? bias, "
      "Tensor residual, Tensor? residual_scale, int residual_bits, bool nested, int k_chunk, float? b_0=None, "
      "float? b_15=None, Tensor? center=None, int n_tb=8, Tensor? workspace=None, Tensor? norm=None, "
      "float norm_eps=0, Tensor? row_scale=None) -> Tensor");
  m.def(
      "uniform_gemv_compensated(Tensor x, Tensor qweight, Tensor scales, Tensor zeros, Tensor? bias, "
      "Tensor residual, Tensor? residual_scale, int residual_bits, bool nested, int k_chunk, float? b_0=None, "
      "float? b_15=None, Tensor? center=None, int n_tb=8, Tensor? workspace=None, Tensor? norm=None, "
      "float norm_eps=0, Tensor? row_scale=None) -> Tensor");

  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor x) -> Tensor");
  m.def(
      "attend(Tensor qkv, Tensor position, Tensor(a!) keys, Tensor(b!) values, Tensor frequencies, float "
      "rotary_scaling, int long_from, float scaling, int window, Tensor? q_norm=None, Tensor? k_norm=None, float "
      "eps=1e-6, int live_at_most=0, Tensor? workspace=None) -> Tensor");
  m.def("argmax(Tensor x, Tensor? workspace=None) -> Tensor");
  m.def("head_gemv(Tensor x, Tensor weight, Tensor? scale=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(decdec, CompositeExplicitAutograd, m) { m.impl("has_cuda", TORCH_BOX(&has_cuda)); }
