#include "csrc/weighted_gram.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
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
void read_weights(const WeightedGramParams& params, int64_t begin, std::vector<double>& weights) {
  for (size_t d = 0; d < weights.size(); ++d) {
    const int64_t row = begin + static_cast<int64_t>(d);
    const int64_t n = row / params.terms, k = row % params.terms;
    weights[d] = static_cast<const Sigma*>(
        params.sigma)[n * params.sigma_sample_stride + k * params.sigma_term_stride];
  }
}

// Two blocks of panels of up to kDepth rows: as they are, and times the weights.
template <class Acc>
struct PackedRows {
  PackedRows(int64_t panels, bool weighted)
      : panel_size(kDepth * CCP_BEST_ISA(panel_width<Acc>)()),
        plain(new Acc[panels * panel_size]),
        scaled(weighted ? new Acc[panels * panel_size] : nullptr) {}

  int64_t panel_size;
  std::unique_ptr<Acc[]> plain, scaled;
};

// Adds to tiles [first, last) of one layer, for which the panels are packed here: that is little
// beside the products, and no thread waits for another.
template <class T, class Acc>
void add_tiles(const WeightedGramParams& params, int64_t first, int64_t last,
               const PackedRows<Acc>& packed) {
  const auto pack = CCP_BEST_ISA(pack_panel<T, Acc>);
  const auto add = CCP_BEST_ISA(add_tile<Acc>);
  const TileIndex begin_tile = upper_tile(first), end_tile = upper_tile(last - 1);
  const int64_t first_panel = begin_tile.column == end_tile.column ? begin_tile.row : 0;
  const auto read = params.sigma_is_double ? read_weights<double> : read_weights<float>;
  const int64_t rows = params.samples * params.terms;
  for (int64_t begin = 0; begin < rows; begin += kDepth) {
    const int64_t depth = std::min(kDepth, rows - begin);
    std::vector<double> weights(params.sigma ? depth : 0);
    read(params, begin, weights);
    const auto pack_one = [&](int64_t panel) {
      const int64_t offset = panel * packed.panel_size;
      pack(params, params.sigma ? weights.data() : nullptr, begin, depth, panel,
           packed.plain.get() + offset, params.sigma ? packed.scaled.get() + offset : nullptr);
    };
    for (int64_t panel = first_panel; panel <= end_tile.column; ++panel) pack_one(panel);
    const Acc* right = packed.plain.get();
    const Acc* left = params.sigma ? packed.scaled.get() : right;
    for (int64_t index = first; index < last; ++index) {
      const TileIndex tile = upper_tile(index);
      add(static_cast<Acc*>(params.S), params.S_stride, params.channels, params.channels, true,
          left + tile.row * packed.panel_size, right + tile.column * packed.panel_size, depth,
          tile);
    }
  }
}

// The tiles are numbered through all layers, so that threads share out the work of all at once.
template <class T, class Acc>
void run(const std::vector<WeightedGramParams>& layers) {
  const int64_t width = CCP_BEST_ISA(panel_width<Acc>)();
  std::vector<int64_t> first_tile{0};
  int64_t most_rows = 1, most_panels = 0;
  bool weighted = false;
  for (const WeightedGramParams& params : layers) {
    const int64_t panels = ceil_div(params.channels, width);
    first_tile.push_back(first_tile.back() + panels * (panels + 1) / 2);
    most_rows = std::max(most_rows, params.samples * params.terms);
    most_panels = std::max(most_panels, panels);
    weighted = weighted || params.sigma != nullptr;
  }
  const int64_t grain = std::max<int64_t>(1, kGrainProducts / (width * width * most_rows));
  torch::stable::parallel_for(0, first_tile.back(), grain, [&](int64_t begin, int64_t end) {
    const PackedRows<Acc> packed(most_panels, weighted);
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      const int64_t first = std::max(begin, first_tile[layer]) - first_tile[layer];
      const int64_t last = std::min(end, first_tile[layer + 1]) - first_tile[layer];
      if (first < last) add_tiles<T, Acc>(layers[layer], first, last, packed);
    }
  });
}

void add_grams(const GramArguments& call) {
  check_weighted_grams(call);
  const std::vector<WeightedGramParams> layers = weighted_gram_layers(call);
  if (layers.empty()) return;
  dispatch_floating(call.a[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (call.S[0].scalar_type() == ScalarType::Float) return run<T, float>(layers);
    }
    run<T, double>(layers);
  });
}

void weighted_gram_(const Tensor& S, const Tensor& a, const std::optional<Tensor>& sigma) {
  add_grams(single_gram(S, a, sigma));
}

void weighted_grams_(const std::vector<Tensor>& S, const std::vector<Tensor>& a,
                     const std::optional<std::vector<Tensor>>& sigma) {
  add_grams(grouped_grams(S, a, sigma));
}

}  // namespace
}  // namespace ccp::cpu

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CPU, m) {
  m.impl("weighted_gram_", TORCH_BOX(&ccp::cpu::weighted_gram_));
  m.impl("weighted_grams_", TORCH_BOX(&ccp::cpu::weighted_grams_));
}
