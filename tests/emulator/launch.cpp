// The launch arithmetic, the layouts' classification and the numbering of tiles; no kernel runs.
#include "csrc/cuda/launch.h"

#include <set>
#include <sstream>
#include <utility>

#include "csrc/cuda/correlation_launch.h"
#include "csrc/cuda/gram_launch.h"
#include "csrc/cuda/map_launch.h"
#include "csrc/cuda/moments_launch.h"
#include "csrc/cuda/patch_launch.h"
#include "csrc/patch_pieces.h"
#include "csrc/triangle.h"
#include "testing.h"

namespace {

using ccp::ChannelDotLayout;
using ccp::ChannelDotParams;
using ccp::LayoutKind;
using Sizes = std::vector<int64_t>;
using testing::expect;

ChannelDotLayout layout_of(const Sizes& sizes, const Sizes& x_strides, const Sizes& g_strides,
                           int64_t channel_dim = 1) {
  ChannelDotLayout layout;
  expect("layout", ccp::make_layout(static_cast<int64_t>(sizes.size()), sizes.data(),
                                    x_strides.data(), g_strides.data(), channel_dim, &layout));
  return layout;
}

void test_layouts() {
  const Sizes sizes{2, 3, 4, 5}, rows{60, 20, 5, 1}, last{60, 1, 15, 3};
  const ChannelDotLayout contiguous = layout_of(sizes, rows, rows);
  expect("contiguous positions merge", contiguous.kind == LayoutKind::kRows &&
                                           contiguous.position_dims == 1 &&
                                           contiguous.positions == 20);
  expect("channels last", layout_of(sizes, last, last).kind == LayoutKind::kChannelsLast);
  expect("mixed layouts are strided", layout_of(sizes, rows, last).kind == LayoutKind::kStrided);
  expect("a crop keeps two dimensions",
         layout_of(sizes, {200, 50, 10, 1}, {200, 50, 10, 1}).position_dims == 2);
  expect("an expanded g merges to one stride of 0",
         layout_of(sizes, rows, {0, 0, 0, 0}).position_dims == 1);
  expect("[N, C] is channels last",
         layout_of({4, 7}, {7, 1}, {7, 1}).kind == LayoutKind::kChannelsLast);
  expect("strides of size-1 dimensions do not matter",
         layout_of({2, 3, 4, 1}, {12, 4, 1, 99}, {12, 4, 1, 7}).kind == LayoutKind::kRows);
  ChannelDotLayout layout;
  const Sizes many(11, 2);
  Sizes gaps(11);
  for (size_t i = 0; i < gaps.size(); ++i) gaps[i] = static_cast<int64_t>(std::pow(3, 10 - i));
  expect("nine strided dimensions are refused",
         !ccp::make_layout(11, many.data(), gaps.data(), gaps.data(), 1, &layout));
}

void test_vector_width() {
  alignas(16) float data[64];
  const auto width = [&](const float* x, const ChannelDotLayout& layout) {
    return ccp::vector_width(ChannelDotParams{x, data, nullptr, layout}, sizeof(float));
  };
  const ChannelDotLayout rows = layout_of({2, 3, 8}, {24, 8, 1}, {24, 8, 1});
  expect("aligned rows", width(data, rows) == 4);
  expect("misaligned rows", width(data + 1, rows) == 1);
  expect("odd rows", width(data, layout_of({2, 3, 7}, {21, 7, 1}, {21, 7, 1})) == 1);
  expect("rows with a gap", width(data, layout_of({2, 3, 4}, {15, 5, 1}, {15, 5, 1})) == 1);
  expect("aligned channels", width(data, layout_of({2, 8, 3}, {24, 1, 8}, {24, 1, 8})) == 4);
  expect("odd channels", width(data, layout_of({2, 7, 3}, {21, 1, 7}, {21, 1, 7})) == 1);
  expect("g broadcast along positions",
         width(data, layout_of({2, 8, 3}, {24, 1, 8}, {8, 1, 0})) == 4);
}

void test_rows() {
  alignas(16) uint16_t data[64];
  const auto plan = [&](const uint16_t* x, const uint16_t* g, const ChannelDotLayout& layout) {
    return ccp::plan_channel_dot(ChannelDotParams{x, g, nullptr, layout}, sizeof(uint16_t));
  };
  const ChannelDotLayout maps = layout_of({256, 2048, 49}, {100352, 49, 1}, {100352, 49, 1});
  const ccp::ChannelDotLaunch whole = plan(data, data, maps);
  expect("rows of odd length are read in 16 bytes", whole.vector == 8 && whole.row.threads == 8);
  expect("short rows are read several at once", whole.row.at_once == 4 && whole.row.turns > 1);
  expect("contiguous samples follow on", whole.row.inner.size == 256 * 2048);
  expect("the ends of aligned tensors are whole",
         whole.row.whole_begin == 0 && whole.row.whole_end == 256 * 2048);
  expect("all rows have a block", whole.row.blocks * whole.row.turns * 32 * 4 >= 256 * 2048);

  const ChannelDotLayout few = layout_of({3, 5, 3}, {15, 3, 1}, {15, 3, 1});
  const ccp::ChannelDotLaunch ends = plan(data + 1, data + 1, few);
  expect("a first row within a unit is not whole", ends.row.whole_begin == 3);
  expect("nor are the rows of the last unit", ends.row.whole_end == 13);
  expect("x and g aligned otherwise", plan(data, data + 1, few).vector == 1);

  const ChannelDotLayout apart = layout_of({3, 5, 50}, {300, 60, 1}, {320, 64, 1});
  expect("strides that keep x and g apart", plan(data, data, apart).vector == 1);
  const ChannelDotLayout slice = layout_of({3, 5, 49}, {490, 49, 1}, {490, 49, 1});
  const ccp::ChannelDotLaunch gaps = plan(data, data, slice);
  expect("rows with gaps are read one at a time",
         gaps.vector == 8 && gaps.row.at_once == 1 && gaps.row.outer.size == 3);
  const ChannelDotLayout same = layout_of({3, 5, 49}, {0, 49, 1}, {0, 49, 1});
  expect("rows that are not ascending", plan(data, data, same).vector == 1);
}

void test_moments() {
  alignas(16) uint16_t data[64];
  const auto plan = [&](const uint16_t* x, const Sizes& sizes, const Sizes& strides) {
    Sizes all{1}, apart{0};  // no samples: they are positions
    all.insert(all.end(), sizes.begin(), sizes.end());
    apart.insert(apart.end(), strides.begin(), strides.end());
    return ccp::plan_channel_moments({x, nullptr, layout_of(all, apart, apart, 2)},
                                     sizeof(uint16_t))
        .rows;
  };
  const ccp::MomentRows aligned = plan(data, {9, 8, 64}, {512, 64, 1});
  expect("eight threads read an aligned row of eight units", aligned.chunks == 1);
  expect("which lies like the others", aligned.alike && aligned.step == 512);
  expect("elsewhere a row of eight units may reach into nine",
         plan(data + 1, {9, 8, 64}, {512, 64, 1}).chunks == 2);
  const ccp::MomentRows odd = plan(data, {9, 8, 49}, {392, 49, 1});
  expect("odd rows, whole units apart, lie alike", odd.alike && odd.chunks == 1);
  expect("not if they are not", !plan(data, {9, 7, 49}, {343, 49, 1}).alike);
  expect("nor do rows of rows", !plan(data, {9, 8, 5, 6}, {640, 80, 8, 1}).alike);
}

void test_split() {
  for (const int64_t length : {1, 7, 64, 1000, 65536, 1000003}) {
    for (const int64_t blocks : {1, 5, 132, 100000}) {
      for (const int64_t granule : {1, 4, 16}) {
        const ccp::Split split = ccp::split_work(length, 64, granule, blocks);
        const std::string name = "split of " + std::to_string(length) + " among " +
                                 std::to_string(blocks) + " by " + std::to_string(granule);
        expect(name + " covers", split.count * split.length >= length);
        expect(name + " has no empty part", (split.count - 1) * split.length < length);
        expect(name + " keeps the granule", split.length % granule == 0);
        expect(name + " fills the device once", (split.count - 1) * blocks < ccp::kTargetBlocks);
        const ccp::Split filled = ccp::fill_multiprocessors(split, length, 16, granule, blocks);
        const bool enough = split.count * blocks >= ccp::kMultiprocessors;
        expect(name + ", filled, covers", filled.count * filled.length >= length);
        expect(name + ", filled, has no empty part", (filled.count - 1) * filled.length < length);
        expect(name + ", filled, keeps the granule", filled.length % granule == 0);
        expect(name + ", filled, has no part too short", filled.length >= 16 || length < 16);
        expect(name + ", filled, is the same where that suffices",
               !enough || (filled.count == split.count && filled.length == split.length));
        expect(name + ", filled, has a block for each multiprocessor, or the least parts",
               filled.count * blocks >= ccp::kMultiprocessors || filled.length <= 16);
        expect(name + ", filled, has few more blocks",
               enough || filled.count * blocks < 4 * ccp::kMultiprocessors);
      }
    }
  }
}

// Contiguous maps, or channels last.
ccp::ChannelDotLaunch dot_of_maps(const Sizes& sizes, int element_size,
                                  bool channels_last = false) {
  alignas(16) static float data[4];
  const int64_t positions = sizes[2] * sizes[3];
  const Sizes rows{sizes[1] * positions, positions, sizes[3], 1};
  const Sizes last{sizes[1] * positions, 1, sizes[3] * sizes[1], sizes[1]};
  const Sizes& strides = channels_last ? last : rows;
  return ccp::plan_channel_dot({data, data, nullptr, layout_of(sizes, strides, strides)},
                               element_size);
}

ccp::ChannelMomentsLaunch moments_of_maps(const Sizes& sizes, int element_size) {
  alignas(16) static float data[4];
  const int64_t positions = sizes[2] * sizes[3];
  const Sizes all{1, sizes[0], sizes[1], sizes[2], sizes[3]};
  const Sizes strides{0, sizes[1] * positions, positions, sizes[3], 1};
  return ccp::plan_channel_moments({data, nullptr, layout_of(all, strides, strides, 2)},
                                   element_size);
}

void test_few_long_rows() {
  const Sizes one{1, 1, 512, 512}, image{1, 3, 224, 224}, two{2, 8, 224, 224};
  expect("one float32 map has a block for each multiprocessor", dot_of_maps(one, 4).blocks == 133);
  expect("of 16 bits, parts of one load a thread",
         dot_of_maps(one, 2).split.length == 2048 && dot_of_maps(one, 2).blocks == 128);
  expect("an image of float32", dot_of_maps(image, 4).blocks == 135);
  expect("an image of 16 bits", dot_of_maps(image, 2).blocks == 75);
  expect("two samples channels last", dot_of_maps(two, 2, true).blocks == 134);
  const ccp::ChannelDotLaunch warps = dot_of_maps({1, 3, 60, 60}, 4);
  expect("three rows of a warp each have no part below 4 KB in all",
         warps.row.threads == 32 && 3 * 4 * warps.split.length >= 4096 && warps.split.count > 7);
  expect("what fits in one part stays in one",
         dot_of_maps({1, 64, 112, 112}, 2).split.count == 1 &&
             dot_of_maps({1, 2048, 7, 7}, 2, true).split.count == 1);

  const Sizes maps{1, 64, 112, 112};
  expect("moments of float32", moments_of_maps(maps, 4).blocks == 200);
  expect("moments of 16 bits: parts of one turn",
         moments_of_maps(maps, 2).split.length == ccp::kMomentLoads &&
             moments_of_maps(maps, 2).blocks == 104);
  expect("moments of few channels",
         moments_of_maps(two, 4).blocks == 196 && moments_of_maps(two, 2).blocks == 98);
  expect("moments of one channel, read by a warp a block: 4 KB each",
         moments_of_maps(one, 2).split.length == 8);
  expect("moments in one part are split too: the second kernel runs anyway",
         moments_of_maps({3, 8, 20, 20}, 4).split.count == 3);
}

void test_many_rows_keep_their_parts() {
  const auto same = [](const ccp::Split& split, int64_t count, int64_t length) {
    return split.count == count && split.length == length;
  };
  expect("sums of a large image", same(dot_of_maps({1, 1, 4096, 4096}, 4).split, 1056, 15888));
  expect("sums of 192 blocks", same(dot_of_maps({1, 64, 112, 112}, 4).split, 3, 4184));
  expect("sums of a batch", same(dot_of_maps({256, 64, 112, 112}, 2).split, 1, 12544));
  expect("moments of a batch", same(moments_of_maps({256, 64, 112, 112}, 2).split, 131, 96));
  expect("moments of 2048 channels", same(moments_of_maps({256, 2048, 7, 7}, 2).split, 16, 16));
}

void test_grid() {
  expect("a grid is never empty", ccp::grid_size(0) == 1);
  expect("a grid stays within the limit", ccp::grid_size(int64_t{1} << 40) == 0x7fffffffu);
  ChannelDotParams params{};
  params.layout = layout_of({1 << 20, 1 << 14, 49}, {802816, 49, 1}, {802816, 49, 1});
  const ccp::ChannelDotLaunch launch = ccp::plan_channel_dot(params, 4);
  expect("more than 2^32 rows are all covered", launch.blocks * launch.row.turns *
                                                        launch.row.at_once *
                                                        (ccp::kBlockThreads / launch.row.threads) >=
                                                    int64_t{1} << 34);
  params.layout = layout_of({1, 8, 100000}, {800000, 1, 8}, {800000, 1, 8});
  expect("a single sample is split", ccp::plan_channel_dot(params, 4).split.count > 100);
}

void test_tiles() {
  int64_t index = 0;
  for (int64_t column = 0; column < 600; ++column) {
    for (int64_t row = 0; row <= column; ++row, ++index) {
      const ccp::TileIndex tile = ccp::upper_tile(index);
      if (tile.row != row || tile.column != column) expect("tile " + std::to_string(index), false);
    }
  }
  const int64_t column = 1234567, first = column * (column + 1) / 2;
  expect("first tile of a distant column", ccp::upper_tile(first).column == column);
  expect("last tile of a distant column", ccp::upper_tile(first - 1).row == column - 1);
}

std::vector<ccp::WeightedGramParams> gram_layers(const std::vector<int64_t>& widths,
                                                 int64_t samples) {
  alignas(16) static float data[4], sigma[4];
  std::vector<ccp::WeightedGramParams> layers(widths.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].a = data;
    layers[i].sigma = sigma;
    layers[i].channels = layers[i].a_sample_stride = layers[i].S_stride = widths[i];
    layers[i].samples = samples;
    layers[i].terms = layers[i].a_channel_stride = layers[i].sigma_sample_stride = 1;
  }
  return layers;
}

