#include "relaxation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "face.h"

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class PairwiseDescent {
 public:
  PairwiseDescent(const Relaxation& problem, std::vector<double> start)
      : problem_(problem), x_(std::move(start)), diagonal_(problem.size) {
    for (Index i = 0; i < problem.size; ++i) diagonal_[i] = problem.row(i)[i];
    sum_gradient();
    restore_sum();
  }

  Relaxed run(const Target& target) {
    const Index interval = std::max<Index>(8, problem_.size / 4);
    for (;;) {
      bool moved = true;
      for (Index k = 0; moved && k < interval; ++k) moved = step();
      if (!moved || target.expired() || reached(target)) break;
      if ((steps_ += interval) >= 4 * problem_.size) sum_gradient();
      if (++rounds_ == kMaxRounds) break;
      if (rounds_ % kFacePeriod == 0) minimise_on_face();
    }
    sum_gradient();
    const double bound = dual_value();
    return {std::move(x_), std::move(gradient_), bound};
  }

 private:
  static constexpr Index kMaxRounds = 2000;
  static constexpr Index kFacePeriod = 4;
  static constexpr Index kLargestFace = 256;

  void sum_gradient() {
    gradient_ = problem_.linear;
    for (Index i = 0; i < problem_.size; ++i) {
      if (x_[i] != 0) add(x_[i], problem_.row(i));
    }
    steps_ = 0;
  }

  void add(double factor, const double* row) {
    double* gradient = gradient_.data();
    for (Index j = 0; j < problem_.size; ++j) gradient[j] += factor * row[j];
  }

  // Fractional channels first, then those whose gradient asks for it most.
  void restore_sum() {
    double missing = problem_.ones - std::accumulate(x_.begin(), x_.end(), 0.0);
    if (missing == 0) return;
    const double sign = missing > 0 ? 1 : -1;
    std::vector<Index> order(problem_.size);
    std::iota(order.begin(), order.end(), Index{0});
    const auto fractional = [&](Index i) { return x_[i] > 0 && x_[i] < 1; };
    std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
      if (fractional(a) != fractional(b)) return fractional(a);
      return sign * gradient_[a] < sign * gradient_[b];
    });
    for (Index i : order) {
      const double moved = std::clamp(x_[i] + missing, 0.0, 1.0);
      missing -= moved - x_[i];
      x_[i] = moved;
      if (sign * missing <= 0) break;
    }
    sum_gradient();
  }

  // Moves weight between the two channels that gain most; false if no pair gains.
  bool step() {
    Index up = -1;
    double least = kInfinity;
    for (Index i = 0; i < problem_.size; ++i) {
      if (x_[i] < 1 && gradient_[i] < least) {
        least = gradient_[i];
        up = i;
      }
    }
    if (up < 0) return false;
    const double* row = problem_.row(up);
    Index down = -1;
    double best_gain = 0;
    for (Index j = 0; j < problem_.size; ++j) {
      const double slope = gradient_[j] - least;
      if (!(slope > 0) || x_[j] == 0) continue;
      const double gain = slope * slope / curvature(up, j, row);
      if (gain > best_gain) {
        best_gain = gain;
        down = j;
      }
    }
    if (down < 0) return false;
    const double room = std::min(1 - x_[up], x_[down]);
    const double newton = (gradient_[down] - least) / curvature(up, down, row);
    return move(up, down, newton < room ? newton : room);
  }

  // Pairs converge slowly where the fractional channels are nearly dependent: a Newton step over
  // all of them at once, up to the edge of the box.
  void minimise_on_face() {
    std::vector<Index> face;
    for (Index i = 0; i < problem_.size; ++i) {
      if (x_[i] > 0 && x_[i] < 1) face.push_back(i);
    }
    const Index size = static_cast<Index>(face.size());
    if (size < 2 || size > kLargestFace) return;
    std::vector<double> slope;
    for (Index i : face) slope.push_back(-gradient_[i]);
    const FaceInverse inverse(problem_.quadratic, problem_.stride, face);
    const std::vector<double> direction = inverse.times(slope);
    double length = 1;
    Index blocking = -1;
    for (Index k = 0; k < size; ++k) {
      const double room = direction[k] > 0 ? 1 - x_[face[k]] : x_[face[k]];
      if (length * std::abs(direction[k]) > room) {
        length = room / std::abs(direction[k]);
        blocking = k;
      }
    }
    for (Index k = 0; k < size; ++k) {
      const double moved = x_[face[k]] + length * direction[k];
      x_[face[k]] = k == blocking ? (direction[k] > 0 ? 1 : 0) : std::clamp(moved, 0.0, 1.0);
    }
    sum_gradient();
  }

  // Of the cost along the move; at least a little, because flat directions are allowed.
  double curvature(Index up, Index down, const double* row) const {
    const double scale = diagonal_[up] + diagonal_[down];
    return std::max(scale - 2 * row[down], kFlat * (scale + kFlat));
  }

  bool move(Index up, Index down, double amount) {
    const double raised = std::min(1.0, x_[up] + amount);
    const double lowered = std::max(0.0, x_[down] - amount);
    if (raised == x_[up] && lowered == x_[down]) return false;
    x_[up] = raised;
    x_[down] = lowered;
    double* gradient = gradient_.data();
    const double* plus = problem_.row(up);
    const double* minus = problem_.row(down);
    for (Index j = 0; j < problem_.size; ++j) gradient[j] += amount * (plus[j] - minus[j]);
    return true;
  }

  // Convexity: f(y) >= f(x) + g'(y - x) for every x. The least g'y over the feasible y is the sum
  // of the r smallest entries of g, and f(x) - g'x = -1/2 x'Sx = -1/2 x'(g - c).
  double dual_value() {
    sorted_ = gradient_;
    std::nth_element(sorted_.begin(), sorted_.begin() + problem_.ones, sorted_.end());
    double value = std::accumulate(sorted_.begin(), sorted_.begin() + problem_.ones, 0.0);
    for (Index i = 0; i < problem_.size; ++i) {
      value -= 0.5 * x_[i] * (gradient_[i] - problem_.linear[i]);
    }
    return value;
  }

  bool reached(const Target& target) {
    const double bound = dual_value();
    double value = 0;
    for (Index i = 0; i < problem_.size; ++i) {
      value += 0.5 * x_[i] * (gradient_[i] + problem_.linear[i]);
    }
    const double open = value - bound;
    const bool hopeless = target.cutoff < kInfinity && open <= kHopeless * (target.cutoff - value);
    return bound >= target.cutoff || open <= target.precision || hopeless;
  }

  static constexpr double kFlat = 1e-12;
  static constexpr double kHopeless = 0.02;  // the bound cannot pass the value at x

  const Relaxation& problem_;
  std::vector<double> x_;
  std::vector<double> diagonal_;
  std::vector<double> gradient_;
  std::vector<double> sorted_;
  Index steps_ = 0;  // since the gradient was summed
  Index rounds_ = 0;
};

}  // namespace

Relaxed relax(const Relaxation& problem, std::vector<double> start, const Target& target) {
  return PairwiseDescent(problem, std::move(start)).run(target);
}

std::vector<char> reduced_cost_fixing(const std::vector<double>& gradient, Index ones,
                                      double room) {
  const Index size = static_cast<Index>(gradient.size());
  std::vector<char> state(size, kFree);
  // The bound takes the `ones` smallest entries. Forcing another in drives the largest of these
  // out; forcing one of these out brings the smallest of the others in.
  std::vector<double> sorted(gradient);
  std::nth_element(sorted.begin(), sorted.begin() + ones, sorted.end());
  const double largest_in =
      ones > 0 ? *std::max_element(sorted.begin(), sorted.begin() + ones) : -kInfinity;
  const double smallest_out = ones < size ? sorted[ones] : kInfinity;
  for (Index i = 0; i < size; ++i) {
    if (gradient[i] - largest_in >= room) state[i] = 0;
    if (smallest_out - gradient[i] >= room) state[i] = 1;
  }
  return state;
}

}  // namespace ccp::solver
