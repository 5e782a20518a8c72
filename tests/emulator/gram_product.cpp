// The kernels with float32 sums. Arguments: number of schedules, and optionally a defect to plant:
// "drop-barrier" and which barrier of a kernel (1 is the first).
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/gram_product.cuh"
#include "weighted_gram_cases.h"

namespace {

using ccp::GramTiles;
using ccp::WeightedGramParams;
using testing::GramCase;

// Of parts of fewer rows than pay, which take less time to emulate.
constexpr GramTiles kSmallTiles{ccp::kSmallGramTile, ccp::kSmallGramTiles.blocks_at_once, 64};
constexpr GramTiles kLargeTiles{ccp::kLargeGramTile, ccp::kLargeGramTiles.blocks_at_once, 64};

struct Case {
  std::string name;
  std::vector<GramCase> layers;
  int64_t packed_layers;
  bool in_parts;
};

// What the launcher does, with emulated launches.
template <class T>
void run(const Case& test, const std::vector<WeightedGramParams>& layers, const GramTiles& tiles,
         unsigned seed) {
  ccp::GramLaunch launch =
      ccp::plan_weighted_grams(layers.data(), static_cast<int>(layers.size()), sizeof(T), tiles);
  int64_t packed_layers = 0;
  for (int i = 0; i < launch.layers; ++i) packed_layers += launch.layer[i].rows.data == nullptr;
  testing::expect(test.name + ": packed layers", packed_layers == test.packed_layers);
  testing::expect(test.name + ": parts", (launch.parts > 0) == test.in_parts);
  // Aligned as memory from the device is.
  std::vector<uint4> rows(launch.packed_rows * sizeof(T) / sizeof(uint4), {~0u, ~0u, ~0u, ~0u});
  auto weights = testing::unwritten<float>(launch.packed_weights);
  auto partial = testing::unwritten<float>(launch.parts * launch.tile * launch.tile);
  ccp::place_packed_copies(rows.data(), weights.data(), sizeof(T), launch);
  emu::launch(2, ccp::kBlockThreads, seed, ccp::pack_gram_rows<T>, launch,
              reinterpret_cast<T*>(rows.data()));
  emu::launch(2, ccp::kBlockThreads, seed, ccp::pack_gram_weights<>, launch, weights.data());
  const bool weighted = layers[0].sigma != nullptr;
  ccp::with_gram_product<T>(launch.tile, weighted, [&](auto kernel, auto traits) {
    using Traits = decltype(traits);
    constexpr int kTile = Traits::kTile;
    emu::launch(ccp::grid_size(launch.blocks), Traits::kThreads, seed, kernel, launch,
                partial.data());
    if (launch.parts > 0)
      emu::launch(ccp::grid_size(launch.split_tiles * (seed % 2 ? kTile / ccp::kGramSliceRows : 1)),
                  ccp::kBlockThreads, seed, ccp::add_gram_parts<float, kTile>, launch,
                  static_cast<const float*>(partial.data()));
  });
}

template <class T, class Sigma>
void check(const Case& test, const GramTiles& tiles, int schedules) {
  std::mt19937 random(11);
  std::vector<testing::GramTest<T, float, Sigma>> layers;
  for (const GramCase& layer : test.layers) layers.emplace_back(layer, random);
  for (int seed = 0; seed < schedules; ++seed) {
    std::vector<WeightedGramParams> params;
    for (auto& layer : layers) params.push_back(layer.restart());
    run<T>(test, params, tiles, seed);
    for (const auto& layer : layers) layer.compare(test.name);
  }
}

// In small tiles.
std::vector<Case> cases() {
  return {
      {"one small tile", {{8, 3, 1, true}}, 0, false},
      {"one row, whose stride is no whole unit", {{8, 1, 1, false, 1}}, 0, false},
      {"no weights", {{24, 75, 1, false}}, 0, false},
      {"odd channels", {{37, 70, 1, true}}, 1, false},
      {"a row that begins anywhere", {{16, 5, 1, true, 0, 1}}, 1, false},
      {"rows with gaps, several terms", {{72, 3, 5, true, 8}}, 0, false},
      {"terms first in memory", {{72, 3, 5, true, 0, 0, true, false}}, 1, false},
      {"several tiles", {{136, 65, 1, false, 0, 0, false, false}}, 0, false},
      {"in parts", {{72, 130, 1, true}}, 0, true},
      {"many layers",
       {{7, 10, 7, true}, {72, 4, 3, true}, {16, 130, 1, true}, {9, 8, 1, true}},
       2,
       true},
  };
}

std::vector<Case> large_cases() {
  return {
      {"one large tile", {{104, 20, 1, true}}, 0, false},
      {"several large tiles", {{264, 9, 1, false, 0, 0, false, false}}, 0, false},
      {"large tiles in parts", {{136, 130, 1, true}}, 0, true},
      {"small layers in large tiles",
       {{40, 9, 1, false}, {8, 3, 1, false}, {200, 8, 1, false}},
       0,
       false},
  };
}

// Whether copies and fragments meet every memory bank once.
template <class Traits>
void check_banks() {
  using Panel = typename Traits::Panel;
  constexpr bool kFloat = sizeof(typename Traits::T) == 4;
  alignas(128) static unsigned char panel[Traits::kPanelBytes];
  const auto at = [](unsigned row, unsigned unit) { return panel + Panel::unit(row, unit); };
  for (unsigned thread = 0; thread < Traits::kThreads; thread += 8)
    testing::expect("copies meet no bank twice", testing::on_all_banks([&](unsigned lane) {
                      return at((thread + lane) / Panel::kRowUnits,
                                (thread + lane) % Panel::kRowUnits);
                    }));
  // Eight rows of one unit for 16 bits, four of two for float32.
  constexpr unsigned kRows = kFloat ? 4 : 8;
  for (unsigned row = 0; row < Traits::kDepth; row += kRows)
    for (unsigned unit = 0; unit < Panel::kRowUnits; unit += 8 / kRows)
      testing::expect("fragments meet no bank twice", testing::on_all_banks([&](unsigned lane) {
                        return at(row + lane % kRows, unit + lane / kRows);
                      }));
}

template <class T>
void check_all(int schedules) {
  check_banks<ccp::GramProductTraits<T, ccp::kSmallGramTile, true>>();
  check_banks<ccp::GramProductTraits<T, ccp::kLargeGramTile, true>>();
  const Case long_rows{"the ring goes round", {{8, 300, 1, false}}, 0, false};
  check<T, float>(long_rows, ccp::kSmallGramTiles, schedules);
  check<T, float>(long_rows, ccp::kLargeGramTiles, schedules);
  for (const Case& test : cases()) check<T, float>(test, kSmallTiles, schedules);
  for (const Case& test : large_cases()) check<T, double>(test, kLargeTiles, schedules);
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  if (argc > 2 && std::string(argv[2]) == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  check_all<float>(schedules);
  check_all<ccp::BFloat16>(schedules);
#ifdef EMU_ALL_DTYPES
  check_all<ccp::Half>(schedules);
#endif
  return testing::report();
}
