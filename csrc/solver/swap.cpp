#include "swap.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels.h"

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

SwapDescent::SwapDescent(const Problem& problem)
    : problem_(problem),
      error_(gradient_error(problem)),
      largest_(problem.size),
      classes_(problem.weight),
      enter_cost_(problem.size),
      leave_cost_(problem.size) {
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
  for (;;) {
    const Swap swap = best_swap(checkpoint);
    if (swap.change < 0) {
      flip(swap.enter);
      flip(swap.leave);
      // The error bound allows for n updates.
      if (updates_ + 2 > problem_.size) refresh();
    } else {
      return;
    }
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

Swap SwapDescent::best_swap(const Checkpoint& checkpoint) {
  Swap best;
  for (double weight : classes_) {
    const Swap swap = best_swap_within(weight, best.change, checkpoint);
    if (swap.change < best.change) best = swap;
  }
  return best;
}

// Swapping i in and j out changes the cost by (g_i + S_ii / 2) + (S_jj / 2 - g_j) - S_ij. Rows are
// those of the channels that could enter, or that could leave, whichever are fewer.
Swap SwapDescent::best_swap_within(double weight, double limit, const Checkpoint& checkpoint) {
  Index chosen = 0;
  Index others = 0;
  for (Index i = 0; i < problem_.size; ++i) {
    enter_cost_[i] = leave_cost_[i] = kInfinity;
    if (problem_.weight[i] != weight) continue;
    const double half = 0.5 * problem_.diagonal(i) + error_[i];
    (mask_[i] ? leave_cost_ : enter_cost_)[i] =
        mask_[i] ? half - gradient_[i] : half + gradient_[i];
    ++(mask_[i] ? chosen : others);
  }
  if (chosen == 0 || others == 0) return {};
  const bool scan_chosen = chosen <= others;
  const std::vector<double>& row_cost = scan_chosen ? leave_cost_ : enter_cost_;
  const std::vector<double>& column_cost = scan_chosen ? enter_cost_ : leave_cost_;
  const double least_column = *std::min_element(column_cost.begin(), column_cost.end());
  Swap best;
  double least = limit;
  for (Index i = 0; i < problem_.size; ++i) {
    if (row_cost[i] + least_column - largest_[i] >= least) continue;
    checkpoint();
    const double* row = problem_.row(i);
    const Index j = rows.find_least_difference(problem_.size, 1, column_cost.data(), row);
    const double change = row_cost[i] + (column_cost[j] - row[j]);
    if (change < least) {
      least = change;
      best = scan_chosen ? Swap{j, i, change} : Swap{i, j, change};
    }
  }
  return best;
}

Mask swap_descent(const Problem& problem, const Mask& mask, const Checkpoint& checkpoint) {
  return SwapDescent(problem).run(mask, checkpoint);
}

}  // namespace ccp::solver
