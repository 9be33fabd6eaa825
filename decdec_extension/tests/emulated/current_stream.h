// binding/current_stream.h on the CPU, which has no streams, nor devices to choose from.

#pragma once

#include <cstdint>

namespace emulated {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

}  // namespace emulated

namespace decdec {

inline void* current_stream(int32_t) { return nullptr; }

}  // namespace decdec
