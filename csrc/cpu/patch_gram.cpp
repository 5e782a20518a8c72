#include "csrc/patch_gram.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/packed_grid.h"
#include "csrc/cpu/pairs.h"
#include "csrc/dispatch.h"
#include "csrc/patch_pieces.h"
#include "csrc/triangle.h"

#define CCP_KERNELS "csrc/cpu/patch_gram_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace ccp::cpu {
namespace {

// Rows of P that are packed at a time: the more, the more rarely the output is read and written.
constexpr int64_t kDepth = 512;
constexpr int64_t kMapPositions = 1024;      // the same for pieces: of maps, at least
constexpr int64_t kTasks = 16;               // about as many sums of tiles go on side by side
constexpr int64_t kGrainProducts = 1 << 20;  // fewer are not worth a thread of their own

int64_t round_up(int64_t value, int64_t granule) { return ceil_div(value, granule) * granule; }

// The kernels for pairs of values of type T, if there are any.
template <class T, class Acc>
const PairKernels* pair_kernels_for() {
  return std::is_same_v<T, BFloat16> && std::is_same_v<Acc, float> ? pair_kernels() : nullptr;
}

// Maps of 16-bit values as those of their words, two neighbouring positions each, where every
// position is a patch of its own and the maps hold whole words.
std::optional<PatchSource> words_of(const PatchSource& source) {
  const int64_t plane = source.size[0] * source.size[1];
  const bool contiguous = source.position_stride[1] == 1 &&
                          (source.size[0] == 1 || source.position_stride[0] == source.size[1]);
  const bool even = (plane | source.channel_stride | source.sample_stride) % 2 == 0 &&
                    reinterpret_cast<uintptr_t>(source.data) % sizeof(float) == 0;
  if (!CCP_BEST_ISA(is_whole)(source) || !contiguous || !even) return std::nullopt;
  PatchSource words = source;
  words.size[0] = 1;
  words.size[1] = words.position_stride[0] = plane / 2;
  words.channel_stride /= 2;
  words.sample_stride /= 2;
  return words;
}

// The packed panels of all groups of one side of the product, [group, panel, depth, width].
template <class T, class Acc>
class PackedPatches {
 public:
  PackedPatches(const PatchProductParams& params, const PatchSource& source, int64_t depth,
                const PairKernels* pairs = nullptr)
      : params_(params),
        source_(source),
        pairs_(pairs),
        words_(pairs ? words_of(source) : std::nullopt),
        panels_(ceil_div(source.columns(), CCP_BEST_ISA(panel_width<Acc>)())),
        panel_size_(std::min(depth, params.rows()) * CCP_BEST_ISA(panel_width<Acc>)()),
        packed_(params.groups * panels_ * panel_size_) {}

  int64_t panels() const { return panels_; }
  const Acc* panel(int64_t group, int64_t index) const {
    return packed_.data() + (group * panels_ + index) * panel_size_;
  }

  void pack(int64_t begin, int64_t depth) {
    const int64_t grain = std::max<int64_t>(1, kGrainProducts / 16 / panel_size_);
    torch::stable::parallel_for(0, params_.groups * panels_, grain,
                                [&](int64_t first, int64_t last) {
                                  for (int64_t item = first; item < last; ++item) {
                                    pack_panel(item / panels_, item % panels_, begin, depth,
                                               packed_.data() + item * panel_size_);
                                  }
                                });
  }

 private:
  void pack_panel(int64_t group, int64_t index, int64_t begin, int64_t depth, Acc* panel) const {
    const auto pack_values = CCP_BEST_ISA(pack_patches<T, Acc>);
    if constexpr (std::is_same_v<Acc, float>) {
      const auto pack_words = CCP_BEST_ISA(pack_patches<float, float>);
      if (words_) return pack_words(params_, *words_, group, index, begin / 2, depth / 2, panel);
    }
    pack_values(params_, source_, group, index, begin, depth, panel);
    if constexpr (std::is_same_v<Acc, float>)
      if (pairs_) pairs_->join_pairs(panel, depth);
  }

