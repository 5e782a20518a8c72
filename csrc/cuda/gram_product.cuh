// The CUDA kernels of weighted_gram_ and weighted_grams_ with float32 sums, on the matrix units.
//
// A stage in shared memory holds kDepth rows of kTile channels for both sides of a tile; fragment
// loads across the rows give the matrix units sums over them. The sum of a few rows joins the
// others by a rounded addition, since the matrix units round towards zero. float32 values are
// multiplied as pairs of TF32 values, three products for one, which keeps 20 bits. Without weights,
// products of 16 bits are exact. A weight times a value of 16 bits needs more: its TF32 pair is
// multiplied with the other value, which is a TF32 value, in two products.
//
// What bounds it is in benchmarks/README.md.
#pragma once

#include "csrc/cuda/channel_tiles.cuh"
#include "csrc/cuda/gram_tile.cuh"
#include "csrc/cuda/shared.cuh"
#include "csrc/cuda/units.cuh"

namespace ccp {

// Of large tiles. The sums of two blocks leave just enough registers on a multiprocessor; elsewhere
// than on Hopper the compiler takes more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kDeepGramStages = false;
constexpr int kWeightedGramBlocks = 1;
#else
constexpr bool kDeepGramStages = true;
constexpr int kWeightedGramBlocks = kLargeGramTiles.blocks_at_once;
#endif

template <class T_, int kTile_, bool kWeighted_>
struct GramProductTraits {
  using T = T_;
  static constexpr int kTile = kTile_;
  static constexpr bool kWeighted = kWeighted_;
  using Panel = ChannelPanel<T, kTile>;
  static constexpr bool kLarge = kTile == kLargeGramTile;
  static constexpr int kThreads = 2 * kTile;
  static constexpr int kBlocks = !kLarge     ? kSmallGramTiles.blocks_at_once
                                 : kWeighted ? kWeightedGramBlocks
                                             : kLargeGramTiles.blocks_at_once;
  // Few deep stages: what a stage takes beside its products is shared by more of them.
  static constexpr bool kDeep = kLarge && !kWeighted && kDeepGramStages;
  static constexpr int kStages = kDeep ? 2 : kLarge ? 4 : 3;
  static constexpr int kPanelBytes = kDeep ? 16384 : 8192;
  static constexpr int kDepth = kPanelBytes / (kTile * static_cast<int>(sizeof(T)));
  static constexpr int kRowStep = kThreads / Panel::kRowUnits;  // rows that are loaded at once
  static constexpr int kRows = kTile / 32;  // fragments of 16 rows: a warp has half the rows
  static constexpr int kColumns = 4;        // fragments of 8 columns
  static constexpr bool kTf32 = kWeighted || sizeof(T) == 4;
  static constexpr int kSteps = kDepth / (kTf32 ? kMmaDepth<float> : kMmaDepth<T>);
  static_assert(kGramGranule % kDepth == 0 && kThreads >= kDepth && kRowStep % 8 == 0);
};

template <class Traits>
struct GramRing {
  unsigned char panel[Traits::kStages][2][Traits::kPanelBytes];
  float weight[Traits::kStages][Traits::kDepth];
};

// A block's shared memory: the stages, then the finished tile.
template <class Traits>
union alignas(16) GramProductShared {
  GramRing<Traits> ring;
  float tile[Traits::kTile][kGramTileRow<Traits::kTile>];
  // Then its size is the same on every GPU, however deep the stages are.
  static_assert(!Traits::kLarge || sizeof ring <= sizeof tile);
};

// What a block sums, in shared memory: the sums leave no registers for it.
template <class T>
struct GramSource {
  GramTask task;
  const T* rows;  // the tile's first row of channels, in the task's first row of a
  int64_t stride;
  const float* weights;
  int to_column;  // channels from the tile's rows to its columns
  int channels;   // from the tile's rows on
};

template <class Traits>
__device__ __forceinline__ GramSource<typename Traits::T> gram_source(const GramLaunch& launch,
                                                                      int64_t block) {
  using T = typename Traits::T;
  const GramTask task = gram_task(launch, block);
  const GramLayer& layer = launch.layer[task.layer];
  const int64_t channel = int64_t{task.row} * Traits::kTile, stride = layer.rows.stride;
  return {task,
          static_cast<const T*>(layer.rows.data) + task.first * stride + channel,
          stride,
          Traits::kWeighted ? layer.weights + task.first : nullptr,
          (task.column - task.row) * Traits::kTile,
          static_cast<int>(layer.params.channels - channel)};
}

// The calling thread's part of filling a stage: one unit of some rows.
template <class Traits>
__device__ __forceinline__ void load_gram_stage(const GramSource<typename Traits::T>& source,
                                                int stage, GramRing<Traits>& ring) {
  using Panel = typename Traits::Panel;
  const int thread = fresh_thread();
  const int unit = thread % Panel::kRowUnits, row = thread / Panel::kRowUnits;
  const int first = stage * Traits::kDepth, rows = source.task.rows - first;
  const int slot = stage % Traits::kStages;
  unsigned char* to = ring.panel[slot][0] + Panel::unit(row, unit);
  const auto* from = source.rows + (first + row) * source.stride + unit * Panel::kUnit;
  const int channels = source.channels - unit * Panel::kUnit;
#pragma unroll(Traits::kDeep ? 1 : Traits::kDepth / Traits::kRowStep)  // deep: to save registers
  for (int i = 0; i < Traits::kDepth; i += Traits::kRowStep) {
    // Nothing is read where there is no row or channel.
    const bool inside = row + i < rows;
    copy_or_zero_async(to + i * Panel::kRowBytes, from, inside && channels > 0);
    if (source.to_column > 0)
      copy_or_zero_async(to + Traits::kPanelBytes + i * Panel::kRowBytes, from + source.to_column,
                         inside && channels > source.to_column);
    from += Traits::kRowStep * source.stride;
  }
  if (Traits::kWeighted && thread < Traits::kDepth)
    copy_async<4>(&ring.weight[slot][thread], source.weights + first + thread, thread < rows);
}

// Values as the sums of two TF32 values each.
template <int kCount, int kRegisters>
struct Tf32Pairs {
  uint32_t big[kCount][kRegisters], small[kCount][kRegisters];

