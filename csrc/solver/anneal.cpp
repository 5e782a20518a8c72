#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>
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
    quadratic_.reserve(problem.size * problem.size);
    for (Index i = 0; i < problem.size; ++i) {
      const double* entries = problem.row(i);
      half_.push_back(0.5 * entries[i]);
      most_.push_back(
          std::max(rows.largest(i, entries), rows.largest(problem.size - i - 1, entries + i + 1)));
      quadratic_.insert(quadratic_.end(), entries, entries + problem.size);
    }
    for (int k = 0; k < kChances; ++k) chances_.push_back(-std::log((k + 0.5) / kChances));
  }

  Mask run(std::int64_t proposals, Clock::time_point deadline, const Expired& expired) {
    if (!exchangeable()) return mask_;
    const Clock::time_point begin = Clock::now();
    const bool timed = deadline != Clock::time_point::max();
    const double typical = typical_change();
    if (!(typical > 0)) return mask_;  // no temperature means anything
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
        double done = static_cast<double>(k) / proposals;
        // What is too long for the time cools faster.
        if (timed) done = std::max(done, (Clock::now() - begin) / Seconds(deadline - begin));
        temperature = hottest * std::pow(cooling, done);
      }
      // One draw is enough: of its bits 32 place the one channel, 22 the other, and 10 are chance.
      const std::uint64_t draw = generator_.next();
      const Index in = (draw >> 32) * others_.size() >> 32;
      const Index out = (draw >> 10 & 0x3fffff) * chosen_.size() >> 22;
      const double accepted = temperature * chances_[draw & (kChances - 1)];
      const Index enter = others_[in];
      const Index leave = chosen_[out];
      const double alone = gradient_[enter] + half_[enter] + half_[leave] - gradient_[leave];
      if (alone - most_[enter] > accepted) continue;  // mostly so, which spares a look at S
      const double rise = alone - row(enter)[leave];
      if (rise > accepted) continue;
      if (!plain_ && problem_.weight[enter] != problem_.weight[leave]) continue;
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
  const float* row(Index i) const { return &quadratic_[i * problem_.size]; }

  double change(Index enter, Index leave) const {
    return gradient_[enter] + half_[enter] + half_[leave] - gradient_[leave] - row(enter)[leave];
  }

  // Whether a chosen channel weighs as much as one of the others.
  bool exchangeable() const {
    if (plain_) return !chosen_.empty() && !others_.empty();
    std::set<double> weights;
    for (Index i : chosen_) weights.insert(problem_.weight[i]);
    return std::any_of(others_.begin(), others_.end(),
                       [&](Index i) { return weights.count(problem_.weight[i]) > 0; });
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
    rows.add_float_difference(problem_.size, row(enter), row(leave), gradient_.data());
  }

  static constexpr std::int64_t kStage = 1024;
  // Temperatures at the start and at the end, of the mean absolute change at the start. What is
  // longer than kShort starts hotter.
  static constexpr double kHot = 0.05;
  static constexpr double kHotter = 0.05;  // times the cube root of the length
  static constexpr double kHottest = 0.2;
  static constexpr double kColdest = 0.0075;
  static constexpr double kShort = 2000;  // proposals a channel
  static constexpr int kChances = 1024;

  const Problem& problem_;
  Mask mask_;
  std::vector<Index> chosen_;
  std::vector<Index> others_;
  std::vector<double> gradient_;
  std::vector<double> half_;      // of the diagonal
  std::vector<double> most_;      // of a row beside its diagonal
  std::vector<float> quadratic_;  // S, in single precision for the sake of the memory's speed
  std::vector<double> chances_;   // a change by as many temperatures is accepted
  bool plain_;                    // all channels weigh 1
  SplitMix64 generator_;
};

}  // namespace

Mask anneal(const Problem& problem, Mask start, std::int64_t proposals, std::uint64_t seed,
            Clock::time_point deadline, const Expired& expired) {
  return Annealing(problem, std::move(start), seed).run(proposals, deadline, expired);
}

}  // namespace ccp::solver
