// The CUDA kernels of weighted_gram_ and weighted_grams_: plain multiply-adds, since TF32 tensor
// cores would lose bits.
#pragma once

#include "csrc/cuda/div_mod.cuh"
#include "csrc/cuda/gram_launch.h"
#include "csrc/cuda/reduce.cuh"
#include "csrc/cuda/vec.cuh"
#include "csrc/triangle.h"

namespace ccp {

// Blocks of a float32 S that must fit on a multiprocessor. On Blackwell, for which the compiler
// takes more registers, eight would spill them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kFloatGramBlocks = 6;
#else
constexpr int kFloatGramBlocks = 8;
#endif

template <class T_, class Acc_>
struct GramTraits {
  using T = T_;      // of a
  using Acc = Acc_;  // of S
  // A thread computes kSide x kSide elements: 2 x 2 squares of kQuad x kQuad, each a quarter of the
  // tile away from the next, so that neighbouring threads read neighbouring 16 bytes.
  static constexpr int kQuad = kVectorBytes / sizeof(Acc);
  static constexpr int kSide = 2 * kQuad;
  static constexpr int kLines = kGramTile / kSide;
  static constexpr int kThreads = kLines * kLines;
  static constexpr int kBlocks = sizeof(Acc) == sizeof(float) ? kFloatGramBlocks : 2;
  static constexpr int kDepthStep = kThreads / kGramTile;  // rows that the block loads at once
  static constexpr int kLoads = kGramDepth / kDepthStep;
};

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

template <class Acc>
__device__ __forceinline__ Acc gram_weight(const WeightedGramParams& params, int64_t n, int64_t k) {
  if (params.sigma == nullptr) return 1;
  const int64_t i = n * params.sigma_sample_stride + k * params.sigma_term_stride;
  return params.sigma_is_double ? static_cast<Acc>(static_cast<const double*>(params.sigma)[i])
                                : static_cast<Acc>(static_cast<const float*>(params.sigma)[i]);
}

// The next kGramDepth rows of two panels of kGramTile channels, on their way from global memory.
// A thread carries one channel of each; its weight is the one of row threadIdx.x % kGramDepth.
template <class Traits>
struct StagedRows {
  typename Traits::T left[Traits::kLoads], right[Traits::kLoads];
  typename Traits::Acc weight;
};

__device__ __forceinline__ DivMod sample_and_term(const WeightedGramParams& params, int64_t row) {
  return params.terms == 1 ? DivMod{row, 0} : div_mod(row, params.terms);
}

// Rows from `first` on; zeros from `end` on and beyond the last channel.
template <class Traits>
__device__ __forceinline__ StagedRows<Traits> read_rows(const WeightedGramParams& params,
                                                        TileIndex tile, int64_t first,
                                                        int64_t end) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  StagedRows<Traits> staged;
  const int rows = end - first < kGramDepth ? static_cast<int>(end - first) : kGramDepth;
  const int weighted = threadIdx.x % kGramDepth;
  staged.weight = 0;
  if (weighted < rows) {
    const DivMod at = sample_and_term(params, first + weighted);
    staged.weight = gram_weight<Acc>(params, at.quotient, at.remainder);
  }
  const int channel = threadIdx.x % kGramTile, depth = threadIdx.x / kGramTile;
  const int64_t i = tile.row * kGramTile + channel, j = tile.column * kGramTile + channel;
  DivMod at = sample_and_term(params, first + depth);
  const T* a = static_cast<const T*>(params.a) + at.quotient * params.a_sample_stride;
#pragma unroll
  for (int load = 0; load < Traits::kLoads; ++load) {
    const bool inside = depth + load * Traits::kDepthStep < rows;
    const T* row = a + at.remainder * params.a_term_stride;
    staged.left[load] = inside && i < params.channels ? row[i * params.a_channel_stride] : T{};
    staged.right[load] = inside && j < params.channels ? row[j * params.a_channel_stride] : T{};
    at.remainder += Traits::kDepthStep;
    while (at.remainder >= params.terms) {
      at.remainder -= params.terms;
      a += params.a_sample_stride;
    }
  }
  return staged;
}

template <class Acc>
struct GramPanels {
  Acc left[kGramDepth][kGramTile];  // times the weights
  Acc right[kGramDepth][kGramTile];
};