ccp::GramLaunch grams(const std::vector<ccp::WeightedGramParams>& layers) {
  return ccp::plan_weighted_grams(layers.data(), static_cast<int>(layers.size()), sizeof(float));
}

void test_grouped_grams() {
  std::vector<int64_t> widths(53);
  for (size_t i = 0; i < widths.size(); ++i) widths[i] = 64 << i % 6;
  std::vector<ccp::WeightedGramParams> layers = gram_layers(widths, 256);
  layers[3].samples = 50000;
  layers[5].a_channel_stride = 2;
  layers[6].sigma_is_double = true;
  const ccp::GramLaunch launch = grams(layers);
  int64_t blocks = 0, split_tiles = 0, parts = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const ccp::GramLayer& layer = launch.layer[i];
    const int64_t rows = layers[i].samples, count = layer.split.count;
    const std::string name = "layer " + std::to_string(i);
    expect(name + " is covered", count * layer.split.length >= rows);
    expect(name + " has no empty part", (count - 1) * layer.split.length < rows);
    expect(name + " begins where the one before ends", layer.first_block == blocks &&
                                                           layer.first_split_tile == split_tiles &&
                                                           layer.first_part == parts);
    expect(name + " is packed", (layer.rows.data == nullptr) == (i == 5));
    expect(name + " has packed weights", (layer.weights == nullptr) == (i == 6));
    blocks += layer.tiles * count;
    split_tiles += count > 1 ? layer.tiles : 0;
    parts += count > 1 ? layer.tiles * count : 0;
  }
  expect("all blocks, split tiles and parts are counted",
         launch.blocks == blocks && launch.split_tiles == split_tiles && launch.parts == parts);
  expect("a long layer is split, short ones are not",
         launch.layer[3].split.count > 1 && split_tiles == launch.layer[3].tiles);
  expect("a row of 2048 float32 is packed into as many, and 256 weights",
         launch.packed_rows == 256 * 2048 && launch.packed_weights == 256);
}

