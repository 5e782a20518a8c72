#include <algorithm>
#include <numeric>

#include "problem.h"

namespace ccp::solver {
namespace {

double sum_of_smallest(std::vector<double>& values, Index count) {  // reorders the values
  std::nth_element(values.begin(), values.begin() + count, values.end());
  return std::accumulate(values.begin(), values.begin() + count, 0.0);
}

// A chosen channel i pays -u_i + S_ii / 2 and half its coupling to the r - 1 other chosen ones,
// which is at least half the sum of the r - 1 smallest off-diagonal entries of its row.
double gilmore_lawler(const Problem& problem, Index r, const std::vector<double>& error,
                      const Checkpoint& checkpoint) {
  if (r == 0) return problem.constant;
  std::vector<double> least(problem.size);
  std::vector<double> others;
  for (Index i = 0; i < problem.size; ++i) {
    checkpoint();
    const double* row = problem.row(i);
    others.assign(row, row + i);
    others.insert(others.end(), row + i + 1, row + problem.size);
    const double coupling = 0.5 * sum_of_smallest(others, r - 1);
    least[i] = coupling + 0.5 * problem.diagonal(i) - problem.linear[i] - error[i];
  }
  return problem.constant + sum_of_smallest(least, r);
}

}  // namespace

double lower_bound(const Problem& problem, Index r, const Checkpoint& checkpoint) {
  const std::vector<double> error = gradient_error(problem);
  double total_error = 0;
  for (double e : error) total_error += e;

  // The doubled error of the complement covers the rounding of its linear term, the total error
  // that of its constant and of the outer sums.
  const double direct = gilmore_lawler(problem, r, error, checkpoint);
  std::vector<double> doubled(error);
  for (double& e : doubled) e *= 2;
  const double mirrored =
      gilmore_lawler(complement(problem), problem.size - r, doubled, checkpoint);
  return std::max(direct, mirrored) - 2 * total_error;
}

}  // namespace ccp::solver