  __device__ __forceinline__ void split(int i, int r, float value) {
    const Tf32Pair pair = split_tf32(value);
    big[i][r] = pair.big;
    small[i][r] = pair.small;
  }
};

// A warp's part of a tile.
template <class Traits>
class GramProduct {
 public:
  using T = typename Traits::T;
  using Panel = typename Traits::Panel;

  __device__ __forceinline__ void add_stage(const GramSource<T>& source, const unsigned char* left,
                                            const unsigned char* right, const float* weights) {
    const int rows = warp_rows<Traits::kTile>(source.channels, source.channels - source.to_column,
                                              source.to_column == 0);
    if (rows == Traits::kRows) {
      add_steps<Traits::kRows>(left, right, weights);
    } else if (rows > 0) {
      add_steps<Traits::kRows / 2>(left, right, weights);
    }
  }

  // to[row * stride + column] = the sums.
  __device__ __forceinline__ void write(float* to, int stride) const {
    const int lane = threadIdx.x % 32;
    const WarpPlace at = warp_place<Traits::kTile>();
    to += (at.row + lane / 4) * stride + at.column + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < Traits::kRows; ++r)
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          to[(16 * r + e / 2 * 8) * stride + 8 * c + e % 2] = sums_[r][c][e];
  }

 private:
  static constexpr int kColumns = Traits::kColumns;
  using Sum = float[kColumns][4];