void test_gram_tiles() {
  std::vector<int64_t> resnet50;
  const auto append = [&](int64_t count, int64_t width) {
    resnet50.insert(resnet50.end(), count, width);
  };
  append(7, 64), append(8, 128), append(16, 256), append(11, 512), append(7, 1024), append(4, 2048);
  const ccp::GramLaunch all = grams(gram_layers(resnet50, 256));
  expect("all layers of a ResNet-50 take large tiles, not split",
         all.tile == ccp::kLargeGramTile && all.blocks == 969 && all.parts == 0);
  const ccp::GramLaunch widest = grams(gram_layers({2048}, 256));
  expect("one of them takes small tiles, four for each multiprocessor",
         widest.tile == ccp::kSmallGramTile && widest.blocks == 528 && widest.parts == 0);
  const ccp::GramLaunch narrow = grams(gram_layers({64}, 100000));
  expect("one tile is split until it fills the device",
         narrow.blocks > 300 && narrow.blocks <= 528 && narrow.parts == narrow.blocks);
  expect("few rows are not split", grams(gram_layers({64}, 511)).parts == 0);
  expect(
      "no part is too long for 32 bits",
      grams(gram_layers({64}, int64_t{1} << 40)).layer[0].split.length < 2 * ccp::kGramMaximumRows);
}

