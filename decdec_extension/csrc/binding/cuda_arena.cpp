// The pinned arena: host memory of exact size, registered once, seen as a CPU tensor and as a CUDA tensor that both own
// it.

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <tuple>

#include "binding/checks.h"

namespace decdec {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// NUMA node of a GPU, or -1 where the machine does not tell.
int numa_node(int device) {
  char bus[32];
  if (cudaDeviceGetPCIBusId(bus, sizeof bus, device) != cudaSuccess) return -1;
  std::string name(bus);
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  int node = -1;
  std::ifstream("/sys/bus/pci/devices/" + name + "/numa_node") >> node;
  return node;
}

// An anonymous mapping, registered with CUDA for every device; given back on destruction.
class PinnedMemory {
 public:
  PinnedMemory(size_t bytes, int device, bool huge_pages) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) refuse("mmap", std::strerror(errno));
    // Preferences, not needs: without them the memory is as right, only the link may be slower.
    if (huge_pages && bytes >= kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
    const int node = numa_node(device);
    constexpr int kPreferred = 1;
    const unsigned long mask = node >= 0 && node < 64 ? 1ul << node : 0;
    if (mask) syscall(SYS_mbind, data_, bytes, kPreferred, &mask, 65ul, 0u);
    const cudaError_t status = cudaHostRegister(data_, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    void* seen = nullptr;
    if (status != cudaSuccess || cudaHostGetDevicePointer(&seen, data_, 0) != cudaSuccess || seen != data_) {
      cudaGetLastError();
      if (status == cudaSuccess) cudaHostUnregister(data_);
      munmap(data_, bytes_);
      refuse("cudaHostRegister",
             status == cudaSuccess ? "the GPU sees it at another address" : cudaGetErrorString(status));
    }
  }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  ~PinnedMemory() {
    cudaHostUnregister(data_);
    munmap(data_, bytes_);
  }

  void* data() const { return data_; }

 private:
  [[noreturn]] void refuse(const char* call, const char* why) const {
    throw std::runtime_error("pinned_arena: bytes: expected memory that can be pinned, got " + std::to_string(bytes_) +
                             " bytes that cannot: " + call + ": " + why);
  }

  size_t bytes_;
  void* data_;
};

std::tuple<Tensor, Tensor> pinned_arena(int64_t bytes, int64_t device, bool huge_pages) {
  if (bytes < 1) fail("pinned_arena", "bytes", "at least 1", bytes);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || device < 0 || device >= devices) {
    cudaGetLastError();
    fail("pinned_arena", "device", "the index of one of " + std::to_string(devices) + " CUDA devices", device);
  }
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const auto memory = std::make_shared<PinnedMemory>(bytes, static_cast<int>(device), huge_pages);
  const auto view = [&](torch::stable::Device where) {
    return torch::stable::from_blob(memory->data(), {bytes}, {1}, where, ScalarType::Byte,
                                    [memory](void*) {});  // the deleter is what owns the memory
  };
  using torch::headeronly::DeviceType;
  return {view({DeviceType::CPU, -1}), view({DeviceType::CUDA, static_cast<int32_t>(device)})};
}

}  // namespace

}  // namespace decdec

STABLE_TORCH_LIBRARY_FRAGMENT(decdec, m) {
  m.def("pinned_arena(int bytes, int device, bool huge_pages) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(decdec, CompositeExplicitAutograd, m) {
  m.impl("pinned_arena", TORCH_BOX(&decdec::pinned_arena));
}
