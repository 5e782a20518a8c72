// How the CPU packs patches and correlates packed maps, in every instruction set that this
// processor has.
#include <algorithm>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/pairs.h"
#include "csrc/params.h"
#include "csrc/triangle.h"
#include "testing.h"

#define CCP_KERNELS "csrc/cpu/patch_gram_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace {

using ccp::TileIndex;

struct Window {
  int64_t kernel[2], stride[2], padding[2], dilation[2], positions[2];
};

// A packed panel of patches holds what the definition says, zeros in the padding and beyond the
// last column.
template <class Acc, class Pack>
void check_patches(const std::string& isa, int64_t width, const Window& window, int64_t C,
                   bool channels_last, Pack pack) {
  const auto& [kernel, stride, padding, dilation, positions] = window;
  const int64_t N = 2, H = 5, W = 7, groups = 2;
  std::mt19937 random(13);
  const auto x = testing::random_values<float>(N * C * H * W, random);
  const int64_t channel_stride = channels_last ? 1 : H * W, x_stride = channels_last ? C : 1;
  ccp::PatchProductParams params{};
  params.left = {x.data(),
                 C / groups,
                 {H, W},
                 C * H * W,
                 channel_stride,
                 {W * x_stride, x_stride},
                 {kernel[0], kernel[1]},
                 {stride[0], stride[1]},
                 {padding[0], padding[1]},
                 {dilation[0], dilation[1]}};
  params.groups = groups;
  params.samples = N;
  params.positions[0] = positions[0];
  params.positions[1] = positions[1];
  const int64_t begin = 5, depth = params.rows() - 7, columns = params.left.columns();
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t panel = 0; panel < ccp::ceil_div(columns, width); ++panel) {
      auto packed = testing::unwritten<Acc>(depth * width);
      pack(params, params.left, group, panel, begin, depth, packed.data());
      for (int64_t i = 0; i < depth * width; ++i) {
        const int64_t row = begin + i / width, column = panel * width + i % width;
        const int64_t kx = column % kernel[1], ky = column / kernel[1] % kernel[0];
        const int64_t c = group * (C / groups) + column / kernel[1] / kernel[0];
        const int64_t ox = row % positions[1], oy = row / positions[1] % positions[0];
        const int64_t n = row / positions[1] / positions[0];
        const int64_t iy = oy * stride[0] + ky * dilation[0] - padding[0];
        const int64_t ix = ox * stride[1] + kx * dilation[1] - padding[1];
        const bool inside = column < columns && 0 <= iy && iy < H && 0 <= ix && ix < W;
        const double expected =
            inside ? x[n * C * H * W + c * channel_stride + (iy * W + ix) * x_stride] : 0.0;
        testing::expect_close(isa + ", patches", i, packed[i], expected, 0.0);
      }
    }
  }
}

// A correlation over a grid of positions, on top of what the tile held.
template <class Acc, class Add>
void check_correlation(const std::string& isa, int64_t width, Add add) {
  using ccp::cpu::PackedGrid;
  std::mt19937 random(17);
  const auto left = testing::random_values<Acc>(600 * width, random);
  const auto right = testing::random_values<Acc>(900 * width, random);
  const PackedGrid left_grid{3 * width, 40 * width, 2 * width};
  const PackedGrid right_grid{5 * width, 260 * width, width};
  for (const auto& [rows, columns] : {std::pair{3, 17}, {2, 200}, {1, 1}}) {
    for (const int64_t maps : {width, width / 2 - 1}) {
      auto tile = testing::random_values<Acc>(width * width, random);
      const std::vector<Acc> before = tile;
      add(left.data(), left_grid, right.data(), right_grid, rows, columns, maps, maps, tile.data());
      for (int64_t r = 0; r < maps; ++r) {
        for (int64_t c = 0; c < maps; ++c) {
          double sum = before[r * width + c], magnitude = std::fabs(sum);
          for (int64_t y = 0; y < rows; ++y) {
            for (int64_t x = 0; x < columns; ++x) {
              const auto at = [&](const PackedGrid& grid) {
                return grid.first + y * grid.row_step + x * grid.column_step;
              };
              const double product = double{left[at(left_grid) + r]} * right[at(right_grid) + c];
              sum += product;
              magnitude += std::fabs(product);
            }
          }
          testing::expect_close(isa + ", correlation", r * width + c, tile[r * width + c], sum,
                                magnitude);
        }
      }
    }
  }
}

// The product of two panels of an odd number of rows, as pairs of bfloat16 values.
void check_pairs(const ccp::cpu::PairKernels& kernels, int64_t width) {
  const int64_t depth = 301, columns = width + 7, stride = columns + 3;
  std::mt19937 random(19);
  std::vector<float> panels(2 * depth * width);
  for (size_t i = 0; i < panels.size(); ++i)
    panels[i] = ccp::widen(testing::random_values<ccp::BFloat16>(1, random)[0]);
  auto joined = panels;
  for (int panel = 0; panel < 2; ++panel)
    kernels.join_pairs(joined.data() + panel * depth * width, depth);
  const std::vector<float> before = testing::random_values<float>(columns * stride, random);
  std::vector<float> out = before;
  kernels.add_tile(out.data(), stride, width, columns, false, joined.data(),
                   joined.data() + depth * width, (depth + 1) / 2, TileIndex{0, 1});
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j < stride; ++j) {
      double sum = before[i * stride + j], magnitude = std::fabs(sum);
      for (int64_t d = 0; d < depth && i < width && width <= j && j < columns; ++d) {
        const double product =
            double{panels[d * width + i]} * panels[(depth + d) * width + j - width];
        sum += product;
        magnitude += std::fabs(product);
      }
      testing::expect_close("pairs", i * stride + j, out[i * stride + j], sum, magnitude);
    }
  }
}

#define CHECK_ISA(isa)                                                                             \
  do {                                                                                             \
    using namespace ccp::cpu::isa;                                                                 \
    std::printf("%s\n", #isa);                                                                     \
    const Window some{{3, 2}, {2, 1}, {1, 2}, {1, 3}, {3, 8}};                                     \
    const Window whole{{1, 1}, {1, 1}, {0, 0}, {1, 1}, {5, 7}};                                    \
    for (const bool last : {false, true}) {                                                        \
      check_patches<float>(#isa, panel_width<float>(), some, 6, last, pack_patches<float, float>); \
      check_patches<double>(#isa, panel_width<double>(), some, 6, last,                            \
                            pack_patches<float, double>);                                          \
      check_patches<float>(#isa, panel_width<float>(), whole, 78, last,                            \
                           pack_patches<float, float>);                                            \
    }                                                                                              \
    check_correlation<float>(#isa, panel_width<float>(), add_correlation<float>);                  \
    check_correlation<double>(#isa, panel_width<double>(), add_correlation<double>);               \
  } while (0)

}  // namespace

int main() {
  CHECK_ISA(baseline);
#ifdef CCP_MULTI_ISA
  if (ccp::cpu::best_isa() >= ccp::cpu::Isa::kAvx2) CHECK_ISA(avx2);
  if (ccp::cpu::best_isa() >= ccp::cpu::Isa::kAvx512) CHECK_ISA(avx512);
  if (const ccp::cpu::PairKernels* kernels = ccp::cpu::pair_kernels())
    check_pairs(*kernels, ccp::cpu::avx512::panel_width<float>());
#endif
  return testing::report();
}