  // The warp's first kRows fragments of rows.
  template <int kRows>
  __device__ __forceinline__ void add_steps(const unsigned char* left, const unsigned char* right,
                                            const float* weights) {
#pragma unroll 1  // or fragments would be loaded before there are registers for them
    for (int step = 0; step < Traits::kSteps; ++step) {
      if constexpr (!Traits::kTf32) {
        add_exact_step<kRows>(left, right, step);
      } else if constexpr (sizeof(T) == 4) {
        add_float_step<kRows>(left, right, weights, step);
      } else {
        add_weighted_step<kRows>(left, right, weights, step);
      }
    }
  }

  template <int kRows>
  __device__ __forceinline__ void add_exact_step(const unsigned char* left,
                                                 const unsigned char* right, int step) {
    const unsigned rows_from = Panel::rows_from(warp_place<Traits::kTile>().row);
    uint32_t b[kColumns][2];
    load_columns(right, step, b);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t a[4];
      Panel::load_rows(left, rows_from, r, step, a);
      Sum sum = {};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) mma_16_bit<T>(sum[c], a, b[c]);
      add(sum, r);
    }
  }

  template <int kRows>
  __device__ __forceinline__ void add_float_step(const unsigned char* left,
                                                 const unsigned char* right, const float* weights,
                                                 int step) {
    const unsigned rows_from = Panel::rows_from(warp_place<Traits::kTile>().row);
    Tf32Pairs<kColumns, 2> b;
    load_columns(right, step, b.big);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weight = Traits::kWeighted ? weights[8 * step + threadIdx.x % 4 + 4 * i] : 1;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) b.split(c, i, weight * float_from_bits(b.big[c][i]));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Tf32Pairs<1, 4> a;
      Panel::load_rows(left, rows_from, r, step, a.big[0]);
#pragma unroll
      for (int i = 0; i < 4; ++i) a.split(0, i, float_from_bits(a.big[0][i]));
      Sum sum = {};
      multiply(sum, a.small[0], b.big);
      multiply(sum, a.big[0], b.small);
      multiply(sum, a.big[0], b.big);
      add(sum, r);
    }
  }

  // A word has two rows: one goes to the first half of a TF32 product's depth, the other to the
  // second, since a sum over rows does not depend on their order.
  template <int kRows>
  __device__ __forceinline__ void add_weighted_step(const unsigned char* left,
                                                    const unsigned char* right,
                                                    const float* weights, int step) {
    const WarpPlace at = warp_place<Traits::kTile>();
    uint32_t words[4], b[kColumns][2];
    Panel::load_pairs(right, Panel::pairs_from(at.column), 0, step, words);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) b[c][i] = bits_from_float(half_of(words[c], i));
    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) weight[i] = weights[8 * step + threadIdx.x % 4 * 2 + i];
    const unsigned rows_from = Panel::pairs_from(at.row);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r % 2 == 0) Panel::load_pairs(left, rows_from, r / 2, step, words);
      Tf32Pairs<1, 4> a;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a.split(0, i, weight[i / 2] * half_of(words[r % 2 * 2 + i % 2], i / 2));
      Sum sum = {};
      multiply(sum, a.small[0], b);
      multiply(sum, a.big[0], b);
      add(sum, r);
    }
  }

  static __device__ __forceinline__ float half_of(uint32_t word, int half) {
    return half == 0 ? widen_low<T>(word) : widen_high<T>(word);
  }

  static __device__ __forceinline__ void load_columns(const unsigned char* right, int step,
                                                      uint32_t (&b)[kColumns][2]) {
    const unsigned from = Panel::columns_from(warp_place<Traits::kTile>().column);
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) Panel::load_columns(right, from, c, step, b[c], b[c + 1]);
  }

  static __device__ __forceinline__ void multiply(Sum& sum, const uint32_t (&a)[4],
                                                  const uint32_t (&b)[kColumns][2]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) mma_tf32(sum[c], a, b[c]);
  }

  __device__ __forceinline__ void add(const Sum& sum, int r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[r][c][e] += sum[c][e];
  }

  float sums_[Traits::kRows][kColumns][4] = {};
};