// A block's shared memory: two stages of panels, then the finished tile.
template <class Acc>
union alignas(16) GramShared {
  GramPanels<Acc> panels[2];
  Acc tile[kGramTile][kGramTile + 1];  // padded: columns are read as fast as rows
};

template <class Traits>
__device__ __forceinline__ void store_rows(const StagedRows<Traits>& staged,
                                           GramPanels<typename Traits::Acc>& panels) {
  using Acc = typename Traits::Acc;
  const int channel = threadIdx.x % kGramTile;
#pragma unroll
  for (int load = 0; load < Traits::kLoads; ++load) {
    const int depth = threadIdx.x / kGramTile + load * Traits::kDepthStep;
    const Acc weight = __shfl_sync(kFullWarp, staged.weight, depth);
    panels.left[depth][channel] = weight * static_cast<Acc>(widen(staged.left[load]));
    panels.right[depth][channel] = static_cast<Acc>(widen(staged.right[load]));
  }
}

// Which row or column of the tile the thread in `line` has as its s-th.
template <class Traits>
__device__ __forceinline__ int tile_element(int line, int s) {
  return s / Traits::kQuad * (kGramTile / 2) + line * Traits::kQuad + s % Traits::kQuad;
}

template <class Traits>
__device__ __forceinline__ void load_side(const typename Traits::Acc* panel_row, int line,
                                          typename Traits::Acc (&side)[Traits::kSide]) {
  constexpr int kQuad = Traits::kQuad;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto quad = load_packed<typename Traits::Acc, kQuad>(
        panel_row + tile_element<Traits>(line, half * kQuad));
#pragma unroll
    for (int q = 0; q < kQuad; ++q) side[half * kQuad + q] = quad.element[q];
  }
}

// sums += the product of two panels, for this thread's elements of the tile.
template <class Traits>
__device__ __forceinline__ void multiply_panels(
    const GramPanels<typename Traits::Acc>& panels,
    typename Traits::Acc (&sums)[Traits::kSide][Traits::kSide]) {
  constexpr int kSide = Traits::kSide;
  const int line = threadIdx.x / Traits::kLines, column = threadIdx.x % Traits::kLines;
#pragma unroll
  for (int depth = 0; depth < kGramDepth; ++depth) {
    typename Traits::Acc rows[kSide], columns[kSide];
    load_side<Traits>(panels.left[depth], line, rows);
    load_side<Traits>(panels.right[depth], column, columns);
#pragma unroll
    for (int r = 0; r < kSide; ++r)
#pragma unroll
      for (int c = 0; c < kSide; ++c) sums[r][c] += rows[r] * columns[c];
  }
}

// One part of one tile, in the registers of the block's threads. Rows are read while the ones
// before them are multiplied; with two stages one barrier a step is enough.
template <class Traits>
__device__ __forceinline__ void compute_part(
    const WeightedGramParams& params, TileIndex tile, int64_t begin, int64_t end,
    GramShared<typename Traits::Acc>& shared,
    typename Traits::Acc (&sums)[Traits::kSide][Traits::kSide]) {
  StagedRows<Traits> staged = read_rows<Traits>(params, tile, begin, end);
  int stage = 0;
  for (int64_t first = begin; first < end; first += kGramDepth, stage ^= 1) {
    store_rows<Traits>(staged, shared.panels[stage]);
    __syncthreads();
    if (first + kGramDepth < end) staged = read_rows<Traits>(params, tile, first + kGramDepth, end);
    multiply_panels<Traits>(shared.panels[stage], sums);
  }
}

