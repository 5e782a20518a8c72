// How the CPU packs patches, in every instruction set that this processor has.
#include <algorithm>

#include "csrc/cpu/isa.h"
#include "csrc/params.h"
#include "csrc/triangle.h"
#include "testing.h"

#define CCP_KERNELS "csrc/cpu/patch_gram_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace {

using ccp::TileIndex;

// A packed panel of patches holds what the definition says, zeros in the padding and beyond the
// last column.
template <class Acc, class Pack>
void check_patches(const std::string& isa, int64_t width, Pack pack) {
  const int64_t N = 2, C = 6, H = 5, W = 7, groups = 2, kernel[] = {3, 2}, stride[] = {2, 1},
                padding[] = {1, 2}, dilation[] = {1, 3}, positions[] = {3, 8};
  std::mt19937 random(13);
  const auto x = testing::random_values<float>(N * C * H * W, random);
  ccp::PatchProductParams params{};
  params.left = {x.data(), C / groups, {H, W}, C * H * W, H * W,
                 {W, 1},   {3, 2},     {2, 1}, {1, 2},    {1, 3}};
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
        const double expected = inside ? x[((n * C + c) * H + iy) * W + ix] : 0.0;
        testing::expect_close(isa + ", patches", i, packed[i], expected, 0.0);
      }
    }
  }
}

#define CHECK_ISA(isa)                                                               \
  do {                                                                               \
    using namespace ccp::cpu::isa;                                                   \
    std::printf("%s\n", #isa);                                                       \
    check_patches<float>(#isa, panel_width<float>(), pack_patches<float, float>);    \
    check_patches<double>(#isa, panel_width<double>(), pack_patches<float, double>); \
  } while (0)

}  // namespace

#include "cpu_main.h"
