// Inputs and reference of channel_moments, for the emulated and the CPU kernels' tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "csrc/params.h"
#include "testing.h"

namespace testing {

// Sizes and strides begin with the samples, or with another dimension that is summed over.
struct MomentsCase {
  std::string name;
  std::vector<int64_t> sizes, strides;
  int64_t channel_dim;
  int64_t misalignment = 0;  // elements by which x begins after a 16-byte boundary
};

inline std::vector<MomentsCase> channel_moments_cases() {
  return {
      {"rows, 16-byte loads", {3, 5, 8, 8}, {320, 64, 8, 1}, 1},
      {"rows, odd length", {3, 5, 7, 7}, {245, 49, 7, 1}, 1},
      {"rows, odd length, that lie alike", {7, 8, 7, 7}, {392, 49, 7, 1}, 1},
      {"misaligned rows that lie alike", {6, 8, 51}, {408, 51, 1}, 1, 3},
      {"rows, two chunks each", {6, 35, 117}, {4095, 117, 1}, 1},
      {"rows shorter than a load", {5, 7, 3}, {21, 3, 1}, 1},
      {"misaligned rows", {2, 3, 64}, {192, 64, 1}, 1, 1},
      {"misaligned rows of odd length", {4, 9, 51}, {459, 51, 1}, 1, 3},
      {"rows of a warp", {3, 9, 301}, {2709, 301, 1}, 1},
      {"the same rows for all samples", {3, 5, 29}, {0, 29, 1}, 1},
      {"a slice of the channels", {2, 3, 40}, {400, 40, 1}, 1},
      {"rows that lie alike, in parts", {40, 8, 7, 7}, {392, 49, 7, 1}, 1},
      {"parts that begin within rows", {3, 9, 2005}, {18045, 2005, 1}, 1, 3},
      {"rows in parts", {2, 1, 20000}, {20000, 20000, 1}, 1},
      {"channels last, 16-byte loads", {2, 16, 5, 5}, {400, 1, 80, 16}, 1},
      {"channels last, odd channels", {2, 13, 37}, {481, 1, 13}, 1},
      {"channels last, several tiles", {2, 3, 264}, {792, 264, 1}, 2},
      {"channels last in parts", {3, 8, 900}, {7200, 1, 8}, 1},
      {"no positions dimension", {30, 70}, {70, 1}, 1},
      {"cropped", {2, 3, 5, 6}, {210, 70, 10, 1}, 1},
      {"cropped channels last", {2, 8, 5, 6}, {560, 1, 80, 8}, 1},
      {"no two neighbours", {4, 3, 9}, {108, 36, 4}, 1},
      {"no rows", {3, 5, 0, 4}, {210, 70, 10, 1}, 1},
  };
}

template <class T>
ccp::Moments moments_reference(const MomentsCase& test, const T* x, int64_t channel) {
  std::vector<int64_t> index(test.sizes.size());
  ccp::Moments moments;
  if (std::count(test.sizes.begin(), test.sizes.end(), 0) > 0) return moments;
  long double sum = 0, square_sum = 0;
  for (;;) {
    int64_t offset = channel * test.strides[test.channel_dim];
    for (size_t d = 0; d < index.size(); ++d) offset += index[d] * test.strides[d];
    const double value = ccp::widen(x[offset]);
    sum += value;
    square_sum += static_cast<long double>(value) * value;
    moments.zeros += value == 0;
    moments.minimum = std::min(moments.minimum, value);
    moments.maximum = std::max(moments.maximum, value);
    size_t d = index.size();
    while (d > 0 &&
           (d - 1 == static_cast<size_t>(test.channel_dim) || ++index[d - 1] == test.sizes[d - 1]))
      index[--d] = 0;
    if (d > 0) continue;
    moments.sum = static_cast<double>(sum);
    moments.square_sum = static_cast<double>(square_sum);
    return moments;
  }
}

// Runs run(params) and compares params.out with the reference.
template <class T, class Run>
void check_channel_moments(const MomentsCase& test, Run run) {
  int64_t last = test.misalignment;
  for (size_t i = 0; i < test.sizes.size(); ++i) last += (test.sizes[i] - 1) * test.strides[i];
  std::mt19937 random(9);
  std::vector<T> data = random_values<T>(last + 1, random);
  for (T& value : data)
    if (ccp::widen(value) < -0.5) value = T{};
  const T* x = data.data() + test.misalignment;
  std::vector<int64_t> sizes{1}, strides{0};
  sizes.insert(sizes.end(), test.sizes.begin(), test.sizes.end());
  strides.insert(strides.end(), test.strides.begin(), test.strides.end());
  const int64_t channels = test.sizes[test.channel_dim];
  auto out = unwritten<double>(ccp::kMomentRows * channels);
  ccp::ChannelMomentsParams params{x, out.data(), {}};
  expect(test.name + ": layout",
         ccp::make_layout(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                          strides.data(), test.channel_dim + 1, &params.layout));
  run(params);
  for (int64_t c = 0; c < channels; ++c) {
    const ccp::Moments expected = moments_reference(test, x, c);
    const ccp::Moments actual = ccp::Moments::read(out.data(), channels, c);
    const double count = static_cast<double>(params.layout.positions);
    const double magnitude = std::sqrt(count * expected.square_sum);  // at least the sum of |x|
    using Acc = ccp::Accumulator<T>;
    expect_close(test.name + ": sum", c, static_cast<Acc>(actual.sum), expected.sum, magnitude);
    expect_close(test.name + ": sum of squares", c, static_cast<Acc>(actual.square_sum),
                 expected.square_sum, expected.square_sum);
    expect(test.name + ": zeros", actual.zeros == expected.zeros);
    expect(test.name + ": minimum", actual.minimum == expected.minimum);
    expect(test.name + ": maximum", actual.maximum == expected.maximum);
  }
}

}  // namespace testing
