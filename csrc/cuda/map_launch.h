// Launch arithmetic of map_similarity; see launch.h.
#pragma once

#include "csrc/cuda/launch.h"
#include "csrc/similarity.h"
#include "csrc/triangle.h"

namespace ccp {

// A block compares a tile of maps with a tile of maps, by twice as many threads.
constexpr int kLargeMapTile = 128, kSmallMapTile = 64;
constexpr int kMapStages = 4;      // of the pipeline between global memory and the matrix units
constexpr int kMapRowBytes = 128;  // of each map in a stage
// Tall tiles, for values of 16 bits on Hopper, are two large ones, one above the other.
constexpr int kTallMapStages = 5;
constexpr int kTallMapRowBytes = 64;

// Blocks on a multiprocessor: both tiles keep eight warps there.
CCP_HD constexpr int map_blocks_at_once(int tile) { return tile == kLargeMapTile ? 1 : 2; }

// Of shared memory, for maps that need not be moved. Some GPUs have less than a large tile takes.
constexpr int64_t map_shared_bytes(int tile) {
  return int64_t{kMapStages} * 2 * tile * (kMapRowBytes + sizeof(MapTerms<float>));
}

// Of the longest maps for tall tiles. There the matrix units alone sum a map's products, 16 at a
// time, and round each sum towards zero (once, we assume). Of 64 such roundings equal maps still
// have a mean squared error below 1e-6, and maps of a large mean a correlation to within 2e-5.
constexpr int64_t kMostTallPositions = 1024;

// How maps come into shared memory.
enum class MapLoads {
  kRows,           // 16 bytes of positions of one map at a time
  kUnalignedRows,  // the same of maps that begin anywhere, from a boundary of 16 bytes on
  kChannelsLast,   // 16 bytes of maps at one position at a time
  kStrided,        // element by element
};

struct MapSimilarityLaunch {
  int rows, tile;  // maps of a tile: rows, columns
  MapLoads loads;
  bool packed;  // the maps are copied, centred, into rows of whole units (packed_maps)
  int64_t
      extent[2];  // of the rows' and of the columns' tensor: elements from its first to its last
  int64_t side;   // tiles side by side in the result
  int64_t tiles;  // of the result, or of its upper triangle
  int64_t units;  // tiles, or pairs of tall ones, that a block compares
  Split split;    // of the samples
  int64_t blocks;
  unsigned grid;
  int chunks;          // stages of a sample
  int last_positions;  // in the last of them
  float per_position;  // map_scale^2 / positions

  CCP_HD bool tall() const { return rows > tile; }

  CCP_HD TileIndex tile_index(bool symmetric, int64_t index) const {
    if (!symmetric) return {index / side, index % side};
    return tall() ? upper_tall_tile(index) : upper_tile(index);
  }

