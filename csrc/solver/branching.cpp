#include "branching.h"

#include <algorithm>

#include "face.h"

namespace ccp::solver {
namespace {

constexpr double kIntegral = 1e-6;
constexpr Index kLargestFace = 128;

}  // namespace

Branching choose_branching(const Relaxation& whole, const std::vector<Index>& free,
                           const std::vector<double>& x) {
  const auto centrality = [&](Index k) {
    return std::min(x[k] / whole.capacity[free[k]], 1 - x[k] / whole.capacity[free[k]]);
  };
  const Index size = static_cast<Index>(free.size());
  std::vector<Index> candidates;
  for (Index k = 0; k < size; ++k) {
    if (centrality(k) > kIntegral) candidates.push_back(k);
  }
  Branching branching{0, std::vector<double>(size)};
  if (candidates.size() < 2) {
    for (Index k = 1; k < size; ++k) {
      if (centrality(k) > centrality(branching.position)) branching.position = k;
    }
    return branching;
  }
  if (static_cast<Index>(candidates.size()) > kLargestFace) {
    std::stable_sort(candidates.begin(), candidates.end(),
                     [&](Index a, Index b) { return centrality(a) > centrality(b); });
    candidates.resize(kLargestFace);
  }
  std::vector<Index> face;
  for (Index k : candidates) face.push_back(free[k]);
  const FaceInverse inverse(whole.quadratic, whole.stride, face);
  Index best = 0;
  double best_score = -1;
  for (Index k = 0; k < static_cast<Index>(face.size()); ++k) {
    const double value = x[candidates[k]];
    const double score = value * (whole.capacity[face[k]] - value) / inverse.diagonal(k);
    if (score > best_score) {
      best_score = score;
      best = k;
    }
  }
  const std::vector<double> column = inverse.column(best);
  for (std::size_t k = 0; k < face.size(); ++k) {
    branching.response[candidates[k]] = column[k] / inverse.diagonal(best);
  }
  branching.position = candidates[best];
  return branching;
}

}  // namespace ccp::solver
