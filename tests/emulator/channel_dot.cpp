// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which
// barrier of a kernel (1 is the first), or "overrun".
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "channel_dot_cases.h"
#include "csrc/cuda/channel_dot.cuh"
#include "testing.h"

namespace {

using ccp::ChannelDotLaunch;
using ccp::ChannelDotParams;
using testing::Case;
using testing::extent;
using testing::Reference;

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
  emu::launch(1, ccp::kBlockThreads, seed, ccp::sum_parts<Acc>, sums.data(), launch.split.count,
              outputs, out.data());
  return out;
}

// A group takes more than one turn only if there are very many rows; here, if the launch allows it.
ChannelDotLaunch with_turns(ChannelDotLaunch launch, int turns) {
  const bool evenly_apart = launch.vector > 1 && launch.row.outer.size == 1;
  if (!evenly_apart || launch.row.threads > 32) return launch;
  launch.row.turns = turns;
  launch.row.blocks = ccp::ceil_div(launch.row.blocks, turns);
  launch.blocks = launch.row.blocks * launch.split.count;
  launch.grid = ccp::grid_size(launch.blocks);
  return launch;
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
  const Reference expected = testing::channel_dot_reference(test, x.data() + test.misalignment,
                                                            g.data() + test.misalignment);
  for (int seed = 0; seed < schedules; ++seed) {
    ChannelDotLaunch shuffled = seed % 2 == 1 ? with_turns(launch, 2) : launch;
    if (seed % 2 == 0) shuffled.grid = std::min(launch.grid, 2u);  // blocks take several turns
    const auto actual = run<T>(params, shuffled, seed);
    for (size_t i = 0; i < expected.sum.size(); ++i)
      testing::expect_close(test.name, static_cast<int64_t>(i), actual[i], expected.sum[i],
                            expected.magnitude[i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  const std::string defect = argc > 2 ? argv[2] : "";
  if (defect == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  for (const Case& test : testing::channel_dot_cases()) {
    check<float>(test, schedules, defect == "overrun");
    check<ccp::BFloat16>(test, schedules, defect == "overrun");
#ifdef EMU_ALL_DTYPES
    check<double>(test, schedules, false);
    check<ccp::Half>(test, schedules, false);
#endif
  }
  return testing::report();
}
