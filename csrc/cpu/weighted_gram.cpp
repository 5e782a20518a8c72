#include "csrc/weighted_gram.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
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

// One layer's share of a block of rows. Panels and tiles are numbered through all layers, so that
// threads share out the work of all of them at once.
struct LayerBlock {
  const WeightedGramParams* params;
  int64_t depth;  // rows, at most kDepth
  int64_t panels, first_panel, first_tile;
  std::vector<double> weights;  // empty: all ones
};

struct RowBlock {
  std::vector<LayerBlock> layers;
  int64_t panels = 0, tiles = 0;
};

template <class Sigma>
void read_weights(const WeightedGramParams& params, int64_t begin, std::vector<double>& weights) {
  for (size_t d = 0; d < weights.size(); ++d) {
    const int64_t row = begin + static_cast<int64_t>(d);
    const int64_t n = row / params.terms, k = row % params.terms;
    weights[d] = static_cast<const Sigma*>(
        params.sigma)[n * params.sigma_sample_stride + k * params.sigma_term_stride];
  }
}

// Rows [begin, begin + kDepth) of the layers that have as many.
RowBlock row_block(const std::vector<WeightedGramParams>& layers, int64_t begin, int64_t width) {
  RowBlock block;
  for (const WeightedGramParams& params : layers) {
    const int64_t depth = std::min(kDepth, params.samples * params.terms - begin);
    if (depth <= 0) continue;
    const int64_t panels = ceil_div(params.channels, width);
    std::vector<double> weights(params.sigma ? depth : 0);
    const auto read = params.sigma_is_double ? read_weights<double> : read_weights<float>;
    read(params, begin, weights);
    block.layers.push_back({&params, depth, panels, block.panels, block.tiles, std::move(weights)});
    block.panels += panels;
    block.tiles += panels * (panels + 1) / 2;
  }
  return block;
}

// Calls f(layer, index within the layer) for the items [first, last), numbered from
// `layer.*start` on in each layer.
template <class F>
void for_each_item(const RowBlock& block, int64_t LayerBlock::* start, int64_t first, int64_t last,
                   F f) {
  auto next = std::partition_point(block.layers.begin(), block.layers.end(),
                                   [&](const LayerBlock& layer) { return layer.*start <= first; });
  for (int64_t item = first; item < last; ++item) {
    while (next != block.layers.end() && (*next).*start <= item) ++next;
    const LayerBlock& layer = *(next - 1);
    f(layer, item - layer.*start);
  }
}

template <class T, class Acc>
void run(const std::vector<WeightedGramParams>& layers) {
  const int64_t width = CCP_BEST_ISA(panel_width<Acc>)();
  const auto pack = CCP_BEST_ISA(pack_panel<T, Acc>);
  const auto add = CCP_BEST_ISA(add_tile<Acc>);
  const int64_t panel_size = kDepth * width;
  const int64_t pack_grain = std::max<int64_t>(1, kGrainProducts / 16 / panel_size);
  const int64_t tile_grain = std::max<int64_t>(1, kGrainProducts / (width * panel_size));
  int64_t rows = 0, panels = 0;
  bool weighted = false;
  for (const WeightedGramParams& params : layers) {
    rows = std::max(rows, params.samples * params.terms);
    panels += ceil_div(params.channels, width);
    weighted = weighted || params.sigma != nullptr;
  }
  std::vector<Acc> plain(panels * panel_size), scaled(weighted ? plain.size() : 0);
  for (int64_t begin = 0; begin < rows; begin += kDepth) {
    const RowBlock block = row_block(layers, begin, width);
    const auto pack_one = [&](const LayerBlock& layer, int64_t panel) {
      const int64_t offset = (layer.first_panel + panel) * panel_size;
      pack(*layer.params, layer.weights.empty() ? nullptr : layer.weights.data(), begin,
           layer.depth, panel, plain.data() + offset, scaled.data() + offset);
    };
    torch::stable::parallel_for(0, block.panels, pack_grain, [&](int64_t first, int64_t last) {
      for_each_item(block, &LayerBlock::first_panel, first, last, pack_one);
    });
    const auto add_one = [&](const LayerBlock& layer, int64_t index) {
      const TileIndex tile = upper_tile(index);
      const Acc* right = plain.data() + layer.first_panel * panel_size;
      const Acc* left = layer.weights.empty() ? right : scaled.data() + (right - plain.data());
      const WeightedGramParams& params = *layer.params;
      add(static_cast<Acc*>(params.S), params.S_stride, params.channels, params.channels, true,
          left + tile.row * panel_size, right + tile.column * panel_size, layer.depth, tile);
    };
    torch::stable::parallel_for(0, block.tiles, tile_grain, [&](int64_t first, int64_t last) {
      for_each_item(block, &LayerBlock::first_tile, first, last, add_one);
    });
  }
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
