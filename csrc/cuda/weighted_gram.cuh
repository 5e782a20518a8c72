// The CUDA kernels of weighted_gram_: plain multiply-adds, since TF32 tensor cores would lose bits.
#pragma once

#include "csrc/cuda/launch.h"
#include "csrc/triangle.h"

namespace ccp {

template <class T_, class Acc_>
struct GramTraits {
  using T = T_;      // of a
  using Acc = Acc_;  // of S
};

constexpr int kGramSide = 4;  // a thread computes kGramSide x kGramSide elements
constexpr int kGramLines = kGramTile / kGramSide;
static_assert(kGramLines * kGramLines == kBlockThreads);
// A padded row keeps the threads of a warp on different memory banks.
constexpr int kGramRow = kGramTile + 4;

template <class Acc>
__device__ __forceinline__ Acc gram_weight(const WeightedGramParams& params, int64_t n, int64_t k) {
  if (params.sigma == nullptr) return 1;
  const int64_t i = n * params.sigma_sample_stride + k * params.sigma_term_stride;
  return params.sigma_is_double ? static_cast<Acc>(static_cast<const double*>(params.sigma)[i])
                                : static_cast<Acc>(static_cast<const float*>(params.sigma)[i]);
}

// Adds `value` to S[i, j] and to its mirror image; elements below the diagonal or outside S are
// left to nobody, as each pair is added once.
template <class Acc>
__device__ __forceinline__ void add_pair(const WeightedGramParams& params, int64_t i, int64_t j,
                                         Acc value) {
  if (i > j || j >= params.channels) return;
  Acc* S = static_cast<Acc*>(params.S);
  S[i * params.S_stride + j] += value;
  if (i != j) S[j * params.S_stride + i] += value;
}

// The product of two panels of kGramTile channels over rows [begin, end) of a: for this thread the
// elements (line + kGramLines * r, column + kGramLines * c) of the tile.
template <class Traits>
__device__ __forceinline__ void multiply_panels(
    const WeightedGramParams& params, TileIndex tile, int64_t begin, int64_t end,
    typename Traits::Acc (&sums)[kGramSide][kGramSide]) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  __shared__ Acc left[kGramDepth][kGramRow], right[kGramDepth][kGramRow];
  const int line = threadIdx.x / kGramLines, column = threadIdx.x % kGramLines;
  for (int64_t first = begin; first < end; first += kGramDepth) {
    for (int element = threadIdx.x; element < kGramDepth * kGramTile; element += kBlockThreads) {
      const int depth = element / kGramTile, channel = element % kGramTile;
      const int64_t row = first + depth;
      const int64_t n = params.terms == 1 ? row : row / params.terms;
      const int64_t k = row - n * params.terms;
      const T* a =
          static_cast<const T*>(params.a) + n * params.a_sample_stride + k * params.a_term_stride;
      const int64_t i = tile.row * kGramTile + channel, j = tile.column * kGramTile + channel;
      const bool inside = row < end;
      left[depth][channel] = inside && i < params.channels
                                 ? gram_weight<Acc>(params, n, k) *
                                       static_cast<Acc>(widen(a[i * params.a_channel_stride]))
                                 : Acc{0};
      right[depth][channel] = inside && j < params.channels
                                  ? static_cast<Acc>(widen(a[j * params.a_channel_stride]))
                                  : Acc{0};
    }
    __syncthreads();
    for (int depth = 0; depth < kGramDepth; ++depth) {
      Acc rows[kGramSide], columns[kGramSide];
#pragma unroll
      for (int s = 0; s < kGramSide; ++s) {
        rows[s] = left[depth][line + kGramLines * s];
        columns[s] = right[depth][column + kGramLines * s];
      }
#pragma unroll
      for (int r = 0; r < kGramSide; ++r)
#pragma unroll
        for (int c = 0; c < kGramSide; ++c) sums[r][c] += rows[r] * columns[c];
    }
    __syncthreads();
  }
}

// Without `partial`, one block adds one tile to S. With it, one block writes one part of one tile
// to partial[part, tile, kGramTile, kGramTile], which add_gram_parts then adds to S.
template <class Traits>
__global__ void __launch_bounds__(kBlockThreads)
    weighted_gram(WeightedGramParams params, WeightedGramLaunch launch, void* partial) {
  using Acc = typename Traits::Acc;
  const int line = threadIdx.x / kGramLines, column = threadIdx.x % kGramLines;
  const int64_t rows = params.samples * params.terms;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const TileIndex tile = upper_tile(block % launch.tiles);
    const int64_t begin = block / launch.tiles * launch.split.length;
    const int64_t end = begin + launch.split.length;
    Acc sums[kGramSide][kGramSide] = {};
    multiply_panels<Traits>(params, tile, begin, end < rows ? end : rows, sums);
    Acc* part = static_cast<Acc*>(partial) + block * kGramTile * kGramTile;
    for (int r = 0; r < kGramSide; ++r) {
      for (int c = 0; c < kGramSide; ++c) {
        const int i = line + kGramLines * r, j = column + kGramLines * c;
        if (partial != nullptr) {
          part[i * kGramTile + j] = sums[r][c];
        } else {
          add_pair(params, tile.row * kGramTile + i, tile.column * kGramTile + j, sums[r][c]);
        }
      }
    }
  }
}

// Adds the parts of every tile to S, in their order.
template <class Acc>
__global__ void __launch_bounds__(kBlockThreads)
    add_gram_parts(WeightedGramParams params, WeightedGramLaunch launch, const Acc* partial) {
  constexpr int64_t kElements = kGramTile * kGramTile;
  const int64_t count = launch.tiles * kElements;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x; e < count;
       e += stride) {
    Acc sum = 0;
    for (int64_t part = 0; part < launch.split.count; ++part) sum += partial[part * count + e];
    const TileIndex tile = upper_tile(e / kElements);
    const int64_t i = e % kElements / kGramTile, j = e % kGramTile;
    add_pair(params, tile.row * kGramTile + i, tile.column * kGramTile + j, sum);
  }
}

}  // namespace ccp
