// The kernel of map_similarity for Hopper (sm_90a) and values of 16 bits: tiles of 256 x 128 maps,
// multiplied by warpgroups.
//
// One warpgroup copies, two multiply. The maps flow through a ring of stages in shared memory, 64
// bytes of each map to a stage, without a break between samples; a barrier for each place in the
// ring says that its stage has arrived, another that it is used up, so that each warpgroup goes its
// own way: while one turns a sample's sums into similarities, the other's products run.
//
// A thread's sums, 128, fill half of its registers; of its totals over the samples, as many, half
// lie in registers and half in shared memory, where the thread alone uses them.
//
// A tile is two blocks of rows by one of columns, of 128 maps each. Where a block of rows is that
// of the columns (the diagonal), it is loaded once; a block of rows below the diagonal is left out.
#pragma once

#include "csrc/cuda/map_launch.h"
#include "csrc/cuda/map_moments.cuh"
#include "csrc/cuda/shared.cuh"
#include "csrc/cuda/units.cuh"
#include "csrc/cuda/wgmma.cuh"

namespace ccp {

template <class T_, MapLoads kLoads_>
struct TallMapTraits {
  using T = T_;
  static_assert(sizeof(T) == 2);
  static constexpr MapLoads kLoads = kLoads_;
  // A panel holds rows of positions, one for each map; or rows of maps, one for each position.
  static constexpr bool kByPosition = kLoads == MapLoads::kChannelsLast;
  static constexpr PanelRows kPanelRows = kByPosition ? PanelRows::kMaps : PanelRows::kDepths;
  static constexpr int kBlock = kLargeMapTile;  // maps of a panel
  static constexpr int kPanels = 3;             // two blocks of rows, one of columns
  static constexpr int kColumns = 2;            // the panel of the columns
  static constexpr int kSumThreads = 2 * kWarpgroup;
  static constexpr int kThreads = kSumThreads + kWarpgroup;
  static constexpr int kUnit = 16 / sizeof(T);                 // elements
  static constexpr int kDepth = kTallMapRowBytes / sizeof(T);  // positions in a stage
  static constexpr int kRowBytes = kByPosition ? 2 * kProductRows : kTallMapRowBytes;
  static constexpr int kPanelBytes = kBlock * kTallMapRowBytes;
  static constexpr int kFragments = kBlock / 8;  // of columns
  static_assert(kBlock == kProductColumns);
};

// A thread's totals in one column of a fragment.
struct alignas(8) ColumnTotals {
  float row[2];
};

template <class Traits>
struct alignas(1024) TallMapShared {
  unsigned char panel[kTallMapStages][Traits::kPanels][Traits::kPanelBytes];
  ColumnTotals totals[Traits::kFragments][2][Traits::kSumThreads];  // of the second block of rows
  // Of a sample; they come with its first stage, and are used before its last is used up.
  MapTerms<float> terms[kTallMapStages][Traits::kPanels * Traits::kBlock];
  float self[Traits::kBlock];  // totals of the columns' similarity to themselves
  SharedBarrier arrived[kTallMapStages], used[kTallMapStages];
};

// A tile of a block and the block's share of the samples.
struct TallMapTask {
  int first_map[3], maps[3];  // of the panels
  int blocks;                 // of rows: 1 or 2
  int diagonal;               // the block of rows that the columns are, or -1
  int64_t first_sample;
  int samples;
  int earlier;    // samples that the block has compared before, in another task
  int64_t index;  // of the tile in the partial result

