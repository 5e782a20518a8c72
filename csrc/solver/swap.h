#pragma once

#include <vector>

#include "problem.h"

namespace ccp::solver {

struct Swap {
  Index enter = -1;
  Index leave = -1;
  double change = 0;  // of the cost, plus the rounding error that it may carry
};

// Exchanges pairs of equal weight until no exchange lowers the cost by more than rounding. Up to
// `kLargestExhaustive` channels the best of all pairs each time, O(n min(r, n - r)) a step; beyond,
// channel by channel the best partner, O(n) a step. Serves several masks of one problem, the
// cheaper the less these differ.
class SwapDescent {
 public:
  explicit SwapDescent(const Problem& problem);

  Mask run(const Mask& start, const Checkpoint& checkpoint);

  const std::vector<double>& gradient() const { return gradient_; }  // S m - u of the last result

 private:
  void start_from(const Mask& mask);
  void refresh();
  void descend(const Checkpoint& checkpoint);
  bool split(double weight);
  Swap best_partner(Index i) const;
  Swap best_swap(const Checkpoint& checkpoint);
  bool sweep(double weight, const Checkpoint& checkpoint);
  void apply(const Swap& swap);
  void flip(Index i);

  const Problem& problem_;
  Mask mask_;
  std::vector<double> error_;
  std::vector<double> largest_;  // coupling of each channel to another
  std::vector<double> classes_;  // the different weights
  std::vector<double> gradient_;
  // Rows are the channels that could enter or those that could leave, whichever are fewer; infinity
  // marks the channels that are not of that side or of another weight.
  bool rows_enter_ = false;
  std::vector<double> row_cost_;
  std::vector<double> column_cost_;
  double least_column_ = 0;
  Index updates_ = 0;  // of the gradient since it was summed
};

Mask swap_descent(const Problem& problem, const Mask& mask, const Checkpoint& checkpoint);

}  // namespace ccp::solver
