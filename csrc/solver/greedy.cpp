#include <algorithm>
#include <limits>

#include "kernels.h"
#include "problem.h"

namespace ccp::solver {
namespace {

Mask grow(const Problem& problem, Index r, const Checkpoint& checkpoint) {
  constexpr double kChosen = std::numeric_limits<double>::infinity();
  Mask mask(problem.size, 0);
  std::vector<double> increase = gradient(problem, mask);  // of the cost, if a channel is added
  for (Index i = 0; i < problem.size; ++i) increase[i] += 0.5 * problem.diagonal(i);

  for (Index count = 0; count < r; ++count) {
    checkpoint();
    const Index best = std::min_element(increase.begin(), increase.end()) - increase.begin();
    mask[best] = 1;
    increase[best] = kChosen;
    rows.add(problem.size, 1, problem.row(best), increase.data());
  }
  return mask;
}

}  // namespace

std::array<Mask, 2> greedy(const Problem& problem, Index r, const Checkpoint& checkpoint) {
  return {grow(problem, r, checkpoint),
          inverse(grow(complement(problem), problem.size - r, checkpoint))};
}

}  // namespace ccp::solver
