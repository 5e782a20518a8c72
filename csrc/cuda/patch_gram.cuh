// The CUDA kernels of patch_gram_ and patch_cross_ for few channels, float64 outputs and large
// windows (the others: patch_correlation.cuh): the matrix P of patches is formed tile by tile in
// shared memory. float32 outputs come from the matrix units, float64 ones from multiply-adds.
#pragma once

#include "csrc/cuda/div_mod.cuh"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/patch_launch.h"
#include "csrc/cuda/patch_precision.h"
#include "csrc/cuda/vec.cuh"
#include "csrc/triangle.h"

namespace ccp {

// kChannelsFirst: neighbouring threads read neighbouring channels, otherwise neighbouring
// positions.
template <class T_, class Acc_, bool kChannelsFirst_, PatchPrecision kPrecision_>
struct PatchTraits {
  using T = T_;
  using Acc = Acc_;
  static constexpr bool kChannelsFirst = kChannelsFirst_;
  static constexpr PatchPrecision kPrecision = kPrecision_;
  static constexpr bool kMatrixUnits = sizeof(Acc) == sizeof(float);
  static constexpr int kThreads = kMatrixUnits ? 128 : 256;
  static constexpr int kDepth = kMatrixUnits ? 16 : 8;  // rows of P at a time
  static constexpr int kWidth = kThreads / kDepth;      // columns of P that the block loads at once
  static constexpr int kLoads = kPatchTile / kWidth;
};

// One column of P: where its elements lie relative to those of the window's first element.
struct PatchColumn {
  int64_t offset;
  int y, x;
};

constexpr int kNowhere = 1 << 30;  // a coordinate beyond every map

// Columns are taken in an order that suits the memory: as in the output, or with the channel
// running fastest. `number` is the one in the output.
struct ColumnNumber {
  int64_t channel, tap, number;  // tap: kernel row and column in one
};

template <bool kChannelsFirst>
__device__ __forceinline__ ColumnNumber column_number(const PatchSource& source, int64_t column) {
  const int64_t taps = source.kernel[0] * source.kernel[1];
  if (!kChannelsFirst) {
    const DivMod at = div_mod(column, taps);
    return {at.quotient, at.remainder, column};
  }
  const DivMod at = div_mod(column, source.channels);
  return {at.remainder, at.quotient, at.remainder * taps + at.quotient};
}

template <bool kChannelsFirst>
__device__ __forceinline__ PatchColumn patch_column(const PatchSource& source, int64_t group,
                                                    int64_t column) {
  if (column >= source.columns()) return {0, kNowhere, kNowhere};
  const ColumnNumber number = column_number<kChannelsFirst>(source, column);
  const DivMod tap = div_mod(number.tap, source.kernel[1]);
  const int64_t y = tap.quotient * source.dilation[0], x = tap.remainder * source.dilation[1];
  const int64_t channel = group * source.channels + number.channel;
  return {channel * source.channel_stride + y * source.position_stride[0] +
              x * source.position_stride[1],
          static_cast<int>(y), static_cast<int>(x)};
}

// Which part of which tile of which group a block computes. Rows of P are counted from the first of
// output position `position` of sample `sample`: within a part 32 bits are enough.
struct PatchTask {
  int64_t group, sample;
  unsigned position, rows;
  TileIndex tile;
  bool diagonal;  // the tile's rows and columns are the same columns of P
};

__device__ __forceinline__ PatchTask patch_task(const PatchProductParams& params,
                                                const PatchLaunch& launch, int64_t block) {
  const DivMod part = div_mod(block, launch.tiles * params.groups);
  const DivMod group = div_mod(part.remainder, launch.tiles);
  const DivMod rectangular = div_mod(group.remainder, launch.tile_rows);
  const int64_t begin = part.quotient * launch.split.length, left = params.rows() - begin;
  const DivMod start = div_mod(begin, params.positions[0] * params.positions[1]);
  const TileIndex tile = params.symmetric ? upper_tile(group.remainder)
                                          : TileIndex{rectangular.remainder, rectangular.quotient};
  return {group.quotient,
          start.quotient,
          static_cast<unsigned>(start.remainder),
          static_cast<unsigned>(left < launch.split.length ? left : launch.split.length),
          tile,
          params.symmetric && tile.row == tile.column};
}

// Where an output lies: its sample, and its row and column in the map.
struct OutputPosition {
  int64_t sample;
  int y, x;
};

__device__ __forceinline__ OutputPosition output_position(const PatchProductParams& params,
                                                          const PatchTask& task, unsigned row) {
  const unsigned width = static_cast<unsigned>(params.positions[1]);
  const unsigned plane = static_cast<unsigned>(params.positions[0]) * width;
  const unsigned position = task.position + row, samples = position / plane;
  const unsigned inside = position - samples * plane, y = inside / width;
  return {task.sample + samples, static_cast<int>(y), static_cast<int>(inside - y * width)};
}

// One row of P: where the window's first element lies.
__device__ __forceinline__ PatchColumn patch_row(const PatchSource& source,
                                                 const OutputPosition& at) {
  const int y = at.y * static_cast<int>(source.stride[0]) - static_cast<int>(source.padding[0]);
  const int x = at.x * static_cast<int>(source.stride[1]) - static_cast<int>(source.padding[1]);
  return {at.sample * source.sample_stride + y * source.position_stride[0] +
              x * source.position_stride[1],
          y, x};
}

// Products on the matrix units. A warp computes 32 x 32 elements of the tile.
template <class Traits>
class MatrixUnitProduct {
 public:
  using T = typename Traits::T;
  // One row holds kDepth elements of one column of P; padded by 4 words, so that the lanes of a
  // fragment's load meet different memory banks.
  static constexpr int kWords = Traits::kDepth * sizeof(T) / sizeof(uint32_t);
  using Panel = uint32_t[kPatchTile][kWords + 4];
  struct Stage {
    Panel left, right;
  };

