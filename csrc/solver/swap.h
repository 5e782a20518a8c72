#pragma once

#include <vector>

#include "problem.h"

namespace ccp::solver {

struct Swap {
  Index enter = -1;
  Index leave = -1;
  double change = 0;  // of the cost, plus the rounding error that it may carry
};

// Exchanges the pair of equal weight that lowers the cost most until no exchange lowers it by more
// than rounding. O(n min(r, n - r)) a step, less where bounds rule rows out. Serves several masks
// of one problem, the cheaper the less these differ.
class SwapDescent {
 public:
  explicit SwapDescent(const Problem& problem);

  Mask run(const Mask& start, const Checkpoint& checkpoint);

  const std::vector<double>& gradient() const { return gradient_; }  // S m - u of the last result

 private:
  void start_from(const Mask& mask);
  void refresh();
  void descend(const Checkpoint& checkpoint);
  Swap best_swap(const Checkpoint& checkpoint);
  Swap best_swap_within(double weight, double limit, const Checkpoint& checkpoint);
  void flip(Index i);

  const Problem& problem_;
  Mask mask_;
  std::vector<double> error_;
  std::vector<double> largest_;  // coupling of each channel to another
  std::vector<double> classes_;  // the different weights
  std::vector<double> gradient_;
  std::vector<double> enter_cost_;
  std::vector<double> leave_cost_;
  Index updates_ = 0;  // of the gradient since it was summed
};

Mask swap_descent(const Problem& problem, const Mask& mask, const Checkpoint& checkpoint);

}  // namespace ccp::solver