void test_gram_rows_in_place() {
  alignas(16) static float data[8];
  const auto in_place = [&](ccp::WeightedGramParams params) {
    return ccp::gram_rows_in_place(params, sizeof(float)).data != nullptr;
  };
  ccp::WeightedGramParams params = gram_layers({64}, 10)[0];
  params.a = data;
  expect("aligned rows", in_place(params));
  params.a_sample_stride = 66;
  expect("rows that begin within a unit", !in_place(params));
  params.samples = 1;
  expect("a single row has no stride",
         in_place(params) && ccp::gram_rows_in_place(params, sizeof(float)).stride == 0);
  params.a = data + 1;
  expect("a row that begins within a unit", !in_place(params));
  params.a = data;
  params.samples = 10, params.terms = 3, params.a_term_stride = 64, params.a_sample_stride = 192;
  expect("samples follow on terms", in_place(params));
  params.a_sample_stride = 256;
  expect("samples with gaps", !in_place(params));
  params.sigma_sample_stride = 3, params.sigma_term_stride = 1;
  expect("weights side by side", ccp::gram_weights_in_place(params) != nullptr);
  params.sigma_sample_stride = 1, params.sigma_term_stride = 10;
  expect("weights in another order", ccp::gram_weights_in_place(params) == nullptr);
}

void test_patch_products() {
  ccp::PatchProductParams params{};
  params.left = {nullptr, 64,     {56, 56}, 64 * 56 * 56, 56 * 56,
                 {56, 1}, {3, 3}, {1, 1},   {1, 1},       {1, 1}};
  params.right = params.left;
  params.symmetric = true;
  params.groups = 1;
  params.samples = 32;
  params.positions[0] = params.positions[1] = 56;
  const ccp::PatchLaunch launch = ccp::plan_patch_product(params);
  expect("576 columns have 45 tiles in the upper triangle", launch.tiles == 45);
  expect("few tiles are split until they fill the device", launch.blocks >= 1000);
  params.samples = int64_t{1} << 40;
  expect("parts are counted in 32 bits",
         ccp::plan_patch_product(params).split.length <= ccp::kPatchMaximumRows);
  expect("contiguous maps are read along positions", !ccp::channels_first_in_memory(params.left));
  params.left.channel_stride = 1;
  params.left.position_stride[1] = 64;
  expect("channels-last maps along channels", ccp::channels_first_in_memory(params.left));
}

