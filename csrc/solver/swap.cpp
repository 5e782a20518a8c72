#include <algorithm>
#include <limits>
#include <utility>

#include "problem.h"

namespace ccp::solver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Swap {
  Index enter = -1;
  Index leave = -1;
  double change = 0;  // of the cost, plus the rounding error that it may carry
};

// min over j of column_cost[j] - row[j]. Independent lanes, because the compiler may not reorder
// one running minimum of doubles and so could not vectorise it.
double row_minimum(const double* column_cost, const double* row, Index size) {
  constexpr Index kLanes = 16;
  double lane[kLanes];
  std::fill(lane, lane + kLanes, kInfinity);
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    for (Index k = 0; k < kLanes; ++k) {
      const double value = column_cost[j + k] - row[j + k];
      lane[k] = value < lane[k] ? value : lane[k];
    }
  }
  double least = *std::min_element(lane, lane + kLanes);
  for (; j < size; ++j) least = std::min(least, column_cost[j] - row[j]);
  return least;
}

class SwapDescent {
 public:
  SwapDescent(const Problem& problem, Mask mask)
      : problem_(problem),
        mask_(std::move(mask)),
        error_(gradient_error(problem)),
        enter_cost_(problem.size),
        leave_cost_(problem.size) {
    refresh();
    const Index chosen = std::count(mask_.begin(), mask_.end(), char{1});
    scan_chosen_ = 2 * chosen <= problem.size;
  }

  Mask run(const Checkpoint& checkpoint) {
    for (;;) {
      const Swap swap = best_swap(checkpoint);
      if (swap.change < 0) {
        apply(swap);
        // The error bound allows for n updates, two of which a swap makes.
        if (2 * (++swaps_since_refresh_ + 1) > problem_.size) refresh();
      } else if (swaps_since_refresh_ > 0) {
        refresh();
      } else {
        return mask_;
      }
    }
  }

 private:
  void refresh() {
    gradient_ = gradient(problem_, mask_);
    swaps_since_refresh_ = 0;
  }

  // Swapping i in and j out changes the cost by (g_i + S_ii / 2) + (S_jj / 2 - g_j) - S_ij.
  Swap best_swap(const Checkpoint& checkpoint) {
    for (Index i = 0; i < problem_.size; ++i) {
      const double half = 0.5 * problem_.diagonal(i) + error_[i];
      enter_cost_[i] = mask_[i] ? kInfinity : half + gradient_[i];
      leave_cost_[i] = mask_[i] ? half - gradient_[i] : kInfinity;
    }
    const std::vector<double>& row_cost = scan_chosen_ ? leave_cost_ : enter_cost_;
    const std::vector<double>& column_cost = scan_chosen_ ? enter_cost_ : leave_cost_;

    Index best_row = -1;
    double best_least = 0;
    double best_change = 0;
    for (Index i = 0; i < problem_.size; ++i) {
      if (row_cost[i] == kInfinity) continue;
      checkpoint();
      const double least = row_minimum(column_cost.data(), problem_.row(i), problem_.size);
      if (row_cost[i] + least < best_change) {
        best_change = row_cost[i] + least;
        best_least = least;
        best_row = i;
      }
    }
    if (best_row < 0) return {};
    const double* row = problem_.row(best_row);
    Index column = 0;
    while (column_cost[column] - row[column] != best_least) ++column;
    return scan_chosen_ ? Swap{column, best_row, best_change} : Swap{best_row, column, best_change};
  }

  void apply(const Swap& swap) {
    mask_[swap.enter] = 1;
    mask_[swap.leave] = 0;
    const double* enter = problem_.row(swap.enter);
    const double* leave = problem_.row(swap.leave);
    for (Index j = 0; j < problem_.size; ++j) gradient_[j] += enter[j] - leave[j];
  }

  const Problem& problem_;
  Mask mask_;
  std::vector<double> error_;
  std::vector<double> gradient_;
  std::vector<double> enter_cost_;
  std::vector<double> leave_cost_;
  bool scan_chosen_;  // rows of the chosen channels, else of the others: whichever are fewer
  Index swaps_since_refresh_ = 0;
};

}  // namespace

Mask swap_descent(const Problem& problem, Mask mask, const Checkpoint& checkpoint) {
  return SwapDescent(problem, std::move(mask)).run(checkpoint);
}

}  // namespace ccp::solver
