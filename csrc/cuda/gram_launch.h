// Launch arithmetic of weighted_gram_ and weighted_grams_: which block adds what. A pure function
// of the layers' shapes, strides and alignment, so that it is tested without a GPU and two runs are
// split alike.
#pragma once

#include "csrc/cuda/launch.h"

namespace ccp {

constexpr int kGramLayers = 64;                           // of one launch
constexpr int64_t kGramMaximumRows = 1 << 20;             // of a part, about
constexpr int64_t kGramGranule = 64;                      // whole stages of every kernel
constexpr int kLargeGramTile = 128, kSmallGramTile = 64;  // channels of a tile's side

// How an S is cut.
struct GramTiles {
  int side;
  int blocks_at_once;    // on a multiprocessor, each with a tile
  int64_t minimum_rows;  // of a part: fewer take less time than summing one part more
};

// With float32 sums, by the matrix units.
constexpr GramTiles kLargeGramTiles{kLargeGramTile, 2, 256};
constexpr GramTiles kSmallGramTiles{kSmallGramTile, 4, 256};
// With float64 sums. More parts than run at once, since these take longest by far.
constexpr GramTiles kDoubleGramTiles{kSmallGramTile, 8, 64};

// Rows of a for the matrix units' kernel: channels side by side, in whole units of 16 bytes.
// `data` is null where a copy must be packed first.
struct GramRows {
  const void* data;
  int64_t stride;
};

// Blocks and tiles are numbered through all layers; a layer's first number tells where it begins.
struct GramLayer {
  WeightedGramParams params;
  GramRows rows;
  const float* weights;      // of all rows, side by side; null without, or likewise
  int64_t tiles;             // of the upper triangle
  Split split;               // of the rows of a
  int64_t first_block;       // one block for each part of each tile
  int64_t first_split_tile;  // counts the tiles of the layers that are split into parts
  int64_t first_part;        // counts the blocks of the same layers
  int64_t first_packed_row, first_packed_weight;  // count the elements of packed copies
};

// One launch. It reaches the kernel by value, so that no copy to the device is needed; 32764 bytes
// of arguments are allowed.
struct GramLaunch {
  int tile;  // channels of a tile's side
  int layers;
  int64_t blocks, split_tiles, parts, packed_rows, packed_weights;
  GramLayer layer[kGramLayers];
};
static_assert(sizeof(GramLaunch) < 32000);

CCP_HD int64_t gram_rows(const WeightedGramParams& params) { return params.samples * params.terms; }

inline int64_t gram_tiles(const WeightedGramParams& params, int tile) {
  const int64_t side = ceil_div(params.channels, tile);
  return side * (side + 1) / 2;
}

// The rows of all tiles of all layers.
inline int64_t gram_tile_rows(const WeightedGramParams* params, int count, int tile) {
  int64_t tile_rows = 0;
  for (int i = 0; i < count; ++i) tile_rows += gram_tiles(params[i], tile) * gram_rows(params[i]);
  return tile_rows;
}

// Whether all rows are equally far apart, in the order of samples and terms.
inline bool rows_are_even(const WeightedGramParams& params, int64_t sample_stride,
                          int64_t term_stride) {
  return params.terms == 1 || params.samples == 1 || sample_stride == params.terms * term_stride;
}

inline GramRows gram_rows_in_place(const WeightedGramParams& params, int element_size) {
  const int64_t unit = kVectorBytes / element_size;
  // The stride of a dimension of size 1 carries no meaning; it must not lead off a unit's boundary.
  const int64_t stride = gram_rows(params) == 1 ? 0
                         : params.terms == 1    ? params.a_sample_stride
                                                : params.a_term_stride;
  const bool possible = params.channels % unit == 0 && params.a_channel_stride == 1 &&
                        rows_are_even(params, params.a_sample_stride, params.a_term_stride) &&
                        stride % unit == 0 &&
                        reinterpret_cast<uintptr_t>(params.a) % kVectorBytes == 0;
  return {possible ? params.a : nullptr, stride};
}

inline const float* gram_weights_in_place(const WeightedGramParams& params) {
  const int64_t sample_stride = params.sigma_sample_stride, term_stride = params.sigma_term_stride;
  const int64_t stride = params.terms == 1 ? sample_stride : term_stride;
  const bool possible = !params.sigma_is_double &&
                        rows_are_even(params, sample_stride, term_stride) &&
                        (gram_rows(params) == 1 || stride == 1);
  return possible ? static_cast<const float*>(params.sigma) : nullptr;
}

// What must be packed: rows into whole units of 16 bytes.
inline void plan_gram_copies(int element_size, GramLayer& layer, GramLaunch& launch) {
  const int64_t unit = kVectorBytes / element_size, rows = gram_rows(layer.params);
  layer.rows = gram_rows_in_place(layer.params, element_size);
  layer.weights = gram_weights_in_place(layer.params);
  layer.first_packed_row = launch.packed_rows;
  layer.first_packed_weight = launch.packed_weights;
  if (layer.rows.data == nullptr) {
    layer.rows.stride = ceil_div(layer.params.channels, unit) * unit;
    launch.packed_rows += rows * layer.rows.stride;
  }
  if (layer.weights == nullptr && layer.params.sigma != nullptr) launch.packed_weights += rows;
}

// Into parts of about `length` rows.
inline Split split_gram_rows(int64_t rows, int64_t length) {
  const int64_t part = ceil_div(rows, std::max<int64_t>(rows / length, 1));
  const int64_t rounded = ceil_div(part, kGramGranule) * kGramGranule;
  return {ceil_div(rows, rounded), rounded};
}

// Requires 0 < count <= kGramLayers. A part is no longer than what each place for a block has to do
// on the average, so that no long layer is waited for.
inline GramLaunch plan_weighted_grams(const WeightedGramParams* params, int count, int element_size,
                                      const GramTiles& tiles) {
  const int64_t places = kMultiprocessors * tiles.blocks_at_once;
  const int64_t length = std::clamp(ceil_div(gram_tile_rows(params, count, tiles.side), places),
                                    tiles.minimum_rows, kGramMaximumRows);
  GramLaunch launch{};
  launch.tile = tiles.side;
  launch.layers = count;
  for (int i = 0; i < count; ++i) {
    GramLayer& layer = launch.layer[i];
    layer.params = params[i];
    layer.tiles = gram_tiles(params[i], tiles.side);
    layer.split = split_gram_rows(gram_rows(params[i]), length);
    layer.first_block = launch.blocks;
    layer.first_split_tile = launch.split_tiles;
    layer.first_part = launch.parts;
    launch.blocks += layer.tiles * layer.split.count;
    if (layer.split.count > 1) {
      launch.split_tiles += layer.tiles;
      launch.parts += layer.tiles * layer.split.count;
    }
    plan_gram_copies(element_size, layer, launch);
  }
  return launch;
}

// A large tile takes about this many times as long as a small one: four times the products, but
// only twice the loads.
constexpr int64_t kLargeOverSmall = 3;

// With the tiles that take less time: a multiprocessor's share of them, and the last of them, which
// it waits for.
inline GramLaunch plan_weighted_grams(const WeightedGramParams* params, int count,
                                      int element_size) {
  const auto plan = [&](const GramTiles& tiles) {
    return plan_weighted_grams(params, count, element_size, tiles);
  };
  const auto time = [&](const GramLaunch& launch) {
    int64_t longest = 0;
    for (int i = 0; i < count; ++i)
      longest = std::max(longest, std::min(launch.layer[i].split.length, gram_rows(params[i])));
    return gram_tile_rows(params, count, launch.tile) + kMultiprocessors * longest;
  };
  const GramLaunch large = plan(kLargeGramTiles), small = plan(kSmallGramTiles);
  return kLargeOverSmall * time(large) < time(small) ? large : small;
}

// Tells the layers whose rows or weights are packed where they will be.
inline void place_packed_copies(const void* rows, const float* weights, int element_size,
                                GramLaunch& launch) {
  for (int i = 0; i < launch.layers; ++i) {
    GramLayer& layer = launch.layer[i];
    if (layer.rows.data == nullptr)
      layer.rows.data = static_cast<const char*>(rows) + layer.first_packed_row * element_size;
    if (layer.weights == nullptr && layer.params.sigma != nullptr)
      layer.weights = weights + layer.first_packed_weight;
  }
}

}  // namespace ccp
