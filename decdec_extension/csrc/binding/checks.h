// Argument checks of decdec's ops, shared by the CPU and the CUDA registrations.
//
// A failed check throws std::runtime_error (RuntimeError in Python) that reads "op: argument: expected ..., got ...".
// STD_TORCH_CHECK is not used, for it would put function, file and line of this library before the message.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace decdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 1024;     // channels of one selection chunk (decdec/reference.py)
constexpr int64_t kTileRows = 16;    // the layouts of decdec/packing.py
constexpr int64_t kUnitInputs = 64;
constexpr int64_t kRowAlign = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of one packed residual row; a row of 3 bits is one of 2 bits and one of 1.
constexpr int64_t residual_row_bytes(int64_t d_out, int64_t bits) {
  if (bits == 3) return residual_row_bytes(d_out, 2) + residual_row_bytes(d_out, 1);
  return ceil_div(ceil_div(d_out * bits, 8), kRowAlign) * kRowAlign;
}

// Channels selected in all chunks of an input of d_in channels.
constexpr int64_t selected_channels(int64_t d_in, int64_t k_chunk) {
  return d_in / kChunk * k_chunk + ceil_div(k_chunk * (d_in % kChunk), kChunk);
}

template <class Expected, class Got>
[[noreturn]] void fail(const char* op, const char* argument, const Expected& expected, const Got& got) {
  std::ostringstream message;
  message << op << ": " << argument << ": expected " << expected << ", got " << got;
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "(";
  const char* separator = "";
  for (int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << ")";
  return text.str();
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

// "float16 (4, 576) on cpu", as messages describe a tensor.
inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << (tensor.is_contiguous() ? "" : "non-contiguous ") << dtype_name(tensor.scalar_type()) << " "
       << shape_text(tensor.sizes()) << " on " << device_name(tensor);
  return text.str();
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// `tensor` is contiguous, of this dtype and shape, on the device of `like`.
inline void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape, const Tensor& like) {
  bool ok = tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size()) &&
            tensor.is_contiguous() && same_device(tensor, like);
  if (ok) {
    int64_t axis = 0;
    for (int64_t size : shape) ok = ok && tensor.size(axis++) == size;
  }
  if (ok) return;
  std::ostringstream expected;
  expected << "contiguous " << dtype_name(dtype) << " " << shape_text(shape) << " on " << device_name(like);
  fail(op, argument, expected.str(), describe(tensor));
}

inline bool is_float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline void check_out_dtype(const char* op, ScalarType dtype) {
  if (!is_float_dtype(dtype)) fail(op, "dtype", "float32, float16 or bfloat16", dtype_name(dtype));
}

inline void check_x(const char* op, const Tensor& x) {
  if (x.dim() != 2 || x.size(1) < 1 || !x.is_contiguous() || !is_float_dtype(x.scalar_type())) {
    fail(op, "x", "contiguous float32, float16 or bfloat16 (batch, d_in) with d_in >= 1", describe(x));
  }
}

inline void check_qweight(const char* op, const Tensor& qweight, int64_t d_out, int64_t d_in, const Tensor& like) {
  const int64_t bits = qweight.dim() == 4 ? qweight.size(2) : 0;
  if (bits < 2 || bits > 4) {
    fail(op, "qweight", "int32 (row tiles, units, bits, 32) with 2, 3 or 4 bits", describe(qweight));
  }
  check_tensor(op, "qweight", qweight, ScalarType::Int,
               {ceil_div(d_out, kTileRows), ceil_div(d_in, kUnitInputs), bits, 32}, like);
}

// Codebook weights of a (d_out, d_in) matrix; returns d_out.
inline int64_t check_codebook(const char* op, const Tensor& qweight, const Tensor& codebook, const Tensor& scale,
                              int64_t d_in, const Tensor& like) {
  if (d_in < 1) fail(op, "d_in", "at least 1", d_in);
  if (codebook.dim() != 2 || codebook.size(0) < 1) {
    fail(op, "codebook", "int16 (d_out, 2**bits) with d_out >= 1", describe(codebook));
  }
  const int64_t d_out = codebook.size(0);
  check_qweight(op, qweight, d_out, d_in, like);
  check_tensor(op, "codebook", codebook, ScalarType::Short, {d_out, int64_t{1} << qweight.size(2)}, like);
  check_tensor(op, "scale", scale, ScalarType::Float, {d_out}, like);
  return d_out;
}

