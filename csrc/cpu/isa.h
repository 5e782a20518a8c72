// One kernel source, compiled for several x86 instruction sets; the best one is chosen at run time.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CCP_MULTI_ISA
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace ccp::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// What the processor has.
inline Isa supported_isa() {
#ifdef CCP_MULTI_ISA
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  return avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

// What ATEN_CPU_CAPABILITY allows, the variable by which torch's own kernels are chosen.
inline Isa allowed_isa() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view capability = variable == nullptr ? "" : variable;
  return capability == "default" ? Isa::kBaseline
         : capability == "avx2"  ? Isa::kAvx2
                                 : Isa::kAvx512;
}

inline Isa best_isa() {
  static const Isa isa = std::min(supported_isa(), allowed_isa());
  return isa;
}

}  // namespace ccp::cpu

// The address of function `...` as compiled for this processor; use inside namespace ccp::cpu.
#ifdef CCP_MULTI_ISA
#define CCP_BEST_ISA(...)                            \
  (best_isa() == Isa::kAvx512 ? &avx512::__VA_ARGS__ \
   : best_isa() == Isa::kAvx2 ? &avx2::__VA_ARGS__   \
                              : &baseline::__VA_ARGS__)
#else
#define CCP_BEST_ISA(...) (&baseline::__VA_ARGS__)
#endif
