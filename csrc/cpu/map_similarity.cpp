#include "csrc/map_similarity.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <memory>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/dispatch.h"
#include "csrc/triangle.h"

#define CCP_KERNELS "csrc/cpu/map_similarity_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace ccp::cpu {
namespace {

constexpr int64_t kBatchBytes = 4 << 20;     // of packed samples at a time
constexpr int64_t kTasks = 32;               // about as many sums of tiles go on side by side
constexpr int64_t kGrainProducts = 1 << 18;  // fewer are not worth a thread of their own

// The tiles of the result, and how the samples are split: part p sums samples p, p + parts, ...
// Functions of the shapes only, so that the number of threads does not change the result.
struct Plan {
  int64_t width, panels, tiles, parts, packed_size, batch;
};

template <class Acc>
Plan make_plan(const MapSimilarityParams& params) {
  const ChannelDotLayout& layout = params.maps.layout;
  Plan plan;
  plan.width = CCP_BEST_ISA(panel_width<Acc>)();
  plan.panels = ceil_div(layout.channel.size, plan.width);
  plan.tiles = params.symmetric ? plan.panels * (plan.panels + 1) / 2 : plan.panels * plan.panels;
  plan.parts = std::min(layout.sample.size, ceil_div(kTasks, plan.tiles));
  plan.packed_size = CCP_BEST_ISA(packed_size<Acc>)(layout.positions);
  const int64_t sample_bytes =
      plan.packed_size * plan.panels * (params.symmetric ? 1 : 2) * sizeof(Acc);
  plan.batch = std::min(layout.sample.size, std::max<int64_t>(1, kBatchBytes / sample_bytes));
  return plan;
}

TileIndex tile_at(const MapSimilarityParams& params, const Plan& plan, int64_t index) {
  return params.symmetric ? upper_tile(index) : TileIndex{index / plan.panels, index % plan.panels};
}

// out = the mean over all samples, of which each part holds a share.
template <class Acc>
void write_means(const MapSimilarityParams& params, const Plan& plan, const Acc* sums) {
  const int64_t channels = params.maps.layout.channel.size, area = plan.width * plan.width;
  const double samples = static_cast<double>(params.maps.layout.sample.size);
  Acc* out = static_cast<Acc*>(params.maps.out);
  for (int64_t index = 0; index < plan.tiles; ++index) {
    const TileIndex tile = tile_at(params, plan, index);
    for (int64_t e = 0; e < area; ++e) {
      const int64_t i = tile.row * plan.width + e / plan.width;
      const int64_t j = tile.column * plan.width + e % plan.width;
      if (i >= channels || j >= channels || (params.symmetric && i > j)) continue;
      double sum = 0;
      for (int64_t part = 0; part < plan.parts; ++part)
        sum += sums[(part * plan.tiles + index) * area + e];
      out[i * channels + j] = static_cast<Acc>(sum / samples);
      if (params.symmetric) out[j * channels + i] = out[i * channels + j];
    }
  }
}

template <class T, SimilarityKind kind>
void run(const MapSimilarityParams& params) {
  using Acc = Accumulator<T>;
  const auto pack = CCP_BEST_ISA(pack_maps<T>);
  const auto add = CCP_BEST_ISA(add_similarities<kind, Acc>);
  const ChannelDotLayout& layout = params.maps.layout;
  const Plan plan = make_plan<Acc>(params);
  const int64_t sides = params.symmetric ? 1 : 2, panels_per_sample = sides * plan.panels;
  const int64_t area = plan.width * plan.width;
  const std::unique_ptr<Acc[]> packed(new Acc[plan.batch * panels_per_sample * plan.packed_size]);
  std::vector<Acc> sums(plan.parts * plan.tiles * area);
  const int64_t pack_grain = std::max<int64_t>(1, kGrainProducts / 8 / plan.packed_size);
  const int64_t products = area * layout.positions * ceil_div(plan.batch, plan.parts);
  const int64_t tile_grain = std::max<int64_t>(1, kGrainProducts / products);
  for (int64_t first = 0; first < layout.sample.size; first += plan.batch) {
    const int64_t batch = std::min(plan.batch, layout.sample.size - first);
    const auto pack_range = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i % panels_per_sample;
        pack(params, panel >= plan.panels, first + i / panels_per_sample, panel % plan.panels,
             packed.get() + i * plan.packed_size);
      }
    };
    torch::stable::parallel_for(0, batch * panels_per_sample, pack_grain, pack_range);
    const auto add_range = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i / plan.tiles;
        const TileIndex tile = tile_at(params, plan, i % plan.tiles);
        const int64_t before = first % plan.parts;
        for (int64_t n = (part - before + plan.parts) % plan.parts; n < batch; n += plan.parts) {
          const Acc* sample = packed.get() + n * panels_per_sample * plan.packed_size;
          add(sample + tile.row * plan.packed_size,
              sample + ((sides - 1) * plan.panels + tile.column) * plan.packed_size,
              layout.positions, std::min(plan.width, layout.channel.size - tile.row * plan.width),
              std::min(plan.width, layout.channel.size - tile.column * plan.width),
              params.symmetric && tile.row == tile.column, sums.data() + i * area);
        }
      }
    };
    torch::stable::parallel_for(0, plan.parts * plan.tiles, tile_grain, add_range);
  }
  write_means(params, plan, sums.data());
}

Tensor map_similarity(const Tensor& x, std::string kind, const std::optional<Tensor>& y,
                      double data_range, bool allow_tf32) {
  const SimilarityKind similarity = check_map_similarity(x, kind, y, data_range);
  Tensor out = torch::stable::new_empty(x, {x.size(1), x.size(1)}, map_similarity_dtype(x));
  const MapSimilarityParams params =
      map_similarity_params(x, y, similarity, data_range, allow_tf32, out);
  if (nothing_to_compare(x))
    return torch::stable::fill_(out, std::numeric_limits<double>::quiet_NaN());
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    with_kind(similarity, [&](auto constant) { run<T, decltype(constant)::value>(params); });
  });
  return out;
}

}  // namespace
}  // namespace ccp::cpu

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CPU, m) {
  m.impl("map_similarity", TORCH_BOX(&ccp::cpu::map_similarity));
}