// Uniform weights of a (d_out, d_in) matrix; returns d_out.
inline int64_t check_uniform(const char* op, const Tensor& qweight, const Tensor& scales, const Tensor& zeros,
                             int64_t d_in, const Tensor& like) {
  if (d_in < 1) fail(op, "d_in", "at least 1", d_in);
  if (scales.dim() != 2 || scales.size(0) < 1 || scales.size(1) < 1 || d_in % scales.size(0) != 0) {
    std::ostringstream expected;
    expected << "float16 (groups, d_out) whose groups divide d_in = " << d_in;
    fail(op, "scales", expected.str(), describe(scales));
  }
  const int64_t groups = scales.size(0), d_out = scales.size(1);
  check_qweight(op, qweight, d_out, d_in, like);
  check_tensor(op, "scales", scales, ScalarType::Half, {groups, d_out}, like);
  check_tensor(op, "zeros", zeros, ScalarType::Half, {groups, d_out}, like);
  return d_out;
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t d_out, const Tensor& x) {
  if (bias) check_tensor(op, "bias", *bias, x.scalar_type(), {d_out}, x);
}

// A packed residual of a (d_out, d_in) matrix and its scales.
inline void check_residual(const char* op, const Tensor& residual, const std::optional<Tensor>& residual_scale,
                           int64_t residual_bits, int64_t d_in, int64_t d_out, const Tensor& like) {
  const int64_t bits = residual_bits;
  if (bits != 1 && bits != 2 && bits != 3 && bits != 4 && bits != 8 && bits != 16) {
    fail(op, "residual_bits", "1, 2, 3, 4, 8 or 16", bits);
  }
  if (d_out < 1) fail(op, "d_out", "at least 1", d_out);
  check_tensor(op, "residual", residual, ScalarType::Byte, {d_in, residual_row_bytes(d_out, bits)}, like);
  if (bits == 16) {
    if (residual_scale) fail(op, "residual_scale", "None with 16-bit residuals", describe(*residual_scale));
    return;
  }
  if (!residual_scale) fail(op, "residual_scale", "float16 (groups, d_out)", "None");
  const int64_t groups = residual_scale->dim() == 2 ? residual_scale->size(0) : 0;
  if (groups < 1 || d_in % groups != 0) {
    std::ostringstream expected;
    expected << "float16 (groups, d_out) whose groups divide d_in = " << d_in;
    fail(op, "residual_scale", expected.str(), describe(*residual_scale));
  }
  check_tensor(op, "residual_scale", *residual_scale, ScalarType::Half, {groups, d_out}, like);
}

inline void check_row_scale(const char* op, const std::optional<Tensor>& row_scale, const Tensor& x) {
  if (row_scale) check_tensor(op, "row_scale", *row_scale, ScalarType::Float, {x.size(1)}, x);
}

inline void check_center(const char* op, const std::optional<Tensor>& center, const Tensor& x) {
  if (center) check_tensor(op, "center", *center, ScalarType::Float, {x.size(1)}, x);
}

// Shape and dtype; whether the values are below d_in can only be seen on the CPU.
inline void check_indices(const char* op, const Tensor& indices, const Tensor& x) {
  check_tensor(op, "indices", indices, ScalarType::Int, {x.size(0), indices.dim() == 2 ? indices.size(1) : 0}, x);
}

inline void check_selection(const char* op, const Tensor& x, int64_t k_chunk, const std::optional<double>& b_0,
                            const std::optional<double>& b_15, const std::optional<Tensor>& center) {
  if (k_chunk < 0 || k_chunk > kChunk) fail(op, "k_chunk", "0 to 1024", k_chunk);
  if (b_0.has_value() != b_15.has_value()) {
    fail(op, b_0 ? "b_15" : "b_0", "both boundaries or neither", "None");
  }
  // Written so that NaN fails too.
  if (b_0 && !(*b_15 >= 0 && *b_0 >= *b_15 && std::isfinite(*b_0))) {
    std::ostringstream got;
    got << "b_0 = " << *b_0 << ", b_15 = " << *b_15;
    fail(op, "b_0", "finite b_0 >= b_15 >= 0", got.str());
  }
  check_center(op, center, x);
}

inline void check_n_tb(const char* op, int64_t n_tb) {
  if (n_tb < 1) fail(op, "n_tb", "at least 1", n_tb);
}

}  // namespace decdec
