#pragma once

#include <vector>

#include "problem.h"

namespace ccp::solver {

// The mask of weight `total` whose scores add up to least; of equal ones, the first. The first
// `total` scores in order where channels weigh 1, else a dynamic program in O(n total). Empty if
// there is no such mask, or none was sought because n total exceeds `most`.
Mask least_scores(const std::vector<double>& score, const std::vector<double>& weight, Index total,
                  Index most);

}  // namespace ccp::solver