  PatchProductParams params_;
  PatchSource source_;
  const PairKernels* pairs_;
  std::optional<PatchSource> words_;  // whose panels are of pairs already
  int64_t panels_, panel_size_;
  std::vector<Acc> packed_;
};

template <class T, class Acc>
void add_products(const PatchProductParams& params, const PackedPatches<T, Acc>& left,
                  const PackedPatches<T, Acc>& right, int64_t depth) {
  auto add = CCP_BEST_ISA(add_tile<Acc>);
  if constexpr (std::is_same_v<Acc, float>) {
    if (const PairKernels* pairs = pair_kernels_for<T, Acc>()) {
      add = pairs->add_tile;
      depth = ceil_div(depth, 2);
    }
  }
  const int64_t width = CCP_BEST_ISA(panel_width<Acc>)();
  const int64_t tiles =
      params.symmetric ? left.panels() * (left.panels() + 1) / 2 : left.panels() * right.panels();
  const int64_t grain = std::max<int64_t>(1, kGrainProducts / (width * width * depth));
  torch::stable::parallel_for(0, params.groups * tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t group = item / tiles, index = item % tiles;
      const TileIndex tile = params.symmetric
                                 ? upper_tile(index)
                                 : TileIndex{index % left.panels(), index / left.panels()};
      Acc* out = static_cast<Acc*>(params.out) + group * params.out_group_stride;
      add(out, params.out_row_stride, params.left.columns(), params.right.columns(),
          params.symmetric, left.panel(group, tile.row), right.panel(group, tile.column), depth,
          tile);
    }
  });
}

template <class T, class Acc>
void add_by_patches(const PatchProductParams& params) {
  const PairKernels* pairs = pair_kernels_for<T, Acc>();
  PackedPatches<T, Acc> left(params, params.left, kDepth, pairs);
  std::optional<PackedPatches<T, Acc>> right;
  if (!params.symmetric) right.emplace(params, params.right, kDepth, pairs);
  for (int64_t begin = 0; begin < params.rows(); begin += kDepth) {
    const int64_t depth = std::min(kDepth, params.rows() - begin);
    left.pack(begin, depth);
    if (right) right->pack(begin, depth);
    add_products(params, left, right ? *right : left, depth);
  }
}

// The maps of a source as patches of a window of one position.
PatchSource map_source(PatchSource source) {
  for (int dim = 0; dim < 2; ++dim) {
    source.kernel[dim] = source.stride[dim] = source.dilation[dim] = 1;
    source.padding[dim] = 0;
  }
  return source;
}

PatchProductParams map_params(PatchProductParams params, const PatchSource& source) {
  std::copy(source.size, source.size + 2, params.positions);
  return params;
}

// The correlations of the pieces of a product (patch_pieces.h).
template <class T, class Acc>
class PieceSums {
 public:
  PieceSums(const PatchProductParams& params, const PatchAxis& rows, const PatchAxis& columns)
      : params_(params),
        rows_(rows),
        columns_(columns),
        pieces_(rows.pieces.size() * columns.pieces.size()),
        left_panels_(ceil_div(params.left.channels, width_)),
        right_panels_(ceil_div(params.right.channels, width_)),
        tiles_(params.groups * left_panels_ * right_panels_),
        parts_(std::min(params.samples, ceil_div(kTasks, tiles_))),
        sums_(parts_ * tiles_ * pieces_ * width_ * width_) {}

  void add_samples() {
    const PatchSource left_maps = map_source(params_.left), right_maps = map_source(params_.right);
    const int64_t left_size = left_maps.size[0] * left_maps.size[1];
    const int64_t right_size = right_maps.size[0] * right_maps.size[1];
    const int64_t batch = std::max(parts_, ceil_div(kMapPositions, left_size));
    PackedPatches<T, Acc> left(map_params(params_, left_maps), left_maps, batch * left_size);
    std::optional<PackedPatches<T, Acc>> right;
    if (!params_.symmetric)
      right.emplace(map_params(params_, right_maps), right_maps, batch * right_size);
    for (int64_t begin = 0; begin < params_.samples; begin += batch) {
      const int64_t count = std::min(batch, params_.samples - begin);
      left.pack(begin * left_size, count * left_size);
      if (right) right->pack(begin * right_size, count * right_size);
      add_batch(left, right ? *right : left, count);
    }
  }

