#pragma once

#include <vector>

#include "problem.h"

namespace ccp::solver {

// result[i, k] = min_j values[i / repeat, j] + (offset[i] + step[k]) * points[j], each in
// O(points + steps) by a walk along the lower convex hull. points must increase strictly and step
// must not decrease. values has shape [offset / repeat, points].
void conjugate(const double* values, const std::vector<double>& points, Index repeat,
               const std::vector<double>& offset, const std::vector<double>& step, double* result);

}  // namespace ccp::solver
