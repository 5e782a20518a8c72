#include "semidefinite.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "kernels.h"
#include "random.h"

namespace ccp::solver {
namespace {

constexpr double kStep = 0.004;   // of the mean diagonal, at first
constexpr double kDecay = 0.125;  // of the steps: 1 / sqrt(1 + decay * round)
constexpr double kMemory = 3;     // the multipliers' mean weighs those of round k by k^(memory - 1)
constexpr Index kBlock = 32;      // rows that are multiplied at once

Index padded(Index size) { return (size + kFloats - 1) / kFloats * kFloats; }

// In single precision: whatever the multipliers are, the bound that follows from them is safe.
class Mixing {
 public:
  Mixing(const Problem& problem, const std::vector<double>& x, Index rank, std::uint64_t seed)
      : problem_(problem),
        size_(problem.size),
        width_(padded(rank)),
        stride_(padded(size_) | kFloats),  // an odd number of lines, so that columns spread
        vectors_(size_ * width_),
        transposed_(width_ * stride_),
        change_(width_),
        slopes_(kBlock * width_),
        inner_(kBlock * stride_),
        diagonal_(size_),
        quadratic_(size_ * stride_),
        products_(size_ * stride_) {
    SplitMix64 generator(seed);
    for (Index i = 0; i < size_; ++i) {
      place(vector(i), x[i], generator);
      std::copy_n(problem.row(i), size_, &quadratic_[i * stride_]);
      quadratic_[i * stride_ + i] = 0;
    }
    modified_ = quadratic_;
  }

  void sweep() {
    for (Index first = 0; first < size_; first += kBlock) {
      const Index count = std::min(kBlock, size_ - first);
      std::fill(slopes_.begin(), slopes_.end(), 0.0f);
      rows.add_product({count, size_, width_, &modified_[first * stride_], stride_, vectors_.data(),
                        width_, slopes_.data(), width_});
      for (Index k = 0; k < count; ++k) {
        update(first + k, &slopes_[k * width_]);
        if (k + 1 == count) break;
        const Index next = first + k + 1;
        rows.add_product({count - k - 1, 1, width_, &modified_[next * stride_ + first + k], stride_,
                          change_.data(), width_, &slopes_[(k + 1) * width_], width_});
      }
    }
  }

  // Moves the multipliers against X_ij; `share` is the weight of the new ones in their mean.
  void move_multipliers(float step, float share) {
    for (Index i = 0; i < size_; ++i) {
      for (Index k = 0; k < width_; ++k) transposed_[k * stride_ + i] = vector(i)[k];
    }
    for (Index first = 0; first < size_; first += kBlock) {
      const Index count = std::min(kBlock, size_ - first);
      std::fill(inner_.begin(), inner_.end(), 0.0f);
      rows.add_product({count, width_, padded(size_), vector(first), width_, transposed_.data(),
                        stride_, inner_.data(), stride_});
      for (Index k = 0; k < count; ++k) {
        const Index row = (first + k) * stride_;
        inner_[k * stride_ + first + k] = 0;  // X_ii has no multiplier
        rows.move_multipliers(size_, step, share, &inner_[k * stride_], &quadratic_[row],
                              &modified_[row], &products_[row]);
      }
    }
  }

  void take_mean_multipliers() {
    std::transform(quadratic_.begin(), quadratic_.end(), products_.begin(), modified_.begin(),
                   std::minus<>());
  }

  Multipliers result() && {
    std::vector<double> products(size_ * size_);
    for (Index i = 0; i < size_; ++i) {
      for (Index j = 0; j < i; ++j) {
        products[i * size_ + j] = products[j * size_ + i] = products_[i * stride_ + j];
      }
    }
    return {std::move(diagonal_), std::move(products)};
  }

 private:
  float* vector(Index i) { return &vectors_[i * width_]; }

  // At x along e, which is the first axis, and otherwise in a random direction.
  void place(float* w, double x, SplitMix64& generator) {
    double square = 0;
    for (Index k = 1; k < width_; ++k) {
      w[k] = static_cast<float>(generator.unit() - 0.5);
      square += w[k] * w[k];
    }
    const double length = std::sqrt(std::max(0.0, x * (1 - x)) / square);
    for (Index k = 1; k < width_; ++k) w[k] *= static_cast<float>(length);
    w[0] = static_cast<float>(x);
  }

  // The least of slope'w over the sphere w'w = w'e is e / 2 - slope / (2 |slope|).
  void update(Index i, float* slope) {
    slope[0] += static_cast<float>(0.5 * problem_.diagonal(i) - problem_.linear[i]);
    double square = 0;
    for (Index k = 0; k < width_; ++k) square += double{slope[k]} * slope[k];
    const double length = std::sqrt(square);
    diagonal_[i] = 2 * length;
    std::fill(change_.begin(), change_.end(), 0.0f);
    // What is nearly zero gives no direction, and its inverse would overflow.
    if (!(length >= std::numeric_limits<float>::min())) return;
    const float factor = static_cast<float>(-0.5 / length);
    float* w = vector(i);
    for (Index k = 0; k < width_; ++k) {
      const float moved = factor * slope[k] + (k == 0 ? 0.5f : 0.0f);
      change_[k] = moved - w[k];
      w[k] = moved;
    }
  }

  const Problem& problem_;
  const Index size_;
  const Index width_;
  const Index stride_;
  std::vector<float> vectors_;
  std::vector<float> transposed_;  // the vectors as columns
  std::vector<float> change_;      // of the vector updated last
  std::vector<float> slopes_;      // of a block of vectors
  std::vector<float> inner_;       // a block of rows of X
  std::vector<double> diagonal_;
  std::vector<float> quadratic_;  // S without its diagonal
  std::vector<float> modified_;   // minus multipliers
  std::vector<float> products_;   // their mean
};

}  // namespace

Multipliers semidefinite_multipliers(const Problem& problem, const std::vector<double>& x,
                                     const MixingSchedule& schedule, std::uint64_t seed,
                                     const Checkpoint& checkpoint) {
  Mixing mixing(problem, x, schedule.rank, seed);
  const auto sweeps = [&](Index count, std::chrono::steady_clock::time_point end) {
    for (Index k = 0; k < count; ++k) {
      mixing.sweep();
      checkpoint();
      if (std::chrono::steady_clock::now() >= end) return false;
    }
    return true;
  };
  double scale = 0;  // the mean diagonal
  for (Index i = 0; i < problem.size; ++i) scale += problem.diagonal(i) / problem.size;
  for (Index k = 0; k < schedule.rounds && sweeps(schedule.sweeps, schedule.rounds_end); ++k) {
    mixing.move_multipliers(kStep * scale / std::sqrt(1 + kDecay * k), kMemory / (k + kMemory));
  }
  mixing.take_mean_multipliers();
  sweeps(schedule.last, schedule.deadline);
  return std::move(mixing).result();
}

}  // namespace ccp::solver
