// Scalar types and conversions shared by the CPU kernels, the CUDA kernels and the emulator.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CCP_HD __host__ __device__ __forceinline__
#else
#define CCP_HD inline
#endif

namespace ccp {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

CCP_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

CCP_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

CCP_HD float widen(float value) { return value; }
CCP_HD double widen(double value) { return value; }
CCP_HD float widen(BFloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }

CCP_HD float widen(Half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  // Shift exponent and mantissa into place, then correct the exponent's bias (127 - 15 = 112) by
  // one multiplication, which also normalises subnormal numbers; infinity and NaN keep all ones.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t scaled = bits_from_float(float_from_bits(magnitude) * 0x1p112f);
  return float_from_bits(scaled | special | (value.bits & 0x8000u) << 16);
#endif
}

// The lower and the upper of two values of 16 bits.
template <class T>
CCP_HD float widen_low(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair)});
}

template <class T>
CCP_HD float widen_high(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair >> 16)});
}

template <>
CCP_HD float widen_high<BFloat16>(uint32_t pair) {
  return float_from_bits(pair & 0xffff0000u);
}

#ifdef __CUDA_ARCH__
template <>
CCP_HD float widen_high<Half>(uint32_t pair) {
  float wide;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}"
      : "=f"(wide)
      : "r"(pair));
  return wide;
}
#endif

// The type that a kernel accumulates values of type T in.
template <class T>
using Accumulator = decltype(widen(T{}));

CCP_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ccp
