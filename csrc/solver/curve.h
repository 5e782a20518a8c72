#pragma once

#include <vector>

#include "problem.h"

namespace ccp::solver {

struct CurvePoint {
  Mask mask;
  double objective;
  double lower_bound;  // on every mask with as many ones; lowered by the rounding errors
};

// For each of the ascending counts a mask and a bound, for an S whose least eigenvalue is -defect
// or more. One relaxation moves along the counts; masks come from rounding it and from the
// neighbours' masks on both sides, each by swap descent. After the deadline the bounds are those
// that the last relaxation gives for all counts, and the masks come by single channels.
std::vector<CurvePoint> curve(const Problem& problem, const std::vector<Index>& counts,
                              double defect, std::chrono::steady_clock::time_point deadline,
                              const Checkpoint& checkpoint);

}  // namespace ccp::solver
