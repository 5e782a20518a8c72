// Loads of one element or of 16 bytes, stores of 16 bytes.
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

template <class T, int kVector>
__device__ __forceinline__ void store_packed(const Packed<T, kVector>& packed, T* address) {
  static_assert(sizeof packed == sizeof(uint4));
  uint4 bits;
  memcpy(&bits, &packed, sizeof packed);
  *reinterpret_cast<uint4*>(address) = bits;
}

}  // namespace ccp
