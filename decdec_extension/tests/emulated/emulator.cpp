#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
constexpr uint8_t kPoison = 0xff;  // NaN in every type of floats
constexpr int kMostBytes = 64;     // that a lane brings to a meeting

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

Memory poisoned(size_t bytes) {
  bytes = (bytes + 127) / 128 * 128;
  Memory memory(static_cast<uint8_t*>(std::aligned_alloc(128, bytes)));
  if (!memory) throw std::runtime_error("emulation: no memory");
  std::memset(memory.get(), kPoison, bytes);
  return memory;
}

struct Copy {
  void* to;
  const void* from;
  size_t size;
  bool wanted;
};

struct Fiber {
  jmp_buf state;
  void* stack = nullptr;
  bool started, done, at_barrier;
  unsigned meetings;  // of its warp that it has reached
  std::vector<std::vector<Copy>> copies;  // closed groups, the oldest first, then the open one
};

struct Warp {
  unsigned complete;  // meetings that all lanes have reached
  int arrived;        // lanes at the next one
  Meeting what;
  alignas(16) uint8_t brought[2][32 * kMostBytes];
};

// The block that runs.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  const std::function<void()>* thread;
  Fiber* current;
  int waiting, running;  // at the barrier, and not done
  Memory shared;
  std::map<std::pair<int, int>, Memory> variables;
  std::string error;
  jmp_buf scheduler;
} block;

std::mt19937 order(1);

void leave() {
  if (_setjmp(block.current->state) == 0) _longjmp(block.scheduler, 1);
}

// What is wrong is told by the scheduler, since nothing may be thrown across a fiber's end.
[[noreturn]] void stop(const std::string& error) {
  block.error = error;
  _longjmp(block.scheduler, 1);
}

std::string place() {
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "), thread " +
         std::to_string(threadIdx.x);
}

void perform(const Copy& copy) {
  if (copy.wanted) std::memcpy(copy.to, copy.from, copy.size);
  else std::memset(copy.to, 0, copy.size);
}

void begin_fiber() {
  (*block.thread)();
  Fiber& mine = *block.current;
  mine.done = true;
  --block.running;
  _longjmp(block.scheduler, 1);
}

void resume(int index) {
  Fiber& fiber = block.fibers[index];
  block.current = &fiber;
  threadIdx = dim3(index);
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack;
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, begin_fiber, 0);
  setcontext(&start);
}

bool can_run(int index) {
  const Fiber& fiber = block.fibers[index];
  return !fiber.done && !fiber.at_barrier && fiber.meetings == block.warps[index / 32].complete;
}

void run_block(size_t threads) {
  while (block.fibers.size() < threads) {
    Fiber& fiber = block.fibers.emplace_back();
    fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) throw std::runtime_error("emulation: no memory for a stack");
  }
  const size_t warps = threads / 32;
  block.warps.assign(warps, Warp{});
  std::vector<int> lanes(32), turns(warps);
  for (int i = 0; i < 32; ++i) lanes[i] = i;
  for (size_t w = 0; w < warps; ++w) turns[w] = int(w);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.started = fiber.done = fiber.at_barrier = false;
    fiber.meetings = 0;
    fiber.copies.assign(1, {});
  }
  block.running = int(threads);
  block.waiting = 0;
  while (block.running > 0) {
    bool ran = false;
    std::shuffle(turns.begin(), turns.end(), order);
    for (const int warp : turns) {  // each as far as the barrier
      for (bool again = true; again;) {
        again = false;
        std::shuffle(lanes.begin(), lanes.end(), order);
        for (const int lane : lanes) {
          if (!can_run(32 * warp + lane)) continue;
          resume(32 * warp + lane);
          if (!block.error.empty()) throw std::runtime_error("emulation: " + block.error);
          ran = again = true;
        }
      }
    }
    if (block.waiting > 0 && block.waiting == block.running) {
      block.waiting = 0;
      for (size_t i = 0; i < threads; ++i) block.fibers[i].at_barrier = false;
    } else if (!ran) {
      throw std::runtime_error("emulation: block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                               "): " + std::to_string(block.running) + " threads wait for ones that do not come");
    }
  }
}

}  // namespace

std::vector<DeviceLimits> devices;

void meet_block() {
  block.current->at_barrier = true;
  ++block.waiting;
  leave();
}

const void* meet_warp(Meeting what, const void* mine, size_t size) {
  Fiber& fiber = *block.current;
  Warp& warp = block.warps[threadIdx.x / 32];
  uint8_t* brought = warp.brought[fiber.meetings % 2];
  if (warp.arrived == 0) warp.what = what;
  if (warp.what != what) stop(place() + ": its warp is at another exchange");
  std::memcpy(brought + threadIdx.x % 32 * size, mine, size);
  ++fiber.meetings;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.complete;
  } else {
    leave();
  }
  return brought;
}

void* dynamic_shared() { return block.shared.get(); }

void* static_shared(std::pair<int, int> name, size_t size) {
  Memory& at = block.variables[name];
  if (!at) at = poisoned(size);
  return at.get();
}

void copy_async(void* to, const void* from, size_t size, bool wanted) {
  if (reinterpret_cast<uintptr_t>(to) % size != 0 || (wanted && reinterpret_cast<uintptr_t>(from) % size != 0)) {
    stop(place() + ": an asynchronous copy that is not aligned to its " + std::to_string(size) + " bytes");
  }
  const Copy copy{to, from, size, wanted};
  if (order() % 2) perform(copy);
  else block.current->copies.back().push_back(copy);
}

void close_copies() { block.current->copies.emplace_back(); }

void wait_copies(int newest) {
  auto& groups = block.current->copies;
  while (int(groups.size()) - 1 > newest) {
    for (const Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& thread) {
  if (threads.x % 32 != 0 || threads.y * threads.z != 1 || threads.x > 1024 || grid.x * grid.y == 0) {
    throw std::runtime_error("emulation: a launch of another shape than the kernels' launches have");
  }
  std::vector<unsigned> blocks(grid.x * grid.y);
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), order);
  gridDim = grid;
  blockDim = threads;
  block.thread = &thread;
  for (const unsigned i : blocks) {
    blockIdx = dim3(i % grid.x, i / grid.x);
    block.error.clear();
    block.variables.clear();
    block.shared = poisoned(shared_bytes + kGuardBytes);
    run_block(threads.x);
    for (size_t at = shared_bytes; at < shared_bytes + kGuardBytes; ++at) {
      if (block.shared.get()[at] != kPoison) throw std::runtime_error("emulation: a block wrote beyond its shared memory");
    }
  }
}

}  // namespace emulated

// A device of these limits is the current one from here on, and the order of threads starts anew.
extern "C" __attribute__((visibility("default"))) void emulated_device(int sms, int shared_per_sm,
                                                                       int shared_per_block, int major,
                                                                       unsigned seed) {
  emulated::devices.push_back({sms, shared_per_sm, shared_per_block, major});
  emulated::order.seed(seed);
}