  static __device__ __forceinline__ void store(Panel& panel, int column, int depth, T value) {
    reinterpret_cast<T*>(panel[column])[depth] = value;
  }

  // Each short chain of products starts at zero and is then added, rounded to nearest: the units'
  // own accumulation truncates, which would bias long sums.
  __device__ __forceinline__ void multiply(const Panel& left, const Panel& right) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1  // more would not fit into the registers
    for (int word = 0; word < kWords; word += 8) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          a[i][r] = left[first_row() + 16 * i + g + 8 * (r % 2)][word + t + 4 * (r / 2)];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) b[j][r] = right[first_column() + 8 * j + g][word + t + 4 * r];
      add_products(a, b);
    }
  }

  // Calls use(row, column, value) for this thread's elements of the tile.
  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          use(first_row() + 16 * i + g + 8 * (e / 2), first_column() + 8 * j + 2 * t + e % 2,
              sums_[i][j][e]);
  }

 private:
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 64 * 32; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % 2 * 32; }

  __device__ __forceinline__ void add_products(const uint32_t (&a)[2][4],
                                               const uint32_t (&b)[4][2]) {
    if constexpr (sizeof(T) == 2) {
      add_each([&](int i, int j, float (&c)[4]) { mma_16_bit<T>(c, a[i], b[j]); });
    } else {
      uint32_t a_big[2][4], b_big[4][2], a_small[2][4], b_small[4][2];
      split(a, a_big, a_small);
      split(b, b_big, b_small);
      add_each([&](int i, int j, float (&c)[4]) {
        if constexpr (Traits::kPrecision == PatchPrecision::kExact) {
          mma_tf32(c, a_small[i], b_big[j]);
          mma_tf32(c, a_big[i], b_small[j]);
        }
        mma_tf32(c, a_big[i], b_big[j]);
      });
    }
  }

  template <class Multiply>
  __device__ __forceinline__ void add_each(Multiply multiply_add) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float c[4] = {};
        multiply_add(i, j, c);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[i][j][e] += c[e];
      }
    }
  }

  template <int kRows, int kRegisters>
  static __device__ __forceinline__ void split(const uint32_t (&bits)[kRows][kRegisters],
                                               uint32_t (&big)[kRows][kRegisters],
                                               uint32_t (&small)[kRows][kRegisters]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        const float value = float_from_bits(bits[i][r]);
        if constexpr (Traits::kPrecision == PatchPrecision::kExact) {
          const Tf32Pair pair = split_tf32(value);
          big[i][r] = pair.big;
          small[i][r] = pair.small;
        } else {
          big[i][r] = round_to_tf32(value);
        }
      }
    }
  }

  float sums_[2][4][4] = {};
};

// Products by multiply-adds in float64. A thread computes 4 x 4 elements of the tile.
template <class Traits>
class ScalarProduct {
 public:
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using Panel = Acc[kPatchTile][Traits::kDepth + 1];
  struct Stage {
    Panel left, right;
  };

  static __device__ __forceinline__ void store(Panel& panel, int column, int depth, T value) {
    panel[column][depth] = static_cast<Acc>(widen(value));
  }

