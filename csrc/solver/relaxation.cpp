#include "relaxation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "face.h"
#include "kernels.h"

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kHopeless = 0.02;  // of the way: the bound cannot pass the value at x
constexpr Index kMaxRounds = 2000;
constexpr Index kFacePeriod = 4;
constexpr Index kLargestFace = 400;

LinearMinimum unit_minimum(std::vector<double> sorted, Index ones) {
  std::nth_element(sorted.begin(), sorted.begin() + ones, sorted.end());
  const auto middle = sorted.begin() + ones;
  return {std::accumulate(sorted.begin(), middle, 0.0),
          ones > 0 ? *std::max_element(sorted.begin(), middle) : -kInfinity,
          middle != sorted.end() ? *middle : kInfinity};
}

}  // namespace

LinearMinimum linear_minimum(const std::vector<double>& gradient,
                             const std::vector<double>& capacity, double total) {
  if (all_ones(capacity)) return unit_minimum(gradient, static_cast<Index>(total));
  std::vector<Index> order(gradient.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::sort(order.begin(), order.end(),
            [&](Index a, Index b) { return gradient[a] < gradient[b]; });
  LinearMinimum minimum{0, -kInfinity, kInfinity};
  for (Index i : order) {
    const double taken = std::min(capacity[i], total);
    if (taken > 0) minimum.last_in = gradient[i];
    minimum.value += taken * gradient[i];
    total -= taken;
    if (taken < capacity[i]) {
      minimum.first_out = gradient[i];
      break;
    }
  }
  return minimum;
}

PairwiseDescent::PairwiseDescent(Relaxation problem, std::vector<double> start)
    : problem_(std::move(problem)),
      x_(std::move(start)),
      diagonal_(problem_.size),
      rise_(problem_.size),
      fall_(problem_.size) {
  for (Index i = 0; i < problem_.size; ++i) {
    diagonal_[i] = problem_.row(i)[i];
    set(i, x_[i]);
  }
  sum_gradient();
  restore_sum();
}

void PairwiseDescent::set_total(double total) {
  problem_.total = total;
  rounds_ = 0;
  restore_sum();
}

void PairwiseDescent::run(const Target& target) {
  const Index interval = std::max<Index>(8, problem_.size / 4);
  for (;;) {
    bool moved = true;
    for (Index k = 0; moved && k < interval; ++k) moved = step();
    if (!moved || target.expired() || reached(target)) break;
    if (++rounds_ == kMaxRounds) break;
    if (rounds_ % kFacePeriod == 0) minimise_on_face();
  }
}

Relaxed PairwiseDescent::finish() {
  sum_gradient();
  const double value = bound();
  return {x_, gradient_, value};
}

void PairwiseDescent::set(Index i, double value) {
  x_[i] = value;
  rise_[i] = value < problem_.capacity[i] ? 0 : kInfinity;
  fall_[i] = value > 0 ? 0 : -kInfinity;
}

void PairwiseDescent::sum_gradient() {
  gradient_ = problem_.linear;
  for (Index i = 0; i < problem_.size; ++i) {
    if (x_[i] != 0) rows.add(problem_.size, x_[i], problem_.row(i), gradient_.data());
  }
  updates_ = 0;
  up_ = -1;
}

// Fractional channels first, then the others, those first whose gradient asks for it most.
void PairwiseDescent::restore_sum() {
  double missing = problem_.total - std::accumulate(x_.begin(), x_.end(), 0.0);
  if (missing == 0) return;
  std::vector<Index> fractional, others;
  for (Index i = 0; i < problem_.size; ++i) {
    (rise_[i] == 0 && fall_[i] == 0 ? fractional : others).push_back(i);
  }
  missing = spread(missing, std::move(fractional));
  if (missing != 0) spread(missing, std::move(others));
  up_ = -1;
  if (updates_ >= problem_.size) sum_gradient();
}

// Adds to the channels, in the order of their gradients; returns what is left.
double PairwiseDescent::spread(double missing, std::vector<Index> channels) {
  const double sign = missing > 0 ? 1 : -1;
  std::stable_sort(channels.begin(), channels.end(),
                   [&](Index a, Index b) { return sign * gradient_[a] < sign * gradient_[b]; });
  for (Index i : channels) {
    const double moved = std::clamp(x_[i] + missing, 0.0, problem_.capacity[i]);
    const double change = moved - x_[i];
    if (change != 0) {
      rows.add(problem_.size, change, problem_.row(i), gradient_.data());
      ++updates_;
      set(i, moved);
    }
    missing -= change;
    if (sign * missing <= 0) return 0;
  }
  return missing;
}

// Moves weight between the two channels that gain most; false if no pair gains.
bool PairwiseDescent::step() {
  if (updates_ + 1 >= problem_.size) sum_gradient();
  const Index up =
      up_ >= 0 ? up_ : rows.find_least_sum(problem_.size, gradient_.data(), rise_.data());
  if (up < 0) return false;
  const double* row = problem_.row(up);
  const double least = gradient_[up];
  const Index down = rows.find_largest_gain(
      problem_.size, {gradient_.data(), fall_.data(), diagonal_.data(), row, diagonal_[up], least});
  if (down < 0 || fall_[down] != 0 || !(gradient_[down] > least)) return false;
  const double room = std::min(problem_.capacity[up] - x_[up], x_[down]);
  const double scale = diagonal_[up] + diagonal_[down];
  const double curvature =
      std::max(scale - 2 * row[down], kFlatCurvature * (scale + kFlatCurvature));
  return move(up, down, std::min(room, (gradient_[down] - least) / curvature));
}

bool PairwiseDescent::move(Index up, Index down, double amount) {
  const double raised = std::min(problem_.capacity[up], x_[up] + amount);
  const double lowered = std::max(0.0, x_[down] - amount);
  if (raised == x_[up] && lowered == x_[down]) return false;
  set(up, raised);
  set(down, lowered);
  up_ = rows.add_difference_and_find_least(problem_.size, amount, problem_.row(up),
                                           problem_.row(down), rise_.data(), gradient_.data());
  ++updates_;
  return true;
}

// Pairs converge slowly where the fractional channels are nearly dependent: a Newton step over
// all of them at once, up to the edge of the box.
void PairwiseDescent::minimise_on_face() {
  std::vector<Index> face;
  for (Index i = 0; i < problem_.size; ++i) {
    if (rise_[i] == 0 && fall_[i] == 0) face.push_back(i);
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
    const double x = x_[face[k]];
    const double room = direction[k] > 0 ? problem_.capacity[face[k]] - x : x;
    if (length * std::abs(direction[k]) > room) {
      length = room / std::abs(direction[k]);
      blocking = k;
    }
  }
  for (Index k = 0; k < size; ++k) {
    const Index i = face[k];
    const double edge = direction[k] > 0 ? problem_.capacity[i] : 0;
    const double moved = std::clamp(x_[i] + length * direction[k], 0.0, problem_.capacity[i]);
    const double before = x_[i];
    set(i, k == blocking ? edge : moved);
    rows.add(problem_.size, x_[i] - before, problem_.row(i), gradient_.data());
  }
  up_ = -1;
  updates_ += size;
  if (updates_ >= problem_.size) sum_gradient();
}

// Convexity: f(y) >= f(x) + g'(y - x) for every x, and f(x) - g'x = -1/2 x'Sx = -1/2 x'(g - c).
double PairwiseDescent::bound() const {
  return linear_minimum(gradient_, problem_.capacity, problem_.total).value + conjugate();
}

double PairwiseDescent::conjugate() const {
  double value = 0;
  for (Index i = 0; i < problem_.size; ++i) {
    value -= 0.5 * x_[i] * (gradient_[i] - problem_.linear[i]);
  }
  return value;
}

bool PairwiseDescent::reached(const Target& target) const {
  const double least = bound();
  double value = 0;
  for (Index i = 0; i < problem_.size; ++i) {
    value += 0.5 * x_[i] * (gradient_[i] + problem_.linear[i]);
  }
  const double open = value - least;
  const bool hopeless = target.cutoff < kInfinity && open <= kHopeless * (target.cutoff - value);
  return least >= target.cutoff || open <= target.precision || hopeless;
}

Relaxed relax(Relaxation problem, std::vector<double> start, const Target& target) {
  PairwiseDescent descent(std::move(problem), std::move(start));
  descent.run(target);
  return descent.finish();
}

std::vector<char> reduced_cost_fixing(const std::vector<double>& gradient,
                                      const std::vector<double>& capacity, double total,
                                      double room) {
  const Index size = static_cast<Index>(gradient.size());
  std::vector<char> state(size, kFree);
  // Forcing a channel in drives weight out whose gradient is at most `last_in`; forcing one out
  // brings weight in whose gradient is at least `first_out`.
  const LinearMinimum minimum = linear_minimum(gradient, capacity, total);
  for (Index i = 0; i < size; ++i) {
    if (capacity[i] * (gradient[i] - minimum.last_in) >= room) state[i] = 0;
    if (capacity[i] * (minimum.first_out - gradient[i]) >= room) state[i] = 1;
  }
  return state;
}

}  // namespace ccp::solver
