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
  kRows,           // 16 bytes of positions of one map at a time
  kUnalignedRows,  // the same of maps that begin anywhere, from a boundary of 16 bytes on
  kChannelsLast,   // 16 bytes of maps at one position at a time
  kStrided,        // element by element
};

struct MapSimilarityLaunch {
  MapLoads loads;
  int64_t
      extent[2];  // of the rows' and of the columns' tensor: elements from its first to its last
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
  const bool rows = maps.layout.kind == LayoutKind::kRows;
  if (vector_width(maps, element_size) > 1) return rows ? MapLoads::kRows : MapLoads::kChannelsLast;
  const auto aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  };
  return rows && aligned(maps.x) && aligned(maps.g) ? MapLoads::kUnalignedRows : MapLoads::kStrided;
}

// Of maps in rows: the elements from the tensor's first to its last.
inline int64_t rows_extent(const ChannelDotLayout& layout, int64_t sample_stride,
                           int64_t channel_stride) {
  return (layout.sample.size - 1) * sample_stride + (layout.channel.size - 1) * channel_stride +
         layout.positions;
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
  return {map_loads(params.maps, element_size),
          {rows_extent(layout, layout.sample.x_stride, layout.channel.x_stride),
           rows_extent(layout, layout.sample.g_stride, layout.channel.g_stride)},
          side,
          tiles,
          split,
          blocks,
          grid_size(blocks)};
}

// The moments of all maps of one tensor.
struct MapMomentsLaunch {
  int vector;           // elements per load
  int map_threads;      // rows kernel: threads that read a map, 8 or 32
  int channel_threads;  // channels-last kernel: threads side by side along the channels
  WholeRows whole_x, whole_g;
  int64_t blocks;
  unsigned grid;
};

inline MapMomentsLaunch plan_map_moments_rows(const MapSimilarityParams& params, int element_size) {
  const ChannelDotLayout& layout = params.maps.layout;
  const Dim &sample = layout.sample, &channel = layout.channel;
  MapMomentsLaunch launch{};
  launch.vector = layout.kind == LayoutKind::kRows ? kVectorBytes / element_size : 1;
  const int64_t positions = layout.positions, unit = launch.vector;
  launch.map_threads = launch.vector > 1 && ceil_div(positions + unit - 1, unit) <= 32 ? 8 : 32;
  const auto whole = [&](const void* data, int64_t sample_stride, int64_t channel_stride) {
    return whole_rows(data, rows_extent(layout, sample_stride, channel_stride), positions, unit,
                      element_size);
  };
  launch.whole_x = whole(params.maps.x, sample.x_stride, channel.x_stride);
  launch.whole_g = whole(params.maps.g, sample.g_stride, channel.g_stride);
  launch.blocks = ceil_div(sample.size * channel.size, kBlockThreads / launch.map_threads);
  launch.grid = grid_size(launch.blocks);
  return launch;
}

inline MapMomentsLaunch plan_map_moments(const MapSimilarityParams& params, int element_size) {
  const ChannelDotLayout& layout = params.maps.layout;
  if (layout.kind != LayoutKind::kChannelsLast) return plan_map_moments_rows(params, element_size);
  MapMomentsLaunch launch{};
  launch.vector = vector_width(params.maps, element_size);
  const int64_t loads = ceil_div(layout.channel.size, launch.vector);
  launch.channel_threads = static_cast<int>(std::min<int64_t>(next_power_of_two(loads), 32));
  launch.blocks = layout.sample.size * ceil_div(loads, launch.channel_threads);
  launch.grid = grid_size(launch.blocks);
  return launch;
}

}  // namespace ccp