  // Of tall tiles: the step-th tile of a unit, and how many it has.
  CCP_HD TileIndex tall_unit(bool symmetric, unsigned unit, int step) const {
    const unsigned wide = static_cast<unsigned>(side);
    if (!symmetric) return {unit / wide, unit % wide};
    return units < tiles ? upper_tall_unit(unit, step) : upper_tall_tile(unit);
  }
  CCP_HD int unit_tiles(bool symmetric, unsigned unit) const {
    const TileIndex first = tall_unit(symmetric, unit, 0);
    const bool joined = units < tiles && first.column == 2 * first.row;
    return joined && first.column + 1 < side ? 2 : 1;
  }
  CCP_HD int64_t tall_index(bool symmetric, const TileIndex& tile) const {
    return symmetric ? upper_tall_index(tile) : tile.row * side + tile.column;
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

// How the samples are split among blocks with tiles of one size, and a multiprocessor's time: what
// it brings from the cache, in rows of kMapRowBytes.
struct MapSplit {
  Split split;
  double time;
};

// What a block takes beside its stages, in stages: its pipeline fills and drains once, and its sums
// are written and read again.
constexpr int64_t kMapBlockStages = 6;
constexpr int kMapMostRounds = 8;

struct MapTiles {
  int rows, tile;  // maps of a tile: rows, columns
  int64_t side;    // tiles side by side in the result
  int64_t count;   // of the result, or of its upper triangle
  int64_t units;   // tiles, or pairs of tall ones, that a block compares
  int64_t loaded;  // maps that all of these load, those on the diagonal their rows only
  int64_t most;    // that one unit loads
};

inline MapTiles map_tiles(int tile, const MapSimilarityParams& params) {
  const int64_t channels = params.maps.layout.channel.size, side = ceil_div(channels, tile);
  const int64_t count = params.symmetric ? side * (side + 1) / 2 : side * side;
  const int64_t panels = params.symmetric ? 1 : 2;
  return {tile,
          tile,
          side,
          count,
          count,
          panels * channels * side,
          std::min<int64_t>(tile, channels) * (side > 1 ? 2 : panels)};
}

// `joined`: with the two tiles that meet the diagonal in neighbouring columns as one unit, so that
// all units take equally long; or for more units.
inline MapTiles tall_map_tiles(const MapSimilarityParams& params, bool joined) {
  constexpr int64_t kTile = kLargeMapTile;
  const int64_t channels = params.maps.layout.channel.size, side = ceil_div(channels, kTile);
  MapTiles tiles{2 * kTile, kTile, side, 0, 0, 0, 0};
  int64_t diagonal_half = 0;  // what the first tile of a unit on the diagonal loads
  for (int64_t column = 0; column < side; ++column) {
    const int64_t last_row = params.symmetric ? column : side - 1;
    const int64_t columns = std::min(kTile, channels - column * kTile);
    for (int64_t row = 0; row <= last_row; row += 2) {
      const bool diagonal = params.symmetric && row + 2 > column;
      const int64_t end = std::min((std::min(row + 1, last_row) + 1) * kTile, channels);
      const int64_t loaded = end - row * kTile + (diagonal ? 0 : columns);
      const bool joins = joined && diagonal && row < column;
      ++tiles.count;
      tiles.units += !joins;
      tiles.loaded += loaded;
      tiles.most = std::max(tiles.most, loaded + (joins ? diagonal_half : 0));
      if (diagonal) diagonal_half = loaded;
    }
  }
  return tiles;
}

// The split of least time, of those into few rounds of blocks. Tiles on the diagonal take half as
// long as others, so that only the last round takes as long as its longest block.
inline MapSplit split_map_samples(const MapTiles& tiles, const MapSimilarityParams& params,
                                  int element_size) {
  const int64_t samples = params.maps.layout.sample.size;
  const int64_t stages = ceil_div(params.maps.layout.positions * element_size, kMapRowBytes);
  const double average = static_cast<double>(tiles.loaded) / tiles.units;
  const double most = static_cast<double>(tiles.most);
  const double more = static_cast<double>(kMapBlockStages * tiles.rows);
  const int64_t at_once = kMultiprocessors * map_blocks_at_once(tiles.tile);
  const int64_t least = ceil_div(tiles.units, at_once);
  MapSplit best{};
  for (int64_t wanted = least; wanted < least + kMapMostRounds; ++wanted) {
    const int64_t length = ceil_div(samples, std::min(wanted * at_once / tiles.units, samples));
    const int64_t count = ceil_div(samples, length), blocks = tiles.units * count;
    const double rows = static_cast<double>(length * stages);
    const double earlier = static_cast<double>(ceil_div(blocks, at_once) - 1);
    const double sharing = blocks > kMultiprocessors ? map_blocks_at_once(tiles.tile) : 1;
    const double time = sharing * (earlier * (rows * average + more) + rows * most + more);
    if (best.time == 0 || time < best.time) best = {{count, length}, time};
  }
  return best;
}

inline MapSimilarityLaunch plan_map_similarity(const MapSimilarityParams& params, int element_size,
                                               const MapTiles& tiles, const Split& split) {
  const ChannelDotLayout& layout = params.maps.layout;
  const MapLoads loads = map_loads(params.maps, element_size);
  const bool packed =
      tiles.tile == kLargeMapTile && loads != MapLoads::kRows && loads != MapLoads::kChannelsLast;
  const int64_t blocks = tiles.units * split.count;
  const int64_t depth = (tiles.rows > tiles.tile ? kTallMapRowBytes : kMapRowBytes) / element_size;
  const int64_t chunks = ceil_div(layout.positions, depth);
  const float scale = static_cast<float>(params.scale);
  return {tiles.rows,
          tiles.tile,
          packed ? MapLoads::kRows : loads,
          packed,
          {rows_extent(layout, layout.sample.x_stride, layout.channel.x_stride),
           rows_extent(layout, layout.sample.g_stride, layout.channel.g_stride)},
          tiles.side,
          tiles.count,
          tiles.units,
          split,
          blocks,
          grid_size(blocks),
          static_cast<int>(chunks),
          static_cast<int>(layout.positions - (chunks - 1) * depth),
          scale * scale / static_cast<float>(layout.positions)};
}

// What the launch arithmetic asks of a GPU.
struct MapDevice {
  int64_t shared_bytes;  // of shared memory, that a block may have
  bool tall_tiles;       // whether the kernel of tall tiles runs there
};

// Whether tall tiles come into question: with one column of them no two blocks of rows meet.
inline bool suits_tall_tiles(const MapSimilarityParams& params, int element_size) {
  const ChannelDotLayout& layout = params.maps.layout;
  return element_size == 2 && layout.channel.size > kLargeMapTile &&
         layout.positions <= kMostTallPositions;
}

// With the tiles that take the least time.
inline MapSimilarityLaunch plan_map_similarity(const MapSimilarityParams& params, int element_size,
                                               const MapDevice& device) {
  MapTiles tiles = map_tiles(kSmallMapTile, params);
  MapSplit split = split_map_samples(tiles, params, element_size);
  const auto consider = [&](const MapTiles& others) {
    const MapSplit other = split_map_samples(others, params, element_size);
    if (other.time >= split.time) return;
    tiles = others;
    split = other;
  };
  if (map_shared_bytes(kLargeMapTile) <= device.shared_bytes)
    consider(map_tiles(kLargeMapTile, params));
  if (device.tall_tiles && suits_tall_tiles(params, element_size)) {
    consider(tall_map_tiles(params, false));
    consider(tall_map_tiles(params, true));
  }
  return plan_map_similarity(params, element_size, tiles, split.split);
}

// The length of a packed map.
inline int64_t padded_positions(const ChannelDotLayout& layout, int element_size) {
  const int64_t unit = kVectorBytes / element_size;
  return ceil_div(layout.positions, unit) * unit;
}

// The same maps, packed at x and g.
inline MapSimilarityParams packed_maps(MapSimilarityParams params, const void* x, const void* g,
                                       int element_size) {
  ChannelDotLayout& layout = params.maps.layout;
  const int64_t padded = padded_positions(layout, element_size);
  const int64_t sample = layout.channel.size * padded;
  params.maps.x = x;
  params.maps.g = g;
  layout.kind = LayoutKind::kRows;
  layout.sample = {layout.sample.size, sample, sample};
  layout.channel = {layout.channel.size, padded, padded};
  layout.position_dims = 1;
  layout.position[0] = {layout.positions, 1, 1};
  return params;
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
