// Inputs and reference of map_similarity, for the emulated and the CPU kernels' tests.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "csrc/narrow.h"
#include "csrc/params.h"
#include "testing.h"

namespace testing {

struct MapCase {
  std::string name;
  std::vector<int64_t> sizes, x_strides, y_strides;
  bool symmetric;
  ccp::SimilarityKind kind;
  float mean = 0;  // added to all values
};

inline std::vector<MapCase> map_similarity_cases() {
  using ccp::SimilarityKind;
  const auto ssim = SimilarityKind::kSsim, mse = SimilarityKind::kMse;
  const auto psnr = SimilarityKind::kPsnr, cosine = SimilarityKind::kCosine;
  const auto pearson = SimilarityKind::kPearson;
  return {
      {"rows, 16-byte loads", {3, 5, 80}, {400, 80, 1}, {400, 80, 1}, true, ssim},
      {"rows, two tiles", {1, 67, 40}, {2680, 40, 1}, {2680, 40, 1}, true, pearson},
      {"rows against rows", {2, 40, 24}, {960, 24, 1}, {1920, 48, 1}, false, mse},
      {"rows, odd length", {2, 9, 7, 7}, {441, 49, 7, 1}, {441, 49, 7, 1}, true, psnr},
      {"odd rows, two tiles", {2, 67, 7, 7}, {3283, 49, 7, 1}, {3283, 49, 7, 1}, true, ssim},
      {"odd rows against odd rows", {3, 7, 45}, {315, 45, 1}, {338, 48, 1}, false, pearson},
      {"odd rows with a large mean", {2, 6, 79}, {474, 79, 1}, {474, 79, 1}, true, mse, 100},
      {"short rows with a large mean", {2, 20, 31}, {620, 31, 1}, {620, 31, 1}, true, psnr, 100},
      {"long rows, odd length", {1, 5, 301}, {1505, 301, 1}, {1505, 301, 1}, true, ssim},
      {"channels last", {2, 72, 5, 5}, {1800, 1, 360, 72}, {1800, 1, 360, 72}, true, ssim},
      {"channels last against channels last",
       {3, 16, 37},
       {592, 1, 16},
       {640, 1, 16},
       false,
       cosine},
      {"channels last, odd channels", {2, 13, 37}, {481, 1, 13}, {481, 1, 13}, true, mse},
      {"single numbers", {9, 8}, {8, 1}, {8, 1}, true, ssim},
      {"rows against channels last", {2, 5, 6, 4}, {120, 24, 4, 1}, {120, 1, 20, 5}, false, ssim},
      {"cropped", {2, 3, 5, 6}, {210, 70, 10, 1}, {210, 70, 10, 1}, true, cosine},
      {"rows with a large mean", {2, 6, 80}, {480, 80, 1}, {480, 80, 1}, true, pearson, 100},
      {"channels last with a large mean", {2, 8, 37}, {296, 1, 8}, {296, 1, 8}, true, ssim, 100},
      {"cropped with a large mean",
       {2, 3, 5, 6},
       {210, 70, 10, 1},
       {210, 70, 10, 1},
       true,
       mse,
       100},
      {"more samples than stages", {11, 3, 8}, {24, 8, 1}, {24, 8, 1}, true, ssim},
  };
}

struct MapStatistics {
  double mean, variance;
};

inline double reference_similarity(ccp::SimilarityKind kind, const MapStatistics& a,
                                   const MapStatistics& b, double covariance) {
  const double distance = a.mean - b.mean;
  const double error = a.variance + b.variance - 2 * covariance + distance * distance;
  switch (kind) {
    case ccp::SimilarityKind::kSsim:
      return (2 * a.mean * b.mean + 1e-4) * (2 * covariance + 9e-4) /
             ((a.mean * a.mean + b.mean * b.mean + 1e-4) * (a.variance + b.variance + 9e-4));
    case ccp::SimilarityKind::kMse:
      return error;
    case ccp::SimilarityKind::kPsnr:
      return -10 * std::log10(std::max(error, 1e-6));
    case ccp::SimilarityKind::kCosine:
      return (covariance + a.mean * b.mean) /
             std::sqrt((a.variance + a.mean * a.mean) * (b.variance + b.mean * b.mean));
    default:
      return covariance / std::sqrt(a.variance * b.variance);
  }
}

// Values of one map.
template <class T>
std::vector<double> map_values(const MapCase& test, const std::vector<int64_t>& strides,
                               const std::vector<T>& data, int64_t sample, int64_t channel) {
  std::vector<int64_t> index(test.sizes.size());
  index[0] = sample;
  index[1] = channel;
  std::vector<double> values;
  for (;;) {
    int64_t offset = 0;
    for (size_t d = 0; d < index.size(); ++d) offset += index[d] * strides[d];
    values.push_back(ccp::widen(data[offset]));
    size_t d = index.size();
    while (d > 2 && ++index[d - 1] == test.sizes[d - 1]) index[--d] = 0;
    if (d == 2) return values;
  }
}

inline double mean_product(const std::vector<double>& a, const std::vector<double>& b,
                           double mean_a, double mean_b) {
  double sum = 0;
  for (size_t p = 0; p < a.size(); ++p) sum += (a[p] - mean_a) * (b[p] - mean_b);
  return sum / static_cast<double>(a.size());
}

inline MapStatistics statistics(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  const double mean = sum / static_cast<double>(values.size());
  return {mean, mean_product(values, values, mean, mean)};
}

// Runs run(params) and compares params.maps.out with the reference, in units of the result's size.
template <class T, class Acc, class Run>
void check_map_similarity(const MapCase& test, double tolerance, Run run) {
  const auto extent = [&](const std::vector<int64_t>& strides) {
    int64_t last = 0;
    for (size_t i = 0; i < strides.size(); ++i) last += (test.sizes[i] - 1) * strides[i];
    return last + 1;
  };
  std::mt19937 random(5);
  const auto values = [&](const std::vector<int64_t>& strides) {
    std::vector<T> data = random_values<T>(extent(strides), random);
    for (T& value : data) value = ccp::narrow<T>(static_cast<float>(ccp::widen(value)) + test.mean);
    return data;
  };
  const std::vector<T> x = values(test.x_strides);
  const std::vector<T> y = test.symmetric ? x : values(test.y_strides);
  const int64_t samples = test.sizes[0], channels = test.sizes[1];
  auto out = unwritten<Acc>(channels * channels);
  ccp::MapSimilarityParams params{{x.data(), test.symmetric ? x.data() : y.data(), out.data(), {}},
                                  test.symmetric,
                                  test.kind,
                                  1.0,
                                  false};
  expect(test.name + ": layout",
         ccp::make_layout(static_cast<int64_t>(test.sizes.size()), test.sizes.data(),
                          test.x_strides.data(), test.y_strides.data(), 1, &params.maps.layout));
  run(params);
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = 0; j < channels; ++j) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n) {
        const auto a = map_values(test, test.x_strides, x, n, i);
        const auto b = map_values(test, test.y_strides, y, n, j);
        const MapStatistics of_a = statistics(a), of_b = statistics(b);
        sum +=
            reference_similarity(test.kind, of_a, of_b, mean_product(a, b, of_a.mean, of_b.mean));
      }
      const double expected = sum / static_cast<double>(samples);
      const double actual = out[i * channels + j];
      if (std::fabs(actual - expected) <= tolerance * std::max(1.0, std::fabs(expected))) continue;
      ++failures;
      std::printf("%s: (%ld, %ld) is %.9g, expected %.9g\n", test.name.c_str(),
                  static_cast<long>(i), static_cast<long>(j), actual, expected);
    }
  }
}

}  // namespace testing
