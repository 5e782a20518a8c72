#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels.h"
#include "problem.h"
#include "random.h"

namespace ccp::solver {
namespace {

class Annealing {
 public:
  Annealing(const Problem& problem, Mask start, std::uint64_t seed)
      : problem_(problem), mask_(std::move(start)), generator_(seed) {
    for (Index i = 0; i < problem.size; ++i) (mask_[i] ? chosen_ : others_).push_back(i);
    gradient_ = gradient(problem_, mask_);
  }

  Mask run(std::int64_t proposals, const Expired& expired) {
    if (chosen_.empty() || others_.empty()) return mask_;
    const double hottest = typical_change();
    Mask best = mask_;
    double cost = 0;  // relative to the start
    double least = 0;
    double temperature = hottest;
    for (std::int64_t k = 0; k < proposals; ++k) {
      if (k % kStage == 0) {
        if (expired()) break;
        temperature = hottest * std::pow(kColdest, static_cast<double>(k) / proposals);
      }
      const Index in = generator_.below(others_.size());
      const Index out = generator_.below(chosen_.size());
      if (problem_.weight[others_[in]] != problem_.weight[chosen_[out]]) continue;
      const double rise = change(others_[in], chosen_[out]);
      if (rise > 0 &&
          (rise > kNever * temperature || generator_.unit() >= std::exp(-rise / temperature))) {
        continue;
      }
      swap(in, out);
      cost += rise;
      if (cost < least) {
        least = cost;
        best = mask_;
      }
    }
    return best;
  }

 private:
  double change(Index enter, Index leave) const {
    return gradient_[enter] + 0.5 * problem_.diagonal(enter) + 0.5 * problem_.diagonal(leave) -
           gradient_[leave] - problem_.row(enter)[leave];
  }

  double typical_change() {
    constexpr int kSamples = 200;
    double total = 0;
    for (int k = 0; k < kSamples; ++k) {
      const Index in = generator_.below(others_.size());
      total += std::abs(change(others_[in], chosen_[generator_.below(chosen_.size())]));
    }
    return kHottest * total / kSamples;
  }

  void swap(Index in, Index out) {
    const Index enter = others_[in];
    const Index leave = chosen_[out];
    std::swap(others_[in], chosen_[out]);
    mask_[enter] = 1;
    mask_[leave] = 0;
    const double* plus = problem_.row(enter);
    const double* minus = problem_.row(leave);
    rows.add_difference(problem_.size, 1, plus, minus, gradient_.data());
  }

  static constexpr std::int64_t kStage = 1024;
  static constexpr double kHottest = 0.05;  // of the mean absolute change at the start
  static constexpr double kColdest = 0.15;  // of the hottest
  static constexpr double kNever = 30;      // exp(-30) is less than one in 10^13

  const Problem& problem_;
  Mask mask_;
  std::vector<Index> chosen_;
  std::vector<Index> others_;
  std::vector<double> gradient_;
  SplitMix64 generator_;
};

}  // namespace

Mask anneal(const Problem& problem, Mask start, std::int64_t proposals, std::uint64_t seed,
            const Expired& expired) {
  return Annealing(problem, std::move(start), seed).run(proposals, expired);
}

}  // namespace ccp::solver
