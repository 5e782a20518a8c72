// Layers for the Gram kernels' tests, and what S must become.
#pragma once

#include "csrc/params.h"
#include "testing.h"

namespace testing {

struct GramCase {
  int64_t channels, samples, terms;
  bool weighted;
  int64_t padding = 0;       // elements behind every row of a
  int64_t shift = 0;         // elements before the first one, which so lies on no boundary
  bool terms_first = false;  // in memory: rows are not equally far apart
  bool symmetric = true;     // the S that it starts from
};

// One layer's data, the S that it starts from and the one that it must become.
template <class T, class Acc, class Sigma>
class GramTest {
 public:
  GramTest(const GramCase& layer, std::mt19937& random)
      : layer_(layer),
        rows_(layer.samples * layer.terms),
        a_stride_(layer.channels + layer.padding),
        S_stride_(layer.channels + (layer.channels % 2 ? 3 : 8)),
        a_(random_values<T>(layer.shift + rows_ * a_stride_, random)),
        sigma_(random_values<Sigma>(rows_, random)),
        start_(random_values<Acc>(S_stride_ * layer.channels, random)),
        S_(start_.size()) {
    if (!sigma_.empty()) sigma_[0] = 0;
    for (int64_t i = 0; layer.symmetric && i < layer.channels; ++i)
      for (int64_t j = 0; j < i; ++j) start_[i * S_stride_ + j] = start_[j * S_stride_ + i];
  }

  ccp::WeightedGramParams restart() {
    S_ = start_;
    const int64_t samples = layer_.samples, terms = layer_.terms;
    const int64_t sample_rows = layer_.terms_first ? 1 : terms;
    const int64_t term_rows = layer_.terms_first ? samples : 1;
    return {S_.data(),
            a_.data() + layer_.shift,
            layer_.weighted ? sigma_.data() : nullptr,
            std::is_same_v<Sigma, double>,
            layer_.channels,
            samples,
            terms,
            S_stride_,
            sample_rows * a_stride_,
            term_rows * a_stride_,
            1,
            sample_rows,
            term_rows};
  }

  // S as it must be, and symmetric to the bit if it began so.
  void compare(const std::string& name) const {
    const int64_t C = layer_.channels;
    for (int64_t i = 0; i < C; ++i)
      for (int64_t j = 0; j < S_stride_; ++j) compare(name, i, j);
    for (int64_t i = 0; layer_.symmetric && i < C; ++i)
      for (int64_t j = 0; j < i; ++j)
        expect(name + " is symmetric", S_[i * S_stride_ + j] == S_[j * S_stride_ + i]);
  }

 private:
  Acc start(int64_t i, int64_t j) const { return start_[i * S_stride_ + j]; }

  void compare(const std::string& name, int64_t i, int64_t j) const {
    double sum = start(i, j), magnitude = std::fabs(sum);
    const T* a = a_.data() + layer_.shift;
    for (int64_t row = 0; j < layer_.channels && row < rows_; ++row) {
      const double weight = layer_.weighted ? sigma_[row] : 1;
      const double term =
          weight * ccp::widen(a[row * a_stride_ + i]) * ccp::widen(a[row * a_stride_ + j]);
      sum += term;
      magnitude += std::fabs(term);
    }
    expect_close(name, i * S_stride_ + j, S_[i * S_stride_ + j], sum, magnitude);
  }

  GramCase layer_;
  int64_t rows_, a_stride_, S_stride_;
  std::vector<T> a_;
  std::vector<Sigma> sigma_;
  std::vector<Acc> start_, S_;
};

}  // namespace testing
