#include "csrc/weighted_gram.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/dispatch.h"
#include "csrc/triangle.h"

#define CCP_KERNELS "csrc/cpu/weighted_gram_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace ccp::cpu {
namespace {

constexpr int64_t kDepth = 128;  // rows of a per block: two packed panels fit in the first cache
constexpr int64_t kGrainProducts = 1 << 20;  // fewer are not worth a thread of their own

template <class Sigma>
void read_weights(const WeightedGramParams& params, int64_t begin, int64_t depth, double* weights) {
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t n = (begin + d) / params.terms, k = (begin + d) % params.terms;
    weights[d] = static_cast<const Sigma*>(
        params.sigma)[n * params.sigma_sample_stride + k * params.sigma_term_stride];
  }
}

template <class T, class Acc>
void run(const WeightedGramParams& params) {
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
      const auto read = params.sigma_is_double ? read_weights<double> : read_weights<float>;
      read(params, begin, depth, weights);
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
        const TileIndex tile = upper_tile(index);
        add(params, left_panels + tile.row * panel_size, right.data() + tile.column * panel_size,
            depth, tile);
      }
    });
  }
}

void weighted_gram_(const Tensor& S, const Tensor& a, const std::optional<Tensor>& sigma) {
  check_weighted_gram(S, a, sigma);
  if (a.numel() == 0) return;
  const WeightedGramParams params = weighted_gram_params(S, a, sigma);
  dispatch_floating(a.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (S.scalar_type() == ScalarType::Float) return run<T, float>(params);
    }
    run<T, double>(params);
  });
}

}  // namespace
}  // namespace ccp::cpu

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CPU, m) {
  m.impl("weighted_gram_", TORCH_BOX(&ccp::cpu::weighted_gram_));
}
