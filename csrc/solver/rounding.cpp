#include "rounding.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Mask first_in_order(const std::vector<double>& score, Index count) {
  std::vector<Index> order(score.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return score[a] < score[b]; });
  Mask mask(score.size(), 0);
  for (Index k = 0; k < count; ++k) mask[order[k]] = 1;
  return mask;
}

// The 0/1 knapsack that is filled exactly (Bellman, 1957).
Mask exact_knapsack(const std::vector<double>& score, const std::vector<double>& weight,
                    Index total) {
  const Index size = static_cast<Index>(score.size());
  std::vector<double> least(total + 1, kInfinity);
  least[0] = 0;
  std::vector<bool> taken(size * (total + 1));
  for (Index i = 0; i < size; ++i) {
    const Index w = static_cast<Index>(weight[i]);
    for (Index t = total; t >= w; --t) {
      const double with = least[t - w] + score[i];
      if (with < least[t]) {
        least[t] = with;
        taken[i * (total + 1) + t] = true;
      }
    }
  }
  if (least[total] == kInfinity) return {};
  Mask mask(size, 0);
  for (Index i = size - 1, t = total; i >= 0; --i) {
    if (!taken[i * (total + 1) + t]) continue;
    mask[i] = 1;
    t -= static_cast<Index>(weight[i]);
  }
  return mask;
}

}  // namespace

Mask least_scores(const std::vector<double>& score, const std::vector<double>& weight, Index total,
                  Index most) {
  const Index size = static_cast<Index>(score.size());
  if (all_ones(weight)) {
    return 0 <= total && total <= size ? first_in_order(score, total) : Mask{};
  }
  if (total < 0 || size * (total + 1) > most) return {};
  return exact_knapsack(score, weight, total);
}

}  // namespace ccp::solver
