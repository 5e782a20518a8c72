// Launch arithmetic of map_similarity; see launch.h.
#pragma once

#include "csrc/cuda/launch.h"
#include "csrc/triangle.h"

namespace ccp {

constexpr int kMapTile = 64;      // a block compares kMapTile with kMapTile maps
constexpr int kMapThreads = 128;  // four warps, each a quarter of the tile
constexpr int kMapStages = 4;     // of the pipeline between global memory and the matrix units
constexpr int kMapRowBytes = 64;  // of each map in a stage
// A block's pipeline fills and drains once; below this many stages that would show.
constexpr int64_t kMapMinimumStages = 16;

// How maps come into shared memory.
enum class MapLoads {
  kRows,          // 16 bytes of positions of one map at a time
  kChannelsLast,  // 16 bytes of maps at one position at a time
  kStrided,       // element by element
};

struct MapSimilarityLaunch {
  MapLoads loads;
  int64_t side;   // tiles along one side of the result
  int64_t tiles;  // of the result, or of its upper triangle
  Split split;    // of the samples
  int64_t blocks;
  unsigned grid;

  CCP_HD TileIndex tile(bool symmetric, int64_t index) const {
    return symmetric ? upper_tile(index) : TileIndex{index / side, index % side};
  }
};

inline MapLoads map_loads(const ChannelDotParams& maps, int element_size) {
  if (vector_width(maps, element_size) == 1) return MapLoads::kStrided;
  return maps.layout.kind == LayoutKind::kRows ? MapLoads::kRows : MapLoads::kChannelsLast;
}

inline MapSimilarityLaunch plan_map_similarity(const MapSimilarityParams& params,
                                               int element_size) {
  const ChannelDotLayout& layout = params.maps.layout;
  const int64_t side = ceil_div(layout.channel.size, kMapTile);
  const int64_t tiles = params.symmetric ? side * (side + 1) / 2 : side * side;
  const int64_t stages = ceil_div(layout.positions * element_size, kMapRowBytes);
  // Half as many blocks as elsewhere: fewer of these fit on a multiprocessor.
  const Split split =
      split_work(layout.sample.size, ceil_div(kMapMinimumStages, stages), 1, 2 * tiles);
  const int64_t blocks = tiles * split.count;
  return {map_loads(params.maps, element_size), side, tiles, split, blocks, grid_size(blocks)};
}

// The moments of all maps of one tensor.
struct MapMomentsLaunch {
  int vector;           // elements per load
  int channel_threads;  // channels-last kernel: threads side by side along the channels
  int64_t blocks;
  unsigned grid;
};

inline MapMomentsLaunch plan_map_moments(const MapSimilarityParams& params, int element_size) {
  const ChannelDotLayout& layout = params.maps.layout;
  const int vector = vector_width(params.maps, element_size);
  if (layout.kind != LayoutKind::kChannelsLast) {
    const int64_t blocks = ceil_div(layout.sample.size * layout.channel.size, kBlockThreads / 32);
    return {vector, 0, blocks, grid_size(blocks)};
  }
  const int64_t loads = ceil_div(layout.channel.size, vector);
  const int64_t width = std::min<int64_t>(next_power_of_two(loads), 32);
  const int64_t blocks = layout.sample.size * ceil_div(loads, width);
  return {vector, static_cast<int>(width), blocks, grid_size(blocks)};
}

}  // namespace ccp
