// The kernels that multiply pairs of bfloat16 values, chosen at run time.
#pragma once

#include "csrc/cpu/isa.h"
#include "csrc/triangle.h"

#ifdef CCP_MULTI_ISA
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define CCP_ISA avx512_bf16
#define CCP_VECTOR_BYTES 64
#define CCP_PAIRS
#include "csrc/cpu/pair_kernels.h"
#undef CCP_PAIRS
#undef CCP_ISA
#undef CCP_VECTOR_BYTES
#pragma GCC pop_options
#endif

namespace ccp::cpu {

struct PairKernels {
  void (*join_pairs)(float* panel, int64_t depth);
  // As add_tile of the best instruction set, whose panels are as wide.
  void (*add_tile)(float* out, int64_t stride, int64_t rows, int64_t columns, bool symmetric,
                   const float* left, const float* right, int64_t depth, TileIndex index);
};

// Null where the processor has no such products.
inline const PairKernels* pair_kernels() {
#ifdef CCP_MULTI_ISA
  static const bool supported = best_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  static const PairKernels kernels{avx512_bf16::join_pairs, avx512_bf16::add_tile<float>};
  return supported ? &kernels : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace ccp::cpu
