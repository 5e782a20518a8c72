// Products of panels of bfloat16 values by the processor's dot products of pairs: a row of such a
// panel holds two rows of values, one in the low and one in the high halves of its words. Sums are
// float32; numbers below 2^-126 count as zero. Included once, with CCP_PAIRS defined.
#include "csrc/cpu/panels.h"

namespace ccp::cpu::CCP_ISA {

// Joins the rows of a float32 panel of bfloat16 values into pairs, where they lie.
inline void join_pairs(float* panel, int64_t depth) {
  typedef uint32_t Words __attribute__((vector_size(2 * CCP_VECTOR_BYTES)));
  for (int64_t d = 0; d < depth; d += 2) {
    Words low, high{};
    __builtin_memcpy(&low, panel + d * kPanel<float>, sizeof low);
    if (d + 1 < depth) __builtin_memcpy(&high, panel + (d + 1) * kPanel<float>, sizeof high);
    const Words pair = (low >> 16) | high;
    __builtin_memcpy(panel + d / 2 * kPanel<float>, &pair, sizeof pair);
  }
}

}  // namespace ccp::cpu::CCP_ISA
