#include "problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels.h"

namespace ccp::solver {

Symmetrised symmetrise(Index size, const double* matrix, double* mean) {
  constexpr Index kTile = 32;
  double turned[kTile][kTile];  // a tile above the diagonal, in the order of the one below
  double asymmetry[kTile] = {}, largest[kTile] = {}, sum[kTile] = {};  // by column
  for (Index top = 0; top < size; top += kTile) {
    const Index height = std::min(kTile, size - top);
    for (Index left = 0; left <= top; left += kTile) {
      const Index width = std::min(kTile, size - left);
      for (Index j = 0; j < width; ++j) {
        const double* const row = matrix + (left + j) * size + top;
        for (Index i = 0; i < height; ++i) turned[i][j] = row[i];
      }
      const double times = left == top ? 1 : 2;
      for (Index i = 0; i < height; ++i) {
        const double* const row = matrix + (top + i) * size + left;
        double* const out = mean + (top + i) * size + left;
        for (Index j = 0; j < width; ++j) {
          const double a = 0.5 * row[j];  // halves, because the sum may overflow
          const double b = 0.5 * turned[i][j];
          out[j] = turned[i][j] = a + b;
          asymmetry[j] = std::max(asymmetry[j], 2 * std::abs(a - b));
          largest[j] = std::max(largest[j], 2 * std::max(std::abs(a), std::abs(b)));
          sum[j] += times * (std::abs(a) + std::abs(b));
        }
      }
      for (Index j = 0; j < width; ++j) {
        double* const out = mean + (left + j) * size + top;
        for (Index i = 0; i < height; ++i) out[i] = turned[i][j];
      }
    }
  }
  return {*std::max_element(asymmetry, asymmetry + kTile),
          *std::max_element(largest, largest + kTile), std::accumulate(sum, sum + kTile, 0.0)};
}

double objective(const Problem& problem, const Mask& mask) {
  std::vector<Index> chosen;
  for (Index i = 0; i < problem.size; ++i) {
    if (mask[i]) chosen.push_back(i);
  }
  double total = problem.constant;
  for (Index i : chosen) {
    double coupling = 0;
    for (Index j : chosen) coupling += problem.row(i)[j];
    total += 0.5 * coupling - problem.linear[i];
  }
  return total;
}

Problem complement(const Problem& problem) {
  const Mask all(problem.size, 1);
  return {problem.size, problem.quadratic, gradient(problem, all), problem.weight,
          objective(problem, all)};
}

Mask inverse(Mask mask) {
  for (char& chosen : mask) chosen = !chosen;
  return mask;
}

bool all_ones(const std::vector<double>& weight) {
  return std::all_of(weight.begin(), weight.end(), [](double w) { return w == 1; });
}

std::vector<double> gradient(const Problem& problem, const Mask& mask) {
  std::vector<double> result(problem.size);
  for (Index i = 0; i < problem.size; ++i) result[i] = -problem.linear[i];
  for (Index i = 0; i < problem.size; ++i) {
    if (!mask[i]) continue;
    rows.add(problem.size, 1, problem.row(i), result.data());
  }
  return result;
}

std::vector<double> gradient_error(const Problem& problem) {
  // n + 1 terms summed once, then two more additions for each of n updates: at most 3n + 1
  // roundings of partial sums that the absolute row sum bounds; the rest is for the bound's own.
  const double unit = 4.0 * (problem.size + 4) * std::numeric_limits<double>::epsilon();
  std::vector<double> error(problem.size);
  for (Index i = 0; i < problem.size; ++i) {
    const double scale =
        std::abs(problem.linear[i]) + rows.absolute_sum(problem.size, problem.row(i));
    // Halving a subnormal entry rounds, too.
    error[i] = unit * scale + 4 * std::numeric_limits<double>::denorm_min();
  }
  return error;
}

}  // namespace ccp::solver
