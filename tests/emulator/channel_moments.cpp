// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which
// barrier of a kernel (1 is the first).
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "channel_moments_cases.h"
#include "csrc/cuda/channel_moments.cuh"

namespace {

// What the launcher does, with emulated launches.
template <class T>
void run(const ccp::ChannelMomentsParams& params, unsigned seed) {
  const ccp::ChannelMomentsLaunch launch = ccp::plan_channel_moments(params, sizeof(T));
  const int64_t channels = params.layout.channel.size;
  auto parts = testing::unwritten<double>(launch.split.count * ccp::kMomentRows * channels);
  const unsigned grid = seed % 2 == 0 ? std::min(launch.grid, 2u) : launch.grid;
  ccp::with_channel_moments_kernel<T>(launch, [&](auto kernel) {
    emu::launch(grid, ccp::kBlockThreads, seed, kernel, params, launch, parts.data());
  });
  emu::launch(1, ccp::kBlockThreads, seed, ccp::finish_channel_moments<>,
              static_cast<const double*>(parts.data()), launch.split.count, channels, params.out);
}

template <class T>
void check(const testing::MomentsCase& test, int schedules) {
  for (int seed = 0; seed < schedules; ++seed)
    testing::check_channel_moments<T>(
        test, [&](const ccp::ChannelMomentsParams& params) { run<T>(params, seed); });
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  if (argc > 2 && std::string(argv[2]) == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  for (const testing::MomentsCase& test : testing::channel_moments_cases()) {
    check<float>(test, schedules);
    check<ccp::BFloat16>(test, schedules);
#ifdef EMU_ALL_DTYPES
    check<double>(test, schedules);
    check<ccp::Half>(test, schedules);
#endif
  }
  return testing::report();
}
