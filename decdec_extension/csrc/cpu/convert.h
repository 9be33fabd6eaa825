// float32 from and to the element types of tensors.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace decdec::cpu {

using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// The conversions of Half are scalar; with F16C eight go at once.
void half_to_float(const Half* from, int64_t n, float* to);

// n elements of dtype Float, Half or BFloat16 at `from`, element `offset` up, as float32.
void load_floats(const void* from, ScalarType dtype, int64_t offset, int64_t n, float* to);

// The reverse, rounding to nearest even.
void store_floats(const float* from, int64_t n, void* to, ScalarType dtype, int64_t offset);

}  // namespace decdec::cpu
