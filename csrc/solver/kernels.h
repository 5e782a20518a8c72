// The inner loops of the solver, compiled for several instruction sets.
#pragma once

#include "problem.h"

namespace ccp::solver {

constexpr double kFlatCurvature = 1e-12;  // of the diagonal: flat directions are allowed

// What a move of weight to channel `up` from each channel gains: slope^2 / curvature.
struct GainTerms {
  const double* gradient;
  const double* penalty;  // -infinity where nothing can be taken
  const double* diagonal;
  const double* row;  // of channel `up`
  double diagonal_up;
  double least;  // gradient of channel `up`
};

constexpr Index kFloats = 16;  // of a line

// sum [rows, width] += left [rows, count] right [count, width]; kFloats must divide the width. The
// terms of an entry are added one after the other.
struct FloatProduct {
  Index rows;
  Index count;
  Index width;
  const float* left;
  Index left_stride;
  const float* right;
  Index right_stride;
  float* sum;
  Index sum_stride;
};

// Where an index is returned, it is that of the first of equal values, and -1 if all are infinite.
struct RowKernels {
  // sum += factor * row
  void (*add)(Index size, double factor, const double* row, double* sum);
  // sum += factor * (plus - minus)
  void (*add_difference)(Index size, double factor, const double* plus, const double* minus,
                         double* sum);
  // sum += plus - minus
  void (*add_float_difference)(Index size, const float* plus, const float* minus, double* sum);
  // sum += factor * (plus - minus); returns where sum + penalty is least then.
  Index (*add_difference_and_find_least)(Index size, double factor, const double* plus,
                                         const double* minus, const double* penalty, double* sum);
  // Where a + b is least.
  Index (*find_least_sum)(Index size, const double* a, const double* b);
  // Where a - factor * b is least.
  Index (*find_least_difference)(Index size, double factor, const double* a, const double* b);
  Index (*find_largest_gain)(Index size, const GainTerms& terms);
  void (*add_product)(const FloatProduct& terms);
  // Moves multipliers, which are `given` minus `modified`, by -step * products, but not below zero,
  // and their mean towards them.
  void (*move_multipliers)(Index size, float step, float share, const float* products,
                           const float* given, float* modified, float* mean);
  double (*dot)(Index size, const double* a, const double* b);
  double (*absolute_sum)(Index size, const double* row);
  double (*largest)(Index size, const double* row);  // -infinity if there is none
};

// Those for this processor.
extern const RowKernels rows;

}  // namespace ccp::solver
