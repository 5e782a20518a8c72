// The CUDA kernels of patch_gram_ and patch_cross_ for many channels: the correlations of the
// pieces (patch_pieces.h) on the matrix units, and their sum into the output.
//
// Maps lie channels last, so that 16 bytes of neighbouring channels are one copy at every position
// and offset of the window; others are packed so first. A stage in shared memory holds kDepth
// positions of kTile channels of both sides, and its transposing fragment loads give the matrix
// units sums over positions.
//
// What bounds it: a stage of large tiles is 2 * 128^2 operations for each position and 128 * 2
// elements of it, 64 operations a byte in 16 bits. At some 5.5 TB/s from the L2 cache of an H200
// that is 350 TFLOP/s, a little more than a third of the nominal rate; the pieces are a third to a
// fifth of the products by patches of a 3x3 window.
#pragma once

#include "csrc/cuda/channel_tiles.cuh"
#include "csrc/cuda/correlation_launch.h"
#include "csrc/cuda/div_mod.cuh"
#include "csrc/cuda/patch_precision.h"
#include "csrc/cuda/shared.cuh"
#include "csrc/cuda/vec.cuh"

namespace ccp {

template <class T_, int kTile_, PatchPrecision kPrecision_>
struct CorrelationTraits {
  using T = T_;
  static constexpr int kTile = kTile_;
  static constexpr PatchPrecision kPrecision = kPrecision_;
  static constexpr int kThreads = 2 * kTile;
  static constexpr int kStages = 3;
  static constexpr int kDepth = kCorrelationDepth<T>;
  using Panel = ChannelPanel<T, kTile>;             // a row for each position
  static constexpr int kUnit = Panel::kUnit;        // elements
  static constexpr int kLanes = kThreads / kDepth;  // threads that load one position
  static constexpr int kUnitsPerThread = Panel::kRowUnits / kLanes;
  static constexpr int kRows = kTile / 32;  // fragments of 16 rows: a warp has half the rows
  static constexpr int kColumns = 4;        // fragments of 8 columns
  static constexpr int kBlocks = kTile == kLargeTile ? 1 : 3;  // on a multiprocessor
};

template <class Traits>
struct CorrelationShared {
  alignas(16) unsigned char panel[Traits::kStages][2]
                                 [Traits::kDepth * Traits::kTile * sizeof(typename Traits::T)];
};

// The stages of one tile that a block sums.
struct CorrelationTask {
  int piece;
  int64_t group;
  TileIndex tile;
  int64_t first;  // stage, counted from the tile's first
  unsigned stages;
  int64_t slot;
  bool diagonal;  // both sides are the same channels at the same positions
};

// The piece that stage `stage` of the line belongs to.
__device__ __forceinline__ int piece_of_stage(const CorrelationLaunch& launch, int64_t stage) {
  int first = 0, last = launch.pieces();
  while (last - first > 1) {
    const int middle = (first + last) / 2;
    (launch.start[middle].stage <= stage ? first : last) = middle;
  }
  return first;
}

// What lies between stages `stage` and `end` of the line and belongs to one tile.
__device__ __forceinline__ CorrelationTask correlation_task(const CorrelationLaunch& launch,
                                                            int depth, int64_t stage, int64_t end) {
  const int piece = piece_of_stage(launch, stage);
  const int64_t in_piece = stage - launch.start[piece].stage;
  const int64_t stages = launch.tile_stages(piece, depth), tiles = launch.piece_tiles(piece);
  const int64_t tile = in_piece / stages, first = in_piece % stages;
  const int64_t left = stages - first < end - stage ? stages - first : end - stage;
  const TileIndex index = launch.tile_index(piece, tile % tiles);
  return {piece,
          tile / tiles,
          index,
          first,
          static_cast<unsigned>(left),
          launch.slot(stage, launch.start[piece].tile + tile),
          launch.kind(piece) == PieceKind::kSymmetric && index.row == index.column};
}

// One thread's part of filling the stages of a task: some units of one position of each.
template <class Traits>
class CorrelationLoader {
 public:
  using T = typename Traits::T;

  __device__ __forceinline__ CorrelationLoader(const CorrelationLaunch& launch,
                                               const CorrelationTask& task)
      : launch_(launch), task_(task) {
    const AxisPiece &row = launch.row(task.piece), &column = launch.column(task.piece);
    width_ = static_cast<unsigned>(column.count);
    plane_ = static_cast<unsigned>(row.count) * width_;
    const int64_t begin = task.first * Traits::kDepth;
    const int64_t left = launch.positions(task.piece) - begin;
    const int64_t all = static_cast<int64_t>(task.stages) * Traits::kDepth;
    sample_ = begin / plane_;
    skipped_ = static_cast<unsigned>(begin % plane_);
    positions_ = static_cast<unsigned>(left < all ? left : all);
    maps_[0] = origin(launch.left, row.left, column.left, task.tile.row);
    maps_[1] = origin(launch.right, row.right, column.right, task.tile.column);
  }

