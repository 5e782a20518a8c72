// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which
// barrier of a kernel (1 is the first).
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/patch_gram.cuh"
#include "patch_gram_cases.h"

namespace {

using ccp::PatchLaunch;
using ccp::PatchPrecision;
using ccp::PatchProductParams;
using testing::PatchCase;
using testing::PatchTest;

// What the launcher does, with emulated launches.
template <class Traits>
void run(const PatchProductParams& params, unsigned seed) {
  const PatchLaunch launch = ccp::plan_patch_product(params);
  // Every other time the blocks take several turns.
  const auto grid = [&](int64_t blocks) { return ccp::grid_size(seed % 2 ? blocks : 2); };
  auto partial = testing::unwritten<typename Traits::Acc>(launch.blocks * ccp::kPatchElements);
  emu::launch(grid(launch.blocks), Traits::kThreads, seed, ccp::patch_product<Traits>, params,
              launch, partial.data());
  if (launch.split.count > 1)
    emu::launch(grid(launch.tiles * params.groups), Traits::kThreads, seed,
                ccp::add_patch_parts<Traits>, params, launch, partial.data());
}

template <class T, class Acc, PatchPrecision kPrecision = PatchPrecision::kExact>
void check(const PatchCase& test, int schedules) {
  using ccp::PatchTraits;
  constexpr double kTolerance = testing::patch_tolerance<Acc>(kPrecision);
  PatchTest<T>(test, false)
      .template check<Acc>(schedules, kTolerance, run<PatchTraits<T, Acc, false, kPrecision>>);
  PatchTest<T>(test, true)
      .template check<Acc>(schedules, kTolerance, run<PatchTraits<T, Acc, true, kPrecision>>);
}

std::vector<PatchCase> cases() {
  return {
      {"one tile", 2, 3, 5, 4, 1, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0},
      {"several tiles", 1, 9, 6, 5, 1, {3, 3}, {2, 1}, {1, 0}, {1, 2}, 0},
      {"groups in parts", 2, 4, 17, 18, 2, {1, 2}, {1, 1}, {0, 1}, {1, 1}, 0},
      {"targets", 1, 7, 6, 5, 1, {3, 3}, {1, 2}, {1, 2}, {1, 1}, 11},
      {"targets of groups, in parts", 2, 4, 17, 17, 2, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 6},
  };
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  if (argc > 2 && std::string(argv[2]) == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  for (const PatchCase& test : cases()) {
    check<float, float>(test, schedules);
    check<float, float, PatchPrecision::kTf32>(test, 1);
    check<ccp::BFloat16, float>(test, schedules);
#ifdef EMU_ALL_DTYPES
    check<ccp::Half, float>(test, schedules);
    check<float, double>(test, schedules);
    check<double, double>(test, schedules);
#endif
  }
  return testing::report();
}
