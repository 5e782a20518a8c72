// The main of a driver of CPU kernels, included at its end: CHECK_ISA(namespace) for each
// instruction set that this processor has.
#pragma once

#include "csrc/cpu/isa.h"
#include "testing.h"

int main() {
  CHECK_ISA(baseline);
#ifdef CCP_MULTI_ISA
  if (ccp::cpu::supported_isa() >= ccp::cpu::Isa::kAvx2) CHECK_ISA(avx2);
  if (ccp::cpu::supported_isa() >= ccp::cpu::Isa::kAvx512) CHECK_ISA(avx512);
#endif
  return testing::report();
}
