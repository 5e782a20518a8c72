#include "face.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace ccp::solver {
namespace {

constexpr double kRidge = 1e-9;  // of the mean diagonal

// The lower triangle of the inverse of the Cholesky factor of S + ridge, row-major.
std::vector<double> inverse_factor(const double* quadratic, Index stride,
                                   const std::vector<Index>& face) {
  const Index size = static_cast<Index>(face.size());
  double trace = 0;
  for (Index i : face) trace += quadratic[i * stride + i];
  const double ridge = kRidge * trace / size + 1e-300;
  std::vector<double> factor(size * size), inverse(size * size);
  for (Index i = 0; i < size; ++i) {
    double* row = &factor[i * size];
    double* inverse_row = &inverse[i * size];
    const double* source = quadratic + face[i] * stride;
    for (Index j = 0; j <= i; ++j) {
      const double* other = &factor[j * size];
      const double value = source[face[j]] - rows.dot(j, row, other);
      row[j] = i == j ? std::sqrt(std::max(value, 0.0) + ridge) : value / other[j];
    }
    for (Index j = 0; j < i; ++j) {
      const double* other = &inverse[j * size];
      rows.add(j + 1, -row[j], other, inverse_row);
    }
    for (Index k = 0; k < i; ++k) inverse_row[k] /= row[i];
    inverse_row[i] = 1 / row[i];
  }
  return inverse;
}

}  // namespace

FaceInverse::FaceInverse(const double* quadratic, Index stride, const std::vector<Index>& face)
    : size_(static_cast<Index>(face.size())),
      factor_(inverse_factor(quadratic, stride, face)),
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

std::vector<double> FaceInverse::column(Index i) const {
  std::vector<double> unit(size_);
  unit[i] = 1;
  return times(unit);
}

std::vector<double> FaceInverse::times(const std::vector<double>& vector) const {
  std::vector<double> result(size_);
  double weight = 0;
  for (Index k = 0; k < size_; ++k) {
    const double* row = &factor_[k * size_];
    rows.add(k + 1, rows.dot(k + 1, row, vector.data()), row, result.data());
    weight += row_sum_[k] * vector[k];
  }
  for (Index j = 0; j < size_; ++j) result[j] -= weight / total_ * row_sum_[j];
  return result;
}

}  // namespace ccp::solver
