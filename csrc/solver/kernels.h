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

// Where an index is returned, it is that of the first of equal values, and -1 if all are infinite.
struct RowKernels {
  // sum += factor * row
  void (*add)(Index size, double factor, const double* row, double* sum);
  // sum += factor * (plus - minus)
  void (*add_difference)(Index size, double factor, const double* plus, const double* minus,
                         double* sum);
  // The same; returns where sum + penalty is least then.
  Index (*add_difference_and_find_least)(Index size, double factor, const double* plus,
                                         const double* minus, const double* penalty, double* sum);
  // Where a + b is least.
  Index (*find_least_sum)(Index size, const double* a, const double* b);
  // Where a - factor * b is least.
  Index (*find_least_difference)(Index size, double factor, const double* a, const double* b);
  Index (*find_largest_gain)(Index size, const GainTerms& terms);
  // sum += the rows of a matrix [count, width], each times its factor; 8 must divide the width.
  void (*combine)(Index count, Index width, const double* factors, const double* matrix,
                  double* sum);
  double (*dot)(Index size, const double* a, const double* b);
  double (*absolute_sum)(Index size, const double* row);
  double (*largest)(Index size, const double* row);  // -infinity if there is none
};

// Those for this processor.
extern const RowKernels rows;

}  // namespace ccp::solver
