// Moments of a set of numbers: shared by the CPU kernels, the CUDA kernels and the emulator.
#pragma once

#include <cmath>

#include "csrc/math.h"

namespace ccp {

constexpr int kMomentRows = 5;  // sum, sum of squares, zeros, minimum, maximum

// Of the empty set unless something was added. The sum of squares is NaN if and only if a number
// is; minimum and maximum pass over NaN until `finished`.
struct Moments {
  double sum = 0, square_sum = 0, zeros = 0;
  double minimum = HUGE_VAL, maximum = -HUGE_VAL;

  CCP_HD void add(const Moments& other) {
    sum += other.sum;
    square_sum += other.square_sum;
    zeros += other.zeros;
    minimum = fmin(minimum, other.minimum);
    maximum = fmax(maximum, other.maximum);
  }

  CCP_HD Moments finished() const {
    const bool ordered = square_sum == square_sum;
    return {sum, square_sum, zeros, ordered ? minimum : square_sum, ordered ? maximum : square_sum};
  }

  // Of column `channel` of a matrix [kMomentRows, channels].
  CCP_HD static Moments read(const double* rows, int64_t channels, int64_t channel) {
    const double* column = rows + channel;
    return {column[0], column[channels], column[2 * channels], column[3 * channels],
            column[4 * channels]};
  }

  CCP_HD void write(double* rows, int64_t channels, int64_t channel) const {
    const double column[kMomentRows] = {sum, square_sum, zeros, minimum, maximum};
    for (int row = 0; row < kMomentRows; ++row) rows[row * channels + channel] = column[row];
  }
};

}  // namespace ccp
