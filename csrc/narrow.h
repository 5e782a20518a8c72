// From float32 to the kernels' element types, rounding to nearest, ties to even.
#pragma once

#include <cmath>

#include "csrc/math.h"

namespace ccp {

CCP_HD float narrow(float value, float) { return value; }

CCP_HD BFloat16 narrow(float value, BFloat16) {
#ifdef __CUDA_ARCH__
  BFloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t bits = bits_from_float(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
}

CCP_HD Half narrow(float value, Half) {
#ifdef __CUDA_ARCH__
  Half rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t sign = bits_from_float(value) >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (value != value) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x1p-14f)
    return {
        static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f)))};
  const uint32_t bits = bits_from_float(magnitude * 0x1p-112f);
  return {static_cast<uint16_t>(sign | (bits + 0xfffu + (bits >> 13 & 1)) >> 13)};
#endif
}

template <class T>
CCP_HD T narrow(float value) {
  return narrow(value, T{});
}

}  // namespace ccp
