// What only Hopper's multiprocessors (sm_90a) have: matrix products by warpgroups, of 128 threads,
// that read both operands from shared memory and run beside the threads; and the barriers between
// threads that copy and threads that multiply. As in mma.cuh each instruction is one function with
// two bodies, PTX for nvcc and one for the emulator.
//
// An operand lies in panels of rows of 64 or 128 bytes in shared memory, in one of two ways:
//   rows of depths: row r has depths of row r of A, or of column r of B;
//   rows of maps, that is of rows of A or columns of B: row k has 64 of them at depth k; the next
//   64 lie in a panel of their own.
// Its units of 16 bytes are mixed (swizzled), so that rows of a unit lie on different memory banks;
// panels begin where the mixture does, at multiples of 8 rows' bytes.
// C, 64 x 128, is spread over the warpgroup: with w the warp of four, g = lane / 4, t = lane % 4,
// element i of fragment f is in row 16 * w + g + 8 * (i / 2), column 8 * f + 2 * t + i % 2.
#pragma once

#include "csrc/cuda/mma.cuh"

// Code for other architectures has no body of a kernel that needs these instructions; its
// __launch_bounds__ tell the host so (kWarpgroupProducts).
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CCP_WARPGROUP_PRODUCTS
#endif

namespace ccp {

#ifdef CCP_WARPGROUP_PRODUCTS
constexpr bool kWarpgroupProducts = true;
#else
constexpr bool kWarpgroupProducts = false;
#endif

constexpr int kWarpgroup = 128;       // threads
constexpr int kProductRows = 64;      // of A
constexpr int kProductColumns = 128;  // of B
constexpr int kProductDepth = 16;     // of one product

// One warpgroup's C.
using ProductSums = float[kProductColumns / 8][4];

// How an operand's panel lies.
enum class PanelRows { kDepths, kMaps };

// A barrier of a number of arrivals, in shared memory, that can be met again and again: its phases
// take turns of parity 0 and 1.
struct SharedBarrier {
  uint64_t state;
};

// An operand, as the instruction takes it.
struct MatrixOperand {
  uint64_t descriptor;

  __device__ __forceinline__ MatrixOperand operator+(unsigned bytes) const {
    return {descriptor + bytes / 16};
  }
};

// Where in panels of such rows a byte lies: the unit's last two or three bits are mixed with those
// of the 128 bytes in which it lies.
template <int kRowBytes>
CCP_HD uint32_t swizzled(uint32_t address) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  return address ^ (address >> 7 & (kRowBytes / 16 - 1)) << 4;
}

