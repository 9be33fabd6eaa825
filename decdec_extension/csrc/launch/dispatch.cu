#include <cuda.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace decdec::cuda {

template <Format kFormat, int kBits>
void launch_gemv_format(const GemvParams& params, int shared_bytes, cudaStream_t stream);

namespace {

struct Instance {
  Format format;
  int bits;
  void (*gemv)(const GemvParams&, int, cudaStream_t);
};

template <Format kFormat, int kBits>
constexpr Instance instance() {
  return {kFormat, kBits, launch_gemv_format<kFormat, kBits>};
}

constexpr Instance kInstances[] = {
    instance<Format::kCodebook, 2>(), instance<Format::kCodebook, 3>(), instance<Format::kCodebook, 4>(),
    instance<Format::kUniform, 2>(),  instance<Format::kUniform, 3>(),  instance<Format::kUniform, 4>(),
};

const Instance& find(Format format, int bits) {
  for (const Instance& i : kInstances) {
    if (i.format == format && i.bits == bits) return i;
  }
  throw std::runtime_error("decdec: no CUDA kernel for " + std::to_string(bits) + "-bit weights");
}

// The SMs that the current context may use, where the driver can tell (12.4 and later); else all.
int context_sms(int all) {
  static const auto get = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuCtxGetDevResource", &f, 12040, cudaEnableDefault, &found) != cudaSuccess) {
      cudaGetLastError();
      f = nullptr;
    }
    return reinterpret_cast<CUresult (*)(CUcontext, CUdevResource*, CUdevResourceType)>(f);
  }();
  static const auto current = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuCtxGetCurrent", &f, 12000, cudaEnableDefault, &found) != cudaSuccess) {
      cudaGetLastError();
      f = nullptr;
    }
    return reinterpret_cast<CUresult (*)(CUcontext*)>(f);
  }();
  CUcontext context = nullptr;
  CUdevResource resource{};
  if (get == nullptr || current == nullptr || current(&context) != CUDA_SUCCESS || context == nullptr ||
      get(context, &resource, CU_DEV_RESOURCE_TYPE_SM) != CUDA_SUCCESS) {
    return all;
  }
  return static_cast<int>(resource.sm.smCount);
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not left for the next caller to find
  throw std::runtime_error(std::string("decdec: ") + what + ": " + cudaGetErrorString(status));
}

Device current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "current device");
  static std::mutex mutex;
  static std::map<int, Device> known;
  Device device;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    auto [at, is_new] = known.try_emplace(index);
    if (is_new) {
      int major = 0;
      check(cudaDeviceGetAttribute(&at->second.sms, cudaDevAttrMultiProcessorCount, index), "SMs");
      check(cudaDeviceGetAttribute(&at->second.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
            "shared memory of an SM");
      check(cudaDeviceGetAttribute(&at->second.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
            "shared memory of a block");
      check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "compute capability");
      at->second.early_launch = major >= 9;
    }
    device = at->second;
  }
  device.sms = context_sms(device.sms);
  return device;
}

bool keeps_values(const Device& device, int selected, int bytes) {
  return selected <= kMaxValues && bytes <= device.shared_per_block;
}

void launch_gemv(Format format, int bits, GemvParams params, cudaStream_t stream) {
  const Instance& instance = find(format, bits);
  const Device device = current_device();
  Compensation& c = params.compensation;
  std::optional<GemvPlan> plan;
  if (params.batch <= kMaxBatch) plan = plan_gemv(device, format, bits, params.weights, params.batch, c.n_tb);
  if (!plan && params.batch > 1) {  // too many rows for one launch, on GPUs with 99 KB of shared memory a block maybe below 8
    GemvParams rest = params;
    params.batch = params.batch > kMaxBatch ? kMaxBatch : params.batch / 2, rest.batch -= params.batch;
    rest.x = static_cast<const uint16_t*>(params.x) + int64_t{params.batch} * params.weights.d_in;
    rest.out = static_cast<uint16_t*>(params.out) + int64_t{params.batch} * params.weights.d_out;
    if (c.n_tb > 0) rest.compensation.workspace += int64_t{params.batch} * params.weights.d_out;
    launch_gemv(format, bits, params, stream);
    return launch_gemv(format, bits, rest, stream);
  }
  if (!plan) throw std::runtime_error("decdec: the device has too little shared memory for this layer");
  params.plan = *plan;
  int bytes = params.plan.generic ? 0 : params.plan.bytes;
  if (c.n_tb > 0) {
    const auto needed = [&](bool kept) {
      return params.norm ? normed_bytes(c.selected, kept, params.weights.d_in) : fetch_bytes(c.selected, kept);
    };
    c.kept = keeps_values(device, c.selected, needed(true));
    bytes = std::max(bytes, needed(c.kept));
  }
  if (bytes > device.shared_per_block) {
    throw std::runtime_error("decdec: " + std::to_string(c.selected) + " selected channels of " +
                             std::to_string(params.weights.d_in) + " inputs need " + std::to_string(bytes) +
                             " bytes of shared memory, the device has " + std::to_string(device.shared_per_block));
  }
  instance.gemv(params, bytes, stream);
}

}  // namespace decdec::cuda
