// What the compensation adds to the arguments of a base GEMV, checked alike for every device.

#pragma once

#include <optional>

#include "binding/checks.h"

namespace decdec {

struct CompensationArguments {
  const Tensor& residual;
  const std::optional<Tensor>& residual_scale;
  int64_t residual_bits;
  bool nested;
  int64_t k_chunk;
  const std::optional<double>& b_0;
  const std::optional<double>& b_15;
  const std::optional<Tensor>& center;
  int64_t n_tb;
  const std::optional<Tensor>& workspace;
  const std::optional<Tensor>& row_scale;

  // For a (d_out, d_in) matrix and x.
  void check(const char* op, int64_t d_in, int64_t d_out, const Tensor& x) const {
    check_residual(op, residual, residual_scale, residual_bits, d_in, d_out, x);
    check_selection(op, x, k_chunk, b_0, b_15, center);
    check_n_tb(op, n_tb);
    check_row_scale(op, row_scale, x);
  }
};

}  // namespace decdec