  // Where in shared memory the terms of a sample lie.
  __device__ __forceinline__ int terms_place(int sample) const {
    return static_cast<unsigned>(earlier + sample) % kTallMapStages;
  }
};

// How many tasks a block has, one after the other: a second one only after one of one block of
// rows.
__device__ __forceinline__ int tall_map_tasks(const MapSimilarityParams& params,
                                              const MapSimilarityLaunch& launch) {
  return launch.unit_tiles(params.symmetric, blockIdx.x % static_cast<unsigned>(launch.units));
}

template <class Traits>
__device__ __forceinline__ TallMapTask tall_map_task(const MapSimilarityParams& params,
                                                     const MapSimilarityLaunch& launch, int step) {
  constexpr int kBlock = Traits::kBlock;
  const ChannelDotLayout& layout = params.maps.layout;
  const unsigned units = static_cast<unsigned>(launch.units), part = blockIdx.x / units;
  const TileIndex tile = launch.tall_unit(params.symmetric, blockIdx.x % units, step);
  const int64_t first[] = {2 * tile.row * kBlock, (2 * tile.row + 1) * kBlock,
                           tile.column * kBlock};
  const int64_t first_sample = part * launch.split.length;
  const int64_t samples = layout.sample.size - first_sample;
  TallMapTask task;
#pragma unroll
  for (int panel = 0; panel < Traits::kPanels; ++panel) {
    const int64_t maps = layout.channel.size - first[panel];
    task.first_map[panel] = static_cast<int>(first[panel]);
    task.maps[panel] = static_cast<int>(maps < kBlock ? maps : kBlock);
  }
  const int64_t last_row = params.symmetric ? first[2] + 1 : layout.channel.size;
  task.blocks = first[1] < last_row ? 2 : 1;
  const int64_t diagonal = tile.column - 2 * tile.row;
  task.diagonal = params.symmetric && diagonal < 2 ? static_cast<int>(diagonal) : -1;
  task.first_sample = first_sample;
  task.samples = static_cast<int>(samples < launch.split.length ? samples : launch.split.length);
  task.earlier = step * task.samples;
  task.index = part * launch.tiles + launch.tall_index(params.symmetric, tile);
  return task;
}

// Where in the samples of a task a stage lies.
struct MapCursor {
  int sample = 0, chunk = 0;

  __device__ __forceinline__ void advance(int chunks) {
    if (++chunk < chunks) return;
    chunk = 0;
    ++sample;
  }
};

// A place in the ring and the parity of its barriers' phase there.
struct RingPlace {
  int place = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++place < kTallMapStages) return;
    place = 0;
    parity ^= 1;
  }
};

// One thread's part of filling the stages of a task.
template <class Traits>
class TallMapLoader {
 public:
  using T = typename Traits::T;

