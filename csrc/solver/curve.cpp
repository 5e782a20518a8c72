#include "curve.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "core.h"
#include "kernels.h"
#include "relaxation.h"
#include "rounding.h"
#include "swap.h"

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kPrecision = 1e-4;  // of the costs' range

// Adds or gives back the cheapest channels until `count` are chosen.
Mask resized(const Problem& problem, Mask mask, Index count) {
  std::vector<double> change = gradient(problem, mask);
  Index ones = std::count(mask.begin(), mask.end(), char{1});
  while (ones != count) {
    const bool grow = ones < count;
    Index best = -1;
    double least = kInfinity;
    for (Index i = 0; i < problem.size; ++i) {
      if (static_cast<bool>(mask[i]) == grow) continue;
      const double cost = 0.5 * problem.diagonal(i) + (grow ? change[i] : -change[i]);
      if (cost < least) {
        least = cost;
        best = i;
      }
    }
    mask[best] = grow;
    rows.add(problem.size, grow ? 1 : -1, problem.row(best), change.data());
    ones += grow ? 1 : -1;
  }
  return mask;
}

class Path {
 public:
  Path(const Problem& problem, const std::vector<Index>& counts, double defect,
       std::chrono::steady_clock::time_point deadline, const Checkpoint& checkpoint)
      : problem_(problem),
        counts_(counts),
        defect_(defect),
        checkpoint_(checkpoint),
        expired_([=, &checkpoint] {
          checkpoint();
          return std::chrono::steady_clock::now() >= deadline;
        }),
        swaps_(problem),
        points_(counts.size(), CurvePoint{{}, kInfinity, -kInfinity}) {
    const std::vector<double> error = gradient_error(problem);
    // Those of a node of the search, and half as much again for a gradient that is not summed
    // afresh for each count.
    slack_ = 6 * std::accumulate(error.begin(), error.end(), 0.0);
  }

  std::vector<CurvePoint> run() {
    relax_upwards();
    Mask above(problem_.size, 1);
    for (Index k = static_cast<Index>(counts_.size()) - 1; k >= 0; --k) {
      improve(k, above);
      above = points_[k].mask;
    }
    for (CurvePoint& point : points_) {
      point.lower_bound = std::min(point.lower_bound, point.objective);
    }
    return std::move(points_);
  }

 private:
  void relax_upwards() {
    std::vector<double> scaled;
    PairwiseDescent descent(relaxation_of(problem_, 0, scaled), std::vector<double>(problem_.size));
    const Mask full(problem_.size, 1);
    const double range = std::abs(objective(problem_, full) - problem_.constant);
    Mask below(problem_.size, 0);
    for (std::size_t k = 0; k < counts_.size(); ++k) {
      descent.set_total(static_cast<double>(counts_[k]));
      descent.run({kInfinity, kPrecision * range + slack_, expired_});
      bound_all(descent, k);
      if (!expired_()) {
        std::vector<double> distance(problem_.size, 1.0);
        for (Index i = 0; i < problem_.size; ++i) distance[i] -= 2 * descent.x()[i];
        consider(k,
                 swaps_.run(least_scores(distance, problem_.weight, counts_[k], 0), checkpoint_));
      }
      improve(k, below);
      below = points_[k].mask;
    }
  }

  // A point's gradient bounds the costs at every count: the neighbours' bounds may be better where
  // this descent has not converged.
  void bound_all(PairwiseDescent& descent, std::size_t solved) {
    std::vector<double> sorted(descent.gradient());
    std::sort(sorted.begin(), sorted.end());
    const double at_point = descent.conjugate() + problem_.constant;
    double sum = 0;
    Index summed = 0;
    const std::size_t last = expired_() ? counts_.size() : std::min(solved + 2, counts_.size());
    for (std::size_t k = 0; k < last; ++k) {
      for (; summed < counts_[k]; ++summed) sum += sorted[summed];
      const double smaller_side = std::min(counts_[k], problem_.size - counts_[k]);
      const double bound = at_point + sum - slack_ - defect_ * smaller_side;
      points_[k].lower_bound = std::max(points_[k].lower_bound, bound);
    }
  }

  void improve(std::size_t k, const Mask& neighbour) {
    const Mask mask = resized(problem_, neighbour, counts_[k]);
    consider(k, expired_() ? mask : swaps_.run(mask, checkpoint_));
  }

  void consider(std::size_t k, const Mask& mask) {
    const double cost = objective(problem_, mask);
    if (cost < points_[k].objective) {
      points_[k].objective = cost;
      points_[k].mask = mask;
    }
  }

  const Problem& problem_;
  const std::vector<Index>& counts_;
  const double defect_;
  const Checkpoint& checkpoint_;
  const Expired expired_;
  SwapDescent swaps_;
  std::vector<CurvePoint> points_;
  double slack_;
};

}  // namespace

std::vector<CurvePoint> curve(const Problem& problem, const std::vector<Index>& counts,
                              double defect, std::chrono::steady_clock::time_point deadline,
                              const Checkpoint& checkpoint) {
  return Path(problem, counts, defect, deadline, checkpoint).run();
}

}  // namespace ccp::solver
