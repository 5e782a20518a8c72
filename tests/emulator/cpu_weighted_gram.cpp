// The CPU kernels of weighted_gram_, in every instruction set that this processor has.
#include <algorithm>

#include "csrc/cpu/isa.h"
#include "csrc/params.h"
#include "csrc/triangle.h"
#include "testing.h"

#define CCP_KERNELS "csrc/cpu/weighted_gram_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace {

using ccp::TileIndex;
using ccp::WeightedGramParams;

template <class Acc, class Pack, class Add>
void check_weighted_gram(const std::string& isa, int64_t width, Pack pack, Add add) {
  const int64_t C = 2 * width + 3, depth = 37, S_stride = C + 2, panels = 3;
  std::mt19937 random(11);
  const auto a = testing::random_values<float>(depth * C, random);
  const auto weights = testing::random_values<double>(depth, random);
  std::vector<Acc> S(S_stride * C), right(panels * depth * width), left(right.size());
  const WeightedGramParams params{
      S.data(), a.data(), weights.data(), true, C, depth, 1, S_stride, C, C, 1, 1, 1};
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t offset = panel * depth * width;
    pack(params, weights.data(), 0, depth, panel, right.data() + offset, left.data() + offset);
  }
  for (int64_t index = 0; index < panels * (panels + 1) / 2; ++index) {
    const TileIndex tile = ccp::upper_tile(index);
    add(S.data(), S_stride, C, C, true, left.data() + tile.row * depth * width,
        right.data() + tile.column * depth * width, depth, tile);
  }
  for (int64_t i = 0; i < C; ++i) {
    for (int64_t j = 0; j < C; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t d = 0; d < depth; ++d) {
        const double term = weights[d] * a[d * C + i] * a[d * C + j];
        sum += term;
        magnitude += std::fabs(term);
      }
      testing::expect_close(isa + ", weighted_gram_", i * C + j, S[i * S_stride + j], sum,
                            magnitude);
    }
  }
}

#define CHECK_ISA(isa)                                                                  \
  do {                                                                                  \
    using namespace ccp::cpu::isa;                                                      \
    std::printf("%s\n", #isa);                                                          \
    check_weighted_gram<float>(#isa, panel_width<float>(), pack_panel<float, float>,    \
                               add_tile<float>);                                        \
    check_weighted_gram<double>(#isa, panel_width<double>(), pack_panel<float, double>, \
                                add_tile<double>);                                      \
  } while (0)

}  // namespace

#include "cpu_main.h"