  __device__ __forceinline__ TallMapLoader(const MapSimilarityParams& params,
                                           const MapSimilarityLaunch& launch,
                                           const TallMapTask& task, const MapTerms<float>* x_terms,
                                           const MapTerms<float>* y_terms,
                                           TallMapShared<Traits>& shared)
      : params_(params),
        launch_(launch),
        task_(task),
        all_terms_{x_terms, y_terms},
        shared_(shared) {
    const ChannelDotLayout& layout = params.maps.layout;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      const MapSide from = side(panel);
      next_[panel] = static_cast<const T*>(from.data) +
                     task.first_sample * from.stride(layout.sample) +
                     (task.first_map[panel] + map_of(0)) * from.stride(layout.channel) +
                     position_of(0) * position_stride(panel);
    }
  }

  // Begins to copy a stage, one after the other.
  __device__ __forceinline__ void load(const MapCursor& at, int place) {
    if (at.chunk == 0) load_terms(at);
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel)
      if (loads(panel)) load_units(panel, at, place);
    commit_copies();
  }

  // Centres what has arrived of a stage.
  __device__ __forceinline__ void centre(const MapCursor& at, int place) {
    if (launch_.packed) return;
    if (at.chunk == 0) shifted_ = any_shift(at);
    if (!shifted_) return;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel)
      if (loads(panel)) centre_units(panel, at, place);
  }

 private:
  static constexpr int kUnit = Traits::kUnit;
  static constexpr int kRowUnits = (Traits::kByPosition ? Traits::kBlock : Traits::kDepth) / kUnit;
  static constexpr int kRowStep = kWarpgroup / kRowUnits;  // between a thread's units
  static constexpr int kUnitsPerThread = Traits::kPanelBytes / 16 / kWarpgroup;
  using Values = Unit<T, kUnit>;

  static __device__ __forceinline__ int first_row() { return threadIdx.x % kWarpgroup / kRowUnits; }
  static __device__ __forceinline__ int unit() { return threadIdx.x % kRowUnits; }
  // The first map of the thread's i-th unit, counted from the panel's first, and its first
  // position, counted from the stage's.
  static __device__ __forceinline__ int map_of(int i) {
    return Traits::kByPosition ? unit() * kUnit : first_row() + i * kRowStep;
  }
  static __device__ __forceinline__ int position_of(int i) {
    return Traits::kByPosition ? first_row() + i * kRowStep : unit() * kUnit;
  }

  __device__ __forceinline__ bool loads(int panel) const {
    return panel == Traits::kColumns ? task_.diagonal < 0 : panel < task_.blocks;
  }
  __device__ __forceinline__ MapSide side(int panel) const {
    return panel == Traits::kColumns ? right_side(params_) : left_side(params_);
  }
  __device__ __forceinline__ int64_t position_stride(int panel) const {
    return Traits::kByPosition ? side(panel).stride(params_.maps.layout.position[0]) : 1;
  }
  __device__ __forceinline__ int positions(const MapCursor& at) const {
    return at.chunk == launch_.chunks - 1 ? launch_.last_positions : Traits::kDepth;
  }
  // In global memory.
  __device__ __forceinline__ const MapTerms<float>* terms_of(int panel, const MapCursor& at) const {
    return all_terms_[panel == Traits::kColumns] +
           (task_.first_sample + at.sample) * params_.maps.layout.channel.size +
           task_.first_map[panel];
  }

  // The thread's i-th unit. Rows of maps lie in two panels beside each other.
  __device__ __forceinline__ T* unit_of(int panel, int place, int i) const {
    constexpr int kPanelUnits = Traits::kRowBytes / 16;
    const int part = unit() / kPanelUnits * (Traits::kDepth * Traits::kRowBytes);
    const int at = part + first_row() * Traits::kRowBytes + unit() % kPanelUnits * 16;
    return reinterpret_cast<T*>(shared_.panel[place][panel] + swizzled<Traits::kRowBytes>(at) +
                                i * kRowStep * Traits::kRowBytes);
  }

  __device__ __forceinline__ void load_terms(const MapCursor& at) const {
    const int map = threadIdx.x % kWarpgroup;
    MapTerms<float>* to = shared_.terms[task_.terms_place(at.sample)];
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      const bool valid = map < task_.maps[panel];
      copy_async<16>(to + panel * Traits::kBlock + map,
                     valid ? terms_of(panel, at) + map : all_terms_[0], valid);
    }
  }

  __device__ __forceinline__ void load_units(int panel, const MapCursor& at, int place) {
    const ChannelDotLayout& layout = params_.maps.layout;
    const MapSide from = side(panel);
    const int along = Traits::kByPosition ? task_.maps[panel] : positions(at);
    const int across = Traits::kByPosition ? positions(at) : task_.maps[panel];
    const int rows_left = unit() * kUnit < along ? across - first_row() : 0;
    const int64_t step =
        kRowStep * from.stride(Traits::kByPosition ? layout.position[0] : layout.channel);
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i)
      copy_async<16>(unit_of(panel, place, i), next_[panel] + i * step, i * kRowStep < rows_left);
    const int64_t depth = Traits::kDepth * position_stride(panel);
    next_[panel] += depth;
    if (at.chunk == launch_.chunks - 1)
      next_[panel] += from.stride(layout.sample) - launch_.chunks * depth;
  }

  // Whether any map of which this thread loads units is to be shifted.
  __device__ __forceinline__ bool any_shift(const MapCursor& at) const {
    constexpr int kMaps = Traits::kByPosition ? kUnit : kUnitsPerThread;
    bool any = false;
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      if (!loads(panel)) continue;
      const MapTerms<float>* terms = terms_of(panel, at);
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        const int map = Traits::kByPosition ? map_of(0) + i : map_of(i);
        if (map < task_.maps[panel]) any |= terms[map].shift != 0;
      }
    }
    return any;
  }

  // What lies outside the maps stays zero.
  __device__ __forceinline__ void centre_units(int panel, const MapCursor& at, int place) const {
    const MapTerms<float>* terms = terms_of(panel, at);
#pragma unroll 1
    for (int i = 0; i < kUnitsPerThread; ++i) {
      if (position_of(i) >= positions(at) || map_of(i) >= task_.maps[panel]) continue;
      T* address = unit_of(panel, place, i);
      const Values values = load_unit<T, kUnit>(address);
      Values centred{};
#pragma unroll
      for (int e = 0; e < kUnit; ++e)
        centred.put(
            e, narrow<T>(values.value(e) - terms[map_of(i) + (Traits::kByPosition ? e : 0)].shift));
      store_unit(centred, address);
    }
  }

  const MapSimilarityParams& params_;
  const MapSimilarityLaunch& launch_;
  const TallMapTask& task_;
  const MapTerms<float>* const all_terms_[2];
  TallMapShared<Traits>& shared_;
  bool shifted_ = false;  // whether any map of the sample that is centred is
  const T* next_[3];      // where the thread's first unit of the next stage lies
};