  __device__ __forceinline__ void load(unsigned stage, CorrelationShared<Traits>& shared) const {
    if (stage < task_.stages) {
      const unsigned position = stage * Traits::kDepth + threadIdx.x / Traits::kLanes;
      const unsigned index = skipped_ + position, samples = index / plane_;
      const unsigned inside = index - samples * plane_, y = inside / width_;
      const bool valid = position < positions_;
      auto& panel = shared.panel[stage % Traits::kStages];
      load_side(launch_.left, 0, task_.tile.row, valid, samples, y, inside - y * width_, panel[0]);
      if (!task_.diagonal)
        load_side(launch_.right, 1, task_.tile.column, valid, samples, y, inside - y * width_,
                  panel[1]);
    }
    commit_copies();
  }

 private:
  __device__ __forceinline__ const T* origin(const CorrelationMaps& maps, int64_t y, int64_t x,
                                             int64_t tile) const {
    return static_cast<const T*>(maps.data) + sample_ * maps.sample_stride +
           task_.group * maps.group_stride + y * maps.position_stride[0] +
           x * maps.position_stride[1] + tile * Traits::kTile;
  }

  __device__ __forceinline__ void load_side(const CorrelationMaps& maps, int side, int64_t tile,
                                            bool valid, unsigned sample, unsigned y, unsigned x,
                                            unsigned char* panel) const {
    const T* from = maps_[side] + sample * maps.sample_stride +
                    y * (maps.stride[0] * maps.position_stride[0]) +
                    x * (maps.stride[1] * maps.position_stride[1]);
    const int64_t channels = maps.channels - tile * Traits::kTile;
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i) {
      const int unit = threadIdx.x % Traits::kLanes + i * Traits::kLanes;
      const bool read = valid && unit * Traits::kUnit < channels;
      copy_async<16>(panel + Traits::Panel::unit(threadIdx.x / Traits::kLanes, unit),
                     read ? from + unit * Traits::kUnit : maps_[side], read);
    }
  }

  const CorrelationLaunch& launch_;
  const CorrelationTask& task_;
  const T* maps_[2];
  int64_t sample_;
  unsigned width_, plane_, skipped_, positions_;
};

// A warp's quarter or eighth of a tile on the matrix units.
template <class Traits>
class CorrelationProduct {
 public:
  using T = typename Traits::T;
  using Panel = typename Traits::Panel;

