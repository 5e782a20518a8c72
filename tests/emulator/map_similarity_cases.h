// Inputs and reference of map_similarity, for the emulated and the CPU kernels' tests.
#pragma once

#include <cmath>
#include <string>
#include <utility>
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
  float mean = 0;             // added to all values
  int constant_channels = 0;  // the first ones
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
      {"constant maps", {2, 9, 40}, {360, 40, 1}, {360, 40, 1}, true, pearson, 100, 3},
  };
}

struct MapStatistics {
  double mean, variance;
};

// Of a map with itself: what the limit of the kinds' formulas is, also where they divide by zero.
inline double reference_self_similarity(ccp::SimilarityKind kind) {
  return kind == ccp::SimilarityKind::kMse ? 0 : kind == ccp::SimilarityKind::kPsnr ? 60 : 1;
}

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
      if (a.variance == 0 || b.variance == 0) return 0;
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

struct ReferenceMap {
  std::vector<double> values;
  MapStatistics statistics;
};

template <class T>
ReferenceMap reference_map(const MapCase& test, const std::vector<int64_t>& strides,
                           const std::vector<T>& data, int64_t sample, int64_t channel) {
  std::vector<double> values = map_values(test, strides, data, sample, channel);
  const MapStatistics of_values = statistics(values);
  return {std::move(values), of_values};
}

// [channels, channels], the mean over the samples.
template <class T>
std::vector<double> reference_similarities(const MapCase& test, const std::vector<T>& x,
                                           const std::vector<T>& y) {
  const int64_t samples = test.sizes[0], channels = test.sizes[1];
  std::vector<double> means(channels * channels);
  for (int64_t n = 0; n < samples; ++n) {
    std::vector<ReferenceMap> left, right;
    for (int64_t c = 0; c < channels; ++c) {
      left.push_back(reference_map(test, test.x_strides, x, n, c));
      right.push_back(reference_map(test, test.y_strides, y, n, c));
    }
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < channels; ++j) {
        const MapStatistics &a = left[i].statistics, &b = right[j].statistics;
        const double product = mean_product(left[i].values, right[j].values, a.mean, b.mean);
        means[i * channels + j] +=
            (test.symmetric && i == j ? reference_self_similarity(test.kind)
                                      : reference_similarity(test.kind, a, b, product)) /
            static_cast<double>(samples);
      }
    }
  }
  return means;
}

// Random values, those of the first channels constant.
template <class T>
std::vector<T> random_maps(const MapCase& test, const std::vector<int64_t>& strides,
                           std::mt19937& random) {
  int64_t last = 0;
  for (size_t i = 0; i < strides.size(); ++i) last += (test.sizes[i] - 1) * strides[i];
  std::vector<T> data = random_values<T>(last + 1, random);
  for (T& value : data) value = ccp::narrow<T>(static_cast<float>(ccp::widen(value)) + test.mean);
  for (int64_t i = 0; i <= last; ++i)
    if (i % strides[0] / strides[1] < test.constant_channels)
      data[i] = ccp::narrow<T>(test.mean + 0.1f);
  return data;
}

// Runs run(params) and compares params.maps.out with the reference, in units of the result's size.
template <class T, class Acc, class Run>
void check_map_similarity(const MapCase& test, double tolerance, Run run, bool allow_tf32 = false) {
  std::mt19937 random(5);
  const std::vector<T> x = random_maps<T>(test, test.x_strides, random);
  const std::vector<T> y = test.symmetric ? x : random_maps<T>(test, test.y_strides, random);
  const int64_t channels = test.sizes[1];
  auto out = unwritten<Acc>(channels * channels);
  ccp::MapSimilarityParams params{{x.data(), test.symmetric ? x.data() : y.data(), out.data(), {}},
                                  test.symmetric,
                                  test.kind,
                                  1.0,
                                  allow_tf32};
  expect(test.name + ": layout",
         ccp::make_layout(static_cast<int64_t>(test.sizes.size()), test.sizes.data(),
                          test.x_strides.data(), test.y_strides.data(), 1, &params.maps.layout));
  run(params);
  const std::vector<double> expected = reference_similarities(test, x, y);
  for (int64_t i = 0; i < channels * channels; ++i) {
    const double actual = out[i];
    if (std::fabs(actual - expected[i]) <= tolerance * std::max(1.0, std::fabs(expected[i])))
      continue;
    ++failures;
    std::printf("%s: (%ld, %ld) is %.9g, expected %.9g\n", test.name.c_str(),
                static_cast<long>(i / channels), static_cast<long>(i % channels), actual,
                expected[i]);
  }
}

}  // namespace testing
