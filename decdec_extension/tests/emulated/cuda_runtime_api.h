// The CUDA runtime that the launchers use, on the CPU.

#pragma once

#include <vector>

#include "emulator.h"

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;
constexpr auto cudaFuncAttributeMaxDynamicSharedMemorySize = 0, cudaFuncAttributePreferredSharedMemoryCarveout = 1;
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSymbolNotFound };
constexpr int cudaEnableDefault = 0;
constexpr int cudaLaunchAttributeProgrammaticStreamSerialization = 0;

struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulated {

struct DeviceLimits {
  int sms, shared_per_sm, shared_per_block, major;
};
extern std::vector<DeviceLimits> devices;  // the last is current: launchers remember what they know of a device

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t bytes, cudaStream_t, const Args&... args) {
  run_grid(grid, block, bytes, [&] { kernel(args...); });
}

}  // namespace emulated

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
inline cudaError_t cudaGetDevice(int* index) { return *index = int(emulated::devices.size()) - 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  const emulated::DeviceLimits& l = emulated::devices.at(index);
  const int values[] = {l.sms, l.shared_per_sm, l.shared_per_block, l.major};
  return *value = values[attribute], cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, int,
                                                    cudaDriverEntryPointQueryResult*) {
  return cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int attribute, int value) {
  const bool fits = attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value <= emulated::devices.back().shared_per_block;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  emulated::launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, nullptr, args...);
  return cudaSuccess;
}
