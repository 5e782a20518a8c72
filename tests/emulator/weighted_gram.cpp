// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which
// barrier of a kernel (1 is the first).
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/weighted_gram.cuh"
#include "testing.h"

namespace {

using ccp::WeightedGramParams;

struct Layer {
  int64_t channels, samples, terms;
  bool weighted;
};

struct Case {
  std::string name;
  std::vector<Layer> layers;
};

// What the launcher does, with emulated launches.
template <class T, class Acc>
void run(const std::vector<WeightedGramParams>& layers, unsigned seed) {
  using Traits = ccp::GramTraits<T, Acc>;
  const auto launch = ccp::plan_weighted_grams(layers.data(), static_cast<int>(layers.size()));
  auto partial = testing::unwritten<Acc>(launch.parts * ccp::kGramElements);
  // Every other time the blocks take several turns.
  const auto grid = [&](int64_t blocks) { return ccp::grid_size(seed % 2 ? blocks : 2); };
  emu::launch(grid(launch.blocks), Traits::kThreads, seed, ccp::weighted_grams<Traits>, launch,
              partial.data());
  if (launch.parts > 0)
    emu::launch(grid(launch.split_tiles), ccp::kBlockThreads, seed, ccp::add_gram_parts<Acc>,
                launch, partial.data());
}

// One layer's data, the S that it starts from and the one that it must become.
template <class T, class Acc, class Sigma>
class LayerTest {
 public:
  LayerTest(const Layer& layer, std::mt19937& random)
      : layer_(layer),
        rows_(layer.samples * layer.terms),
        S_stride_(layer.channels + 3),
        a_(testing::random_values<T>(rows_ * layer.channels, random)),
        sigma_(testing::random_values<Sigma>(rows_, random)),
        start_(testing::random_values<Acc>(S_stride_ * layer.channels, random)),
        S_(start_.size()) {}

  WeightedGramParams restart() {
    S_ = start_;
    const int64_t C = layer_.channels, terms = layer_.terms;
    return {S_.data(), a_.data(), layer_.weighted ? sigma_.data() : nullptr,
            is_double, C,         layer_.samples,
            terms,     S_stride_, terms * C,
            C,         1,         terms,
            1};
  }

  void compare(const std::string& name) const {
    const int64_t C = layer_.channels;
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t j = 0; j < S_stride_; ++j) {
        double sum = start_[i * S_stride_ + j], magnitude = std::fabs(sum);
        for (int64_t row = 0; j < C && row < rows_; ++row) {
          const double weight = layer_.weighted ? sigma_[row] : 1;
          const double term = weight * ccp::widen(a_[row * C + i]) * ccp::widen(a_[row * C + j]);
          sum += term;
          magnitude += std::fabs(term);
        }
        testing::expect_close(name, i * S_stride_ + j, S_[i * S_stride_ + j], sum, magnitude);
      }
    }
  }

 private:
  static constexpr bool is_double = std::is_same_v<Sigma, double>;
  Layer layer_;
  int64_t rows_, S_stride_;
  std::vector<T> a_;
  std::vector<Sigma> sigma_;
  std::vector<Acc> start_, S_;
};

template <class T, class Acc, class Sigma>
void check(const Case& test, int schedules) {
  std::mt19937 random(11);
  std::vector<LayerTest<T, Acc, Sigma>> layers;
  for (const Layer& layer : test.layers) layers.emplace_back(layer, random);
  for (int seed = 0; seed < schedules; ++seed) {
    std::vector<WeightedGramParams> params;
    for (auto& layer : layers) params.push_back(layer.restart());
    run<T, Acc>(params, seed);
    for (const auto& layer : layers) layer.compare(test.name);
  }
}

std::vector<Case> cases() {
  return {
      {"one tile", {{5, 3, 1, true}}},
      {"no weights", {{16, 20, 1, false}}},
      {"several tiles, several terms", {{70, 3, 5, true}}},
      {"in parts", {{66, 80, 1, true}}},
      {"many layers", {{7, 10, 7, true}, {65, 4, 3, false}, {3, 130, 1, true}, {9, 8, 1, true}}},
  };
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  if (argc > 2 && std::string(argv[2]) == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  for (const Case& test : cases()) {
    check<float, float, float>(test, schedules);
    check<float, double, double>(test, schedules);
    check<ccp::BFloat16, float, double>(test, schedules);
  }
  return testing::report();
}
