// CUDA kernels on the CPU, for tests on machines without a GPU: enough of CUDA C++ for the sources in csrc/kernels and
// csrc/launch to compile as ordinary C++, and a scheduler that runs a block's threads as fibers.
//
// It is made to find mistakes, not to be fast. Threads run in random order, each as far as the next barrier or exchange
// of its warp, so that a missing barrier shows. Shared memory is full of NaN when a block begins, and a block must not
// write beyond its own. Asynchronous copies land at random between their start and the wait for them. Lanes of a warp
// that meet at different exchanges, or a barrier that not all threads reach, are errors. Not seen: races within what
// the order of fibers hides, the order in which global memory is written, blocks that run at the same time.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

template <class T>
struct alignas(2 * sizeof(T)) Vector2 {
  T x, y;
};
template <class T>
struct alignas(4 * sizeof(T)) Vector4 {
  T x, y, z, w;
};
using int2 = Vector2<int>;
using uint2 = Vector2<uint32_t>;
using float2 = Vector2<float>;
using int4 = Vector4<int>;
using uint4 = Vector4<uint32_t>;
using float4 = Vector4<float>;
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the running thread.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum class Meeting { kBarrier, kWarp, kShuffle, kVote, kReduce, kProduct };

// Waits for the other threads of the block.
void meet_block();

// Waits for the other lanes of the warp and leaves what each of them brought, `size` bytes a lane, in the result, which
// stays until the lane's next meeting.
const void* meet_warp(Meeting what, const void* mine, size_t size);

template <class T>
const T* exchange(Meeting what, const T& mine) {
  static_assert(sizeof(T) <= 64);
  return static_cast<const T*>(meet_warp(what, &mine, sizeof(T)));
}

// The block's shared memory: the dynamic part, and a variable, known by the line that declares it and its number there.
void* dynamic_shared();
void* static_shared(std::pair<int, int> name, size_t size);

template <class T>
T& static_shared(std::pair<int, int> name) {
  return *static_cast<T*>(static_shared(name, sizeof(T)));
}

// The thread's asynchronous copies.
void copy_async(void* to, const void* from, size_t size, bool wanted);
void close_copies();
void wait_copies(int newest);

// Runs `thread` once for every thread of the grid, one block after another in random order.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

inline int lane() { return int(threadIdx.x % 32); }

}  // namespace emulated

inline void __syncthreads() { emulated::meet_block(); }
inline void __syncwarp() { emulated::exchange(emulated::Meeting::kWarp, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulated::exchange(emulated::Meeting::kShuffle, v)[emulated::lane() ^ mask];
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const int* all = emulated::exchange(emulated::Meeting::kVote, predicate);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned(all[i] != 0) << i;
  return bits;
}
inline int __all_sync(unsigned, int predicate) { return __ballot_sync(0xffffffff, predicate) == 0xffffffff; }
template <class T>
T __reduce_max_sync(unsigned, T v) {
  const T* all = emulated::exchange(emulated::Meeting::kReduce, v);
  T most = all[0];
  for (int i = 1; i < 32; ++i) most = all[i] > most ? all[i] : most;
  return most;
}
template <class T>
T __reduce_add_sync(unsigned, T v) {
  const T* all = emulated::exchange(emulated::Meeting::kReduce, v);
  T sum = 0;
  for (int i = 0; i < 32; ++i) sum += all[i];
  return sum;
}

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }

template <class T>
T atomicExch(T* at, std::type_identity_t<T> v) {
  const T old = *at;
  *at = v;
  return old;
}
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> v) {
  const T old = *at;
  *at = old + v;
  return old;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> v) {
  const T old = *at;
  *at = old > v ? old : v;
  return old;
}

inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline int __popc(uint32_t v) { return std::popcount(v); }
inline int __ffs(uint32_t v) { return v ? std::countr_zero(v) + 1 : 0; }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  const uint32_t low = std::max(a & 0xffff, b & 0xffff), high = std::max(a >> 16, b >> 16);
  return high << 16 | low;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
  return c;
}
inline float __expf(float v) { return std::exp(v); }
inline float __sinf(float v) { return std::sin(v); }
inline float __cosf(float v) { return std::cos(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}
using std::isfinite;
using std::isnan;
