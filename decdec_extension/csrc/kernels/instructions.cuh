// The few machine instructions that CUDA C++ has no name for.

#pragma once

#include <cstdint>

namespace decdec::cuda {

// Four bytes picked from the eight of (a, b) by the nibbles of `selector`; a nibble's top bit repeats the picked byte's
// sign.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// d (16 x 8, int32) += a (16 x 32, signed or unsigned bytes) * b (32 x 8, signed bytes), exact.
template <bool kSigned>
__device__ __forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kSigned) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 1, 2 or 4 words that are read once, past the L1 cache.
template <int kWords>
__device__ __forceinline__ void load_streaming(uint32_t (&d)[kWords], const void* p) {
  if constexpr (kWords == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "l"(p));
  } else if constexpr (kWords == 2) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "l"(p));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(d[0]) : "l"(p));
  }
}

// A number that another block may have written meanwhile, past the L1 cache; it orders nothing else.
__device__ __forceinline__ uint64_t load_relaxed(const void* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}

// Brings a line of global memory into the first-level cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

// Brings a line into the second-level cache.
__device__ __forceinline__ void prefetch_far(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// A kernel launched with programmatic serialization may start before the one ahead of it in the stream has ended: it
// must wait before it reads what that one wrote, or writes what that one reads. Weights are constant and need no
// waiting.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// An asynchronous copy of 16 bytes that are read once, past the L1 cache.
__device__ __forceinline__ void copy_streaming(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

// Asynchronous copies of 4, 8 or 16 bytes into shared memory; with `wanted` false the bytes become 0 and nothing is
// read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool wanted = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "n"(kBytes), "r"(wanted ? kBytes : 0)
               : "memory");
}

// Closes a group of the thread's copies, and waits for all groups but the newest kNewest. They are its own: other
// threads' copies need a barrier besides.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewest>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

}  // namespace decdec::cuda