  __device__ __forceinline__ void multiply(const Panel& left, const Panel& right) {
    const int line = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll
    for (int depth = 0; depth < Traits::kDepth; ++depth) {
      Acc rows[4], columns[4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        rows[s] = left[line + 16 * s][depth];
        columns[s] = right[column + 16 * s][depth];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[r][c] += rows[r] * columns[c];
    }
  }

  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        use(static_cast<int>(threadIdx.x) / 16 + 16 * r,
            static_cast<int>(threadIdx.x) % 16 + 16 * c, sums_[r][c]);
  }

 private:
  Acc sums_[4][4] = {};
};

template <class Traits, bool kMatrixUnits>
struct ProductOf;
template <class Traits>
struct ProductOf<Traits, true> {
  using type = MatrixUnitProduct<Traits>;
};
template <class Traits>
struct ProductOf<Traits, false> {
  using type = ScalarProduct<Traits>;
};
template <class Traits>
using PatchProduct = typename ProductOf<Traits, Traits::kMatrixUnits>::type;

// A block's shared memory: the tile's columns; two stages of P, then the finished tile.
template <class Traits>
struct PatchShared {
  PatchColumn left[kPatchTile], right[kPatchTile];
  union {
    typename PatchProduct<Traits>::Stage stage[2];
    typename Traits::Acc tile[kPatchTile][kPatchTile + 1];
  };
};

// This thread's share of kDepth rows of P, on its way from global memory.
template <class Traits>
struct StagedPatches {
  typename Traits::T left[Traits::kLoads], right[Traits::kLoads];
};

// A thread loads one row of P, every kWidth-th column.
template <class Traits>
__device__ __forceinline__ int load_depth() {
  return Traits::kChannelsFirst ? threadIdx.x / Traits::kWidth : threadIdx.x % Traits::kDepth;
}

template <class Traits>
__device__ __forceinline__ int load_column(int load) {
  const int first =
      Traits::kChannelsFirst ? threadIdx.x % Traits::kWidth : threadIdx.x / Traits::kDepth;
  return first + load * Traits::kWidth;
}

template <class Traits>
__device__ __forceinline__ void read_side(const PatchSource& source, const PatchColumn& row,
                                          const PatchColumn (&columns)[kPatchTile],
                                          typename Traits::T (&staged)[Traits::kLoads]) {
  const auto* data = static_cast<const typename Traits::T*>(source.data) + row.offset;
  const unsigned height = static_cast<unsigned>(source.size[0]);
  const unsigned width = static_cast<unsigned>(source.size[1]);
#pragma unroll
  for (int load = 0; load < Traits::kLoads; ++load) {
    const PatchColumn column = columns[load_column<Traits>(load)];
    const bool inside = static_cast<unsigned>(row.y + column.y) < height &&
                        static_cast<unsigned>(row.x + column.x) < width;
    staged[load] = inside ? data[column.offset] : typename Traits::T{};
  }
}

// Rows of the task's part from `first` on; zeros beyond its last.
template <class Traits>
__device__ __forceinline__ StagedPatches<Traits> read_patches(const PatchProductParams& params,
                                                              const PatchTask& task,
                                                              const PatchShared<Traits>& shared,
                                                              unsigned first) {
  StagedPatches<Traits> staged = {};
  const unsigned row = first + load_depth<Traits>();
  if (row >= task.rows) return staged;
  const OutputPosition at = output_position(params, task, row);
  read_side<Traits>(params.left, patch_row(params.left, at), shared.left, staged.left);
  if (!task.diagonal)
    read_side<Traits>(params.right, patch_row(params.right, at), shared.right, staged.right);
  return staged;
}

template <class Traits>
__device__ __forceinline__ void find_columns(const PatchProductParams& params,
                                             const PatchTask& task, PatchShared<Traits>& shared) {
  for (int i = threadIdx.x; i < 2 * kPatchTile; i += Traits::kThreads) {
    const int column = i % kPatchTile;
    if (i < kPatchTile) {
      shared.left[column] = patch_column<Traits::kChannelsFirst>(
          params.left, task.group, task.tile.row * kPatchTile + column);
    } else {
      shared.right[column] = patch_column<Traits::kChannelsFirst>(
          params.right, task.group, task.tile.column * kPatchTile + column);
    }
  }
}

