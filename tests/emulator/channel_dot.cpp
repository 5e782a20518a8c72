// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which barrier
// of a kernel (1 is the first), or "overrun".
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/channel_dot.cuh"
#include "testing.h"

namespace {

using ccp::ChannelDotLaunch;
using ccp::ChannelDotParams;

struct Case {
  std::string name;
  std::vector<int64_t> sizes, x_strides, g_strides;
  int64_t channel_dim;
  int64_t misalignment = 0;  // elements by which x and g begin after a 16-byte boundary
};

int64_t extent(const Case& test, const std::vector<int64_t>& strides) {
  int64_t last = test.misalignment;
  for (size_t i = 0; i < strides.size(); ++i) last += (test.sizes[i] - 1) * strides[i];
  return last + 1;
}

// What the launcher does, with emulated launches.
template <class T>
std::vector<ccp::Accumulator<T>> run(const ChannelDotParams& params, ChannelDotLaunch launch,
                                     unsigned seed) {
  using Acc = ccp::Accumulator<T>;
  const int64_t outputs = params.layout.sample.size * params.layout.channel.size;
  auto sums = testing::unwritten<Acc>(launch.split.count * outputs);
  ccp::with_channel_dot_kernel<T>(params.layout.kind, launch, [&](auto kernel) {
    emu::launch(launch.grid, ccp::kBlockThreads, seed, kernel, params, launch, sums.data());
  });
  if (launch.split.count == 1) return sums;
  auto out = testing::unwritten<Acc>(outputs);
  emu::launch(2, ccp::kBlockThreads, seed, ccp::sum_parts<Acc>, sums.data(), launch.split.count,
              outputs, out.data());
  return out;
}

struct Reference {
  std::vector<double> sum, magnitude;
};

template <class T>
Reference reference(const Case& test, const T* x, const T* g) {
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

template <class T>
void check(const Case& test, int schedules, bool overrun) {
  std::mt19937 random(7);
  const auto x = testing::random_values<T>(extent(test, test.x_strides), random);
  const auto g = testing::random_values<T>(extent(test, test.g_strides), random);
  ChannelDotParams params{x.data() + test.misalignment, g.data() + test.misalignment, nullptr, {}};
  testing::expect(test.name + ": layout",
                  ccp::make_layout(static_cast<int64_t>(test.sizes.size()), test.sizes.data(),
                                   test.x_strides.data(), test.g_strides.data(), test.channel_dim,
                                   &params.layout));
  if (overrun) ++params.layout.sample.size;
  const ChannelDotLaunch launch = ccp::plan_channel_dot(params, sizeof(T));
  const Reference expected =
      reference(test, x.data() + test.misalignment, g.data() + test.misalignment);
  for (int seed = 0; seed < schedules; ++seed) {
    ChannelDotLaunch shuffled = launch;
    if (seed % 2 == 0) shuffled.grid = std::min(launch.grid, 2u);  // blocks take several turns
    const auto actual = run<T>(params, shuffled, seed);
    for (size_t i = 0; i < expected.sum.size(); ++i)
      testing::expect_close(test.name, static_cast<int64_t>(i), actual[i], expected.sum[i],
                            expected.magnitude[i]);
  }
}

std::vector<Case> cases() {
  return {
      {"eight threads a row, 16-byte loads", {2, 3, 8, 8}, {192, 64, 8, 1}, {192, 64, 8, 1}, 1},
      {"eight threads a row, odd length", {3, 13, 7, 7}, {637, 49, 7, 1}, {637, 49, 7, 1}, 1},
      {"misaligned rows", {2, 3, 64}, {192, 64, 1}, {192, 64, 1}, 1, 1},
      {"a slice of the channels", {2, 3, 40}, {400, 40, 1}, {120, 40, 1}, 1},
      {"a warp a row", {1, 9, 1056}, {9504, 1056, 1}, {9504, 1056, 1}, 1},
      {"a block a row", {1, 2, 2061}, {4122, 2061, 1}, {4122, 2061, 1}, 1},
      {"rows in parts", {1, 1, 33000}, {33000, 33000, 1}, {33000, 33000, 1}, 1},
      {"channels last, 16-byte loads", {2, 16, 5, 5}, {400, 1, 80, 16}, {400, 1, 80, 16}, 1},
      {"channels last, odd channels", {2, 13, 37}, {481, 1, 13}, {481, 1, 13}, 1},
      {"channels last, several tiles", {2, 11, 264}, {2904, 264, 1}, {2904, 264, 1}, 2},
      {"channels last in parts", {1, 8, 9000}, {72000, 1, 8}, {72000, 1, 8}, 1},
      {"channels last, g the same everywhere", {2, 8, 50}, {400, 1, 8}, {8, 1, 0}, 1},
      {"no positions dimension", {3, 300}, {300, 1}, {300, 1}, 1},
      {"cropped", {2, 3, 5, 6}, {210, 70, 10, 1}, {210, 70, 10, 1}, 1},
      {"rows against channels last", {2, 5, 9, 4}, {180, 36, 4, 1}, {180, 1, 20, 5}, 1},
      {"g expanded", {2, 5, 9, 4}, {180, 36, 4, 1}, {0, 0, 0, 0}, 1},
      {"transposed positions, in parts", {1, 1, 70, 70}, {4900, 4900, 70, 1},
       {4900, 4900, 1, 70}, 1},
  };
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  const std::string defect = argc > 2 ? argv[2] : "";
  if (defect == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  for (const Case& test : cases()) {
    check<float>(test, schedules, defect == "overrun");
    check<ccp::BFloat16>(test, schedules, defect == "overrun");
#ifdef EMU_ALL_DTYPES
    check<double>(test, schedules, false);
    check<ccp::Half>(test, schedules, false);
#endif
  }
  return testing::report();
}
