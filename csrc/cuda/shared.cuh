// Shared memory beyond the 48 KiB that a kernel may declare.
#pragma once

#include "csrc/math.h"

namespace ccp {

// The block's shared memory as a Shared; the launch must ask for its size. One type a kernel.
template <class Shared>
__device__ __forceinline__ Shared& dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) uint4 dynamic_shared_memory[];  // as wgmma.cuh asks
  static_assert(alignof(Shared) <= 1024);
  return *reinterpret_cast<Shared*>(dynamic_shared_memory);
#else
  static Shared shared;
  emu::use_dynamic_shared(&shared);
  return shared;
#endif
}

// threadIdx.x, read anew: what follows from it is computed where it is used, and not kept in
// registers from before a loop on.
__device__ __forceinline__ unsigned fresh_thread() {
#ifdef __CUDACC__
  unsigned thread;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

}  // namespace ccp
