// Launch arithmetic of the patch products by pieces (patch_pieces.h): which block sums what. Pure
// functions of shapes and strides, so that they are tested without a GPU and two runs are split
// alike.
//
// A piece has tiles of channels x channels; each tile sums kCorrelationDepth<T> positions after
// kCorrelationDepth<T> positions: its stages. The stages of all tiles of all pieces form one line,
// which is cut into equal lengths, one for each block, whatever the pieces' sizes.
#pragma once

#include "csrc/cuda/patch_launch.h"
#include "csrc/patch_pieces.h"
#include "csrc/triangle.h"

namespace ccp {

constexpr int kCorrelationRowBytes = 128;
template <class T>
constexpr int kCorrelationDepth = kCorrelationRowBytes / sizeof(T);  // positions in a stage

constexpr int kLargeTile = 128, kSmallTile = 64;  // channels
constexpr int kMaxAxisPieces = 32;
constexpr int kMaxPieces = 256;
constexpr int kMaxTaps = 7;     // of the window along one axis
constexpr int kMaxWindow = 25;  // taps of the window
// A block's pipeline fills and drains once; below this many stages that would show.
constexpr int64_t kCorrelationMinimumStages = 8;
constexpr int64_t kCorrelationMaximumStages = 1 << 24;  // positions are counted in 32 bits

// Maps with neighbouring channels side by side, aligned to 16 bytes like every stride.
struct CorrelationMaps {
  const void* data;
  int64_t sample_stride, group_stride, position_stride[2];
  int64_t channels;   // of a group
  int64_t stride[2];  // of the window's
};

struct PieceStart {
  int64_t stage;  // of the piece's first tile, in the line of all stages
  int64_t tile;   // counting the tiles of the pieces before
};

struct CorrelationAxis {
  int pieces;
  AxisPiece piece[kMaxAxisPieces];
  PieceRange range[kMaxTaps * kMaxTaps];
};

struct CorrelationLaunch {
  CorrelationMaps left, right;
  bool symmetric;
  int64_t groups, samples;
  int tile;                         // channels of a tile's side
  int64_t tile_rows, tile_columns;  // of one group
  CorrelationAxis axis[2];
  PieceStart start[kMaxPieces + 1];  // the last one is where all pieces end
  int64_t length;                    // stages of a block
  int64_t blocks;

  CCP_HD int pieces() const { return axis[0].pieces * axis[1].pieces; }
  CCP_HD const AxisPiece& row(int piece) const { return axis[0].piece[piece / axis[1].pieces]; }
  CCP_HD const AxisPiece& column(int piece) const { return axis[1].piece[piece % axis[1].pieces]; }
  CCP_HD int64_t tiles() const { return start[pieces()].tile; }
  CCP_HD int64_t stages() const { return start[pieces()].stage; }
  CCP_HD PieceKind kind(int piece) const {
    return piece_kind(symmetric, row(piece), column(piece));
  }

