#include "random.h"

#include <numeric>
#include <utility>

#include "problem.h"

namespace ccp::solver {

Mask random_subset(Index size, Index r, std::uint64_t seed) {
  SplitMix64 generator(seed);
  std::vector<Index> order(size);
  std::iota(order.begin(), order.end(), Index{0});
  Mask mask(size, 0);
  for (Index k = 0; k < r; ++k) {
    std::swap(order[k], order[k + static_cast<Index>(generator.below(size - k))]);
    mask[order[k]] = 1;
  }
  return mask;
}

}  // namespace ccp::solver
