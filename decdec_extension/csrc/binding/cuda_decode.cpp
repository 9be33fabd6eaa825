// The CUDA implementations of the ops of a decoding step (decdec/decode_ops.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding/cuda_call.h"
#include "launch/decode.h"

namespace decdec {

namespace {

constexpr int64_t kVector = 8;  // numbers that a thread reads at once

void check_vectors(const char* op, const char* argument, const Tensor& x, int64_t multiple) {
  const bool half = x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
  if (x.dim() == 2 && half && x.is_contiguous() && x.size(1) > 0 && x.size(1) % multiple == 0) {
    return check_aligned(op, argument, x);
  }
  std::ostringstream expected;
  expected << "contiguous float16 or bfloat16 (rows, width) on CUDA, width a multiple of " << multiple;
  fail(op, argument, expected.str(), describe(x));
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const char* op = "rms_norm";
  check_vectors(op, "x", x, kVector);
  if (x.size(1) > 32768) fail(op, "x", "at most 32768 numbers a row on CUDA", describe(x));
  check_tensor(op, "weight", weight, x.scalar_type(), {x.size(1)}, x);
  check_aligned(op, "weight", weight);
  const OnDevice device(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (x.size(0) > 0) {
    cuda::launch_norm({x.data_ptr(), weight.data_ptr(), out.data_ptr(), static_cast<int>(x.size(0)),
                       static_cast<int>(x.size(1)), static_cast<float>(eps), dtype_of(x.scalar_type())},
                      device.stream);
  }
  return out;
}

Tensor silu_mul(const Tensor& x) {
  check_vectors("silu_mul", "x", x, 2 * kVector);
  const OnDevice device(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1) / 2});
  if (x.size(0) > 0) {
    cuda::launch_gate({x.data_ptr(), out.data_ptr(), static_cast<int>(x.size(0)), static_cast<int>(x.size(1) / 2),
                       dtype_of(x.scalar_type())},
                      device.stream);
  }
  return out;
}

Tensor attend(const Tensor& qkv, const Tensor& position, Tensor keys, Tensor values, const Tensor& frequencies,
              double rotary_scaling, int64_t long_from, double scaling, int64_t window, const OptionalTensor& q_norm,
              const OptionalTensor& k_norm, double eps, int64_t live_at_most, const OptionalTensor& workspace) {
  const char* op = "attend";
  check_vectors(op, "qkv", qkv, kVector);
  if (keys.dim() != 3 || keys.size(0) < 1 || keys.size(1) < 1 || keys.size(2) % kVector != 0 ||
      keys.size(2) > cuda::kMaxHeadDim) {
    fail(op, "keys", "(kv_heads, places, head_dim), head_dim a multiple of 8 up to 256 on CUDA", describe(keys));
  }
  const int64_t kv_heads = keys.size(0), places = keys.size(1), dim = keys.size(2);
  check_tensor(op, "keys", keys, qkv.scalar_type(), {kv_heads, places, dim}, qkv);
  check_tensor(op, "values", values, qkv.scalar_type(), {kv_heads, places, dim}, qkv);
  check_aligned(op, "keys", keys);
  check_aligned(op, "values", values);
  const int64_t heads = qkv.size(1) / dim - 2 * kv_heads;
  if (qkv.size(0) != 1 || qkv.size(1) % dim != 0 || heads < 1 || heads % kv_heads != 0) {
    fail(op, "qkv", "(1, (heads + 2 kv_heads) * head_dim), heads a multiple of kv_heads", describe(qkv));
  }
  check_tensor(op, "position", position, ScalarType::Long, {1}, qkv);
  if (frequencies.dim() != 2 || frequencies.size(0) < 1 || frequencies.size(0) > 2 || 2 * frequencies.size(1) > dim) {
    fail(op, "frequencies", "float32 (1 or 2, at most head_dim / 2)", describe(frequencies));
  }
  check_tensor(op, "frequencies", frequencies, ScalarType::Float, {frequencies.size(0), frequencies.size(1)}, qkv);
  if (q_norm) check_tensor(op, "q_norm", *q_norm, qkv.scalar_type(), {dim}, qkv);
  if (k_norm) check_tensor(op, "k_norm", *k_norm, qkv.scalar_type(), {dim}, qkv);
  if (window < 0) fail(op, "window", "at least 0", window);
  const OnDevice device(qkv);
  const bool few = live_at_most > 0 && live_at_most <= cuda::kShort;
  const cuda::AttendGrid grid =
      cuda::attend_grid(static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(dim), places, few);
  const Tensor counters = zeroed_workspace(op, workspace, 4 * kv_heads * grid.groups, qkv);
  Tensor partials = torch::stable::new_empty(qkv, {heads, grid.splits, dim + 2}, ScalarType::Float);
  Tensor out = torch::stable::new_empty(qkv, {1, heads * dim});
  cuda::AttendParams p{};
  p.qkv = qkv.data_ptr();
  p.position = data<int64_t>(position);
  p.frequencies = data<float>(frequencies);
  p.q_norm = q_norm ? q_norm->data_ptr() : nullptr;
  p.k_norm = k_norm ? k_norm->data_ptr() : nullptr;
  p.keys = keys.data_ptr();
  p.values = values.data_ptr();
  p.out = out.data_ptr();
  p.partials = static_cast<float*>(partials.data_ptr());
  p.counters = static_cast<uint32_t*>(counters.data_ptr());
  p.heads = static_cast<int>(heads);
  p.kv_heads = static_cast<int>(kv_heads);
  p.groups = grid.groups;
  p.splits = grid.splits;
  p.few = few;
  p.head_dim = static_cast<int>(dim);
  p.rotary = static_cast<int>(2 * frequencies.size(1));
  p.places = places;
  p.window = window;
  p.long_from = frequencies.size(0) == 2 ? long_from : INT64_MAX;
  p.rotary_scaling = static_cast<float>(rotary_scaling);
  p.scaling = static_cast<float>(scaling);
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(qkv.scalar_type());
  cuda::launch_attend(p, device.stream);
  return out;
}

Tensor head_gemv(const Tensor& x, const Tensor& weight, const OptionalTensor& scale) {
  const char* op = "head_gemv";
  check_vectors(op, "x", x, scale ? 2 * kVector : kVector);
  if (x.size(0) != 1 || x.size(1) > 32768) fail(op, "x", "one row of at most 32768 numbers on CUDA", describe(x));
  const int64_t rows = weight.dim() == 2 ? weight.size(0) : 0;
  check_tensor(op, "weight", weight, scale ? ScalarType::Char : x.scalar_type(), {rows, x.size(1)}, x);
  check_aligned(op, "weight", weight);
  if (scale) check_tensor(op, "scale", *scale, ScalarType::Float, {rows}, x);
  const OnDevice device(x);
  Tensor out = torch::stable::new_empty(x, {1, rows}, ScalarType::Float);
  if (rows > 0) {
    cuda::launch_head({x.data_ptr(), weight.data_ptr(), data<float>(scale), static_cast<float*>(out.data_ptr()),
                       static_cast<int>(rows), static_cast<int>(x.size(1)), dtype_of(x.scalar_type())},
                      device.stream);
  }
  return out;
}

Tensor argmax(const Tensor& x, const OptionalTensor& workspace) {
  const char* op = "argmax";
  check_tensor(op, "x", x, ScalarType::Float, {1, x.dim() == 2 ? x.size(1) : 0}, x);
  if (x.size(1) < 1 || x.size(1) > INT32_MAX) fail(op, "x", "at least one number", describe(x));
  check_aligned(op, "x", x);
  constexpr int64_t kBytes = 16;
  const OnDevice device(x);
  const Tensor best = zeroed_workspace(op, workspace, kBytes, x);
  Tensor out = torch::stable::new_empty(x, {1}, ScalarType::Long);
  cuda::launch_argmax({data<float>(x), static_cast<int64_t*>(out.data_ptr()),
                       static_cast<uint64_t*>(best.data_ptr()), static_cast<int>(x.size(1))},
                      device.stream);
  return out;
}

}  // namespace

}  // namespace decdec

STABLE_TORCH_LIBRARY_IMPL(decdec, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&decdec::rms_norm));
  m.impl("silu_mul", TORCH_BOX(&decdec::silu_mul));
  m.impl("attend", TORCH_BOX(&decdec::attend));
  m.impl("argmax", TORCH_BOX(&decdec::argmax));
  m.impl("head_gemv", TORCH_BOX(&decdec::head_gemv));
}