  CCP_HD int64_t positions(int piece) const {
    return samples * row(piece).count * column(piece).count;
  }
  // Of one group of a piece.
  CCP_HD int64_t piece_tiles(int piece) const {
    const PieceKind needed = kind(piece);
    if (needed == PieceKind::kMirrored) return 0;
    return needed == PieceKind::kFull ? tile_rows * tile_columns : tile_rows * (tile_rows + 1) / 2;
  }
  CCP_HD int64_t tile_stages(int piece, int depth) const {
    return ceil_div(positions(piece), depth);
  }
  CCP_HD TileIndex tile_index(int piece, int64_t index) const {
    return kind(piece) == PieceKind::kSymmetric
               ? upper_tile(index)
               : TileIndex{index / tile_columns, index % tile_columns};
  }
  // A tile's sums over the stages of one block go to a slot of their own: blocks and tiles both
  // only grow along the line. The first slot of a tile is that of its first stage.
  CCP_HD int64_t slot(int64_t stage, int64_t tile) const { return stage / length + tile; }
  CCP_HD int64_t slots() const { return blocks + tiles(); }
};
static_assert(sizeof(CorrelationLaunch) < 32000);  // it reaches the kernels by value

inline bool fits_correlations(const PatchAxis (&axis)[2], const PatchProductParams& params) {
  for (int dim = 0; dim < 2; ++dim)
    if (axis[dim].pieces.size() > kMaxAxisPieces || params.left.kernel[dim] > kMaxTaps)
      return false;
  return axis[0].pieces.size() * axis[1].pieces.size() <= kMaxPieces &&
         params.left.kernel[0] * params.left.kernel[1] <= kMaxWindow;
}

inline CorrelationAxis correlation_axis(const PatchAxis& axis) {
  CorrelationAxis copy{};
  copy.pieces = static_cast<int>(axis.pieces.size());
  std::copy(axis.pieces.begin(), axis.pieces.end(), copy.piece);
  std::copy(axis.ranges.begin(), axis.ranges.end(), copy.range);
  return copy;
}

// Without the maps' addresses and strides, which packing may change. Requires fits_correlations.
inline CorrelationLaunch plan_correlations(const PatchProductParams& params,
                                           const PatchAxis (&axis)[2], int depth) {
  CorrelationLaunch launch{};
  launch.symmetric = params.symmetric;
  launch.groups = params.groups;
  launch.samples = params.samples;
  const int64_t rows = params.left.channels, columns = params.right.channels;
  launch.tile = std::max(rows, columns) > kSmallTile ? kLargeTile : kSmallTile;
  launch.tile_rows = ceil_div(rows, launch.tile);
  launch.tile_columns = ceil_div(columns, launch.tile);
  for (int dim = 0; dim < 2; ++dim) launch.axis[dim] = correlation_axis(axis[dim]);
  for (int piece = 0; piece < launch.pieces(); ++piece) {
    const int64_t tiles = params.groups * launch.piece_tiles(piece);
    launch.start[piece + 1] = {launch.start[piece].stage + tiles * launch.tile_stages(piece, depth),
                               launch.start[piece].tile + tiles};
  }
  // Every multiprocessor runs one block with a large tile at a time, several with a small one. Two
  // rounds of equal blocks: more would write more slots, fewer leave GPUs of other sizes idle.
  const int64_t wanted = launch.tile == kLargeTile ? kTargetBlocks / 4 : kTargetBlocks;
  launch.length = std::clamp(ceil_div(launch.stages(), wanted), kCorrelationMinimumStages,
                             kCorrelationMaximumStages);
  launch.blocks = ceil_div(launch.stages(), launch.length);
  return launch;
}

// Whether the maps can be read where they are; otherwise they are packed into packed_maps.
inline bool readable_in_place(const PatchSource& source, int64_t samples, int element_size) {
  const int64_t unit = kVectorBytes / element_size;
  // The stride of a dimension of size 1 carries no meaning.
  const auto in_units = [unit](int64_t size, int64_t stride) {
    return size == 1 || stride % unit == 0;
  };
  return source.channel_stride == 1 && source.channels % unit == 0 &&
         reinterpret_cast<uintptr_t>(source.data) % kVectorBytes == 0 &&
         in_units(samples, source.sample_stride) &&
         in_units(source.size[0], source.position_stride[0]) &&
         in_units(source.size[1], source.position_stride[1]);
}

inline CorrelationMaps maps_in_place(const PatchSource& source) {
  return {source.data,     source.sample_stride,
          source.channels, {source.position_stride[0], source.position_stride[1]},
          source.channels, {source.stride[0], source.stride[1]}};
}

// [samples][positions][groups][channels rounded up to whole units].
inline int64_t padded_channels(const PatchSource& source, int element_size) {
  const int64_t unit = kVectorBytes / element_size;
  return ceil_div(source.channels, unit) * unit;
}

inline CorrelationMaps packed_maps(const PatchSource& source, int64_t groups, int element_size,
                                   const void* data) {
  const int64_t padded = padded_channels(source, element_size), position = groups * padded;
  return {data,
          source.size[0] * source.size[1] * position,
          padded,
          {source.size[1] * position, position},
          source.channels,
          {source.stride[0], source.stride[1]}};
}

// A multiplication by patches takes at least this many times as long as one by pieces. Counted in
// the machine code, for each instruction of the matrix units: by patches 15 in float32 and 62 in 16
// bits, by pieces at most 8 and 9.
constexpr double kPatchesOverPieces = 1.4;

// Whether the pieces take less time than the patches, tiles counted in full.
inline bool correlations_pay(const CorrelationLaunch& launch, const PatchProductParams& params,
                             int depth) {
  const PatchLaunch patches = plan_patch_product(params);
  const double by_pieces = static_cast<double>(launch.stages()) * depth * launch.tile * launch.tile;
  const double by_patches = static_cast<double>(patches.tiles * params.groups) * kPatchElements *
                            static_cast<double>(params.rows());
  return by_pieces <= kPatchesOverPieces * by_patches;
}

}  // namespace ccp
