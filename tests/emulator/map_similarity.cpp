// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which
// barrier of a kernel (1 is the first), or "drop-wait", a warpgroup of tall tiles and which of its
// waits for a stage.
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

constexpr ccp::MapDevice kDevice{227 << 10, false};

enum class Tiles { kPlanned, kLarge, kTall };

// By the launch arithmetic, or with tiles of this size and the samples in `parts` parts.
template <class T>
ccp::MapSimilarityLaunch plan(const MapSimilarityParams& params, Tiles tiles, int parts) {
  if (tiles == Tiles::kPlanned) return ccp::plan_map_similarity(params, sizeof(T), kDevice);
  const int64_t samples = params.maps.layout.sample.size;
  return ccp::plan_map_similarity(params, sizeof(T),
                                  tiles == Tiles::kTall
                                      ? ccp::tall_map_tiles(params, parts == 1)
                                      : ccp::map_tiles(ccp::kLargeMapTile, params),
                                  {parts, ccp::ceil_div(samples, parts)});
}

// What the launcher does, with emulated launches.
template <class T>
void run(MapSimilarityParams params, Tiles tiles, int parts, unsigned seed) {
  const auto x_terms = moments<T>(params, ccp::left_side(params), seed);
  const auto y_terms =
      params.symmetric ? x_terms : moments<T>(params, ccp::right_side(params), seed);
  const ccp::MapSimilarityLaunch launch = plan<T>(params, tiles, parts);
  std::vector<T> x_maps, y_maps;
  if (launch.packed) {
    x_maps = centred_maps<T>(params, ccp::left_side(params), x_terms, seed);
    if (!params.symmetric) y_maps = centred_maps<T>(params, ccp::right_side(params), y_terms, seed);
    params = ccp::packed_maps(params, x_maps.data(),
                              params.symmetric ? x_maps.data() : y_maps.data(), sizeof(T));
  }
  auto partial =
      testing::unwritten<float>(launch.split.count * launch.tiles * launch.rows * launch.tile);
  ccp::with_map_similarity_kernel<T>(launch, [&](auto kernel, int threads, int) {
    const bool all = launch.tall() || seed % 2 != 0;  // the blocks of threads that there may be
    emu::launch(all ? launch.grid : std::min(launch.grid, 2u), threads, seed, kernel, params,
                launch, x_terms.data(), y_terms.data(), partial.data());
  });
  emu::launch(2, ccp::kBlockThreads, seed, ccp::mean_of_map_parts<>, params, launch,
              static_cast<const float*>(partial.data()));
}

template <class T>
void check(const MapCase& test, Tiles tiles, int parts, unsigned seed) {
  testing::check_map_similarity<T, float>(
      test, 2e-6, [&](const MapSimilarityParams& params) { run<T>(params, tiles, parts, seed); });
}

void check_float(const MapCase& test, Tiles tiles, int parts, unsigned seed) {
  check<float>(test, tiles, parts, seed);
  testing::check_map_similarity<float, float>(
      test, testing::kTf32Tolerance,
      [&](const MapSimilarityParams& params) { run<float>(params, tiles, parts, seed); }, true);
}

void check_16_bits(const MapCase& test, Tiles tiles, int parts, unsigned seed) {
  check<ccp::BFloat16>(test, tiles, parts, seed);
#ifdef EMU_ALL_DTYPES
  check<ccp::Half>(test, tiles, parts, seed);
#endif
}

struct LargeCase {
  MapCase test;
  int parts;
};

std::vector<LargeCase> large_cases() {
  using ccp::SimilarityKind;
  const auto ssim = SimilarityKind::kSsim, mse = SimilarityKind::kMse;
  const auto psnr = SimilarityKind::kPsnr, cosine = SimilarityKind::kCosine;
  const auto pearson = SimilarityKind::kPearson;
  return {
      {{"large tiles, rows", {1, 130, 8, 8}, {8320, 64, 8, 1}, {8320, 64, 8, 1}, true, ssim}, 1},
      {{"large tiles, odd rows", {2, 130, 7, 7}, {6370, 49, 7, 1}, {6370, 49, 7, 1}, true, pearson},
       2},
      {{"large tiles, single numbers", {3, 257}, {257, 1}, {257, 1}, true, mse}, 2},
      {{"large tiles, channels last", {2, 136, 9}, {1224, 1, 136}, {1224, 1, 136}, true, mse}, 1},
      {{"large tiles, odd channels last", {1, 67, 9}, {603, 1, 67}, {603, 1, 67}, true, cosine}, 1},
      {{"large tiles, rows against slices", {2, 70, 16}, {1120, 16, 1}, {1330, 19, 1}, false, ssim},
       1},
      {{"large tiles, channels last against channels last",
        {1, 72, 37},
        {2664, 1, 72},
        {2960, 1, 80},
        false,
        cosine},
       1},
      {{"large tiles, constant maps",
        {3, 80, 16},
        {1280, 16, 1},
        {1280, 16, 1},
        true,
        pearson,
        100,
        2},
       1},
      {{"large tiles, more samples than stages", {11, 66, 8}, {528, 8, 1}, {528, 8, 1}, true, psnr},
       3},
  };
}

