// Launch arithmetic of weighted_gram_ and weighted_grams_: which block adds what. A pure function
// of the layers' shapes, so that it is tested without a GPU and two runs are split alike.
#pragma once

#include "csrc/cuda/launch.h"

namespace ccp {

constexpr int kGramTile = 64;  // a block computes kGramTile x kGramTile elements of one S
constexpr int kGramElements = kGramTile * kGramTile;
constexpr int kGramDepth = 8;  // rows of a in shared memory at a time
constexpr int64_t kGramMinimumRows = 64;
constexpr int kGramLayers = 64;  // of one launch

// Blocks and tiles are numbered through all layers; a layer's first number tells where it begins.
struct GramLayer {
  WeightedGramParams params;
  int64_t tiles;             // of the upper triangle
  Split split;               // of the rows of a
  int64_t first_block;       // one block for each part of each tile
  int64_t first_split_tile;  // counts the tiles of the layers that are split into parts
  int64_t first_part;        // counts the blocks of the same layers
};

// One launch. It reaches the kernel by value, so that no copy to the device is needed; 32764 bytes
// of arguments are allowed.
struct GramLaunch {
  int layers;
  int64_t blocks, split_tiles, parts;
  GramLayer layer[kGramLayers];
};
static_assert(sizeof(GramLaunch) < 32000);

CCP_HD int64_t gram_rows(const WeightedGramParams& params) { return params.samples * params.terms; }

inline int64_t gram_tiles(const WeightedGramParams& params) {
  const int64_t side = ceil_div(params.channels, kGramTile);
  return side * (side + 1) / 2;
}

// Requires 0 < count <= kGramLayers. All parts of all layers are about equally long, so that
// blocks do equal work and about kTargetBlocks of them fill the device.
inline GramLaunch plan_weighted_grams(const WeightedGramParams* params, int count) {
  int64_t tile_rows = 0;
  for (int i = 0; i < count; ++i) tile_rows += gram_tiles(params[i]) * gram_rows(params[i]);
  const int64_t length = std::max(kGramMinimumRows, ceil_div(tile_rows, kTargetBlocks));
  GramLaunch launch{};
  launch.layers = count;
  for (int i = 0; i < count; ++i) {
    const int64_t rows = gram_rows(params[i]), tiles = gram_tiles(params[i]);
    const int64_t part = ceil_div(rows, ceil_div(rows, length));
    const int64_t rounded = ceil_div(part, kGramDepth) * kGramDepth;
    const Split split{ceil_div(rows, rounded), rounded};
    launch.layer[i] = {params[i], tiles, split, launch.blocks, launch.split_tiles, launch.parts};
    launch.blocks += tiles * split.count;
    if (split.count == 1) continue;
    launch.split_tiles += tiles;
    launch.parts += tiles * split.count;
  }
  return launch;
}

}  // namespace ccp
