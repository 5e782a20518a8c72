// The kernel with float64 sums. Arguments: number of schedules, and optionally a defect to plant:
// "drop-barrier" and which barrier of a kernel (1 is the first).
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/weighted_gram.cuh"
#include "weighted_gram_cases.h"

namespace {

using ccp::WeightedGramParams;
using testing::GramCase;

struct Case {
  std::string name;
  std::vector<GramCase> layers;
};

// What the launcher does, with emulated launches.
template <class T>
void run(const std::vector<WeightedGramParams>& layers, unsigned seed) {
  using Traits = ccp::GramTraits<T>;
  constexpr int kTile = ccp::kSmallGramTile;
  const auto launch = ccp::plan_weighted_grams(layers.data(), static_cast<int>(layers.size()),
                                               sizeof(T), ccp::kDoubleGramTiles);
  auto partial = testing::unwritten<double>(launch.parts * kTile * kTile);
  // Every other time the blocks take several turns.
  const auto grid = [&](int64_t blocks) { return ccp::grid_size(seed % 2 ? blocks : 2); };
  emu::launch(grid(launch.blocks), Traits::kThreads, seed, ccp::weighted_grams<Traits>, launch,
              partial.data());
  if (launch.parts > 0)
    emu::launch(grid(launch.split_tiles * (kTile / ccp::kGramSliceRows)), ccp::kBlockThreads, seed,
                ccp::add_gram_parts<double, kTile>, launch,
                static_cast<const double*>(partial.data()));
}

template <class T, class Sigma>
void check(const Case& test, int schedules) {
  std::mt19937 random(11);
  std::vector<testing::GramTest<T, double, Sigma>> layers;
  for (const GramCase& layer : test.layers) layers.emplace_back(layer, random);
  for (int seed = 0; seed < schedules; ++seed) {
    std::vector<WeightedGramParams> params;
    for (auto& layer : layers) params.push_back(layer.restart());
    run<T>(params, seed);
    for (const auto& layer : layers) layer.compare(test.name);
  }
}

std::vector<Case> cases() {
  return {
      {"one tile", {{5, 3, 1, true}}},
      {"no weights", {{16, 20, 1, false}}},
      {"several tiles, several terms", {{70, 3, 5, true}}},
      {"in parts", {{66, 150, 1, true}}},
      {"many layers", {{7, 10, 7, true}, {65, 4, 3, false}, {3, 130, 1, true}, {9, 8, 1, true}}},
  };
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  if (argc > 2 && std::string(argv[2]) == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  for (const Case& test : cases()) {
    check<float, double>(test, schedules);
    check<double, float>(test, schedules);
  }
  return testing::report();
}