// Tall tiles: three blocks of columns, so that tiles meet the diagonal in either block of rows.
std::vector<LargeCase> tall_cases() {
  using ccp::SimilarityKind;
  const auto ssim = SimilarityKind::kSsim, mse = SimilarityKind::kMse;
  const auto psnr = SimilarityKind::kPsnr, cosine = SimilarityKind::kCosine;
  const auto pearson = SimilarityKind::kPearson;
  return {
      {{"tall tiles, rows", {2, 300, 40}, {12000, 40, 1}, {12000, 40, 1}, true, ssim}, 2},
      {{"tall tiles, odd rows", {7, 140, 35}, {4900, 35, 1}, {4900, 35, 1}, true, mse}, 1},
      {{"tall tiles, rows against odd slices",
        {1, 290, 24},
        {6960, 24, 1},
        {8990, 31, 1},
        false,
        psnr},
       1},
      {{"tall tiles, rows with a large mean",
        {2, 136, 72},
        {9792, 72, 1},
        {9792, 72, 1},
        true,
        pearson,
        100},
       1},
      {{"tall tiles, channels last", {2, 296, 36}, {10656, 1, 296}, {10656, 1, 296}, true, cosine},
       1},
      {{"tall tiles, channels last with a large mean",
        {3, 136, 70},
        {9520, 1, 136},
        {9520, 1, 136},
        true,
        ssim,
        100},
       1},
      {{"tall tiles, channels last against slices of channels last",
        {1, 264, 33},
        {8712, 1, 264},
        {8976, 1, 272},
        false,
        mse},
       1},
  };
}

void check_tall(unsigned seed) {
  for (const LargeCase& tall : tall_cases())
    check_16_bits(tall.test, Tiles::kTall, tall.parts, seed);
}

template <class Traits>
void check_banks() {
  alignas(128) static unsigned char
      panel[ccp::row_bytes<Traits>(Traits::kByPosition ? Traits::kDepth : Traits::kTile)];
  const auto at = [](int row, int unit) { return ccp::unit_address<Traits>(panel, row, unit); };
  for (int thread = 0; thread < Traits::kThreads; thread += 8)
    testing::expect("copies meet no bank twice", testing::on_all_banks([&](unsigned lane) {
                      const int index = thread + static_cast<int>(lane);
                      return at(index / Traits::kLoadedUnits, index % Traits::kLoadedUnits);
                    }));
  // Eight rows of one unit, or four positions of two units of float32.
  constexpr int kRows = Traits::kByPosition && sizeof(typename Traits::T) == 4 ? 4 : 8;
  for (int unit = 0; unit < Traits::kLoadedUnits; unit += 8 / kRows)
    testing::expect("fragments meet no bank twice", testing::on_all_banks([&](unsigned lane) {
                      return at(lane % kRows, unit + static_cast<int>(lane) / kRows);
                    }));
}

template <class T>
void check_banks_of() {
  using ccp::MapLoads, ccp::MapTraits;
  check_banks<MapTraits<T, MapLoads::kRows, ccp::kSmallMapTile>>();
  check_banks<MapTraits<T, MapLoads::kRows, ccp::kLargeMapTile>>();
  check_banks<MapTraits<T, MapLoads::kChannelsLast, ccp::kSmallMapTile>>();
  check_banks<MapTraits<T, MapLoads::kChannelsLast, ccp::kLargeMapTile>>();
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  if (argc > 2 && std::string(argv[2]) == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  const unsigned seed = schedules - 1;
  if (argc > 2 && std::string(argv[2]) == "drop-wait") {
    emu::dropped_wait_warpgroup = std::stoi(argv[3]);
    emu::dropped_wait = std::stoi(argv[4]);
    check_tall(seed);
    return testing::report();
  }
  check_banks_of<float>();
  check_banks_of<ccp::BFloat16>();
  for (int seed = 0; seed < schedules; ++seed) {
    for (const MapCase& test : testing::map_similarity_cases()) {
      check_float(test, Tiles::kPlanned, 0, seed);
      check_16_bits(test, Tiles::kPlanned, 0, seed);
    }
  }
  for (const LargeCase& large : large_cases()) {
    check_float(large.test, Tiles::kLarge, large.parts, seed);
    check_16_bits(large.test, Tiles::kLarge, large.parts, seed);
    check_16_bits(large.test, Tiles::kTall, large.parts, seed);
  }
  check_tall(seed);
  const MapCase longest{"large tiles, 28x28 maps", {1, 65, 784}, {50960, 784, 1},
                        {50960, 784, 1},           true,         ccp::SimilarityKind::kSsim};
  check<ccp::BFloat16>(longest, Tiles::kLarge, 1, seed);
  check<ccp::BFloat16>(longest, Tiles::kTall, 1, seed);
  return testing::report();
}
