// The caller's CUDA stream.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <stdexcept>

// Weak, so that a library with CUDA ops loads in a torch without CUDA, which lacks this symbol (and never calls it).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace decdec {

// The current cudaStream_t of a device, as a pointer: launches on it keep the caller's order and are captured with it.
inline void* current_stream(int32_t device_index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device_index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("decdec: this torch gave no CUDA stream");
  }
  return stream;
}

}  // namespace decdec