// target[r * stride + c] += value(r, c) for the elements of a tile where inside(r, c). Reads run
// ahead of writes, neighbouring threads touch neighbouring columns.
template <int kThreads, class Acc, class Inside, class Value>
__device__ __forceinline__ void add_rows(Acc* target, int64_t stride, Inside inside, Value value) {
  constexpr int kRows = kThreads / kGramTile, kAhead = 8;
  const int row = threadIdx.x / kGramTile, column = threadIdx.x % kGramTile;
  for (int first = row; first < kGramTile; first += kRows * kAhead) {
    Acc old[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (inside(first + k * kRows, column)) old[k] = target[(first + k * kRows) * stride + column];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (inside(first + k * kRows, column))
        target[(first + k * kRows) * stride + column] = old[k] + value(first + k * kRows, column);
  }
}

// Adds a finished tile to the upper triangle of S and its mirror image to the lower one; each pair
// of elements receives the same value.
template <int kThreads, class Acc>
__device__ __forceinline__ void add_tile(const WeightedGramParams& params, TileIndex tile,
                                         const Acc (&values)[kGramTile][kGramTile + 1]) {
  const int64_t i0 = tile.row * kGramTile, j0 = tile.column * kGramTile;
  Acc* S = static_cast<Acc*>(params.S);
  add_rows<kThreads>(
      S + i0 * params.S_stride + j0, params.S_stride,
      [&](int r, int c) { return i0 + r <= j0 + c && j0 + c < params.channels; },
      [&](int r, int c) { return values[r][c]; });
  add_rows<kThreads>(
      S + j0 * params.S_stride + i0, params.S_stride,
      [&](int r, int c) { return i0 + c < j0 + r && j0 + r < params.channels; },
      [&](int r, int c) { return values[c][r]; });
}

// One block computes one part of one tile of one layer. A tile of a single part is added to S; one
// of several goes to partial[part of all layers, kGramTile, kGramTile], which add_gram_parts sums.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    weighted_grams(const __grid_constant__ GramLaunch launch, void* partial) {
  using Acc = typename Traits::Acc;
  constexpr int kSide = Traits::kSide;
  __shared__ GramShared<Acc> shared;
  const int line = threadIdx.x / Traits::kLines, column = threadIdx.x % Traits::kLines;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const GramLayer& layer = launch.layer[find_gram_layer(launch, &GramLayer::first_block, block)];
    const int64_t index = block - layer.first_block;
    const int64_t part = index / layer.tiles, rows = gram_rows(layer.params);
    const TileIndex tile = upper_tile(index - part * layer.tiles);
    const int64_t begin = part * layer.split.length, end = begin + layer.split.length;
    Acc sums[kSide][kSide] = {};
    compute_part<Traits>(layer.params, tile, begin, end < rows ? end : rows, shared, sums);
    if (layer.split.count == 1) {
      __syncthreads();  // the panels make room for the tile
#pragma unroll
      for (int r = 0; r < kSide; ++r)
#pragma unroll
        for (int c = 0; c < kSide; ++c)
          shared.tile[tile_element<Traits>(line, r)][tile_element<Traits>(column, c)] = sums[r][c];
      __syncthreads();
      add_tile<Traits::kThreads>(layer.params, tile, shared.tile);
    } else {
      Acc* to = static_cast<Acc*>(partial) + (layer.first_part + index) * kGramElements;
#pragma unroll
      for (int r = 0; r < kSide; ++r)
#pragma unroll
        for (int c = 0; c < kSide; ++c)
          to[tile_element<Traits>(line, r) * kGramTile + tile_element<Traits>(column, c)] =
              sums[r][c];
    }
    __syncthreads();  // before the next turn's panels
  }
}

// Adds the parts of every tile that has several to S, in their order. One block per tile.
template <class Acc>
__global__ void __launch_bounds__(kBlockThreads)
    add_gram_parts(const __grid_constant__ GramLaunch launch, const Acc* partial) {
  __shared__ Acc values[kGramTile][kGramTile + 1];
  for (int64_t block = blockIdx.x; block < launch.split_tiles; block += gridDim.x) {
    const GramLayer& layer =
        launch.layer[find_gram_layer(launch, &GramLayer::first_split_tile, block)];
    const int64_t tile = block - layer.first_split_tile;
    const Acc* parts = partial + (layer.first_part + tile) * kGramElements;
    const int64_t stride = layer.tiles * kGramElements;
    for (int e = threadIdx.x; e < kGramElements; e += kBlockThreads) {
      Acc sum = 0;
      for (int64_t part = 0; part < layer.split.count; ++part) sum += parts[part * stride + e];
      values[e / kGramTile][e % kGramTile] = sum;
    }
    __syncthreads();
    add_tile<kBlockThreads>(layer.params, upper_tile(tile), values);
    __syncthreads();  // before the next turn's tile
  }
}

}  // namespace ccp
