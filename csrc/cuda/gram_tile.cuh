// What the kernels of weighted_gram_ and weighted_grams_ have in common: their layers, weights and
// rows, and how finished tiles are added to S.
#pragma once

#include "csrc/cuda/div_mod.cuh"
#include "csrc/cuda/gram_launch.h"
#include "csrc/cuda/vec.cuh"
#include "csrc/triangle.h"

namespace ccp {

// The last layer whose `first` is not beyond `index`: layers without any number are passed over.
__device__ __forceinline__ int find_gram_layer(const GramLaunch& launch, int64_t GramLayer::* first,
                                               int64_t index) {
  int low = 0, high = launch.layers;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (launch.layer[middle].*first <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ DivMod sample_and_term(const WeightedGramParams& params, int64_t row) {
  return params.terms == 1 ? DivMod{row, 0} : div_mod(row, params.terms);
}

// Of the row-th row; params.sigma must not be null.
__device__ __forceinline__ double gram_weight(const WeightedGramParams& params, int64_t row) {
  const DivMod place = sample_and_term(params, row);
  const int64_t at =
      place.quotient * params.sigma_sample_stride + place.remainder * params.sigma_term_stride;
  return params.sigma_is_double ? static_cast<const double*>(params.sigma)[at]
                                : static_cast<const float*>(params.sigma)[at];
}

// What a block computes: a part of a tile of a layer.
struct GramTask {
  int layer;
  int row, column;  // the tile's
  int rows;         // of a
  int64_t first;    // of them
  int64_t part;     // among those of all layers, if the layer has several for a tile

  __device__ __forceinline__ TileIndex tile() const { return {row, column}; }
  __device__ __forceinline__ bool diagonal() const { return row == column; }
};

__device__ __forceinline__ GramTask gram_task(const GramLaunch& launch, int64_t block) {
  const int number = find_gram_layer(launch, &GramLayer::first_block, block);
  const GramLayer& layer = launch.layer[number];
  const int64_t index = block - layer.first_block;
  const DivMod at = div_mod(index, layer.tiles);
  const TileIndex tile = upper_tile(at.remainder);
  const int64_t first = at.quotient * layer.split.length, left = gram_rows(layer.params) - first;
  return {number,
          static_cast<int>(tile.row),
          static_cast<int>(tile.column),
          static_cast<int>(left < layer.split.length ? left : layer.split.length),
          first,
          layer.first_part + index};
}

// The length of a tile's rows in shared memory: read along rows or columns, and written as the
// matrix units leave them, elements meet few memory banks twice.
template <int kTile>
constexpr int kGramTileRow = kTile + 9;

// target[r * stride + c] += value(r, c) for r < kRows, c < kColumns where inside(r, c), which is
// the same for kVector neighbouring columns. Reads run ahead of writes. A warp touches some 128
// neighbouring bytes of each row.
template <int kThreads, int kRows, int kColumns, int kVector, class Acc, class Inside, class Value>
__device__ __forceinline__ void add_block(Acc* target, int64_t stride, Inside inside, Value value) {
  constexpr int kWarpColumns = kColumns < 32 ? kColumns : 32;
  constexpr int kUnits = kWarpColumns / kVector, kWarps = kColumns / kWarpColumns;
  constexpr int kRowsAtOnce = kThreads * kVector / kColumns;
  constexpr int kAhead = kRows / kRowsAtOnce < 8 ? kRows / kRowsAtOnce : 8;
  static_assert(kRows % (kRowsAtOnce * kAhead) == 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / kWarps * (32 / kUnits) + lane / kUnits;
  const int column = warp % kWarps * kWarpColumns + lane % kUnits * kVector;
  for (int first = row; first < kRows; first += kRowsAtOnce * kAhead) {
    Packed<Acc, kVector> sum[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int r = first + k * kRowsAtOnce;
      if (inside(r, column)) sum[k] = load_packed<Acc, kVector>(target + r * stride + column);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int r = first + k * kRowsAtOnce;
      if (!inside(r, column)) continue;
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[k].element[v] += value(r, column + v);
      if constexpr (kVector == 1) {
        target[r * stride + column] = sum[k].element[0];
      } else {
        store_packed(sum[k], target + r * stride + column);
      }
    }
  }
}

// Adds kRows finished rows of a tile, from its first_row-th on, to the upper triangle of S and
// their mirror image to the lower one; each pair of elements receives the same value.
template <int kThreads, int kTile, int kRows, class Acc>
__device__ __forceinline__ void add_tile_rows(const WeightedGramParams& params, TileIndex tile,
                                              int first_row,
                                              const Acc (&values)[kRows][kGramTileRow<kTile>]) {
  constexpr int kVector = kVectorBytes / sizeof(Acc);
  const int64_t i0 = tile.row * kTile + first_row, j0 = tile.column * kTile;
  const int64_t stride = params.S_stride, channels = params.channels;
  Acc* upper = static_cast<Acc*>(params.S) + i0 * stride + j0;
  Acc* lower = static_cast<Acc*>(params.S) + j0 * stride + i0;
  const auto value = [&](int r, int c) { return values[r][c]; };
  const auto mirrored = [&](int r, int c) { return values[c][r]; };
  if constexpr (kRows == kTile) {
    const bool aligned =
        reinterpret_cast<uintptr_t>(params.S) % kVectorBytes == 0 && stride % kVector == 0;
    if (aligned && tile.row < tile.column && j0 + kTile <= channels) {
      const auto everywhere = [](int, int) { return true; };
      add_block<kThreads, kTile, kTile, kVector>(upper, stride, everywhere, value);
      add_block<kThreads, kTile, kTile, kVector>(lower, stride, everywhere, mirrored);
      return;
    }
  }
  add_block<kThreads, kRows, kTile, 1>(
      upper, stride, [&](int r, int c) { return i0 + r <= j0 + c && j0 + c < channels; }, value);
  add_block<kThreads, kTile, kRows, 1>(
      lower, stride, [&](int r, int c) { return i0 + c < j0 + r && j0 + r < channels; }, mirrored);
}

constexpr int kGramSliceRows = 8;  // of a tile whose parts a block sums

// partial[part of all layers, kTile, kTile]: adds the parts of every tile that has several to S, in
// their order. One block for each slice of rows of such a tile.
template <class Acc, int kTile>
__global__ void __launch_bounds__(kBlockThreads)
    add_gram_parts(const __grid_constant__ GramLaunch launch, const Acc* partial) {
  constexpr int kArea = kTile * kTile, kSlices = kTile / kGramSliceRows;
  constexpr int kElements = kGramSliceRows * kTile;
  __shared__ Acc values[kGramSliceRows][kGramTileRow<kTile>];
  for (int64_t block = blockIdx.x; block < launch.split_tiles * kSlices; block += gridDim.x) {
    const int64_t index = block / kSlices;
    const int slice = static_cast<int>(block % kSlices);
    const GramLayer& layer =
        launch.layer[find_gram_layer(launch, &GramLayer::first_split_tile, index)];
    const int64_t tile = index - layer.first_split_tile, stride = layer.tiles * kArea;
    const Acc* parts = partial + (layer.first_part + tile) * kArea + slice * kElements;
    for (int e = threadIdx.x; e < kElements; e += kBlockThreads) {
      Acc sum = 0;
#pragma unroll 8
      for (int64_t part = 0; part < layer.split.count; ++part) sum += parts[part * stride + e];
      values[e / kTile][e % kTile] = sum;
    }
    __syncthreads();
    add_tile_rows<kBlockThreads, kTile>(layer.params, upper_tile(tile), slice * kGramSliceRows,
                                        values);
    __syncthreads();  // before the next turn's slice
  }
}

}  // namespace ccp