ccp::PatchProductParams square_gram(int64_t side, int64_t kernel, int64_t stride, int64_t padding) {
  ccp::PatchProductParams params{};
  params.left = {nullptr,
                 64,
                 {side, side},
                 0,
                 0,
                 {0, 0},
                 {kernel, kernel},
                 {stride, stride},
                 {padding, padding},
                 {1, 1}};
  params.right = params.left;
  params.symmetric = true;
  params.groups = params.samples = 1;
  params.positions[0] = params.positions[1] = (side + 2 * padding - kernel) / stride + 1;
  return params;
}

// Every pair of taps sums each pair of positions that its definition names once, and no other.
void test_pieces_of_an_axis() {
  for (const int64_t side : {1, 2, 3, 7, 14}) {
    for (const int64_t kernel : {1, 2, 3, 5}) {
      for (const int64_t stride : {1, 2, 3}) {
        for (const int64_t padding : {0, 1, 4}) {
          if (side + 2 * padding < kernel) continue;
          const ccp::PatchProductParams params = square_gram(side, kernel, stride, padding);
          const ccp::PatchAxis axis = ccp::patch_axis(params, 1);
          const std::string name = "side " + std::to_string(side) + ", kernel " +
                                   std::to_string(kernel) + ", stride " + std::to_string(stride) +
                                   ", padding " + std::to_string(padding);
          for (int64_t p = 0; p < kernel; ++p) {
            for (int64_t q = 0; q < kernel; ++q) {
              std::vector<std::pair<int64_t, int64_t>> expected, found;
              for (int64_t o = 0; o < params.positions[1]; ++o) {
                const int64_t left = o * stride + p - padding, right = o * stride + q - padding;
                if (std::min(left, right) >= 0 && std::max(left, right) < side)
                  expected.push_back({left, right});
              }
              const ccp::PieceRange range = axis.ranges[p * kernel + q];
              for (int i = range.first; i < range.last; ++i)
                for (int64_t t = 0; t < axis.pieces[i].count; ++t)
                  found.push_back(
                      {axis.pieces[i].left + t * stride, axis.pieces[i].right + t * stride});
              expect(name + ": taps " + std::to_string(p) + ", " + std::to_string(q),
                     found == expected);
            }
          }
        }
      }
    }
  }
}

void test_pieces_of_the_plane() {
  const auto work = [](int64_t side) {
    const ccp::PatchProductParams params = square_gram(side, 3, 1, 1);
    const ccp::PatchAxis rows = ccp::patch_axis(params, 0), columns = ccp::patch_axis(params, 1);
    int64_t doubled = 0;
    for (const ccp::AxisPiece& row : rows.pieces) {
      for (const ccp::AxisPiece& column : columns.pieces) {
        const ccp::PieceKind kind = ccp::piece_kind(true, row, column);
        if (kind != ccp::PieceKind::kMirrored)
          doubled += row.count * column.count * (kind == ccp::PieceKind::kFull ? 2 : 1);
      }
    }
    return doubled;
  };
  expect("5 x 7 pieces of a 3x3 window",
         ccp::patch_axis(square_gram(9, 3, 1, 1), 0).pieces.size() == 5 &&
             ccp::patch_axis(square_gram(9, 3, 1, 1), 1).pieces.size() == 7);
  expect("products of 7 x 7 maps", work(7) == 841);
  expect("products of 56 x 56 maps", work(56) == 75076);
}

ccp::CorrelationLaunch correlations(const ccp::PatchProductParams& params) {
  const ccp::PatchAxis axis[] = {ccp::patch_axis(params, 0), ccp::patch_axis(params, 1)};
  expect("the window fits", ccp::fits_correlations(axis, params));
  return ccp::plan_correlations(params, axis, 64);
}

void test_correlations() {
  ccp::PatchProductParams params = square_gram(56, 3, 1, 1);
  params.samples = 256;
  ccp::CorrelationLaunch launch = correlations(params);
  expect("29 pieces of one small tile", launch.tile == 64 && launch.tiles() == 29);
  expect("every tile's stages",
         launch.stages() >= 256 * 37538 / 64 && launch.stages() < 256 * 39106 / 64 + 29);
  expect("equal shares of the line fill the device",
         launch.blocks <= ccp::kTargetBlocks && launch.blocks > ccp::kTargetBlocks * 9 / 10 &&
             launch.blocks * launch.length >= launch.stages());
  expect("pieces pay", ccp::correlations_pay(launch, params, 64));
  params.left.channels = params.right.channels = 200;
  launch = correlations(params);
  expect("9 pieces of three large tiles, 20 of four",
         launch.tile == 128 && launch.tiles() == 9 * 3 + 20 * 4);
  params.left.channels = params.right.channels = 16;
  expect("few channels would leave tiles empty",
         !ccp::correlations_pay(correlations(params), params, 64));
  for (const int64_t channels : {128, 256, 512}) {
    ccp::PatchProductParams alone = square_gram(28, 1, 1, 0);
    alone.left.channels = alone.right.channels = channels;
    alone.samples = 256;
    expect("without a window, too, although the diagonal's tiles are larger",
           ccp::correlations_pay(correlations(alone), alone, 64));
  }
  params.samples = int64_t{1} << 40;
  expect("a block counts positions in 32 bits",
         correlations(params).length <= ccp::kCorrelationMaximumStages);
  params.samples = 1;
  expect("few stages stay together", correlations(square_gram(4, 1, 1, 0)).blocks == 1);
  const ccp::PatchProductParams wide = square_gram(56, 7, 1, 3);
  const ccp::PatchAxis axis[] = {ccp::patch_axis(wide, 0), ccp::patch_axis(wide, 1)};
  expect("a 7x7 window has too many pieces", !ccp::fits_correlations(axis, wide));
}

