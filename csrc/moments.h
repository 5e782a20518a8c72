// Moments of a set of numbers: shared by the CPU kernels, the CUDA kernels and the emulator.
#pragma once

#include <cmath>

#include "csrc/math.h"

namespace ccp {

// The lesser and the greater of two numbers, or NaN if either is NaN.
template <class Acc>
CCP_HD Acc lesser(Acc a, Acc b) {
  return b < a || b != b ? b : a;
}
template <class Acc>
CCP_HD Acc greater(Acc a, Acc b) {
  return b > a || b != b ? b : a;
}

#ifdef __CUDA_ARCH__
CCP_HD float lesser(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
CCP_HD float greater(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
#endif

constexpr int kMomentRows = 5;  // sum, sum of squares, zeros, minimum, maximum

// Of the empty set unless something was added.
struct Moments {
  double sum = 0, square_sum = 0, zeros = 0;
  double minimum = HUGE_VAL, maximum = -HUGE_VAL;

  CCP_HD void add(const Moments& other) {
    sum += other.sum;
    square_sum += other.square_sum;
    zeros += other.zeros;
    minimum = lesser(minimum, other.minimum);
    maximum = greater(maximum, other.maximum);
  }

  // Column `channel` of a matrix [kMomentRows, channels].
  CCP_HD void write(double* out, int64_t channels, int64_t channel) const {
    const double rows[kMomentRows] = {sum, square_sum, zeros, minimum, maximum};
    for (int row = 0; row < kMomentRows; ++row) out[row * channels + channel] = rows[row];
  }
};

}  // namespace ccp
