#include "branching.h"

#include <algorithm>
#include <cmath>

namespace ccp::solver {
namespace {

constexpr double kIntegral = 1e-6;
constexpr double kRidge = 1e-9;  // of the mean diagonal: S may be singular on the face
constexpr Index kLargestFace = 128;

// The lower triangle of the inverse of the Cholesky factor of S + ridge, row-major.
std::vector<double> inverse_factor(const Problem& problem, const std::vector<Index>& face) {
  const Index size = static_cast<Index>(face.size());
  double trace = 0;
  for (Index i : face) trace += problem.diagonal(i);
  const double ridge = kRidge * trace / size + 1e-300;
  std::vector<double> factor(size * size), inverse(size * size);
  for (Index i = 0; i < size; ++i) {
    double* row = &factor[i * size];
    double* inverse_row = &inverse[i * size];
    const double* source = problem.row(face[i]);
    for (Index j = 0; j <= i; ++j) {
      const double* other = &factor[j * size];
      double value = source[face[j]];
      for (Index k = 0; k < j; ++k) value -= row[k] * other[k];
      row[j] = i == j ? std::sqrt(std::max(value, 0.0) + ridge) : value / other[j];
    }
    for (Index j = 0; j < i; ++j) {
      const double* other = &inverse[j * size];
      for (Index k = 0; k <= j; ++k) inverse_row[k] -= row[j] * other[k];
    }
    for (Index k = 0; k < i; ++k) inverse_row[k] /= row[i];
    inverse_row[i] = 1 / row[i];
  }
  return inverse;
}

// The diagonal of the inverse of S on the face and on sum d = 0.
std::vector<double> inverse_diagonal(const Problem& problem, const std::vector<Index>& face) {
  const Index size = static_cast<Index>(face.size());
  const std::vector<double> inverse = inverse_factor(problem, face);
  std::vector<double> diagonal(size), ones(size);
  double total = 0;
  for (Index i = 0; i < size; ++i) {
    const double* row = &inverse[i * size];
    double sum = 0;
    for (Index k = 0; k <= i; ++k) sum += row[k];
    for (Index k = 0; k <= i; ++k) {
      diagonal[k] += row[k] * row[k];
      ones[k] += row[k] * sum;
    }
    total += sum * sum;
  }
  for (Index i = 0; i < size; ++i) diagonal[i] -= ones[i] * ones[i] / total;
  return diagonal;
}

}  // namespace

Index branching_position(const Problem& problem, const std::vector<Index>& free,
                         const std::vector<double>& x) {
  const auto centrality = [&](Index k) { return std::min(x[k], 1 - x[k]); };
  std::vector<Index> candidates;
  for (Index k = 0; k < static_cast<Index>(free.size()); ++k) {
    if (centrality(k) > kIntegral) candidates.push_back(k);
  }
  if (candidates.size() < 2) {
    Index most = 0;
    for (Index k = 1; k < static_cast<Index>(free.size()); ++k) {
      if (centrality(k) > centrality(most)) most = k;
    }
    return most;
  }
  if (static_cast<Index>(candidates.size()) > kLargestFace) {
    std::stable_sort(candidates.begin(), candidates.end(),
                     [&](Index a, Index b) { return centrality(a) > centrality(b); });
    candidates.resize(kLargestFace);
  }
  std::vector<Index> face;
  for (Index k : candidates) face.push_back(free[k]);
  const std::vector<double> inverse = inverse_diagonal(problem, face);
  Index best = candidates[0];
  double best_score = -1;
  for (std::size_t k = 0; k < candidates.size(); ++k) {
    const double value = x[candidates[k]];
    const double both = value * (1 - value) / std::max(inverse[k], 1e-300);
    if (both > best_score) {
      best_score = both;
      best = candidates[k];
    }
  }
  return best;
}

}  // namespace ccp::solver
