// Random maps and windows for the tests of the patch products, and their definition in float64.
#pragma once

#include "csrc/cuda/patch_precision.h"
#include "csrc/params.h"
#include "testing.h"

namespace testing {

using ccp::PatchProductParams;
using ccp::PatchSource;

struct PatchCase {
  std::string name;
  int64_t samples, channels, height, width, groups;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t targets;  // channels of y; 0: the Gram matrix of x's patches
};

// Maps [samples, channels, height, width], contiguous or channels last.
template <class T>
struct Maps {
  int64_t channels, height, width;
  bool channels_last;
  std::vector<T> values;

  int64_t stride(int dim) const {
    const int64_t last[] = {channels * height * width, 1, width * channels, channels};
    const int64_t first[] = {channels * height * width, height * width, width, 1};
    return channels_last ? last[dim] : first[dim];
  }

  double at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    if (y < 0 || y >= height || x < 0 || x >= width) return 0;
    return ccp::widen(values[n * stride(0) + c * stride(1) + y * stride(2) + x * stride(3)]);
  }

  PatchSource source(int64_t groups) const {
    return {values.data(),   channels / groups,
            {height, width}, stride(0),
            stride(1),       {stride(2), stride(3)},
            {1, 1},          {1, 1},
            {0, 0},          {1, 1}};
  }
};

template <class T>
Maps<T> random_maps(int64_t samples, int64_t channels, int64_t height, int64_t width,
                    bool channels_last, std::mt19937& random) {
  return {channels, height, width, channels_last,
          random_values<T>(samples * channels * height * width, random)};
}

// Of the sum of the terms' magnitudes.
template <class Acc>
constexpr double patch_tolerance(ccp::PatchPrecision precision) {
  return precision == ccp::PatchPrecision::kTf32 ? kTf32Tolerance : kExactTolerance<Acc>;
}

template <class T>
class PatchTest {
 public:
  PatchTest(const PatchCase& test, bool channels_last) : test_(test) {
    std::mt19937 random(5);
    for (int d = 0; d < 2; ++d) {
      const int64_t extent = test.dilation[d] * (test.kernel[d] - 1) + 1;
      const int64_t size = d == 0 ? test.height : test.width;
      positions_[d] = (size + 2 * test.padding[d] - extent) / test.stride[d] + 1;
    }
    x_ =
        random_maps<T>(test.samples, test.channels, test.height, test.width, channels_last, random);
    y_ = random_maps<T>(test.samples, test.targets, positions_[0], positions_[1], channels_last,
                        random);
  }

  // run(params, seed) must add the products to params.out.
  template <class Acc, class Run>
  void check(int schedules, double tolerance, Run run) const {
    const int64_t rows = x_.source(test_.groups).channels * test_.kernel[0] * test_.kernel[1];
    const int64_t columns = test_.targets ? test_.targets / test_.groups : rows;
    const int64_t row_stride = columns + 3, group_stride = rows * row_stride + 5;
    std::mt19937 random(6);
    const auto start = random_values<Acc>(test_.groups * group_stride, random);
    std::vector<double> sum(start.begin(), start.end()), magnitude;
    for (const double value : sum) magnitude.push_back(std::fabs(value));
    add_reference(sum, magnitude, rows, columns, group_stride, row_stride);
    for (int seed = 0; seed < schedules; ++seed) {
      std::vector<Acc> out = start;
      run(params(out.data(), group_stride, row_stride), seed);
      for (size_t i = 0; i < out.size(); ++i)
        expect_close(test_.name, static_cast<int64_t>(i), out[i], sum[i], magnitude[i], tolerance);
    }
  }

 private:
  PatchProductParams params(void* out, int64_t group_stride, int64_t row_stride) const {
    PatchProductParams params{out,
                              group_stride,
                              row_stride,
                              x_.source(test_.groups),
                              {},
                              test_.targets == 0,
                              test_.groups,
                              test_.samples,
                              {positions_[0], positions_[1]}};
    for (int d = 0; d < 2; ++d) {
      params.left.kernel[d] = test_.kernel[d];
      params.left.stride[d] = test_.stride[d];
      params.left.padding[d] = test_.padding[d];
      params.left.dilation[d] = test_.dilation[d];
    }
    params.right = test_.targets ? y_.source(test_.groups) : params.left;
    return params;
  }

  // An element of column `column` of a group's P at one output position.
  double patch(int64_t n, int64_t group, int64_t column, int64_t oy, int64_t ox) const {
    const int64_t kx = column % test_.kernel[1], ky = column / test_.kernel[1] % test_.kernel[0];
    const int64_t c = column / test_.kernel[1] / test_.kernel[0];
    return x_.at(n, group * (test_.channels / test_.groups) + c,
                 oy * test_.stride[0] + ky * test_.dilation[0] - test_.padding[0],
                 ox * test_.stride[1] + kx * test_.dilation[1] - test_.padding[1]);
  }

  void add_reference(std::vector<double>& sum, std::vector<double>& magnitude, int64_t rows,
                     int64_t columns, int64_t group_stride, int64_t row_stride) const {
    std::vector<double> left(rows), right(columns);
    for (int64_t n = 0; n < test_.samples; ++n)
      for (int64_t oy = 0; oy < positions_[0]; ++oy)
        for (int64_t ox = 0; ox < positions_[1]; ++ox)
          for (int64_t g = 0; g < test_.groups; ++g) {
            for (int64_t i = 0; i < rows; ++i) left[i] = patch(n, g, i, oy, ox);
            for (int64_t j = 0; j < columns; ++j)
              right[j] = test_.targets ? y_.at(n, g * columns + j, oy, ox) : left[j];
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t j = 0; j < columns; ++j) {
                const int64_t e = g * group_stride + i * row_stride + j;
                sum[e] += left[i] * right[j];
                magnitude[e] += std::fabs(left[i] * right[j]);
              }
          }
  }

  PatchCase test_;
  int64_t positions_[2];
  Maps<T> x_, y_;
};

}  // namespace testing