  // Adds one stage. The matrix units round sums towards zero: a stage's own sum is short, and
  // joins the others by an addition rounded to nearest.
  __device__ __forceinline__ void add_stage(unsigned char* left, unsigned char* right) {
    constexpr int kSteps = Traits::kDepth / kMmaDepth<T>;
    const unsigned rows = Panel::rows_from(first_row());
    const unsigned columns = Panel::columns_from(first_column());
    float stage[Traits::kRows][Traits::kColumns][4] = {};
#pragma unroll(sizeof(T) == 2 ? kSteps : 1)  // more float32 fragments would not fit
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[Traits::kColumns][2], small_b[Traits::kColumns][2];
#pragma unroll
      for (int c = 0; c < Traits::kColumns; c += 2)
        Panel::load_columns(right, columns, c, step, b[c], b[c + 1]);
      split(b, small_b);
#pragma unroll
      for (int r = 0; r < Traits::kRows; ++r) {
        uint32_t a[1][4], small_a[1][4];
        Panel::load_rows(left, rows, r, step, a[0]);
        split(a, small_a);
#pragma unroll
        for (int c = 0; c < Traits::kColumns; ++c)
          multiply(stage[r][c], a[0], small_a[0], b[c], small_b[c]);
      }
    }
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r)
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[r][c][e] += stage[r][c][e];
  }

  // to[kTile][kTile] = the sums.
  __device__ __forceinline__ void write(float* to) const {
    struct alignas(8) Pair {
      float first, second;
    };
    const unsigned lane = threadIdx.x % 32, row = first_row() + lane / 4;
    const unsigned column = first_column() + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r)
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          *reinterpret_cast<Pair*>(to + (row + 16 * r + 4 * e) * Traits::kTile + column + 8 * c) = {
              sums_[r][c][e], sums_[r][c][e + 1]};
  }

 private:
  static constexpr int kWarpsInRow = Traits::kTile / 32;

  static __device__ __forceinline__ unsigned first_row() {
    return threadIdx.x / 32 / kWarpsInRow * (Traits::kTile / 2);
  }
  static __device__ __forceinline__ unsigned first_column() {
    return threadIdx.x / 32 % kWarpsInRow * 32;
  }

  // float32 values as pairs of TF32 values, of which the big ones replace them; or rounded.
  template <int kCount, int kRegisters>
  static __device__ __forceinline__ void split(uint32_t (&values)[kCount][kRegisters],
                                               uint32_t (&small)[kCount][kRegisters]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) {
          const float value = float_from_bits(values[i][r]);
          if constexpr (Traits::kPrecision == PatchPrecision::kExact) {
            const Tf32Pair pair = split_tf32(value);
            values[i][r] = pair.big;
            small[i][r] = pair.small;
          } else {
            values[i][r] = round_to_tf32(value);
          }
        }
      }
    }
  }

  // Three products of pairs keep 20 bits, one keeps 11.
  static __device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&small_a)[4],
                                                  const uint32_t (&b)[2],
                                                  const uint32_t (&small_b)[2]) {
    if constexpr (sizeof(T) == 2) {
      mma_16_bit<T>(sum, a, b);
    } else {
      if constexpr (Traits::kPrecision == PatchPrecision::kExact) {
        mma_tf32(sum, small_a, b);
        mma_tf32(sum, a, small_b);
      }
      mma_tf32(sum, a, b);
    }
  }

  float sums_[Traits::kRows][Traits::kColumns][4] = {};
};

// Writes the sums of every tile over every block's share of its stages to
// slots[slot][kTile][kTile].
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    correlate_pieces(const __grid_constant__ CorrelationLaunch launch, float* slots) {
  auto& shared = dynamic_shared<CorrelationShared<Traits>>();
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const int64_t length = launch.length, all = launch.stages();
    const int64_t end = (block + 1) * length < all ? (block + 1) * length : all;
    for (int64_t stage = block * length; stage < end;) {
      const CorrelationTask task = correlation_task(launch, Traits::kDepth, stage, end);
      const CorrelationLoader<Traits> loader(launch, task);
      CorrelationProduct<Traits> product;
      for (int ahead = 0; ahead < Traits::kStages - 1; ++ahead) loader.load(ahead, shared);
      for (unsigned turn = 0; turn < task.stages; ++turn) {
        wait_for_copies<Traits::kStages - 2>();
        __syncthreads();
        loader.load(turn + Traits::kStages - 1, shared);
        auto& panel = shared.panel[turn % Traits::kStages];
        product.add_stage(panel[0], panel[task.diagonal ? 0 : 1]);
      }
      product.write(slots + task.slot * (Traits::kTile * Traits::kTile));
      __syncthreads();  // before the next task's copies
      stage += task.stages;
    }
  }
}

// The first and the last slot of a tile.
struct SlotRange {
  int64_t first, last;
};

__device__ __forceinline__ SlotRange slots_of(const CorrelationLaunch& launch, int depth, int piece,
                                              int64_t tile_in_piece) {
  const int64_t stages = launch.tile_stages(piece, depth);
  const int64_t stage = launch.start[piece].stage + tile_in_piece * stages;
  const int64_t tile = launch.start[piece].tile + tile_in_piece;
  return {launch.slot(stage, tile), launch.slot(stage + stages - 1, tile)};
}

// Sums the slots of every tile, in their order, into its first.
template <class = void>
__global__ void __launch_bounds__(kBlockThreads)
    sum_correlation_slots(const __grid_constant__ CorrelationLaunch launch, int depth,
                          float* slots) {
  using Floats = Packed<float, 4>;
  const int64_t area = static_cast<int64_t>(launch.tile) * launch.tile;
  const int64_t shares = area / (4 * kBlockThreads);
  for (int64_t block = blockIdx.x; block < launch.tiles() * shares; block += gridDim.x) {
    const int64_t tile = block / shares;
    int piece = 0;
    while (launch.start[piece + 1].tile <= tile) ++piece;
    const SlotRange range = slots_of(launch, depth, piece, tile - launch.start[piece].tile);
    if (range.first == range.last) continue;
    float* at = slots + range.first * area + (block % shares * kBlockThreads + threadIdx.x) * 4;
    Floats sum = load_packed<float, 4>(at);
#pragma unroll 4
    for (int64_t slot = range.first + 1; slot <= range.last; ++slot) {
      const Floats part = load_packed<float, 4>(at + (slot - range.first) * area);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.element[i] += part.element[i];
    }
    store_packed(sum, at);
  }
}