void test_maps_in_place() {
  alignas(16) char data[32];
  ccp::PatchSource source{data,         64,     {7, 5}, 64 * 35, 1,
                          {64 * 5, 64}, {3, 3}, {1, 1}, {1, 1},  {1, 1}};
  expect("aligned channels-last maps are read in place", ccp::readable_in_place(source, 3, 2));
  source.sample_stride += 4;
  expect("not with samples half a unit apart", !ccp::readable_in_place(source, 3, 2));
  expect("unless there is one", ccp::readable_in_place(source, 1, 2));
  source.sample_stride -= 4;
  source.position_stride[1] = 1;
  expect("not with neighbouring positions", !ccp::readable_in_place(source, 3, 2));
  source.size[1] = 1;
  expect("unless there is one in a row", ccp::readable_in_place(source, 3, 2));
  source.size[1] = 5;
  source.position_stride[1] = 64;
  source.data = data + 2;
  expect("not at another address", !ccp::readable_in_place(source, 3, 2));
  source.data = data;
  source.channels = 60;
  expect("not with half a unit of channels", !ccp::readable_in_place(source, 3, 2));
  expect("four floats are a unit", ccp::readable_in_place(source, 3, 4));
  source.channel_stride = 35;
  expect("not with contiguous positions", !ccp::readable_in_place(source, 3, 4));
  expect("packing rounds the channels up",
         ccp::packed_maps(source, 3, 2, data).sample_stride == 35 * 3 * 64);
}

alignas(16) uint16_t map_data[64];

ccp::MapSimilarityParams similarity_of_maps(int64_t samples, int64_t channels, int64_t positions,
                                            bool symmetric = true, bool channels_last = false) {
  const Sizes strides = channels_last ? Sizes{channels * positions, 1, channels}
                                      : Sizes{channels * positions, positions, 1};
  ccp::MapSimilarityParams params{};
  params.maps = {map_data, map_data, nullptr,
                 layout_of({samples, channels, positions}, strides, strides)};
  params.symmetric = symmetric;
  return params;
}

constexpr ccp::MapDevice kWithoutTallTiles{227 << 10, false}, kHopper{227 << 10, true};

ccp::MapSimilarityLaunch plan_maps(const ccp::MapSimilarityParams& params,
                                   const ccp::MapDevice& device = kWithoutTallTiles,
                                   int element_size = sizeof(uint16_t)) {
  return ccp::plan_map_similarity(params, element_size, device);
}

void test_map_tiles() {
  const auto tile = [](int64_t samples, int64_t channels, int64_t positions,
                       bool symmetric = true) {
    return plan_maps(similarity_of_maps(samples, channels, positions, symmetric)).tile;
  };
  for (const int64_t positions : {1, 49, 196, 784, 3136}) {
    for (const bool symmetric : {true, false}) {
      const std::string name = ", maps of " + std::to_string(positions);
      expect(
          "small tiles for up to 64 channels" + name,
          tile(256, 16, positions, symmetric) == 64 && tile(256, 64, positions, symmetric) == 64);
      for (const int64_t channels : {96, 128, 256, 257, 512, 1024, 2048})
        expect("large tiles for " + std::to_string(channels) + " channels" + name,
               tile(256, channels, positions, symmetric) == 128);
    }
  }
  for (const Sizes& shape : {Sizes{64, 96, 49}, Sizes{96, 257, 36}, Sizes{48, 130, 784}})
    for (const bool symmetric : {true, false})
      expect("large tiles where the GPU's tests expect them",
             tile(shape[0], shape[1], shape[2], symmetric) == 128);
  expect("small tiles on GPUs with less shared memory",
         plan_maps(similarity_of_maps(256, 512, 784), {99 << 10, false}).tile == 64);
  expect("small tiles where large ones would leave multiprocessors idle",
         tile(8, 256, 784) == 64 && tile(1, 1024, 784) == 64);
}

