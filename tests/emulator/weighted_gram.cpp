// Arguments: number of schedules, and optionally a defect to plant: "drop-barrier" and which
// barrier of a kernel (1 is the first).
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/weighted_gram.cuh"
#include "testing.h"

namespace {

using ccp::WeightedGramLaunch;
using ccp::WeightedGramParams;

struct Case {
  std::string name;
  int64_t channels, samples, terms;
  bool weighted;
};

template <class T, class Acc>
void run(const WeightedGramParams& params, const WeightedGramLaunch& launch, unsigned seed) {
  const auto kernel = ccp::weighted_gram<ccp::GramTraits<T, Acc>>;
  const bool whole = launch.split.count == 1;
  auto partial =
      testing::unwritten<Acc>(whole ? 0 : launch.blocks * ccp::kGramTile * ccp::kGramTile);
  emu::launch(launch.grid, ccp::kBlockThreads, seed, kernel, params, launch,
              whole ? nullptr : partial.data());
  if (whole) return;
  emu::launch(3, ccp::kBlockThreads, seed, ccp::add_gram_parts<Acc>, params, launch,
              partial.data());
}

template <class T, class Acc, class Sigma>
void check(const Case& test, int schedules) {
  const int64_t C = test.channels, rows = test.samples * test.terms, S_stride = C + 3;
  std::mt19937 random(11);
  const auto a = testing::random_values<T>(rows * C, random);
  const auto sigma = testing::random_values<Sigma>(rows, random);
  const auto start = testing::random_values<Acc>(S_stride * C, random);
  for (int seed = 0; seed < schedules; ++seed) {
    std::vector<Acc> S = start;
    const bool is_double = std::is_same_v<Sigma, double>;
    const WeightedGramParams params{S.data(),   a.data(), test.weighted ? sigma.data() : nullptr,
                                    is_double,  C,        test.samples,
                                    test.terms, S_stride, test.terms * C,
                                    C,          1,        test.terms,
                                    1};
    WeightedGramLaunch launch = ccp::plan_weighted_gram(params);
    if (seed % 2 == 0) launch.grid = std::min(launch.grid, 2u);  // blocks take several turns
    run<T, Acc>(params, launch, seed);
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t j = 0; j < S_stride; ++j) {
        double sum = start[i * S_stride + j], magnitude = std::fabs(sum);
        for (int64_t row = 0; j < C && row < rows; ++row) {
          const double weight = test.weighted ? sigma[row] : 1;
          const double term = weight * ccp::widen(a[row * C + i]) * ccp::widen(a[row * C + j]);
          sum += term;
          magnitude += std::fabs(term);
        }
        testing::expect_close(test.name, i * S_stride + j, S[i * S_stride + j], sum, magnitude);
      }
    }
  }
}

std::vector<Case> cases() {
  return {
      {"one tile", 5, 3, 1, true},
      {"no weights", 16, 20, 1, false},
      {"several tiles, several terms", 70, 9, 5, true},
      {"in parts", 66, 150, 1, true},
      {"one tile in parts, several terms", 20, 50, 7, true},
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
