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

template <class T>
std::vector<T> centred_maps(const MapSimilarityParams& params, ccp::MapSide side,
                            const std::vector<ccp::MapTerms<float>>& terms, unsigned seed) {
  const int64_t padded = ccp::padded_positions(params.maps.layout, sizeof(T));
  std::vector<T> maps(terms.size() * padded);
  memset(maps.data(), 0xff, maps.size() * sizeof(T));
  emu::launch(2, ccp::kBlockThreads, seed, ccp::centre_maps<T>, params, side, terms.data(), padded,
              maps.data());
  return maps;
}

// What the launcher does, with emulated launches.
template <class T>
void run(MapSimilarityParams params, unsigned seed) {
  const auto x_terms = moments<T>(params, ccp::left_side(params), seed);
  const auto y_terms =
      params.symmetric ? x_terms : moments<T>(params, ccp::right_side(params), seed);
  const ccp::MapSimilarityLaunch launch = ccp::plan_map_similarity(params, sizeof(T));
  std::vector<T> x_maps, y_maps;
  if (launch.packed) {
    x_maps = centred_maps<T>(params, ccp::left_side(params), x_terms, seed);
    if (!params.symmetric)
      y_maps = centred_maps<T>(params, ccp::right_side(params), y_terms, seed);
    params = ccp::packed_maps(params, x_maps.data(),
                              params.symmetric ? x_maps.data() : y_maps.data(), sizeof(T));
  }
  auto partial = testing::unwritten<float>(launch.blocks * launch.tile * launch.tile);
  ccp::with_map_similarity_kernel<T>(launch, [&](auto kernel, auto traits) {
    const unsigned grid = seed % 2 == 0 ? std::min(launch.grid, 2u) : launch.grid;
    emu::launch(grid, decltype(traits)::kThreads, seed, kernel, params, launch, x_terms.data(),
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