// The copying warpgroup. A stage is centred and given to the others when the two after it have been
// begun.
template <class Traits>
__device__ __forceinline__ void load_maps(const MapSimilarityParams& params,
                                          const MapSimilarityLaunch& launch,
                                          const MapTerms<float>* x_terms,
                                          const MapTerms<float>* y_terms,
                                          TallMapShared<Traits>& shared) {
  constexpr int kBehind = 2;
  RingPlace loaded, given;
#pragma unroll 1
  for (int step = 0; step < tall_map_tasks(params, launch); ++step) {
    const TallMapTask task = tall_map_task<Traits>(params, launch, step);
    TallMapLoader<Traits> loader(params, launch, task, x_terms, y_terms, shared);
    MapCursor loading, giving;
    const auto give = [&] {
      loader.centre(giving, given.place);
      show_to_products();
      arrive(shared.arrived[given.place]);
      given.advance();
      giving.advance(launch.chunks);
    };
    int begun = 0;  // stages that are not given yet, at most kBehind
#pragma unroll 1
    while (loading.sample < task.samples) {
      wait(shared.used[loaded.place], loaded.parity ^ 1);
      loader.load(loading, loaded.place);
      loaded.advance();
      loading.advance(launch.chunks);
      if (begun < kBehind) {
        ++begun;
        continue;
      }
      wait_for_copies<kBehind>();
      give();
    }
    wait_for_copies<0>();
    while (begun-- > 0) give();
  }
}

// The place of a multiplying thread's first element in its block of rows.
__device__ __forceinline__ int tall_row(unsigned thread) {
  return static_cast<int>(thread / 32 * 16 + thread % 32 / 4);
}
__device__ __forceinline__ int tall_column(unsigned thread) {
  return static_cast<int>(thread % 4 * 2);
}

// sums += the products over one stage, or sums = those of a sample's first.
template <class Traits, int kBlocks>
__device__ __forceinline__ void multiply_stage(uint32_t panels, int diagonal, int warpgroup,
                                               bool is_first, ProductSums (&sums)[kBlocks]) {
  using T = typename Traits::T;
  constexpr PanelRows kRows = Traits::kPanelRows;
  // From 64 maps to the next 64, and from one product's depth to the next.
  constexpr unsigned kMapsBytes = kProductRows * kTallMapRowBytes;
  constexpr unsigned kStepBytes =
      kProductDepth * (Traits::kByPosition ? Traits::kRowBytes : sizeof(T));
  const auto operand = [](uint32_t address) {
    return matrix_operand<kRows, Traits::kRowBytes>(address, kMapsBytes);
  };
  const int column_panel = diagonal < 0 ? Traits::kColumns : diagonal;
  const MatrixOperand rows = operand(panels + warpgroup * kMapsBytes);
  const MatrixOperand columns = operand(panels + column_panel * Traits::kPanelBytes);
  begin_products(sums);
#pragma unroll
  for (int step = 0; step < Traits::kDepth / kProductDepth; ++step) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
      multiply_async<T, kRows, Traits::kRowBytes>(
          sums[block], rows + (block * Traits::kPanelBytes + step * kStepBytes),
          columns + step * kStepBytes, !is_first || step > 0);
  }
  wait_for_products(sums);
}