// One block computes one part of one tile of one layer. A tile of a single part is added to S; one
// of several goes to partial[part of all layers, kTile, kTile], which add_gram_parts sums.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    weighted_gram_products(const __grid_constant__ GramLaunch launch, float* partial) {
  constexpr int kTile = Traits::kTile, kStages = Traits::kStages;
  auto& shared = dynamic_shared<GramProductShared<Traits>>();
  __shared__ GramSource<typename Traits::T> source;
  if (threadIdx.x == 0) source = gram_source<Traits>(launch, blockIdx.x);
  __syncthreads();
  GramRing<Traits>& ring = shared.ring;
  const auto load = [&](int stage) {
    if (stage * Traits::kDepth < source.task.rows) load_gram_stage(source, stage, ring);
    commit_copies();
  };
  GramProduct<Traits> product;
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
#pragma unroll 1
  for (int stage = 0; stage * Traits::kDepth < source.task.rows; ++stage) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    load(stage + kStages - 1);
    auto& panel = ring.panel[stage % kStages];
    product.add_stage(source, panel[0], panel[source.to_column > 0], ring.weight[stage % kStages]);
  }
  const GramTask& task = source.task;
  const GramLayer& layer = launch.layer[task.layer];
  if (layer.split.count > 1) {
    product.write(partial + task.part * (kTile * kTile), kTile);
    return;
  }
  __syncthreads();  // the stages make room for the tile
  product.write(shared.tile[0], kGramTileRow<kTile>);
  __syncthreads();
  add_tile_rows<Traits::kThreads, kTile>(layer.params, task.tile(), 0, shared.tile);
}

// Copies the rows of the layers whose a cannot be read in place; zeros behind their last channels.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    pack_gram_rows(const __grid_constant__ GramLaunch launch, T* packed) {
  constexpr int kUnit = 16 / sizeof(T);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads * kUnit;
  for (int64_t at = (blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x) * kUnit;
       at < launch.packed_rows; at += stride) {
    const GramLayer& layer =
        launch.layer[find_gram_layer(launch, &GramLayer::first_packed_row, at)];
    const WeightedGramParams& params = layer.params;
    const DivMod place = div_mod(at - layer.first_packed_row, layer.rows.stride);
    const DivMod row = sample_and_term(params, place.quotient);
    const T* from = static_cast<const T*>(params.a) + row.quotient * params.a_sample_stride +
                    row.remainder * params.a_term_stride;
    Unit<T, kUnit> unit{};
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const int64_t channel = place.remainder + e;
      if (channel < params.channels) unit.put(e, from[channel * params.a_channel_stride]);
    }
    store_unit(unit, packed + at);
  }
}

// The same for the weights of the layers that have others than float32 side by side.
template <class = void>
__global__ void __launch_bounds__(kBlockThreads)
    pack_gram_weights(const __grid_constant__ GramLaunch launch, float* packed) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t at = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x;
       at < launch.packed_weights; at += stride) {
    const GramLayer& layer =
        launch.layer[find_gram_layer(launch, &GramLayer::first_packed_weight, at)];
    packed[at] = static_cast<float>(gram_weight(layer.params, at - layer.first_packed_weight));
  }
}

// Calls use(kernel, traits) with the kernel for tiles of this side. Host code, shared by the
// launcher and the emulator's tests.
template <class T, class Use>
void with_gram_product(int tile, bool weighted, Use use) {
  const auto with = [&](auto traits) { use(weighted_gram_products<decltype(traits)>, traits); };
  const auto sized = [&](auto is_weighted) {
    constexpr bool kWeighted = decltype(is_weighted)::value;
    if (tile == kLargeGramTile) return with(GramProductTraits<T, kLargeGramTile, kWeighted>{});
    with(GramProductTraits<T, kSmallGramTile, kWeighted>{});
  };
  weighted ? sized(std::true_type{}) : sized(std::false_type{});
}

}  // namespace ccp
