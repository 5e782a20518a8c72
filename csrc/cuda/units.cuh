// Vectors of 16 bytes, or single elements, as words of 32 bits, on which two elements of 16 bits
// are worked at once.
#pragma once

#include "csrc/cuda/vec.cuh"
#include "csrc/narrow.h"

namespace ccp {

template <class T, int kUnit>
struct Unit {
  static constexpr int kElementWords = sizeof(T) == 8 ? 2 : 1;
  static constexpr int kWords = sizeof(T) == 2 ? (kUnit + 1) / 2 : kUnit * kElementWords;
  static constexpr int kPlaces = sizeof(T) == 2 ? 2 * kWords : kUnit;  // for elements
  uint32_t word[kWords];

  __device__ __forceinline__ Accumulator<T> value(int v) const {
    if constexpr (sizeof(T) == 2) {
      return v % 2 == 0 ? widen_low<T>(word[v / 2]) : widen_high<T>(word[v / 2]);
    } else {
      T element;
      memcpy(&element, word + v * kElementWords, sizeof element);
      return element;
    }
  }

  // Element v must be zero before.
  __device__ __forceinline__ void put(int v, T element) {
    if constexpr (sizeof(T) == 2) {
      word[v / 2] |= static_cast<uint32_t>(element.bits) << v % 2 * 16;
    } else {
      memcpy(word + v * kElementWords, &element, sizeof element);
    }
  }
};

template <class T, int kUnit>
__device__ __forceinline__ Unit<T, kUnit> load_unit(const T* address) {
  Unit<T, kUnit> unit{};
  if constexpr (kUnit == 1) {
    unit.put(0, *address);
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(address);
    static_assert(sizeof unit == sizeof bits);
    memcpy(&unit, &bits, sizeof unit);
  }
  return unit;
}

template <class T, int kUnit>
__device__ __forceinline__ void store_unit(const Unit<T, kUnit>& unit, T* address) {
  uint4 bits;
  static_assert(sizeof unit == sizeof bits);
  memcpy(&bits, &unit, sizeof bits);
  *reinterpret_cast<uint4*>(address) = bits;
}

// Reads only the elements that `inside` names; the others are zero.
template <class T, int kUnit>
__device__ __forceinline__ Unit<T, kUnit> load_part(const T* address, unsigned inside) {
  Unit<T, kUnit> unit{};
#pragma unroll
  for (int v = 0; v < kUnit; ++v)
    if (inside >> v & 1) unit.put(v, address[v]);
  return unit;
}

// A unit's worth of elements from the `first`-th of two units on.
template <class T, int kUnit>
__device__ __forceinline__ Unit<T, kUnit> elements_from(int first, const Unit<T, kUnit>& low,
                                                        const Unit<T, kUnit>& high) {
  constexpr int kWords = Unit<T, kUnit>::kWords;
  static_assert(kWords == 4);
  uint32_t words[2 * kWords];
  memcpy(words, &low, sizeof low);
  memcpy(words + kWords, &high, sizeof high);
  const unsigned bytes = first * sizeof(T);
#pragma unroll
  for (int skipped = 2; skipped > 0; --skipped) {
    const bool skip = bytes & 4 * skipped;
#pragma unroll
    for (int w = 0; w < 2 * kWords - skipped; ++w) words[w] = skip ? words[w + skipped] : words[w];
  }
  Unit<T, kUnit> unit;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint64_t pair = static_cast<uint64_t>(words[w + 1]) << 32 | words[w];
    unit.word[w] = sizeof(T) == 2 ? static_cast<uint32_t>(pair >> bytes % 4 * 8) : words[w];
  }
  return unit;
}

// Ones in the places of the elements that `inside` names, zeros elsewhere.
template <class T, int kUnit>
__device__ __forceinline__ Unit<T, kUnit> unit_mask(unsigned inside) {
  using U = Unit<T, kUnit>;
  U mask;
#pragma unroll
  for (int w = 0; w < U::kWords; ++w) {
    if constexpr (sizeof(T) == 2) {
      mask.word[w] = (inside >> 2 * w & 1) * 0xffffu | (inside >> (2 * w + 1) & 1) * 0xffff0000u;
    } else {
      mask.word[w] = 0u - (inside >> w / U::kElementWords & 1);
    }
  }
  return mask;
}

template <class T, int kUnit>
__device__ __forceinline__ Unit<T, kUnit> zero_outside(Unit<T, kUnit> unit,
                                                       const Unit<T, kUnit>& mask) {
#pragma unroll
  for (int w = 0; w < Unit<T, kUnit>::kWords; ++w) unit.word[w] &= mask.word[w];
  return unit;
}