// totals += the similarities that a sample's sums of products amount to; more_totals those of the
// second block of rows.
template <SimilarityKind kind, class Traits, int kBlocks>
__device__ __forceinline__ void add_similarities(
    const MapTerms<float>* terms, int columns, float per_position,
    const ProductSums (&sums)[kBlocks], ProductSums& totals,
    ColumnTotals (&more_totals)[Traits::kFragments][2][Traits::kSumThreads]) {
  const unsigned thread = fresh_thread();
  MapTerms<float> rows[kBlocks][2];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      rows[block][i] = terms[block * Traits::kBlock + tall_row(thread) + 8 * i];
  terms += Traits::kColumns * Traits::kBlock + tall_column(thread);
#pragma unroll
  for (int f = 0; f < Traits::kFragments; ++f) {
    // Every other fragment: the compiler postpones no addition beyond a branch, and so has
    // registers for what it keeps.
    if (f % 2 == 0 && 8 * f >= columns) break;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const MapTerms<float> column = terms[8 * f + c];
      const auto of = [&](int block, int i) {
        return similarity<kind>(rows[block][i], column, sums[block][f][2 * i + c], per_position);
      };
#pragma unroll
      for (int i = 0; i < 2; ++i) totals[f][2 * i + c] += of(0, i);
      if constexpr (kBlocks == 2) {
        ColumnTotals more = more_totals[f][c][thread];
#pragma unroll
        for (int i = 0; i < 2; ++i) more.row[i] += of(1, i);
        more_totals[f][c][thread] = more;
      }
    }
  }
}

// A thread's totals of one block of rows to the partial result; on the diagonal the others' alone.
template <class Get>
__device__ __forceinline__ void write_totals(float* out, unsigned thread, bool diagonal, Get get) {
#pragma unroll
  for (int f = 0; f < kProductColumns / 8; ++f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tall_row(thread) + i / 2 * 8, column = 8 * f + tall_column(thread) + i % 2;
      if (!diagonal || row != column) out[row * kProductColumns + column] = get(f, i);
    }
  }
}

// What a multiplying warpgroup does of a task with kBlocks blocks of rows.
template <class Traits, int kBlocks>
__device__ __forceinline__ void compare_blocks(const MapSimilarityParams& params,
                                               const MapSimilarityLaunch& launch,
                                               const TallMapTask& task, int warpgroup,
                                               TallMapShared<Traits>& shared, RingPlace& ring,
                                               float* partial) {
  constexpr int kBlock = Traits::kBlock;
  ProductSums sums[kBlocks]{};
  ProductSums totals{};
  if (threadIdx.x < kBlock) shared.self[threadIdx.x] = 0;
  if constexpr (kBlocks == 2) {
#pragma unroll
    for (auto& fragment : shared.totals) fragment[0][threadIdx.x] = fragment[1][threadIdx.x] = {};
  }
  MapCursor at;
#pragma unroll 1
  while (at.sample < task.samples) {
    const bool last = at.chunk == launch.chunks - 1;
    wait(shared.arrived[ring.place], ring.parity);
    multiply_stage<Traits>(shared_address(shared.panel[ring.place]), task.diagonal, warpgroup,
                           at.chunk == 0, sums);
    if (last) {
      const MapTerms<float>* terms = shared.terms[task.terms_place(at.sample)];
      with_kind(params.kind, [&](auto kind) {
        constexpr SimilarityKind kKind = decltype(kind)::value;
        add_similarities<kKind, Traits>(terms, task.maps[Traits::kColumns], launch.per_position,
                                        sums, totals, shared.totals);
        const unsigned thread = fresh_thread();
        if (thread < kBlock)
          shared.self[thread] += self_similarity<kKind>(terms[Traits::kColumns * kBlock + thread]);
      });
    }
    __syncwarp();
    if (fresh_thread() % 32 == 0) arrive(shared.used[ring.place]);
    ring.advance();
    at.advance(launch.chunks);
  }
  float* out = partial + task.index * (2 * kBlock * kBlock);
  const unsigned thread = fresh_thread();
  write_totals(out, thread, task.diagonal == 0, [&](int f, int i) { return totals[f][i]; });
  if constexpr (kBlocks == 2)
    write_totals(out + kBlock * kBlock, thread, task.diagonal == 1,
                 [&](int f, int i) { return shared.totals[f][i % 2][thread].row[i / 2]; });
  if (task.diagonal >= 0 && thread < kBlock)
    out[(task.diagonal * kBlock + thread) * kBlock + thread] = shared.self[thread];
}

