// Inputs and reference of channel_dot, for the emulated and the CPU kernels' tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/math.h"

namespace testing {

struct Case {
  std::string name;
  std::vector<int64_t> sizes, x_strides, g_strides;
  int64_t channel_dim;
  int64_t misalignment = 0;  // elements by which x and g begin after a 16-byte boundary
};

// Elements from the first of the buffer to the last that the view holds.
inline int64_t extent(const Case& test, const std::vector<int64_t>& strides) {
  int64_t last = test.misalignment;
  for (size_t i = 0; i < strides.size(); ++i) last += (test.sizes[i] - 1) * strides[i];
  return last + 1;
}

struct Reference {
  std::vector<double> sum, magnitude;
};

template <class T>
Reference channel_dot_reference(const Case& test, const T* x, const T* g) {
  const int64_t channels = test.sizes[test.channel_dim];
  Reference result{std::vector<double>(test.sizes[0] * channels),
                   std::vector<double>(test.sizes[0] * channels)};
  std::vector<int64_t> index(test.sizes.size());
  for (;;) {
    int64_t x_offset = 0, g_offset = 0;
    for (size_t d = 0; d < index.size(); ++d) {
      x_offset += index[d] * test.x_strides[d];
      g_offset += index[d] * test.g_strides[d];
    }
    const double term = static_cast<double>(ccp::widen(x[x_offset])) * ccp::widen(g[g_offset]);
    const int64_t output = index[0] * channels + index[test.channel_dim];
    result.sum[output] += term;
    result.magnitude[output] += std::fabs(term);
    size_t d = index.size();
    while (d > 0 && ++index[d - 1] == test.sizes[d - 1]) index[--d] = 0;
    if (d == 0) return result;
  }
}

inline std::vector<Case> channel_dot_cases() {
  return {
      {"eight threads a row, 16-byte loads", {2, 3, 8, 8}, {192, 64, 8, 1}, {192, 64, 8, 1}, 1},
      {"eight threads a row, odd length", {3, 13, 7, 7}, {637, 49, 7, 1}, {637, 49, 7, 1}, 1},
      {"more rows than a block's turn", {3, 61, 7, 7}, {2989, 49, 7, 1}, {2989, 49, 7, 1}, 1},
      {"eight threads a row, two loads each", {2, 13, 117}, {1521, 117, 1}, {1521, 117, 1}, 1},
      {"eight threads a row, four loads each", {2, 5, 196}, {980, 196, 1}, {980, 196, 1}, 1},
      {"rows shorter than a load", {5, 31, 3}, {93, 3, 1}, {93, 3, 1}, 1},
      {"misaligned rows", {2, 3, 64}, {192, 64, 1}, {192, 64, 1}, 1, 1},
      {"misaligned rows of odd length", {2, 3, 51}, {153, 51, 1}, {153, 51, 1}, 1, 3},
      {"rows with odd gaps", {3, 5, 29}, {160, 31, 1}, {320, 63, 1}, 1},
      {"samples in the inner dimension", {5, 3, 29}, {29, 145, 1}, {29, 145, 1}, 1},
      {"x and g aligned otherwise", {3, 5, 29}, {160, 32, 1}, {145, 29, 1}, 1},
      {"one short row", {1, 1, 5}, {5, 5, 1}, {5, 5, 1}, 1, 6},
      {"the same rows of g for all samples", {3, 5, 56}, {280, 56, 1}, {0, 56, 1}, 1},
      {"a slice of the channels", {2, 3, 40}, {400, 40, 1}, {120, 40, 1}, 1},
      {"a warp a row", {1, 9, 1056}, {9504, 1056, 1}, {9504, 1056, 1}, 1},
      {"a block a row", {1, 2, 8201}, {16402, 8201, 1}, {16402, 8201, 1}, 1},
      {"eight threads a row, in parts", {2, 35, 256}, {8960, 256, 1}, {8960, 256, 1}, 1},
      {"eight threads a row of 16 bits, in parts",
       {2, 35, 512},
       {17920, 512, 1},
       {17920, 512, 1},
       1},
      {"a warp a row, in parts", {1, 9, 3003}, {27027, 3003, 1}, {27027, 3003, 1}, 1, 3},
      {"rows in parts", {1, 1, 33003}, {33003, 33003, 1}, {33003, 33003, 1}, 1, 5},
      {"channels last, 16-byte loads", {2, 16, 5, 5}, {400, 1, 80, 16}, {400, 1, 80, 16}, 1},
      {"channels last, odd channels", {2, 13, 37}, {481, 1, 13}, {481, 1, 13}, 1},
      {"channels last, several tiles", {2, 11, 264}, {2904, 264, 1}, {2904, 264, 1}, 2},
      {"channels last in parts", {1, 16, 9000}, {144000, 1, 16}, {144000, 1, 16}, 1},
      {"channels last, g the same everywhere", {2, 8, 50}, {400, 1, 8}, {8, 1, 0}, 1},
      {"no positions dimension", {3, 300}, {300, 1}, {300, 1}, 1},
      {"cropped", {2, 3, 5, 6}, {210, 70, 10, 1}, {210, 70, 10, 1}, 1},
      {"rows against channels last", {2, 5, 9, 4}, {180, 36, 4, 1}, {180, 1, 20, 5}, 1},
      {"g expanded", {2, 5, 9, 4}, {180, 36, 4, 1}, {0, 0, 0, 0}, 1},
      {"transposed positions, in parts",
       {1, 1, 70, 70},
       {4900, 4900, 70, 1},
       {4900, 4900, 1, 70},
       1},
  };
}

}  // namespace testing