void test_tall_tiles() {
  const auto rows = [](int64_t samples, int64_t channels, int64_t positions, bool symmetric = true,
                       bool channels_last = false, int element_size = 2) {
    return plan_maps(similarity_of_maps(samples, channels, positions, symmetric, channels_last),
                     kHopper, element_size)
        .rows;
  };
  for (const bool symmetric : {true, false}) {
    for (const bool channels_last : {true, false}) {
      for (const int64_t channels : {256, 512, 1024, 2048})
        expect("tall tiles for 28x28 maps, " + std::to_string(channels) + " channels",
               rows(256, channels, 784, symmetric, channels_last) == 256);
      expect("tall tiles for 7x7 maps", rows(256, 1024, 49, symmetric, channels_last) == 256 &&
                                            rows(256, 2048, 49, symmetric, channels_last) == 256);
    }
  }
  expect("tall tiles where the GPU's tests expect them",
         rows(48, 130, 784) == 256 && rows(33, 392, 320) == 256 && rows(200, 256, 256) == 256);
  const ccp::MapSimilarityLaunch pairs = plan_maps(similarity_of_maps(200, 256, 256), kHopper);
  expect("the GPU's tests have blocks of several tiles and samples",
         pairs.units < pairs.tiles && pairs.split.length > 1);
  expect("no tall tiles for one column of them", rows(256, 128, 784) == 128);
  expect("no tall tiles for float32", rows(256, 512, 784, true, false, 4) == 128);
  expect("tall tiles for up to 1024 positions",
         rows(64, 512, 1024) == 256 && rows(64, 512, 1025) == 128);
  const ccp::MapSimilarityLaunch launch = plan_maps(similarity_of_maps(256, 512, 784), kHopper);
  expect("stages of 32 positions", launch.chunks == 25 && launch.last_positions == 16);
  const ccp::MapSimilarityLaunch odd = plan_maps(similarity_of_maps(256, 1024, 49), kHopper);
  expect("tall tiles have odd rows packed", odd.packed && odd.loads == ccp::MapLoads::kRows);
}

void check_tall_units(int64_t side, bool symmetric, bool joined) {
  const int64_t channels = side * 128 - 28;
  const ccp::MapSimilarityParams params = similarity_of_maps(256, channels, 784, symmetric);
  const ccp::MapTiles tiles = ccp::tall_map_tiles(params, joined);
  const ccp::MapSimilarityLaunch launch = ccp::plan_map_similarity(params, 2, tiles, {1, 256});
  const auto maps_from = [&](int64_t block) {
    return std::min<int64_t>(128, channels - block * 128);
  };
  std::set<std::pair<int64_t, int64_t>> blocks;  // of 128 x 128 maps
  std::set<int64_t> indices;
  int64_t loaded = 0, most = 0;
  for (int64_t unit = 0; unit < tiles.units; ++unit) {
    int64_t maps = 0;
    for (int step = 0; step < launch.unit_tiles(symmetric, unit); ++step) {
      const ccp::TileIndex tile = launch.tall_unit(symmetric, unit, step);
      const int64_t index = launch.tall_index(symmetric, tile);
      const ccp::TileIndex same = launch.tile_index(symmetric, index);
      expect("the tile of that number", same.row == tile.row && same.column == tile.column);
      expect("every tile once", indices.insert(index).second && index < tiles.count);
      bool diagonal = false;
      for (int64_t row = 2 * tile.row; row < 2 * tile.row + 2; ++row) {
        if (row >= side || (symmetric && row > tile.column)) continue;
        expect("every block once", blocks.insert({row, tile.column}).second);
        diagonal |= symmetric && row == tile.column;
        maps += maps_from(row);
      }
      maps += diagonal ? 0 : maps_from(tile.column);
    }
    const bool whole = joined && side % 2 == 0 && unit + 1 < tiles.units;
    expect("joined units load equally much", !whole || maps + 28 >= tiles.most);
    loaded += maps;
    most = std::max(most, maps);
  }
  const int64_t expected = symmetric ? side * (side + 1) / 2 : side * side;
  expect("every block", static_cast<int64_t>(blocks.size()) == expected);
  expect("maps loaded", loaded == tiles.loaded && most == tiles.most);
}

void test_tall_units() {
  for (int64_t side = 1; side <= 9; ++side) {
    check_tall_units(side, true, true);
    check_tall_units(side, true, false);
    check_tall_units(side, false, false);
  }
}

void test_map_split() {
  for (const int64_t samples : {1, 2, 37, 256, 1000}) {
    for (const int64_t channels : {1, 64, 130, 512, 2048}) {
      for (const int64_t positions : {1, 49, 784}) {
        const ccp::MapSimilarityLaunch launch =
            plan_maps(similarity_of_maps(samples, channels, positions));
        const ccp::Split& split = launch.split;
        const std::string name = "split of " + std::to_string(samples) + " samples of " +
                                 std::to_string(channels) + "x" + std::to_string(positions);
        expect(name + " covers", split.count * split.length >= samples);
        expect(name + " has no empty part", (split.count - 1) * split.length < samples);
        expect(name + ": every tile of every part has a block",
               launch.blocks == launch.tiles * split.count);
      }
    }
  }
  const auto rounds = [](const ccp::MapSimilarityLaunch& launch) {
    return static_cast<double>(launch.blocks) / (132 * ccp::map_blocks_at_once(launch.tile));
  };
  for (const int64_t channels : {64, 128, 256, 512, 1024, 2048}) {
    const double filled = rounds(plan_maps(similarity_of_maps(256, channels, 784)));
    expect("the last round is nearly full, " + std::to_string(channels) + " channels",
           filled / std::ceil(filled) > 0.9);
  }
}

