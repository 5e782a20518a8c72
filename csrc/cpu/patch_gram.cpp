#include "csrc/patch_gram.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/dispatch.h"
#include "csrc/triangle.h"

#define CCP_KERNELS "csrc/cpu/patch_gram_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace ccp::cpu {
namespace {

// Rows of P that are packed at a time: the more, the more rarely the output is read and written.
constexpr int64_t kDepth = 512;
constexpr int64_t kGrainProducts = 1 << 20;  // fewer are not worth a thread of their own

// The packed panels of all groups of one side of the product, [group, panel, depth, width].
template <class T, class Acc>
class PackedPatches {
 public:
  PackedPatches(const PatchProductParams& params, const PatchSource& source)
      : params_(params),
        source_(source),
        panels_(ceil_div(source.columns(), CCP_BEST_ISA(panel_width<Acc>)())),
        panel_size_(std::min(kDepth, params.rows()) * CCP_BEST_ISA(panel_width<Acc>)()),
        packed_(params.groups * panels_ * panel_size_) {}

  int64_t panels() const { return panels_; }
  const Acc* panel(int64_t group, int64_t index) const {
    return packed_.data() + (group * panels_ + index) * panel_size_;
  }

  void pack(int64_t begin, int64_t depth) {
    const auto pack_one = CCP_BEST_ISA(pack_patches<T, Acc>);
    const int64_t grain = std::max<int64_t>(1, kGrainProducts / 16 / panel_size_);
    torch::stable::parallel_for(0, params_.groups * panels_, grain,
                                [&](int64_t first, int64_t last) {
                                  for (int64_t item = first; item < last; ++item)
                                    pack_one(params_, source_, item / panels_, item % panels_,
                                             begin, depth, packed_.data() + item * panel_size_);
                                });
  }

 private:
  const PatchProductParams& params_;
  const PatchSource& source_;
  int64_t panels_, panel_size_;
  std::vector<Acc> packed_;
};

template <class T, class Acc>
void add_products(const PatchProductParams& params, const PackedPatches<T, Acc>& left,
                  const PackedPatches<T, Acc>& right, int64_t depth) {
  const auto add = CCP_BEST_ISA(add_tile<Acc>);
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
void run(const PatchProductParams& params) {
  PackedPatches<T, Acc> left(params, params.left);
  std::optional<PackedPatches<T, Acc>> right;
  if (!params.symmetric) right.emplace(params, params.right);
  for (int64_t begin = 0; begin < params.rows(); begin += kDepth) {
    const int64_t depth = std::min(kDepth, params.rows() - begin);
    left.pack(begin, depth);
    if (right) right->pack(begin, depth);
    add_products(params, left, right ? *right : left, depth);
  }
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