// The operand from `address` on, with `maps_bytes` from 64 maps to the next 64 (of rows of maps).
// Fields in units of 16 bytes: the address (bits 0 to 13), the leading offset (16 to 29), which is
// maps_bytes or 1 in rows of depths, and that from eight rows to the next eight (32 to 45); bits 62
// and 63 are the mode of mixing, 1 for rows of 128 bytes, 2 for those of 64.
template <PanelRows kRows, int kRowBytes>
__device__ __forceinline__ MatrixOperand matrix_operand(uint32_t address, unsigned maps_bytes) {
  const uint64_t leading = kRows == PanelRows::kMaps ? maps_bytes / 16 : 1;
  constexpr uint64_t kMode = kRowBytes == 64 ? 2 : 1;
  return {(address & 0x3ffff) / 16 | leading << 16 | uint64_t{8 * kRowBytes / 16} << 32 |
          kMode << 62};
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void init_barrier(SharedBarrier& barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void arrive(SharedBarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// Until the phase of this parity has ended; that before the first has.
__device__ __forceinline__ void wait(SharedBarrier& barrier, unsigned parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// What this thread has written to shared memory may be read by products that other threads begin
// after they have met a barrier with it.
__device__ __forceinline__ void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The registers of each thread of a warpgroup from now on: fewer than the launch gave, or more once
// others have given them up.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#define CCP_FRAGMENT(f) "+f"(c[f][0]), "+f"(c[f][1]), "+f"(c[f][2]), "+f"(c[f][3])
#define CCP_FRAGMENTS(f) \
  CCP_FRAGMENT(f), CCP_FRAGMENT(f + 1), CCP_FRAGMENT(f + 2), CCP_FRAGMENT(f + 3)
#define CCP_PRODUCT(types, transposed)                                                    \
  asm volatile(                                                                           \
      "{.reg .pred accumulate; setp.ne.u32 accumulate, %66, 0;\n"                         \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, accumulate, 1, 1, " transposed ", " transposed ";}"                      \
      : CCP_FRAGMENTS(0), CCP_FRAGMENTS(4), CCP_FRAGMENTS(8), CCP_FRAGMENTS(12)           \
      : "l"(a.descriptor), "l"(b.descriptor), "r"(static_cast<uint32_t>(add))             \
      : "memory")

// Begins C += A * B, or C = A * B unless `add`, with float32 accumulation. A is 64 x 16, B 16 x
// 128. C is in use, and must not be touched, until wait_for_products; A and B likewise.
template <class T, PanelRows kRows, int kRowBytes>
__device__ __forceinline__ void multiply_async(ProductSums& c, MatrixOperand a, MatrixOperand b,
                                               bool add) {
  static_assert(sizeof(T) == 2);
  if constexpr (kIsBFloat16<T>) {
    if constexpr (kRows == PanelRows::kDepths)
      CCP_PRODUCT("bf16.bf16", "0");
    else
      CCP_PRODUCT("bf16.bf16", "1");
  } else {
    if constexpr (kRows == PanelRows::kDepths)
      CCP_PRODUCT("f16.f16", "0");
    else
      CCP_PRODUCT("f16.f16", "1");
  }
}

#undef CCP_PRODUCT
#undef CCP_FRAGMENTS
#undef CCP_FRAGMENT

// The compiler moves nothing that it does with C past here.
template <int kBlocks>
__device__ __forceinline__ void hold(ProductSums (&c)[kBlocks]) {
#pragma unroll
  for (auto& block : c)
#pragma unroll
    for (auto& fragment : block)
#pragma unroll
      for (float& sum : fragment) asm volatile("" : "+f"(sum)::"memory");
}

// Before the first of some products: what the threads have done with C so far comes first.
template <int kBlocks>
__device__ __forceinline__ void begin_products(ProductSums (&c)[kBlocks]) {
  hold(c);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Of all that this thread has begun.
template <int kBlocks>
__device__ __forceinline__ void wait_for_products(ProductSums (&c)[kBlocks]) {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold(c);
}

#else  // in the emulator

inline uint32_t shared_address(const void* shared) { return emu::shared_address(shared); }
inline void init_barrier(SharedBarrier& barrier, unsigned arrivals) {
  emu::init_barrier(&barrier.state, arrivals);
}
inline void arrive(SharedBarrier& barrier) { emu::arrive(&barrier.state); }
inline void wait(SharedBarrier& barrier, unsigned parity) { emu::wait(&barrier.state, parity); }
inline void show_to_products() {}
template <int kRegisters>
void keep_registers() {}
template <int kRegisters>
void claim_registers() {}

// The element of an operand in row or column `map` at `depth`.
template <class T, PanelRows kRows>
double operand_element(uint64_t descriptor, int map, int depth) {
  const auto bytes = [&](int first) { return static_cast<int>(descriptor >> first & 0x3fff) * 16; };
  const bool short_rows = descriptor >> 62 == 2;
  const int row_bytes = short_rows ? 64 : 128, maps_bytes = bytes(16), group_bytes = bytes(32);
  const int row = kRows == PanelRows::kDepths ? map : depth;
  const int column = kRows == PanelRows::kDepths ? depth : map % 64;
  const int panel = kRows == PanelRows::kDepths ? 0 : map / 64 * maps_bytes;
  const uint32_t address =
      bytes(0) + panel + row / 8 * group_bytes + row % 8 * row_bytes + column * 2;
  const uint32_t at = short_rows ? swizzled<64>(address) : swizzled<128>(address);
  return widen(*static_cast<const T*>(emu::shared_data(at)));
}

template <class T, PanelRows kRows, int kRowBytes>
void multiply_async(ProductSums& c, MatrixOperand a, MatrixOperand b, bool add) {
  for (const MatrixOperand& operand : {a, b})
    if (operand.descriptor >> 46 != (kRowBytes == 64 ? 2u : 1u) << 16)
      throw std::runtime_error("other matrix operands than these are not emulated");
  emu::begin_product(a.descriptor, b.descriptor, &c[0][0], sizeof c, [=](float* sums) {
    const int thread = threadIdx.x % kWarpgroup, g = thread % 32 / 4, t = thread % 4;
    for (int i = 0; i < kProductColumns / 8 * 4; ++i) {
      const int row = thread / 32 * 16 + g + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
      double sum = add ? sums[i] : 0;
      for (int k = 0; k < kProductDepth; ++k)
        sum += operand_element<T, kRows>(a.descriptor, row, k) *
               operand_element<T, kRows>(b.descriptor, column, k);
      sums[i] = static_cast<float>(sum);
    }
  });
}

template <int kBlocks>
void begin_products(ProductSums (&)[kBlocks]) {}

template <int kBlocks>
void wait_for_products(ProductSums (&)[kBlocks]) {
  emu::finish_products();
}

#endif

}  // namespace ccp