void test_map_loads() {
  using ccp::MapLoads;
  const ccp::MapSimilarityLaunch whole = plan_maps(similarity_of_maps(256, 256, 784));
  expect("aligned rows are read where they are", whole.loads == MapLoads::kRows && !whole.packed);
  const ccp::MapSimilarityLaunch last = plan_maps(similarity_of_maps(256, 256, 49, true, true));
  expect("and so are channels last", last.loads == MapLoads::kChannelsLast && !last.packed);
  const ccp::MapSimilarityLaunch few = plan_maps(similarity_of_maps(256, 64, 49));
  expect("small tiles read odd rows", few.loads == MapLoads::kUnalignedRows && !few.packed);
  const ccp::MapSimilarityParams odd = similarity_of_maps(256, 256, 49);
  const ccp::MapSimilarityLaunch packed = plan_maps(odd);
  expect("large tiles have them packed", packed.loads == MapLoads::kRows && packed.packed);
  const ccp::ChannelDotLayout layout = ccp::packed_maps(odd, map_data, map_data, 2).maps.layout;
  expect("into whole units", layout.channel.x_stride == 56 && layout.sample.g_stride == 256 * 56);
}

// The parts of `text` between separators.
std::vector<std::string> split(const std::string& text, char separator) {
  std::istringstream stream(text);
  std::vector<std::string> parts;
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// Of "NUMBER,...:NUMBER,...".
std::vector<Sizes> lists_of_numbers(const std::string& text) {
  std::vector<Sizes> lists;
  for (const std::string& list : split(text, ':')) {
    lists.emplace_back();
    for (const std::string& n : split(list, ',')) lists.back().push_back(std::stoll(n));
  }
  return lists;
}

// "BYTES:SIZE,...:STRIDE,..." of one batch of maps: which kernel compares them, in words.
std::string map_kernel(const std::string& maps) {
  const std::vector<Sizes> parts = lists_of_numbers(maps);
  ccp::MapSimilarityParams params{};
  params.maps = {map_data, map_data, nullptr, layout_of(parts[1], parts[2], parts[2])};
  params.symmetric = true;
  const ccp::MapSimilarityLaunch launch = plan_maps(params, kHopper, static_cast<int>(parts[0][0]));
  const char* const loads[] = {"rows", "unaligned rows", "channels last", "strided"};
  return std::to_string(launch.rows) + ' ' +
         (launch.packed ? "packed" : loads[static_cast<int>(launch.loads)]);
}

// A layer "BYTES:SIZE,...:STRIDE,..." of a, and with weights the same of sigma behind it.
ccp::WeightedGramParams gram_layer(const std::vector<Sizes>& parts) {
  const Sizes &sizes = parts[1], &strides = parts[2];
  const bool has_terms = sizes.size() == 3;
  ccp::WeightedGramParams params{};
  params.a = map_data;
  params.samples = sizes.front(), params.channels = sizes.back();
  params.terms = has_terms ? sizes[1] : 1;
  params.a_sample_stride = strides.front(), params.a_channel_stride = strides.back();
  params.a_term_stride = has_terms ? strides[1] : 0;
  if (parts.size() == 3) return params;
  params.sigma = map_data;
  params.sigma_is_double = parts[3][0] == sizeof(double);
  params.sigma_sample_stride = parts[5].front();
  params.sigma_term_stride = has_terms ? parts[5].back() : 0;
  return params;
}

// "BYTES;LAYER;...", those of S first: the kernels that add to it, a comma behind each.
std::string gram_kernels(const std::string& call) {
  const std::vector<std::string> parts = split(call, ';');
  std::vector<ccp::WeightedGramParams> layers;
  int element_size = 0;
  for (size_t i = 1; i < parts.size(); ++i) {
    const std::vector<Sizes> layer = lists_of_numbers(parts[i]);
    element_size = static_cast<int>(layer[0][0]);
    layers.push_back(gram_layer(layer));
  }
  const int count = static_cast<int>(layers.size());
  if (parts[0] != "4") {
    const ccp::GramLaunch launch =
        ccp::plan_weighted_grams(layers.data(), count, element_size, ccp::kDoubleGramTiles);
    return launch.parts > 0 ? "weighted_grams,add_gram_parts of float64," : "weighted_grams,";
  }
  const ccp::GramLaunch launch = ccp::plan_weighted_grams(layers.data(), count, element_size);
  std::string kernels = "weighted_gram_products " + std::to_string(launch.tile);
  kernels += layers[0].sigma != nullptr ? " weighted," : ",";
  if (launch.packed_rows > 0) kernels += "pack_gram_rows,";
  if (launch.packed_weights > 0) kernels += "pack_gram_weights,";
  if (launch.parts > 0) kernels += "add_gram_parts " + std::to_string(launch.tile) + ",";
  return kernels;
}

}  // namespace

// Arguments: none, or "maps" or "grams" and calls, whose kernels are printed.
int main(int argc, char** argv) {
  const auto kernels = argc > 1 && argv[1] == std::string("maps") ? map_kernel : gram_kernels;
  for (int i = 2; i < argc; ++i) std::printf("%s\n", kernels(argv[i]).c_str());
  if (argc > 1) return 0;
  test_map_tiles();
  test_tall_tiles();
  test_tall_units();
  test_map_split();
  test_map_loads();
  test_correlations();
  test_maps_in_place();
  test_pieces_of_an_axis();
  test_pieces_of_the_plane();
  test_grouped_grams();
  test_gram_tiles();
  test_gram_rows_in_place();
  test_patch_products();
  test_layouts();
  test_vector_width();
  test_rows();
  test_moments();
  test_split();
  test_few_long_rows();
  test_many_rows_keep_their_parts();
  test_grid();
  test_tiles();
  return testing::report();
}
