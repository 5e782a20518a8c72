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

// The inverse of S on the face and on sum d = 0: for K = S on the face, K^-1 less its projection.
class FaceInverse {
 public:
  FaceInverse(const Problem& problem, const std::vector<Index>& face)
      : size_(static_cast<Index>(face.size())),
        factor_(inverse_factor(problem, face)),
        diagonal_(size_),
        row_sum_(size_) {
    for (Index k = 0; k < size_; ++k) {
      const double* row = &factor_[k * size_];
      double sum = 0;
      for (Index i = 0; i <= k; ++i) sum += row[i];
      for (Index i = 0; i <= k; ++i) {
        diagonal_[i] += row[i] * row[i];
        row_sum_[i] += row[i] * sum;
      }
      total_ += sum * sum;
    }
    for (Index i = 0; i < size_; ++i) {
      diagonal_[i] = std::max(diagonal_[i] - row_sum_[i] * row_sum_[i] / total_, 1e-300);
    }
  }

  double diagonal(Index i) const { return diagonal_[i]; }

  std::vector<double> column(Index i) const {
    std::vector<double> result(size_);
    for (Index k = i; k < size_; ++k) {
      const double* row = &factor_[k * size_];
      for (Index j = 0; j <= k; ++j) result[j] += row[i] * row[j];
    }
    for (Index j = 0; j < size_; ++j) result[j] -= row_sum_[i] * row_sum_[j] / total_;
    return result;
  }

 private:
  Index size_;
  std::vector<double> factor_;  // L^-1 for K = L L'
  std::vector<double> diagonal_;
  std::vector<double> row_sum_;  // of K^-1
  double total_ = 0;             // of K^-1
};

}  // namespace

Branching choose_branching(const Problem& problem, const std::vector<Index>& free,
                           const std::vector<double>& x) {
  const auto centrality = [&](Index k) { return std::min(x[k], 1 - x[k]); };
  const Index size = static_cast<Index>(free.size());
  std::vector<Index> candidates;
  for (Index k = 0; k < size; ++k) {
    if (centrality(k) > kIntegral) candidates.push_back(k);
  }
  Branching branching{0, std::vector<double>(size)};
  if (candidates.size() < 2) {
    for (Index k = 1; k < size; ++k) {
      if (centrality(k) > centrality(branching.position)) branching.position = k;
    }
    return branching;
  }
  if (static_cast<Index>(candidates.size()) > kLargestFace) {
    std::stable_sort(candidates.begin(), candidates.end(),
                     [&](Index a, Index b) { return centrality(a) > centrality(b); });
    candidates.resize(kLargestFace);
  }
  std::vector<Index> face;
  for (Index k : candidates) face.push_back(free[k]);
  const FaceInverse inverse(problem, face);
  Index best = 0;
  double best_score = -1;
  for (Index k = 0; k < static_cast<Index>(face.size()); ++k) {
    const double value = x[candidates[k]];
    const double score = value * (1 - value) / inverse.diagonal(k);
    if (score > best_score) {
      best_score = score;
      best = k;
    }
  }
  const std::vector<double> column = inverse.column(best);
  for (std::size_t k = 0; k < face.size(); ++k) {
    branching.response[candidates[k]] = column[k] / inverse.diagonal(best);
  }
  branching.position = candidates[best];
  return branching;
}

}  // namespace ccp::solver
