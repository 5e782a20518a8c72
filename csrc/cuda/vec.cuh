// Loads of one element or of 16 bytes, stores of 16 bytes, and rows read in units: vectors of
// kUnit elements, aligned to their 16 bytes wherever the row begins and ends.
#pragma once

#include "csrc/math.h"

namespace ccp {

template <class T, int kVector>
struct Packed {
  T element[kVector];
};

// `address` must be aligned to 16 bytes when kVector is not 1.
template <class T, int kVector>
__device__ __forceinline__ Packed<T, kVector> load_packed(const T* address) {
  Packed<T, kVector> packed;
  if constexpr (kVector == 1) {
    packed.element[0] = *address;
  } else {
    static_assert(sizeof packed == sizeof(uint4));
    const uint4 bits = *reinterpret_cast<const uint4*>(address);
    memcpy(&packed, &bits, sizeof packed);
  }
  return packed;
}

// The v-th element in the accumulator's type. Two elements of 16 bits share a register, from which
// each is widened by one instruction; taken out first, the upper one would cost two.
template <class T, int kVector>
__device__ __forceinline__ Accumulator<T> widened(const Packed<T, kVector>& packed, int v) {
  if constexpr (sizeof(T) == 2 && kVector > 1) {
    uint32_t pair;
    memcpy(&pair, &packed.element[v / 2 * 2], sizeof pair);
    return v % 2 == 0 ? widen_low<T>(pair) : widen_high<T>(pair);
  } else {
    return widen(packed.element[v]);
  }
}

template <class T, int kVector>
__device__ __forceinline__ void store_packed(const Packed<T, kVector>& packed, T* address) {
  static_assert(sizeof packed == sizeof(uint4));
  uint4 bits;
  memcpy(&bits, &packed, sizeof packed);
  *reinterpret_cast<uint4*>(address) = bits;
}

// How many elements after the beginning of a unit `address` lies.
template <int kUnit, class T>
__device__ __forceinline__ int unit_remainder(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % (kUnit * sizeof(T)) / sizeof(T));
}

// Bit v: whether the v-th element of the unit at `position` lies within [begin, end).
template <int kUnit, class Index>
__device__ __forceinline__ unsigned bits_within(Index position, Index begin, Index end) {
  const auto first_bits = [](Index count) {
    return (1u << static_cast<int>(count < 0 ? 0 : count > kUnit ? kUnit : count)) - 1;
  };
  return first_bits(end - position) & ~first_bits(begin - position);
}

}  // namespace ccp