constexpr int kSpreadRows = 8;  // left channels of a block that adds to the output
constexpr int kSpread = 32;     // right ones
constexpr int kSpreadThreads = kSpreadRows * kSpread;

// One block's share of the output: one tap of some left channels, every tap of some right ones.
struct SpreadTask {
  int64_t group, left, right;  // first channels
  int tap;
};

struct SpreadShared {
  // Where the task's channels of each piece begin among the slots, and those of its mirror image.
  int64_t offset[kMaxPieces][2];
  PieceRange range[kMaxWindow][2];  // of rows and of columns, that a right tap sums with task.tap
  // The rows' length keeps neighbouring rows on different memory banks.
  float sum[kSpreadRows][kSpread * kMaxWindow + 4];
};

// Where channels (row, column) of a piece begin; without meaning where they are not computed.
__device__ __forceinline__ int64_t channel_offset(const CorrelationLaunch& launch, int depth,
                                                  int piece, int64_t group, int64_t row,
                                                  int64_t column) {
  const int64_t side = launch.tile;
  const TileIndex tile{row / side, column / side};
  const bool symmetric = launch.kind(piece) == PieceKind::kSymmetric;
  if (launch.kind(piece) == PieceKind::kMirrored || (symmetric && tile.row > tile.column)) return 0;
  const int64_t index = symmetric ? tile.column * (tile.column + 1) / 2 + tile.row
                                  : tile.row * launch.tile_columns + tile.column;
  const SlotRange range = slots_of(launch, depth, piece, group * launch.piece_tiles(piece) + index);
  return (range.first * side + row % side) * side + column % side;
}

__device__ __forceinline__ void find_pieces(const CorrelationLaunch& launch,
                                            const PatchProductParams& params, int depth,
                                            const SpreadTask& task, SpreadShared& shared) {
  for (int piece = threadIdx.x; piece < launch.pieces(); piece += kSpreadThreads) {
    shared.offset[piece][0] =
        channel_offset(launch, depth, piece, task.group, task.left, task.right);
    shared.offset[piece][1] =
        channel_offset(launch, depth, piece, task.group, task.right, task.left);
  }
  const int q = threadIdx.x, height = static_cast<int>(params.right.kernel[0]);
  const int left_width = static_cast<int>(params.left.kernel[1]);
  const int right_width = static_cast<int>(params.right.kernel[1]);
  if (q >= height * right_width) return;
  const bool mirrored = launch.symmetric && task.tap > q;
  const int first = mirrored ? q : task.tap, second = mirrored ? task.tap : q;
  shared.range[q][0] = launch.axis[0].range[first / left_width * height + second / right_width];
  shared.range[q][1] =
      launch.axis[1].range[first % left_width * right_width + second % right_width];
}

// shared.sum = what the task adds. Of a symmetric product, what lies below the diagonal of the
// taps, and of the channels for equal taps, is read as its mirror image.
__device__ __forceinline__ void sum_pieces(const CorrelationLaunch& launch, int taps,
                                           const SpreadTask& task, const float* slots,
                                           SpreadShared& shared) {
  for (int q = 0; q < taps; ++q) {
    const bool same = launch.symmetric && task.tap == q;
    const bool below =
        (launch.symmetric && task.tap > q) || (same && task.left >= task.right + kSpread);
    // Neighbouring threads read neighbouring elements.
    const int row = below ? threadIdx.x % kSpreadRows : threadIdx.x / kSpread;
    const int column = below ? threadIdx.x / kSpreadRows : threadIdx.x % kSpread;
    const bool mirrored = below || (same && task.left + row > task.right + column);
    const int element = mirrored ? column * launch.tile + row : row * launch.tile + column;
    const PieceRange rows = shared.range[q][0], columns = shared.range[q][1];
    float sum = 0;
    for (int i = rows.first; i < rows.last; ++i)
      for (int j = columns.first; j < columns.last; ++j)
        sum += slots[shared.offset[i * launch.axis[1].pieces + j][mirrored] + element];
    shared.sum[row][column * taps + q] = sum;
  }
}

