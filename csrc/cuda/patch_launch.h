// Launch arithmetic of patch_gram_ and patch_cross_: which block computes what. A pure function of
// shapes, so that it is tested without a GPU and two runs are split alike.
#pragma once

#include "csrc/cuda/launch.h"

namespace ccp {

constexpr int kPatchTile = 64;  // a block computes kPatchTile x kPatchTile elements of the product
constexpr int kPatchElements = kPatchTile * kPatchTile;
constexpr int64_t kPatchMinimumRows = 256;
constexpr int64_t kPatchMaximumRows = 1 << 30;  // the kernel counts a part's rows in 32 bits
constexpr int64_t kPatchRowGranule = 16;

struct PatchLaunch {
  int64_t tile_rows, tiles;  // tile rows and tiles of one group's product
  Split split;               // of the rows of P
  int64_t blocks;            // one for each part of each tile of each group
};

inline PatchLaunch plan_patch_product(const PatchProductParams& params) {
  const int64_t rows = ceil_div(params.left.columns(), kPatchTile);
  const int64_t columns = ceil_div(params.right.columns(), kPatchTile);
  const int64_t tiles = params.symmetric ? rows * (rows + 1) / 2 : rows * columns;
  Split split =
      split_work(params.rows(), kPatchMinimumRows, kPatchRowGranule, tiles * params.groups);
  if (split.length > kPatchMaximumRows)
    split = {ceil_div(params.rows(), kPatchMaximumRows), kPatchMaximumRows};
  return {rows, tiles, split, tiles * params.groups * split.count};
}

// Whether neighbouring channels are neighbours in memory, as in channels-last maps.
inline bool channels_first_in_memory(const PatchSource& source) {
  return source.channel_stride == 1 && source.channels > 1 && source.position_stride[1] != 1;
}

}  // namespace ccp