// Of every type, a number of ones only is NaN.
template <class T, int kUnit>
__device__ __forceinline__ Unit<T, kUnit> nan_outside(Unit<T, kUnit> unit,
                                                      const Unit<T, kUnit>& mask) {
#pragma unroll
  for (int w = 0; w < Unit<T, kUnit>::kWords; ++w) unit.word[w] |= ~mask.word[w];
  return unit;
}

#ifdef __CUDACC__

// Of two pairs of 16 bits.
template <class T>
__device__ __forceinline__ uint32_t smaller_of_pairs(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (kIsBFloat16<T>) {
    asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("min.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
}

template <class T>
__device__ __forceinline__ uint32_t larger_of_pairs(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (kIsBFloat16<T>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
}

// counts, a pair of float16, plus 1 where a pair of either type of 16 bits, whose zeros have the
// same bits, is zero.
__device__ __forceinline__ uint32_t count_zeros_of_pair(uint32_t counts, uint32_t pair) {
  uint32_t result;
  asm("{.reg .b32 zero; set.eq.f16x2.f16x2 zero, %2, %3; add.f16x2 %0, %1, zero;}"
      : "=r"(result)
      : "r"(counts), "r"(pair), "r"(0));
  return result;
}

#else  // in the emulator

template <class T, class Choose>
uint32_t chosen_of_pairs(uint32_t a, uint32_t b, Choose choose) {
  const uint16_t low = narrow<T>(choose(widen_low<T>(a), widen_low<T>(b))).bits;
  const uint16_t high = narrow<T>(choose(widen_high<T>(a), widen_high<T>(b))).bits;
  return low | static_cast<uint32_t>(high) << 16;
}

template <class T>
uint32_t smaller_of_pairs(uint32_t a, uint32_t b) {
  return chosen_of_pairs<T>(a, b, [](float x, float y) { return std::fmin(x, y); });
}

template <class T>
uint32_t larger_of_pairs(uint32_t a, uint32_t b) {
  return chosen_of_pairs<T>(a, b, [](float x, float y) { return std::fmax(x, y); });
}

inline uint32_t count_zeros_of_pair(uint32_t counts, uint32_t pair) {
  const uint16_t low = narrow<Half>(widen_low<Half>(counts) + !(pair & 0x7fffu)).bits;
  const uint16_t high = narrow<Half>(widen_high<Half>(counts) + !(pair & 0x7fff0000u)).bits;
  return low | static_cast<uint32_t>(high) << 16;
}

#endif

// Counts the zeros of some units, up to 2048 in each place of a word.
template <class T, int kUnit>
class ZeroCount {
 public:
  __device__ __forceinline__ void add(const Unit<T, kUnit>& unit) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int w = 0; w < unit.kWords; ++w) count_ = count_zeros_of_pair(count_, unit.word[w]);
    } else {
#pragma unroll
      for (int v = 0; v < kUnit; ++v) count_ += unit.value(v) == 0;
    }
  }

  __device__ __forceinline__ int total() const {
    if constexpr (sizeof(T) != 2) return static_cast<int>(count_);
    return static_cast<int>(widen_low<Half>(count_) + widen_high<Half>(count_));
  }

 private:
  uint32_t count_ = 0;  // or a pair of float16
};

// The smaller of each two elements, or the one that is not NaN.
template <class T, int kUnit>
__device__ __forceinline__ Unit<T, kUnit> smaller(const Unit<T, kUnit>& a,
                                                  const Unit<T, kUnit>& b) {
  Unit<T, kUnit> result;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int w = 0; w < result.kWords; ++w)
      result.word[w] = smaller_of_pairs<T>(a.word[w], b.word[w]);
  } else {
#pragma unroll
    for (int v = 0; v < kUnit; ++v) result.put(v, fmin(a.value(v), b.value(v)));
  }
  return result;
}

// The larger of each two elements, or the one that is not NaN.
template <class T, int kUnit>
__device__ __forceinline__ Unit<T, kUnit> larger(const Unit<T, kUnit>& a, const Unit<T, kUnit>& b) {
  Unit<T, kUnit> result;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int w = 0; w < result.kWords; ++w)
      result.word[w] = larger_of_pairs<T>(a.word[w], b.word[w]);
  } else {
#pragma unroll
    for (int v = 0; v < kUnit; ++v) result.put(v, fmax(a.value(v), b.value(v)));
  }
  return result;
}

}  // namespace ccp
