// The CUDA kernel of weighted_gram_ and weighted_grams_ with float64 sums: plain multiply-adds.
#pragma once

#include "csrc/cuda/gram_tile.cuh"
#include "csrc/cuda/reduce.cuh"

namespace ccp {

constexpr int kGramDepth = 8;  // rows of a in shared memory at a time

template <class T_>
struct GramTraits {
  using T = T_;
  // A thread computes kSide x kSide elements: 2 x 2 squares of kQuad x kQuad, each a quarter of the
  // tile away from the next, so that neighbouring threads read neighbouring 16 bytes.
  static constexpr int kQuad = kVectorBytes / sizeof(double);
  static constexpr int kSide = 2 * kQuad;
  static constexpr int kLines = kSmallGramTile / kSide;
  static constexpr int kThreads = kLines * kLines;
  static constexpr int kBlocks = 2;
  static constexpr int kDepthStep = kThreads / kSmallGramTile;  // rows that the block loads at once
  static constexpr int kLoads = kGramDepth / kDepthStep;
};

// The next kGramDepth rows of two panels of kSmallGramTile channels, on their way from global
// memory. A thread carries one channel of each; its weight is the one of row threadIdx.x %
// kGramDepth.
template <class Traits>
struct StagedRows {
  typename Traits::T left[Traits::kLoads], right[Traits::kLoads];
  double weight;
};

// Rows from `first` on; zeros from `end` on and beyond the last channel.
template <class Traits>
__device__ __forceinline__ StagedRows<Traits> read_rows(const WeightedGramParams& params,
                                                        TileIndex tile, int64_t first,
                                                        int64_t end) {
  using T = typename Traits::T;
  StagedRows<Traits> staged;
  const int rows = end - first < kGramDepth ? static_cast<int>(end - first) : kGramDepth;
  const int weighted = threadIdx.x % kGramDepth;
  staged.weight = 0;
  if (weighted < rows) staged.weight = params.sigma ? gram_weight(params, first + weighted) : 1;
  const int channel = threadIdx.x % kSmallGramTile, depth = threadIdx.x / kSmallGramTile;
  const int64_t i = tile.row * kSmallGramTile + channel, j = tile.column * kSmallGramTile + channel;
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

struct GramPanels {
  double left[kGramDepth][kSmallGramTile];  // times the weights
  double right[kGramDepth][kSmallGramTile];
};

// A block's shared memory: two stages of panels, then the finished tile.
union alignas(16) GramShared {
  GramPanels panels[2];
  double tile[kSmallGramTile][kGramTileRow<kSmallGramTile>];
};

template <class Traits>
__device__ __forceinline__ void store_rows(const StagedRows<Traits>& staged, GramPanels& panels) {
  const int channel = threadIdx.x % kSmallGramTile;
#pragma unroll
  for (int load = 0; load < Traits::kLoads; ++load) {
    const int depth = threadIdx.x / kSmallGramTile + load * Traits::kDepthStep;
    const double weight = __shfl_sync(kFullWarp, staged.weight, depth);
    panels.left[depth][channel] = weight * static_cast<double>(widen(staged.left[load]));
    panels.right[depth][channel] = static_cast<double>(widen(staged.right[load]));
  }
}

// Which row or column of the tile the thread in `line` has as its s-th.
template <class Traits>
__device__ __forceinline__ int tile_element(int line, int s) {
  return s / Traits::kQuad * (kSmallGramTile / 2) + line * Traits::kQuad + s % Traits::kQuad;
}

template <class Traits>
__device__ __forceinline__ void load_side(const double* panel_row, int line,
                                          double (&side)[Traits::kSide]) {
  constexpr int kQuad = Traits::kQuad;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto quad =
        load_packed<double, kQuad>(panel_row + tile_element<Traits>(line, half * kQuad));
#pragma unroll
    for (int q = 0; q < kQuad; ++q) side[half * kQuad + q] = quad.element[q];
  }
}

// sums += the product of two panels, for this thread's elements of the tile.
template <class Traits>
__device__ __forceinline__ void multiply_panels(const GramPanels& panels,
                                                double (&sums)[Traits::kSide][Traits::kSide]) {
  constexpr int kSide = Traits::kSide;
  const int line = threadIdx.x / Traits::kLines, column = threadIdx.x % Traits::kLines;
#pragma unroll
  for (int depth = 0; depth < kGramDepth; ++depth) {
    double rows[kSide], columns[kSide];
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
__device__ __forceinline__ void compute_part(const WeightedGramParams& params, const GramTask& task,
                                             GramShared& shared,
                                             double (&sums)[Traits::kSide][Traits::kSide]) {
  const int64_t end = task.first + task.rows;
  StagedRows<Traits> staged = read_rows<Traits>(params, task.tile(), task.first, end);
  int stage = 0;
  for (int64_t first = task.first; first < end; first += kGramDepth, stage ^= 1) {
    store_rows<Traits>(staged, shared.panels[stage]);
    __syncthreads();
    if (first + kGramDepth < end)
      staged = read_rows<Traits>(params, task.tile(), first + kGramDepth, end);
    multiply_panels<Traits>(shared.panels[stage], sums);
  }
}

// One block computes one part of one tile of one layer. A tile of a single part is added to S; one
// of several goes to partial[part of all layers, kSmallGramTile, kSmallGramTile], which
// add_gram_parts sums.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    weighted_grams(const __grid_constant__ GramLaunch launch, double* partial) {
  constexpr int kSide = Traits::kSide;
  __shared__ GramShared shared;
  __shared__ GramTask task;
  const int line = threadIdx.x / Traits::kLines, column = threadIdx.x % Traits::kLines;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    if (threadIdx.x == 0) task = gram_task(launch, block);
    __syncthreads();
    const GramLayer& layer = launch.layer[task.layer];
    double sums[kSide][kSide] = {};
    compute_part<Traits>(layer.params, task, shared, sums);
    const auto write = [&](double* to, int stride) {
#pragma unroll
      for (int r = 0; r < kSide; ++r)
#pragma unroll
        for (int c = 0; c < kSide; ++c)
          to[tile_element<Traits>(line, r) * stride + tile_element<Traits>(column, c)] = sums[r][c];
    };
    if (layer.split.count > 1) {
      write(partial + task.part * (kSmallGramTile * kSmallGramTile), kSmallGramTile);
    } else {
      __syncthreads();  // the panels make room for the tile
      write(shared.tile[0], kGramTileRow<kSmallGramTile>);
      __syncthreads();
      add_tile_rows<Traits::kThreads, kSmallGramTile>(layer.params, task.tile(), 0, shared.tile);
    }
    __syncthreads();  // before the next turn's panels
  }
}

}  // namespace ccp
