#pragma once

#include <vector>

#include "relaxation.h"

namespace ccp::solver {

struct Branching {
  Index position;                // of the channel to branch on, in `free`
  std::vector<double> response;  // the best move of the free channels with a unit of that channel
};

// The channel whose two values both cost most, estimated on the face of the fractional channels:
// with H = S restricted to them and to sum d = 0, moving x_i to 0 costs 1/2 x_i^2 / (H^-1)_ii, and
// moving it to w_i the same with w_i - x_i. The other channels of the face then move by column i of
// H^-1 over (H^-1)_ii. `free` names the rows of S, `x` belongs to them.
Branching choose_branching(const Relaxation& whole, const std::vector<Index>& free,
                           const std::vector<double>& x);

}  // namespace ccp::solver
