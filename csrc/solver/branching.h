#pragma once

#include <vector>

#include "relaxation.h"

namespace ccp::solver {

// The channel whose two values both cost most, estimated on the face of the fractional channels:
// with H = S restricted to them and to sum d = 0, moving x_i to 0 costs 1/2 x_i^2 / (H^-1)_ii, and
// moving it to 1 the same with 1 - x_i. `free` names the rows of S, `x` belongs to them; returns a
// position in `free`.
Index branching_position(const Problem& problem, const std::vector<Index>& free,
                         const std::vector<double>& x);

}  // namespace ccp::solver
