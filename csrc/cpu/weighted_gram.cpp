#include "weighted_gram.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "dispatch.h"

#define CCP_KERNELS "cpu/weighted_gram_kernels.h"
#include "cpu/for_each_isa.h"

namespace ccp::cpu {
namespace {

constexpr int64_t kDepth = 128;  // rows of a per block: two packed panels fit in the first cache
constexpr int64_t kGrainProducts = 1 << 18;  // fewer are not worth a thread of their own

struct TileIndex {
  int64_t row, column;
};

// The index-th tile of the upper triangle, counted down the columns: (0,0), (0,1), (1,1), (0,2) ...
TileIndex upper_tile(int64_t index) {
  auto column = static_cast<int64_t>((std::sqrt(8.0 * index + 1) - 1) / 2);
  while (column * (column + 1) / 2 > index) --column;
  while ((column + 1) * (column + 2) / 2 <= index) ++column;
  return {index - column * (column + 1) / 2, column};
}

template <class Sigma>
void read_weights(const WeightedGramParams& params, int64_t begin, int64_t depth, double* weights) {
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t n = (begin + d) / params.terms, k = (begin + d) % params.terms;
    weights[d] = static_cast<const Sigma*>(
        params.sigma)[n * params.sigma_sample_stride + k * params.sigma_term_stride];
  }
}

template <class T, class Acc>
void run(const WeightedGramParams& params, bool sigma_is_double) {
  const int64_t width = CCP_BEST_ISA(panel_width<Acc>)();
  const auto pack = CCP_BEST_ISA(pack_panel<T, Acc>);
  const auto add = CCP_BEST_ISA(add_tile<Acc>);
  const int64_t panels = ceil_div(params.channels, width);
  const int64_t panel_size = kDepth * width, tile_products = width * panel_size;
  const bool weighted = params.sigma != nullptr;
  std::vector<Acc> right(panels * panel_size), left(weighted ? right.size() : 0);
  const int64_t rows = params.samples * params.terms;
  for (int64_t begin = 0; begin < rows; begin += kDepth) {
    const int64_t depth = std::min(kDepth, rows - begin);
    double weights[kDepth];
    if (weighted) {
      (sigma_is_double ? read_weights<double> : read_weights<float>)(params, begin, depth, weights);
    }
    const int64_t pack_grain = std::max<int64_t>(1, kGrainProducts / 16 / panel_size);
    torch::stable::parallel_for(0, panels, pack_grain, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel)
        pack(params, weighted ? weights : nullptr, begin, depth, panel,
             right.data() + panel * panel_size, left.data() + panel * panel_size);
    });
    const Acc* left_panels = weighted ? left.data() : right.data();
    const int64_t tile_grain = std::max<int64_t>(1, kGrainProducts / tile_products);
    const int64_t tiles = panels * (panels + 1) / 2;
    torch::stable::parallel_for(0, tiles, tile_grain, [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; ++index) {
        const auto [I, J] = upper_tile(index);
        add(params, left_panels + I * panel_size, right.data() + J * panel_size, depth, I, J);
      }
    });
  }
}

void weighted_gram(const Tensor& S, const Tensor& a, const std::optional<Tensor>& sigma) {
  check_weighted_gram(S, a, sigma);
  if (a.numel() == 0) return;
  const WeightedGramParams params = weighted_gram_params(S, a, sigma);
  const bool sigma_is_double = sigma && sigma->scalar_type() == ScalarType::Double;
  dispatch_floating(a.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (S.scalar_type() == ScalarType::Float) return run<T, float>(params, sigma_is_double);
    }
    run<T, double>(params, sigma_is_double);
  });
}

}  // namespace
}  // namespace ccp::cpu

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CPU, m) {
  m.impl("weighted_gram_", TORCH_BOX(&ccp::cpu::weighted_gram));
}
