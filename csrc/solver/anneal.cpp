#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "kernels.h"
#include "problem.h"
#include "random.h"

namespace ccp::solver {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

class Annealing {
 public:
  Annealing(const Problem& problem, Mask start, std::uint64_t seed)
      : problem_(problem),
        mask_(std::move(start)),
        plain_(all_ones(problem.weight)),
        generator_(seed) {
    for (Index i = 0; i < problem.size; ++i) (mask_[i] ? chosen_ : others_).push_back(i);
    gradient_ = gradient(problem_, mask_);
    for (Index i = 0; i < problem.size; ++i) half_.push_back(0.5 * problem.diagonal(i));
  }

  Mask run(std::int64_t proposals, Clock::time_point deadline, const Expired& expired) {
    if (chosen_.empty() || others_.empty()) return mask_;
    const Clock::time_point begin = Clock::now();
    const double typical = typical_change();
    const double length = static_cast<double>(proposals) / (kShort * problem_.size);
    const double hottest = std::clamp(kHotter * std::cbrt(length), kHot, kHottest) * typical;
    const double cooling = kColdest * typical / hottest;
    Mask best = mask_;
    double cost = 0;  // relative to the start
    double least = 0;
    double temperature = hottest;
    for (std::int64_t k = 0; k < proposals; ++k) {
      if (k % kStage == 0) {
        if (expired()) break;
        // What is too long for the time cools faster; a deadline out of reach changes nothing.
        const double spent = (Clock::now() - begin) / Seconds(deadline - begin);
        const double done =
            std::max(static_cast<double>(k) / proposals, spent > kNoticed ? spent : 0);
        temperature = hottest * std::pow(cooling, done);
      }
      const Index in = generator_.index(others_.size());
      const Index out = generator_.index(chosen_.size());
      if (!plain_ && problem_.weight[others_[in]] != problem_.weight[chosen_[out]]) continue;
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
    return gradient_[enter] + half_[enter] + half_[leave] - gradient_[leave] -
           problem_.row(enter)[leave];
  }

  double typical_change() {
    constexpr int kSamples = 200;
    double total = 0;
    for (int k = 0; k < kSamples; ++k) {
      const Index in = generator_.index(others_.size());
      total += std::abs(change(others_[in], chosen_[generator_.index(chosen_.size())]));
    }
    return total / kSamples;
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
  // Temperatures at the start and at the end, of the mean absolute change at the start. What is
  // longer than kShort starts hotter.
  static constexpr double kHot = 0.05;
  static constexpr double kHotter = 0.05;  // times the cube root of the length
  static constexpr double kHottest = 0.2;
  static constexpr double kColdest = 0.0075;
  static constexpr double kShort = 2000;    // proposals a channel
  static constexpr double kNoticed = 1e-6;  // of the time
  static constexpr double kNever = 30;      // exp(-30) is less than one in 10^13

  const Problem& problem_;
  Mask mask_;
  std::vector<Index> chosen_;
  std::vector<Index> others_;
  std::vector<double> gradient_;
  std::vector<double> half_;  // of the diagonal
  bool plain_;                // all channels weigh 1
  SplitMix64 generator_;
};

}  // namespace

Mask anneal(const Problem& problem, Mask start, std::int64_t proposals, std::uint64_t seed,
            Clock::time_point deadline, const Expired& expired) {
  return Annealing(problem, std::move(start), seed).run(proposals, deadline, expired);
}

}  // namespace ccp::solver