  void add_to_output() {
    const auto add = CCP_BEST_ISA(add_pieces<Acc>);
    const int64_t size = pieces_ * width_ * width_, part_size = tiles_ * size;
    torch::stable::parallel_for(0, tiles_, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        Acc* sums = sums_.data() + item * size;
        for (int64_t part = 1; part < parts_; ++part)
          for (int64_t e = 0; e < size; ++e) sums[e] += sums[part * part_size + e];
        const Place place = place_of(item);
        add(params_, rows_, columns_, sums, place.tile,
            static_cast<Acc*>(params_.out) + place.group * params_.out_group_stride);
      }
    });
  }

 private:
  struct Place {
    int64_t group;
    TileIndex tile;
  };

  Place place_of(int64_t item) const {
    return {item / (left_panels_ * right_panels_),
            {item / right_panels_ % left_panels_, item % right_panels_}};
  }

  // Part p of a batch sums its samples p, p + parts, ...; a function of the shapes only, so that
  // the number of threads does not change the result.
  void add_batch(const PackedPatches<T, Acc>& left, const PackedPatches<T, Acc>& right,
                 int64_t samples) {
    const int64_t products = params_.rows() / params_.samples * samples * width_ * width_;
    const int64_t grain = std::max<int64_t>(1, kGrainProducts * parts_ / products);
    torch::stable::parallel_for(
        0, parts_ * tiles_ * pieces_, grain, [&](int64_t first, int64_t last) {
          for (int64_t item = first; item < last; ++item)
            for (int64_t sample = item / pieces_ / tiles_; sample < samples; sample += parts_)
              add_piece(left, right, sample, item / pieces_ % tiles_, item % pieces_,
                        sums_.data() + item * width_ * width_);
        });
  }

  void add_piece(const PackedPatches<T, Acc>& left, const PackedPatches<T, Acc>& right,
                 int64_t sample, int64_t tile_number, int64_t piece, Acc* sums) const {
    const int64_t width = columns_.pieces.size();
    const AxisPiece &row = rows_.pieces[piece / width], &column = columns_.pieces[piece % width];
    const auto [group, tile] = place_of(tile_number);
    const PieceKind kind = piece_kind(params_.symmetric, row, column);
    if (kind == PieceKind::kMirrored) return;
    if (kind == PieceKind::kSymmetric && tile.row > tile.column) return;
    CCP_BEST_ISA(add_correlation<Acc>)
    (left.panel(group, tile.row), packed_grid(params_.left, width_, sample, row.left, column.left),
     right.panel(group, tile.column),
     packed_grid(params_.right, width_, sample, row.right, column.right), row.count, column.count,
     std::min(width_, params_.left.channels - tile.row * width_),
     std::min(width_, params_.right.channels - tile.column * width_), sums);
  }

  const PatchProductParams& params_;
  const PatchAxis &rows_, &columns_;
  const int64_t width_ = CCP_BEST_ISA(panel_width<Acc>)();
  int64_t pieces_, left_panels_, right_panels_, tiles_, parts_;
  std::vector<Acc> sums_;  // [part, group, left panel, right panel, piece, width, width]
};

// Multiplications, those of padded panels included.
template <class Acc>
double products_of_patches(const PatchProductParams& params) {
  const int64_t width = CCP_BEST_ISA(panel_width<Acc>)();
  const double area = static_cast<double>(round_up(params.left.columns(), width / 4)) *
                      static_cast<double>(round_up(params.right.columns(), width / 2));
  return area * static_cast<double>(params.rows()) / (params.symmetric ? 2 : 1);
}

template <class Acc>
double products_of_pieces(const PatchProductParams& params, const PatchAxis& rows,
                          const PatchAxis& columns) {
  const int64_t width = CCP_BEST_ISA(panel_width<Acc>)();
  const double area = static_cast<double>(round_up(params.left.channels, width / 4)) *
                      static_cast<double>(round_up(params.right.channels, width / 2));
  double positions = 0;
  for (const AxisPiece& row : rows.pieces) {
    for (const AxisPiece& column : columns.pieces) {
      const PieceKind kind = piece_kind(params.symmetric, row, column);
      if (kind == PieceKind::kMirrored) continue;
      const double count = static_cast<double>(row.count) * static_cast<double>(column.count);
      positions += kind == PieceKind::kSymmetric ? count / 2 : count;
    }
  }
  return area * positions * static_cast<double>(params.samples);
}

template <class T, class Acc>
void run(const PatchProductParams& params) {
  const PatchAxis rows = patch_axis(params, 0), columns = patch_axis(params, 1);
  if (products_of_patches<Acc>(params) <= products_of_pieces<Acc>(params, rows, columns))
    return add_by_patches<T, Acc>(params);
  PieceSums<T, Acc> sums(params, rows, columns);
  sums.add_samples();
  sums.add_to_output();
}

void add_patches(const Tensor& out, const Tensor& x, const PatchProductParams& params) {
  if (params.rows() == 0 || out.numel() == 0) return;
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (out.scalar_type() == ScalarType::Float) return run<T, float>(params);
    }
    run<T, double>(params);
  });
}

// float32 products are exact to float32 here: there is no TF32 to allow.
void patch_gram_(const Tensor& A, const Tensor& x, const std::vector<int64_t>& kernel_size,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation, int64_t groups, bool) {
  const Window window{kernel_size, stride, padding, dilation, groups};
  add_patches(A, x, check_patch_gram(A, x, window));
}

void patch_cross_(const Tensor& B, const Tensor& x, const Tensor& y,
                  const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                  int64_t groups, bool) {
  const Window window{kernel_size, stride, padding, dilation, groups};
  add_patches(B, x, check_patch_cross(B, x, y, window));
}

}  // namespace
}  // namespace ccp::cpu

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CPU, m) {
  m.impl("patch_gram_", TORCH_BOX(&ccp::cpu::patch_gram_));
  m.impl("patch_cross_", TORCH_BOX(&ccp::cpu::patch_cross_));
}
