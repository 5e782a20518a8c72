#pragma once

#include <vector>

#include "problem.h"

namespace ccp::solver {

// The inverse of S on some channels and on the moves d with sum d = 0. A small ridge stands in
// where S is singular there.
class FaceInverse {
 public:
  // Rows of `quadratic` are `stride` apart; `face` names rows and columns.
  FaceInverse(const double* quadratic, Index stride, const std::vector<Index>& face);

  double diagonal(Index i) const { return diagonal_[i]; }  // at least 1e-300
  std::vector<double> column(Index i) const;
  std::vector<double> times(const std::vector<double>& vector) const;

 private:
  Index size_;
  std::vector<double> factor_;  // L^-1 for S = L L' on the face, row-major, lower triangle
  std::vector<double> diagonal_;
  std::vector<double> row_sum_;  // of S^-1, whose projection on sum d = 0 is meant
  double total_ = 0;
};

}  // namespace ccp::solver
