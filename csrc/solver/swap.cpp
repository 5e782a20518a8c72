#include "swap.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels.h"

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Index kLargestExhaustive = 256;

}  // namespace

SwapDescent::SwapDescent(const Problem& problem)
    : problem_(problem),
      error_(gradient_error(problem)),
      largest_(problem.size),
      classes_(problem.weight),
      row_cost_(problem.size),
      column_cost_(problem.size) {
  for (Index i = 0; i < problem.size; ++i) {
    const double* row = problem.row(i);
    largest_[i] = std::max(rows.largest(i, row), rows.largest(problem.size - i - 1, row + i + 1));
  }
  std::sort(classes_.begin(), classes_.end());
  classes_.erase(std::unique(classes_.begin(), classes_.end()), classes_.end());
}

Mask SwapDescent::run(const Mask& start, const Checkpoint& checkpoint) {
  start_from(start);
  descend(checkpoint);
  return mask_;
}

void SwapDescent::start_from(const Mask& mask) {
  if (mask_.empty() || 2 * updates_ > problem_.size) {
    mask_ = mask;
    refresh();
    return;
  }
  for (Index i = 0; i < problem_.size; ++i) {
    if (mask_[i] != mask[i]) flip(i);
  }
  if (updates_ + 2 > problem_.size) refresh();
}

void SwapDescent::descend(const Checkpoint& checkpoint) {
  if (problem_.size <= kLargestExhaustive) {
    for (Swap swap = best_swap(checkpoint); swap.change < 0; swap = best_swap(checkpoint)) {
      apply(swap);
    }
    return;
  }
  for (bool improved = true; improved;) {
    improved = false;
    for (double weight : classes_) improved |= sweep(weight, checkpoint);
  }
}

void SwapDescent::refresh() {
  gradient_ = solver::gradient(problem_, mask_);
  updates_ = 0;
}

void SwapDescent::flip(Index i) {
  rows.add(problem_.size, mask_[i] ? -1 : 1, problem_.row(i), gradient_.data());
  mask_[i] = !mask_[i];
  ++updates_;
}

void SwapDescent::apply(const Swap& swap) {
  flip(swap.enter);
  flip(swap.leave);
  if (updates_ + 2 > problem_.size) refresh();  // the error bound allows for n updates
}

// Swapping i in and j out changes the cost by (g_i + S_ii / 2) + (S_jj / 2 - g_j) - S_ij. False if
// no pair has this weight.
bool SwapDescent::split(double weight) {
  Index chosen = 0;
  Index others = 0;
  for (Index i = 0; i < problem_.size; ++i) {
    if (problem_.weight[i] == weight) ++(mask_[i] ? chosen : others);
  }
  rows_enter_ = others < chosen;
  for (Index i = 0; i < problem_.size; ++i) {
    row_cost_[i] = column_cost_[i] = kInfinity;
    if (problem_.weight[i] != weight) continue;
    const double half = 0.5 * problem_.diagonal(i) + error_[i];
    const double cost = mask_[i] ? half - gradient_[i] : half + gradient_[i];
    (static_cast<bool>(mask_[i]) == rows_enter_ ? column_cost_ : row_cost_)[i] = cost;
  }
  least_column_ = *std::min_element(column_cost_.begin(), column_cost_.end());
  return chosen > 0 && others > 0;
}

Swap SwapDescent::best_partner(Index i) const {
  const double* row = problem_.row(i);
  const Index j = rows.find_least_difference(problem_.size, 1, column_cost_.data(), row);
  const double change = row_cost_[i] + (column_cost_[j] - row[j]);
  return rows_enter_ ? Swap{i, j, change} : Swap{j, i, change};
}

Swap SwapDescent::best_swap(const Checkpoint& checkpoint) {
  Swap best;
  for (double weight : classes_) {
    if (!split(weight)) continue;
    for (Index i = 0; i < problem_.size; ++i) {
      if (row_cost_[i] + least_column_ - largest_[i] >= best.change) continue;
      checkpoint();
      const Swap swap = best_partner(i);
      if (swap.change < best.change) best = swap;
    }
  }
  return best;
}

// Each row once, the most promising first; true if any exchange was made.
bool SwapDescent::sweep(double weight, const Checkpoint& checkpoint) {
  if (!split(weight)) return false;
  std::vector<Index> order;
  for (Index i = 0; i < problem_.size; ++i) {
    if (row_cost_[i] < kInfinity) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    return row_cost_[a] - largest_[a] < row_cost_[b] - largest_[b];
  });
  bool improved = false;
  for (Index i : order) {
    if (row_cost_[i] + least_column_ - largest_[i] >= 0) continue;
    checkpoint();
    const Swap swap = best_partner(i);
    if (!(swap.change < 0)) continue;
    apply(swap);
    split(weight);
    improved = true;
  }
  return improved;
}

Mask swap_descent(const Problem& problem, const Mask& mask, const Checkpoint& checkpoint) {
  return SwapDescent(problem).run(mask, checkpoint);
}

}  // namespace ccp::solver
