// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which
// barrier of a kernel (1 is the first).
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/map_similarity.cuh"
#include "map_similarity_cases.h"

namespace {

using ccp::MapSimilarityParams;
using testing::MapCase;

template <class T>
std::vector<ccp::MapTerms<float>> moments(const MapSimilarityParams& params, ccp::MapSide side,
                                          unsigned seed) {
  const auto& layout = params.maps.layout;
  const ccp::MapMomentsLaunch launch = ccp::plan_map_moments(params, sizeof(T));
  std::vector<ccp::MapTerms<float>> terms(layout.sample.size * layout.channel.size);
  ccp::with_map_moments_kernel<T>(layout.kind, launch, [&](auto kernel) {
    emu::launch(std::min(launch.grid, 2u), ccp::kBlockThreads, seed, kernel, params, launch, side,
                terms.data());
  });
  return terms;
}

// What the launcher does, with emulated launches.
template <class T>
void run(const MapSimilarityParams& params, unsigned seed) {
  const auto x_terms = moments<T>(params, ccp::left_side(params), seed);
  const auto y_terms =
      params.symmetric ? x_terms : moments<T>(params, ccp::right_side(params), seed);
  ccp::MapSimilarityLaunch launch = ccp::plan_map_similarity(params, sizeof(T));
  auto partial = testing::unwritten<float>(launch.blocks * ccp::kMapTile * ccp::kMapTile);
  ccp::with_map_similarity_kernel<T>(launch.loads, [&](auto kernel) {
    const unsigned grid = seed % 2 == 0 ? std::min(launch.grid, 2u) : launch.grid;
    emu::launch(grid, ccp::kMapThreads, seed, kernel, params, launch, x_terms.data(),
                y_terms.data(), partial.data());
  });
  emu::launch(2, ccp::kBlockThreads, seed, ccp::mean_of_map_parts<>, params, launch,
              static_cast<const float*>(partial.data()));
}

template <class T>
void check(const MapCase& test, int schedules) {
  for (int seed = 0; seed < schedules; ++seed)
    testing::check_map_similarity<T, float>(
        test, 2e-6, [&](const MapSimilarityParams& params) { run<T>(params, seed); });
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  if (argc > 2 && std::string(argv[2]) == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  for (const MapCase& test : testing::map_similarity_cases()) {
    check<float>(test, schedules);
    check<ccp::BFloat16>(test, schedules);
#ifdef EMU_ALL_DTYPES
    check<ccp::Half>(test, schedules);
#endif
  }
  return testing::report();
}
