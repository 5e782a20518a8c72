// The convex relaxation of channel selection:
//
//     minimise  1/2 x'Sx + c'x   over 0 <= x <= 1 with sum x = r, for a positive semidefinite S.
#pragma once

#include <vector>

#include "problem.h"

namespace ccp::solver {

struct Relaxation {
  Index size;
  const double* quadratic;  // S, row-major, rows `stride` apart
  Index stride;
  std::vector<double> linear;  // c
  Index ones;                  // r

  const double* row(Index i) const { return quadratic + i * stride; }
};

// When the descent may end: at a bound of `cutoff` or more, once the bound is known to the absolute
// `precision`, once it is clear that no bound reaches a finite cutoff, or if `expired` says so.
struct Target {
  double cutoff;
  double precision;
  const Expired& expired;
};

struct Relaxed {
  std::vector<double> x;         // in [0, 1]; sums to r up to rounding
  std::vector<double> gradient;  // S x + c, summed afresh
  double bound;                  // of every feasible point, up to rounding
};

// Sequential minimal optimisation (Platt, 1998; pairs by second-order gain after Fan, Chen and Lin,
// JMLR 6, 2005) from `start`, a point in the box whose sum need not be r.
Relaxed relax(const Relaxation& problem, std::vector<double> start, const Target& target);

// The channels that a bound decides: forcing the other value would raise it by `room` or more.
// 0 or 1 where decided, kFree elsewhere.
constexpr char kFree = 2;
std::vector<char> reduced_cost_fixing(const std::vector<double>& gradient, Index ones, double room);

}  // namespace ccp::solver