// A multiplying warpgroup.
template <class Traits>
__device__ __forceinline__ void compare_maps(const MapSimilarityParams& params,
                                             const MapSimilarityLaunch& launch, int warpgroup,
                                             TallMapShared<Traits>& shared, float* partial) {
  RingPlace ring;
  TallMapTask task = tall_map_task<Traits>(params, launch, 0);
  if (task.blocks == 1) {
    compare_blocks<Traits, 1>(params, launch, task, warpgroup, shared, ring, partial);
    if (tall_map_tasks(params, launch) == 1) return;
    task = tall_map_task<Traits>(params, launch, 1);
  }
  compare_blocks<Traits, 2>(params, launch, task, warpgroup, shared, ring, partial);
}

// Writes partial[part, tile][256][128], the sums over the task's samples. What lies below the
// diagonal or outside the result may be left unwritten. A launch is possible only where
// maxThreadsPerBlock, of the code that the device has loaded, is kThreads.
template <class Traits>
__global__ void __launch_bounds__(kWarpgroupProducts ? Traits::kThreads : 32, 1)
    compare_tall_map_tiles(MapSimilarityParams params, MapSimilarityLaunch launch,
                           const MapTerms<float>* x_terms, const MapTerms<float>* y_terms,
                           float* partial) {
#ifdef CCP_WARPGROUP_PRODUCTS
  static_assert(sizeof(TallMapShared<Traits>) <= 227 << 10);  // what a block may have there
  auto& shared = dynamic_shared<TallMapShared<Traits>>();
  if (threadIdx.x < kTallMapStages) {
    init_barrier(shared.arrived[threadIdx.x], kWarpgroup);
    init_barrier(shared.used[threadIdx.x], Traits::kSumThreads / 32);
  }
  __syncthreads();
  // The same number in all threads of a warp, as the compiler can tell.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / kWarpgroup), 0);
  if (warpgroup == Traits::kSumThreads / kWarpgroup) {
    keep_registers<40>();
    load_maps<Traits>(params, launch, x_terms, y_terms, shared);
  } else {
    claim_registers<232>();
    compare_maps<Traits>(params, launch, warpgroup, shared, partial);
  }
#endif
}

// Calls use(kernel, threads, shared_bytes) with the kernel for maps loaded so. Host code.
template <class T, class Use>
void with_tall_map_kernel(MapLoads loads, Use use) {
  const auto with = [&](auto traits) {
    using Traits = decltype(traits);
    use(compare_tall_map_tiles<Traits>, Traits::kThreads, sizeof(TallMapShared<Traits>));
  };
  if (loads == MapLoads::kChannelsLast) return with(TallMapTraits<T, MapLoads::kChannelsLast>{});
  return with(TallMapTraits<T, MapLoads::kRows>{});
}

}  // namespace ccp
