// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which
// barrier of a kernel (1 is the first).
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/patch_correlation.cuh"
#include "patch_gram_cases.h"

namespace {

using ccp::CorrelationLaunch;
using ccp::CorrelationMaps;
using ccp::PatchPrecision;
using ccp::PatchProductParams;
using ccp::PatchSource;
using testing::PatchCase;
using testing::PatchTest;

unsigned grid(int64_t blocks, unsigned seed) {
  // Every other time the blocks take several turns.
  return ccp::grid_size(seed % 2 ? blocks : std::min<int64_t>(blocks, 2));
}

template <class T>
CorrelationMaps maps_of(const PatchProductParams& params, const PatchSource& source,
                        std::vector<T>& memory, unsigned seed) {
  if (ccp::readable_in_place(source, params.samples, sizeof(T))) return ccp::maps_in_place(source);
  const int64_t padded = ccp::padded_channels(source, sizeof(T));
  const int64_t positions = source.size[0] * source.size[1];
  memory.resize(params.samples * positions * params.groups * padded);
  memset(memory.data(), 0xff, memory.size() * sizeof(T));
  emu::launch(2, ccp::kBlockThreads, seed, ccp::pack_maps<T>, source, params.samples, params.groups,
              padded, memory.data());
  return ccp::packed_maps(source, params.groups, sizeof(T), memory.data());
}

template <class Traits>
void launch_all(const PatchProductParams& params, const CorrelationLaunch& launch, unsigned seed) {
  auto slots = testing::unwritten<float>(launch.slots() * launch.tile * launch.tile);
  emu::launch(grid(launch.blocks, seed), Traits::kThreads, seed, ccp::correlate_pieces<Traits>,
              launch, slots.data());
  emu::launch(2, ccp::kBlockThreads, seed, ccp::sum_correlation_slots<>, launch, Traits::kDepth,
              slots.data());
  emu::launch(grid(ccp::spread_blocks(params), seed), ccp::kSpreadThreads, seed,
              ccp::add_correlations<>, launch, params, Traits::kDepth,
              static_cast<const float*>(slots.data()));
}

// What the launcher does, with emulated launches.
template <class T, PatchPrecision kPrecision>
void run(const PatchProductParams& params, unsigned seed) {
  const ccp::PatchAxis axis[] = {ccp::patch_axis(params, 0), ccp::patch_axis(params, 1)};
  testing::expect("the window fits", ccp::fits_correlations(axis, params));
  CorrelationLaunch launch = ccp::plan_correlations(params, axis, ccp::kCorrelationDepth<T>);
  std::vector<T> left, right;
  launch.left = maps_of<T>(params, params.left, left, seed);
  launch.right = params.symmetric ? launch.left : maps_of<T>(params, params.right, right, seed);
  if (launch.tile == ccp::kLargeTile) {
    launch_all<ccp::CorrelationTraits<T, ccp::kLargeTile, kPrecision>>(params, launch, seed);
  } else {
    launch_all<ccp::CorrelationTraits<T, ccp::kSmallTile, kPrecision>>(params, launch, seed);
  }
}

template <class T, PatchPrecision kPrecision = PatchPrecision::kExact>
void check(const PatchCase& test, int schedules) {
  constexpr double kTolerance = testing::patch_tolerance<float>(kPrecision);
  for (const bool channels_last : {true, false})
    PatchTest<T>(test, channels_last)
        .template check<float>(schedules, kTolerance, run<T, kPrecision>);
}

template <class Traits>
void check_banks() {
  alignas(128) static unsigned char panel[Traits::kDepth * Traits::Panel::kRowUnits * 16];
  const auto at = [](unsigned row, unsigned unit) {
    return panel + Traits::Panel::unit(row, unit);
  };
  for (unsigned thread = 0; thread < Traits::kThreads; thread += 8)
    for (unsigned unit = 0; unit < Traits::Panel::kRowUnits; unit += Traits::kLanes)
      testing::expect("copies meet no bank twice", testing::on_all_banks([&](unsigned lane) {
                        return at((thread + lane) / Traits::kLanes,
                                  (thread + lane) % Traits::kLanes + unit);
                      }));
  // Eight rows of one unit for bfloat16, four of two for float32.
  constexpr unsigned kRows = sizeof(typename Traits::T) == 2 ? 8 : 4;
  for (unsigned row = 0; row < Traits::kDepth; row += kRows)
    for (unsigned unit = 0; unit < Traits::Panel::kRowUnits; unit += 8 / kRows)
      testing::expect("fragments meet no bank twice", testing::on_all_banks([&](unsigned lane) {
                        return at(row + lane % kRows, unit + lane / kRows);
                      }));
}

std::vector<PatchCase> cases() {
  return {
      {"several large tiles", 1, 152, 3, 4, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 0},
      {"packed, in several blocks", 4, 33, 9, 8, 1, {1, 3}, {1, 1}, {0, 1}, {1, 1}, 0},
      {"groups, strides, dilation", 2, 70, 5, 6, 2, {2, 2}, {2, 1}, {1, 0}, {1, 2}, 0},
      {"targets", 1, 40, 6, 5, 1, {3, 2}, {1, 2}, {1, 2}, {1, 1}, 35},
      {"targets of several large tiles", 1, 40, 3, 4, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 136},
  };
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  if (argc > 2 && std::string(argv[2]) == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  check_banks<ccp::CorrelationTraits<float, ccp::kSmallTile, PatchPrecision::kExact>>();
  check_banks<ccp::CorrelationTraits<float, ccp::kLargeTile, PatchPrecision::kExact>>();
  check_banks<ccp::CorrelationTraits<ccp::BFloat16, ccp::kSmallTile, PatchPrecision::kExact>>();
  check_banks<ccp::CorrelationTraits<ccp::BFloat16, ccp::kLargeTile, PatchPrecision::kExact>>();
  for (const PatchCase& test : cases()) {
    check<float>(test, schedules);
    check<float, PatchPrecision::kTf32>(test, 1);
    check<ccp::BFloat16>(test, schedules);
#ifdef EMU_ALL_DTYPES
    check<ccp::Half>(test, schedules);
#endif
  }
  return testing::report();
}