// One part of one tile. Rows are read while the ones before them are multiplied; with two stages
// one barrier a step is enough. On the diagonal one panel serves as both.
template <class Traits>
__device__ __forceinline__ void multiply_patches(const PatchProductParams& params,
                                                 const PatchTask& task, PatchShared<Traits>& shared,
                                                 PatchProduct<Traits>& product) {
  using Product = PatchProduct<Traits>;
  const int depth = load_depth<Traits>();
  StagedPatches<Traits> staged = read_patches<Traits>(params, task, shared, 0);
  int turn = 0;
  for (unsigned first = 0; first < task.rows; first += Traits::kDepth, turn ^= 1) {
    typename Product::Stage& stage = shared.stage[turn];
#pragma unroll
    for (int load = 0; load < Traits::kLoads; ++load) {
      Product::store(stage.left, load_column<Traits>(load), depth, staged.left[load]);
      if (!task.diagonal)
        Product::store(stage.right, load_column<Traits>(load), depth, staged.right[load]);
    }
    __syncthreads();
    if (first + Traits::kDepth < task.rows)
      staged = read_patches<Traits>(params, task, shared, first + Traits::kDepth);
    product.multiply(stage.left, task.diagonal ? stage.left : stage.right);
  }
}

// Adds a finished tile to the output; a symmetric product's upper triangle and its mirror image.
template <class Traits>
__device__ __forceinline__ void add_patch_tile(
    const PatchProductParams& params, const PatchTask& task,
    const typename Traits::Acc (&values)[kPatchTile][kPatchTile + 1]) {
  constexpr bool kChannelsFirst = Traits::kChannelsFirst;
  auto* out = static_cast<typename Traits::Acc*>(params.out) + task.group * params.out_group_stride;
  const int64_t i0 = task.tile.row * kPatchTile, j0 = task.tile.column * kPatchTile;
  for (int e = threadIdx.x; e < kPatchElements; e += Traits::kThreads) {
    const int r = e / kPatchTile, c = e % kPatchTile;
    const int64_t i = i0 + r, j = j0 + c;
    if (i >= params.left.columns() || j >= params.right.columns()) continue;
    if (params.symmetric && i > j) continue;
    const int64_t row = column_number<kChannelsFirst>(params.left, i).number;
    const int64_t column = column_number<kChannelsFirst>(params.right, j).number;
    out[row * params.out_row_stride + column] += values[r][c];
  }
  if (!params.symmetric) return;
  for (int e = threadIdx.x; e < kPatchElements; e += Traits::kThreads) {
    const int r = e / kPatchTile, c = e % kPatchTile;  // neighbouring threads: neighbouring rows
    const int64_t i = i0 + c, j = j0 + r;
    if (i >= j || j >= params.right.columns()) continue;
    const int64_t row = column_number<kChannelsFirst>(params.left, i).number;
    const int64_t column = column_number<kChannelsFirst>(params.right, j).number;
    out[column * params.out_row_stride + row] += values[c][r];
  }
}

// One block computes one part of one tile. The only part of a tile is added to the output; one of
// several goes to partial[part, group, tile, kPatchTile, kPatchTile], which add_patch_parts sums.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2 * kBlockThreads / Traits::kThreads)
    patch_product(const __grid_constant__ PatchProductParams params,
                  const __grid_constant__ PatchLaunch launch, void* partial) {
  using Acc = typename Traits::Acc;
  __shared__ PatchShared<Traits> shared;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const PatchTask task = patch_task(params, launch, block);
    find_columns<Traits>(params, task, shared);
    __syncthreads();
    PatchProduct<Traits> product;
    multiply_patches<Traits>(params, task, shared, product);
    if (launch.split.count == 1) {
      __syncthreads();  // the stages make room for the tile
      product.for_each([&](int r, int c, Acc value) { shared.tile[r][c] = value; });
      __syncthreads();
      add_patch_tile<Traits>(params, task, shared.tile);
    } else {
      Acc* to = static_cast<Acc*>(partial) + block * kPatchElements;
      product.for_each([&](int r, int c, Acc value) { to[r * kPatchTile + c] = value; });
    }
    __syncthreads();  // before the next turn's columns
  }
}

// Adds the parts of every tile to the output, in their order. One block per tile of each group.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    add_patch_parts(const __grid_constant__ PatchProductParams params,
                    const __grid_constant__ PatchLaunch launch,
                    const typename Traits::Acc* partial) {
  __shared__ typename Traits::Acc values[kPatchTile][kPatchTile + 1];
  const int64_t tiles = launch.tiles * params.groups;
  for (int64_t block = blockIdx.x; block < tiles; block += gridDim.x) {
    for (int e = threadIdx.x; e < kPatchElements; e += Traits::kThreads) {
      typename Traits::Acc sum = 0;
      for (int64_t part = 0; part < launch.split.count; ++part)
        sum += partial[(part * tiles + block) * kPatchElements + e];
      values[e / kPatchTile][e % kPatchTile] = sum;
    }
    __syncthreads();
    add_patch_tile<Traits>(params, patch_task(params, launch, block), values);
    __syncthreads();  // before the next turn's tile
  }
}

}  // namespace ccp
