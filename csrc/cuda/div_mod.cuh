// Quotient and remainder of indices.
#pragma once

#include "csrc/math.h"

namespace ccp {

struct DivMod {
  int64_t quotient, remainder;
};

// Division of numbers that are not negative; 64-bit division is slow and rarely needed.
__device__ __forceinline__ DivMod div_mod(int64_t a, int64_t b) {
  if (a < b) return {0, a};
  if (((a | b) >> 32) == 0) {
    const uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return {quotient, a - static_cast<int64_t>(quotient) * b};
  }
  return {a / b, a % b};
}

}  // namespace ccp
