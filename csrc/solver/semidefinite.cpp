#include "semidefinite.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels.h"
#include "random.h"

namespace ccp::solver {
namespace {

constexpr double kStep = 0.004;   // of the mean diagonal, at first
constexpr double kDecay = 0.125;  // of the steps: 1 / sqrt(1 + decay * round)

class Mixing {
 public:
  Mixing(const Problem& problem, const std::vector<double>& x, Index rank, std::uint64_t seed)
      : problem_(problem),
        size_(problem.size),
        width_((rank + 7) / 8 * 8),
        vectors_(size_ * width_),
        diagonal_(size_),
        slope_(width_),
        modified_(problem.quadratic, problem.quadratic + size_ * size_),
        products_(size_ * size_) {
    SplitMix64 generator(seed);
    for (Index i = 0; i < size_; ++i) {
      place(vector(i), x[i], generator);
      modified_[i * size_ + i] = 0;
    }
  }

  void sweep() {
    for (Index i = 0; i < size_; ++i) update(i);
  }

  // Moves the multipliers against X_ij; `share` is the weight of the new ones in their mean.
  void move_multipliers(double step, double share) {
    for (Index i = 0; i < size_; ++i) {
      for (Index j = 0; j < i; ++j) {
        const double product = rows.dot(width_, vector(i), vector(j));
        const double before = problem_.row(i)[j] - modified_[i * size_ + j];
        const double after = std::max(0.0, before - step * product);
        set_multiplier(i, j, after);
        products_[i * size_ + j] += share * (after - products_[i * size_ + j]);
      }
    }
  }

  void take_mean_multipliers() {
    for (Index i = 0; i < size_; ++i) {
      for (Index j = 0; j < i; ++j) {
        products_[j * size_ + i] = products_[i * size_ + j];
        set_multiplier(i, j, products_[i * size_ + j]);
      }
    }
  }

  Multipliers result() && { return {std::move(diagonal_), std::move(products_)}; }

 private:
  double* vector(Index i) { return &vectors_[i * width_]; }

  void set_multiplier(Index i, Index j, double value) {
    modified_[i * size_ + j] = modified_[j * size_ + i] = problem_.row(i)[j] - value;
  }

  // At x along e, which is the first axis, and otherwise in a random direction.
  void place(double* w, double x, SplitMix64& generator) {
    double square = 0;
    for (Index k = 1; k < width_; ++k) {
      w[k] = generator.unit() - 0.5;
      square += w[k] * w[k];
    }
    const double length = std::sqrt(std::max(0.0, x * (1 - x)) / square);
    for (Index k = 1; k < width_; ++k) w[k] *= length;
    w[0] = x;
  }

  // The least of slope'w over the sphere w'w = w'e is e / 2 - slope / (2 |slope|).
  void update(Index i) {
    const double* row = &modified_[i * size_];
    std::fill(slope_.begin(), slope_.end(), 0.0);
    rows.combine(size_, width_, row, vectors_.data(), slope_.data());
    slope_[0] += 0.5 * problem_.diagonal(i) - problem_.linear[i];
    const double length = std::sqrt(rows.dot(width_, slope_.data(), slope_.data()));
    diagonal_[i] = 2 * length;
    if (length == 0) return;
    double* w = vector(i);
    for (Index k = 0; k < width_; ++k) w[k] = -slope_[k] / (2 * length);
    w[0] += 0.5;
  }

  const Problem& problem_;
  const Index size_;
  const Index width_;
  std::vector<double> vectors_;
  std::vector<double> diagonal_;
  std::vector<double> slope_;
  std::vector<double> modified_;  // S without its diagonal, minus multipliers
  std::vector<double> products_;  // their mean; the lower triangle until it is taken
};

}  // namespace

Multipliers semidefinite_multipliers(const Problem& problem, const std::vector<double>& x,
                                     const MixingSchedule& schedule, std::uint64_t seed,
                                     const Checkpoint& checkpoint) {
  Mixing mixing(problem, x, schedule.rank, seed);
  const auto sweeps = [&](Index count, std::chrono::steady_clock::time_point end) {
    for (Index k = 0; k < count; ++k) {
      mixing.sweep();
      checkpoint();
      if (std::chrono::steady_clock::now() >= end) return false;
    }
    return true;
  };
  double scale = 0;  // the mean diagonal
  for (Index i = 0; i < problem.size; ++i) scale += problem.diagonal(i) / problem.size;
  const Index first = schedule.rounds / 3;
  for (Index k = 0; k < schedule.rounds && sweeps(schedule.sweeps, schedule.rounds_end); ++k) {
    mixing.move_multipliers(kStep * scale / std::sqrt(1 + kDecay * k),
                            k <= first ? 1.0 : 1.0 / (k - first + 1));
  }
  mixing.take_mean_multipliers();
  sweeps(schedule.last, schedule.deadline);
  return std::move(mixing).result();
}

}  // namespace ccp::solver
