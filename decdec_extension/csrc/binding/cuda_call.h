// What every CUDA op does with its tensors: typed pointers, dtypes, the device and the caller's stream.

#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "binding/checks.h"
#include "binding/current_stream.h"
#include "launch/launch.h"

namespace decdec {

using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Kernels read this tensor so many bytes at once: refuses a view that begins between two such pieces.
inline void check_aligned(const char* op, const char* argument, const Tensor& tensor, int64_t bytes = 16) {
  const int64_t beyond = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes;
  if (beyond == 0) return;
  std::ostringstream expected;
  expected << "memory that begins at a multiple of " << bytes << " bytes (a clone's does)";
  fail(op, argument, expected.str(), describe(tensor) + ", " + std::to_string(beyond) + " bytes beyond one");
}

inline cuda::Dtype dtype_of(ScalarType dtype) {
  using cuda::Dtype;
  return dtype == ScalarType::Half ? Dtype::kHalf : dtype == ScalarType::BFloat16 ? Dtype::kBfloat16 : Dtype::kFloat;
}

// The device of a tensor is current, and its stream the caller's, while this lives.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& tensor)
      : guard(tensor.get_device_index()),
        stream(static_cast<cudaStream_t>(current_stream(tensor.get_device_index()))) {}
};

// Memory that is all zero before a call and after it: the caller's workspace, at least `bytes` of uint8 on the device
// of `like`, or if there is none the call's own. While OnDevice lives.
inline Tensor zeroed_workspace(const char* op, const OptionalTensor& workspace, int64_t bytes, const Tensor& like) {
  if (!workspace) {
    Tensor own = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    torch::stable::zero_(own);
    return own;
  }
  if (workspace->scalar_type() != ScalarType::Byte || !workspace->is_contiguous() || workspace->numel() < bytes ||
      !same_device(*workspace, like) || reinterpret_cast<uintptr_t>(workspace->data_ptr()) % 8 != 0) {
    std::ostringstream expected;
    expected << "contiguous zeroed uint8 of at least " << bytes << " bytes, aligned to 8, on " << device_name(like);
    fail(op, "workspace", expected.str(), describe(*workspace));
  }
  return *workspace;
}

}  // namespace decdec