// Adds the correlations of the pieces to the output.
template <class = void>
__global__ void __launch_bounds__(kSpreadThreads)
    add_correlations(const __grid_constant__ CorrelationLaunch launch,
                     const __grid_constant__ PatchProductParams params, int depth,
                     const float* slots) {
  __shared__ SpreadShared shared;
  const int64_t rows = ceil_div(params.left.channels, kSpreadRows);
  const int64_t columns = ceil_div(params.right.channels, kSpread);
  const int64_t left_taps = params.left.kernel[0] * params.left.kernel[1];
  const int64_t right_taps = params.right.kernel[0] * params.right.kernel[1];
  for (int64_t block = blockIdx.x; block < params.groups * rows * columns * left_taps;
       block += gridDim.x) {
    const DivMod tap = div_mod(block, left_taps), column = div_mod(tap.quotient, columns);
    const DivMod row = div_mod(column.quotient, rows);
    const SpreadTask task{row.quotient, row.remainder * kSpreadRows, column.remainder * kSpread,
                          static_cast<int>(tap.remainder)};
    find_pieces(launch, params, depth, task, shared);
    __syncthreads();
    sum_pieces(launch, static_cast<int>(right_taps), task, slots, shared);
    __syncthreads();
    const int64_t channel = task.left + threadIdx.x / kSpread;
    const int64_t left = params.right.channels - task.right;
    const int64_t width = (left < kSpread ? left : kSpread) * right_taps;
    float* out = static_cast<float*>(params.out) + task.group * params.out_group_stride +
                 (channel * left_taps + task.tap) * params.out_row_stride + task.right * right_taps;
    if (channel < params.left.channels)
      for (int64_t i = threadIdx.x % kSpread; i < width; i += kSpread)
        out[i] += shared.sum[threadIdx.x / kSpread][i];
    __syncthreads();  // before the next turn's pieces
  }
}

// Blocks of add_correlations.
inline int64_t spread_blocks(const PatchProductParams& params) {
  return params.groups * ceil_div(params.left.channels, kSpreadRows) *
         ceil_div(params.right.channels, kSpread) * params.left.kernel[0] * params.left.kernel[1];
}

constexpr int kPackSide = 64;  // positions and channels that a block packs

// Copies maps to out[sample][position][group][padded], zeros beyond a group's channels.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    pack_maps(const __grid_constant__ PatchSource source, int64_t samples, int64_t groups,
              int64_t padded, T* out) {
  constexpr int kUnit = 16 / sizeof(T), kUnits = kPackSide / kUnit;
  __shared__ T tile[kPackSide][kPackSide + 4 / sizeof(T)];  // [channel][position]
  const int64_t positions = source.size[0] * source.size[1];
  const int64_t across = ceil_div(positions, kPackSide), deep = ceil_div(padded, kPackSide);
  const bool by_channel = source.channel_stride == 1;  // neighbouring threads: channels
  for (int64_t block = blockIdx.x; block < samples * groups * deep * across; block += gridDim.x) {
    const int64_t first_position = block % across * kPackSide;
    const int64_t first_channel = block / across % deep * kPackSide;
    const int64_t group = block / across / deep % groups, sample = block / across / deep / groups;
    const T* maps = static_cast<const T*>(source.data) + sample * source.sample_stride +
                    group * source.channels * source.channel_stride;
    const auto offset_of = [&](int p) {
      const DivMod at = div_mod(first_position + p, source.size[1]);
      return at.quotient * source.position_stride[0] + at.remainder * source.position_stride[1];
    };
    const auto copy = [&](int c, int p, int64_t offset) {
      const int64_t channel = first_channel + c;
      const bool inside = channel < source.channels && first_position + p < positions;
      tile[c][p] = inside ? maps[channel * source.channel_stride + offset] : T{};
    };
    const int inner = threadIdx.x % kPackSide, outer = threadIdx.x / kPackSide;
    if (by_channel) {
      for (int p = outer; p < kPackSide; p += kBlockThreads / kPackSide)
        copy(inner, p, offset_of(p));
    } else {
      const int64_t offset = offset_of(inner);
#pragma unroll 16
      for (int c = outer; c < kPackSide; c += kBlockThreads / kPackSide) copy(c, inner, offset);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kPackSide * kUnits; i += kBlockThreads) {
      const int p = i / kUnits, c = i % kUnits * kUnit;
      if (first_position + p >= positions || first_channel + c >= padded) continue;
      Packed<T, kUnit> unit;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) unit.element[e] = tile[c + e][p];
      store_packed(unit, out +
                             ((sample * positions + first_position + p) * groups + group) * padded +
                             first_channel + c);
    }
    __syncthreads();  // before the next turn's tile
  }
}

}  // namespace ccp
