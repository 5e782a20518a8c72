// Random data and comparison for the emulated kernels' tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "csrc/math.h"

namespace testing {

inline float narrow(float value, float*) { return value; }
inline double narrow(float value, double*) { return value; }
inline ccp::BFloat16 narrow(float value, ccp::BFloat16*) {
  return {static_cast<uint16_t>(ccp::bits_from_float(value) >> 16)};
}
// A float16 with `value`'s sign and an exponent near zero; exact rounding does not matter here.
inline ccp::Half narrow(float value, ccp::Half*) {
  const uint32_t bits = ccp::bits_from_float(value * 0x1p-112f);
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | (bits >> 13 & 0x7fffu))};
}

// Normally distributed values in a buffer of exactly this size, so that AddressSanitizer sees the
// first access beyond it.
template <class T>
std::vector<T> random_values(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) value = narrow(normal(random), static_cast<T*>(nullptr));
  return values;
}

template <class Acc>
std::vector<Acc> unwritten(int64_t count) {
  return std::vector<Acc>(count, std::numeric_limits<Acc>::quiet_NaN());
}

inline int failures = 0;

// Errors over the sum of the terms' magnitudes: a few roundings, and that of terms each of whose
// two factors is rounded to TF32.
template <class Acc>
constexpr double kExactTolerance = 32 * std::numeric_limits<Acc>::epsilon();
constexpr double kTf32Tolerance = 0x1p-10;

template <class Acc>
void expect_close(const std::string& name, int64_t index, Acc actual, double expected,
                  double magnitude, double tolerance = kExactTolerance<Acc>) {
  if (std::fabs(actual - expected) <= tolerance * magnitude) return;
  ++failures;
  std::printf("%s: element %ld is %.9g, expected %.9g\n", name.c_str(), static_cast<long>(index),
              static_cast<double>(actual), expected);
}

inline void expect(const std::string& name, bool condition) {
  if (condition) return;
  ++failures;
  std::printf("%s\n", name.c_str());
}

// Whether eight lanes, of 16 bytes each, meet every memory bank once.
template <class Place>
bool on_all_banks(Place place) {
  unsigned met = 0;
  for (unsigned lane = 0; lane < 8; ++lane)
    met |= 1u << reinterpret_cast<uintptr_t>(place(lane)) / 16 % 8;
  return met == 0xff;
}

inline int report() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace testing
