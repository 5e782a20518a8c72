// The CUDA kernels of map_similarity.
//
// A block compares kMapTile maps with kMapTile maps, sample after sample. The maps flow through a
// ring of stages in shared memory, kMapRowBytes of each map to a stage, without a break between
// samples; the matrix units sum the products, and after a sample's last stage each thread turns its
// sums into similarities, which it adds up over the samples in registers.
//
// What bounds it, for N samples of C maps of P positions and s bytes, T = ceil(C / kMapTile):
//   memory: N C P s bytes for the moments, and T times that for the tiles, most of it from the
//     cache;
//   matrix units: N T (T + 1) / 2 tiles of 2 kMapTile^2 P operations each (P in whole stages),
//     three times that for float32;
//   similarities: as many tiles of kMapTile^2 pairs, each pair some 12 instructions and, for SSIM,
//     a reciprocal, which counts as 8.
// A multiprocessor of Hopper issues 128 float32 instructions a cycle and its matrix units perform
// 4096 operations of 16 bits: by this count, similarities outweigh products below about P = 300.
#pragma once

#include "csrc/cuda/map_moments.cuh"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/units.cuh"

namespace ccp {

template <class T_, MapLoads kLoads_>
struct MapTraits {
  using T = T_;
  static constexpr MapLoads kLoads = kLoads_;
  static constexpr int kUnit = 16 / sizeof(T);             // elements
  static constexpr int kDepth = kMapRowBytes / sizeof(T);  // positions in a stage
  // A panel holds rows of positions, one for each map; or rows of maps, one for each position.
  static constexpr bool kByPosition = kLoads == MapLoads::kChannelsLast;
  // Rows that begin within a unit reach into one more. All others are mixed (unit_address).
  static constexpr bool kUnaligned = kLoads == MapLoads::kUnalignedRows;
  static constexpr int kRowUnits = kByPosition ? kMapTile / kUnit : kMapRowBytes / 16 + kUnaligned;
  static constexpr int kUnitsPerThread = kMapTile * kMapRowBytes / 16 / kMapThreads;
};

template <class Traits>
struct MapShared {
  alignas(
      16) unsigned char panel[kMapStages][2][kMapTile * (kMapRowBytes + 16 * Traits::kUnaligned)];
  MapTerms<float> terms[kMapStages][2 * kMapTile];  // of a sample's rows, then of its columns
};

// Where unit `unit` of row `row` lies in a panel: mixed so that the eight rows that a warp reads at
// once lie on different memory banks. Rows of five units do so by themselves.
template <class Traits>
__device__ __forceinline__ unsigned char* unit_address(unsigned char* panel, int row, int unit) {
  int mixed;
  if constexpr (Traits::kUnaligned) {
    mixed = unit;
  } else if constexpr (!Traits::kByPosition) {
    mixed = unit ^ (row / 2 % 4);
  } else if constexpr (sizeof(typename Traits::T) == 2) {
    mixed = unit ^ (row % 8);
  } else {
    mixed = unit ^ (row % 4 * 2);
  }
  return panel + (row * Traits::kRowUnits + mixed) * 16;
}

// The tile of a block and its share of the samples.
struct MapTask {
  int64_t first_map[2];  // of the rows, of the columns
  bool diagonal;         // rows and columns are the same maps
  int64_t first_sample, samples;
};

// A stage's place in the sequence of all stages of all samples of a task.
struct MapCursor {
  int64_t sample;  // counted from the task's first
  int64_t chunk;
  int stage;  // counted on and on; its place in the ring is stage % kMapStages

  __device__ __forceinline__ void advance(int64_t chunks) {
    ++stage;
    if (++chunk < chunks) return;
    chunk = 0;
    ++sample;
  }
};

// One thread's part of filling the stages.
template <class Traits>
struct MapLoader {
  using T = typename Traits::T;
  static constexpr int kUnit = Traits::kUnit;
  using Values = Unit<T, kUnit>;
  const MapSimilarityParams& params;
  const MapSimilarityLaunch& launch;
  const MapTask& task;
  const MapTerms<float>* all_terms[2];
  MapShared<Traits>& shared;

  // The place of the thread's i-th unit: its first map, counted from the panel's first, and its
  // first position, counted from the sample's.
  struct Place {
    int row, unit, map;
    int64_t position;
  };

  __device__ __forceinline__ Place place_of(int i, const MapCursor& at) const {
    constexpr int kUnits = Traits::kByPosition ? kMapTile / kUnit : kMapRowBytes / 16;
    const int index = threadIdx.x + i * kMapThreads;
    const int row = index / kUnits, unit = index % kUnits;
    const int64_t first = at.chunk * Traits::kDepth;
    if constexpr (Traits::kByPosition) return {row, unit, unit * kUnit, first + row};
    return {row, unit, row, first + unit * kUnit};
  }

  __device__ __forceinline__ bool inside(int panel, int map, int64_t position) const {
    const ChannelDotLayout& layout = params.maps.layout;
    return task.first_map[panel] + map < layout.channel.size && position < layout.positions;
  }

  __device__ __forceinline__ MapSide side(int panel) const {
    return panel == 0 ? left_side(params) : right_side(params);
  }

  // Where a sample's maps begin, in elements.
  __device__ __forceinline__ int64_t sample_offset(int panel, int64_t sample) const {
    const ChannelDotLayout& layout = params.maps.layout;
    const MapSide from = side(panel);
    return (task.first_sample + sample) * from.stride(layout.sample) +
           task.first_map[panel] * from.stride(layout.channel);
  }

  __device__ __forceinline__ const T* sample_maps(int panel, int64_t sample) const {
    return static_cast<const T*>(side(panel).data) + sample_offset(panel, sample);
  }

  __device__ __forceinline__ void load_terms(const MapCursor& at) const {
    const bool row = threadIdx.x < kMapTile;
    const int64_t channels = params.maps.layout.channel.size;
    const int64_t channel = (row ? task.first_map[0] : task.first_map[1]) + threadIdx.x % kMapTile;
    const bool valid = channel < channels;
    const int64_t index = (task.first_sample + at.sample) * channels + (valid ? channel : 0);
    copy_async<16>(&shared.terms[at.sample % kMapStages][threadIdx.x],
                   (row ? all_terms[0] : all_terms[1]) + index, valid);
  }

  __device__ __forceinline__ void load_units(int panel, const MapCursor& at) const {
    const ChannelDotLayout& layout = params.maps.layout;
    const MapSide from = side(panel);
    const T* maps = sample_maps(panel, at.sample);
    unsigned char* to = shared.panel[at.stage % kMapStages][panel];
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i) {
      const Place place = place_of(i, at);
      const bool valid = inside(panel, place.map, place.position);
      const int64_t offset = place.map * from.stride(layout.channel) +
                             place.position * from.stride(layout.position[0]);
      copy_async<16>(unit_address<Traits>(to, place.row, place.unit), maps + (valid ? offset : 0),
                     valid);
    }
  }

  // From the boundary of 16 bytes at or before each row's beginning on.
  __device__ __forceinline__ void load_unaligned(int panel, const MapCursor& at) const {
    constexpr int kUnits = kMapTile * Traits::kRowUnits;
    const ChannelDotLayout& layout = params.maps.layout;
    const MapSide from = side(panel);
    const T* data = static_cast<const T*>(from.data);
    const int64_t maps = sample_offset(panel, at.sample);
    unsigned char* to = shared.panel[at.stage % kMapStages][panel];
#pragma unroll
    for (int first = 0; first < kUnits; first += kMapThreads) {
      const int index = first + threadIdx.x;
      if (index >= kUnits) break;
      const int row = index / Traits::kRowUnits, unit = index % Traits::kRowUnits;
      const int64_t map = maps + row * from.stride(layout.channel);
      const int64_t begin = map / kUnit * kUnit + at.chunk * Traits::kDepth + unit * kUnit;
      const bool valid = inside(panel, row, 0) && begin < map + layout.positions;
      const int64_t left = launch.extent[panel] - begin;
      const int elements = left < kUnit ? static_cast<int>(left) : kUnit;
      copy_part_async<16>(unit_address<Traits>(to, row, unit), data + (valid ? begin : 0),
                          valid ? elements * static_cast<int>(sizeof(T)) : 0);
    }
  }

  // Element by element, centred at once.
  __device__ __forceinline__ void load_elements(int panel, const MapCursor& at) const {
    const ChannelDotLayout& layout = params.maps.layout;
    const MapSide from = side(panel);
    const T* maps = sample_maps(panel, at.sample);
    const MapTerms<float>* terms = all_terms[panel] +
                                   (task.first_sample + at.sample) * layout.channel.size +
                                   task.first_map[panel];
    unsigned char* to = shared.panel[at.stage % kMapStages][panel];
#pragma unroll 4
    for (int i = threadIdx.x; i < kMapTile * Traits::kDepth; i += kMapThreads) {
      const int map = i / Traits::kDepth, depth = i % Traits::kDepth;
      const int64_t position = at.chunk * Traits::kDepth + depth;
      T centred{};
      if (inside(panel, map, position))
        centred = narrow<T>(
            widen(maps[map * from.stride(layout.channel) + from.position(layout, position)]) -
            terms[map].shift);
      T* unit = reinterpret_cast<T*>(unit_address<Traits>(to, map, depth / Traits::kUnit));
      unit[depth % Traits::kUnit] = centred;
    }
  }

  __device__ __forceinline__ void load(const MapCursor& at) const {
    if (at.sample < task.samples) {
      if (at.chunk == 0) load_terms(at);
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        if (panel == 1 && task.diagonal) break;
        if constexpr (Traits::kLoads == MapLoads::kStrided) {
          load_elements(panel, at);
        } else if constexpr (Traits::kUnaligned) {
          load_unaligned(panel, at);
        } else {
          load_units(panel, at);
        }
      }
    }
    commit_copies();
  }

  // The unit less the shifts of its maps.
  __device__ __forceinline__ Values centred(const Values& values,
                                            const MapTerms<float>* terms) const {
    float shift[kUnit];
    bool any = false;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      shift[e] = terms[Traits::kByPosition ? e : 0].shift;
      any |= shift[e] != 0;
    }
    if (!any) return values;
    Values result{};
#pragma unroll
    for (int e = 0; e < kUnit; ++e) result.put(e, narrow<T>(values.value(e) - shift[e]));
    return result;
  }

  __device__ __forceinline__ T* panel_unit(int panel, const MapCursor& at, int row,
                                           int unit) const {
    return reinterpret_cast<T*>(
        unit_address<Traits>(shared.panel[at.stage % kMapStages][panel], row, unit));
  }

  // Centres what this thread loaded. What lies outside the maps stays zero.
  __device__ __forceinline__ void centre_units(int panel, const MapCursor& at,
                                               const MapTerms<float>* terms) const {
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i) {
      const Place place = place_of(i, at);
      if (!inside(panel, place.map, place.position)) continue;
      T* address = panel_unit(panel, at, place.row, place.unit);
      store_unit(centred(load_unit<T, kUnit>(address), terms + place.map), address);
    }
  }

  // Moves every row to the beginning of its units, centres it, and writes zeros behind its end. The
  // threads of a row are of one warp.
  __device__ __forceinline__ void straighten(int panel, const MapCursor& at,
                                             const MapTerms<float>* terms) const {
    const ChannelDotLayout& layout = params.maps.layout;
    const int64_t maps = sample_offset(panel, at.sample);
    const int64_t stride = side(panel).stride(layout.channel);
    Values straight[Traits::kUnitsPerThread];
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i) {
      const Place place = place_of(i, at);
      const T* address = panel_unit(panel, at, place.row, place.unit);
      const int first = static_cast<unsigned>(maps + place.row * stride) % kUnit;
      const Values moved =
          elements_from(first, load_unit<T, kUnit>(address), load_unit<T, kUnit>(address + kUnit));
      const int64_t left = inside(panel, place.row, 0) ? layout.positions - place.position : 0;
      straight[i] = zero_outside(centred(moved, terms + place.row),
                                 unit_mask<T, kUnit>(bits_within<kUnit, int64_t>(0, 0, left)));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i) {
      const Place place = place_of(i, at);
      store_unit(straight[i], panel_unit(panel, at, place.row, place.unit));
    }
  }

  __device__ __forceinline__ void centre(const MapCursor& at) const {
    if constexpr (Traits::kLoads != MapLoads::kStrided) {
      if (at.sample >= task.samples) return;
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        if (panel == 1 && task.diagonal) break;
        const MapTerms<float>* terms = shared.terms[at.sample % kMapStages] + panel * kMapTile;
        if constexpr (Traits::kUnaligned) {
          straighten(panel, at, terms);
        } else {
          centre_units(panel, at, terms);
        }
      }
    }
  }
};

constexpr int kWarpRows = 2;     // fragments of 16 rows: a warp's quarter of the tile is 32 x 32
constexpr int kWarpColumns = 4;  // fragments of 8 columns

// One warp's sums: element i of fragment [r][c] is as mma.cuh says.
struct WarpTile {
  float element[kWarpRows][kWarpColumns][4];
};

// The fragments of 16 maps from `map` on (rows of A), at depth step `step` of a stage.
template <class Traits>
__device__ __forceinline__ void load_rows(unsigned char* panel, int map, int step,
                                          uint32_t (&a)[4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (!Traits::kByPosition) {
    load_matrices(a, unit_address<Traits>(panel, map + lane % 16, 2 * step + lane / 16));
  } else if constexpr (sizeof(typename Traits::T) == 2) {
    load_matrices_transposed(a, unit_address<Traits>(panel, 16 * step + lane % 8 + lane / 16 * 8,
                                                     map / 8 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = map + lane / 4 + r % 2 * 8, depth = 8 * step + lane % 4 + r / 2 * 4;
      a[r] = reinterpret_cast<uint32_t*>(unit_address<Traits>(panel, depth, row / 4))[row % 4];
    }
  }
}

// The fragments of 16 maps from `map` on, as two neighbouring groups of columns of B.
template <class Traits>
__device__ __forceinline__ void load_columns(unsigned char* panel, int map, int step,
                                             uint32_t (&b)[2][2]) {
  const int lane = threadIdx.x % 32;
  uint32_t both[4];
  if constexpr (!Traits::kByPosition) {
    load_matrices(
        both, unit_address<Traits>(panel, map + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  } else if constexpr (sizeof(typename Traits::T) == 2) {
    load_matrices_transposed(
        both, unit_address<Traits>(panel, 16 * step + lane % 16, map / 8 + lane / 16));
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int column = map + lane / 4 + r / 2 * 8, depth = 8 * step + lane % 4 + r % 2 * 4;
      both[r] =
          reinterpret_cast<uint32_t*>(unit_address<Traits>(panel, depth, column / 4))[column % 4];
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) b[r / 2][r % 2] = both[r];
}

// values[i] = big + small, each of them in TF32; big replaces the value.
template <int kCount, int kRegisters>
__device__ __forceinline__ void split_fragments(uint32_t (&values)[kCount][kRegisters],
                                                uint32_t (&small)[kCount][kRegisters]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      const Tf32Pair pair = split_tf32(float_from_bits(values[i][r]));
      values[i][r] = pair.big;
      small[i][r] = pair.small;
    }
  }
}

// sums += the products over one stage. float32 values are multiplied as pairs of TF32 values: three
// products keep 20 bits, one keeps 11. The matrix units round sums towards zero; a stage's own sum
// is short, and joins the others by a rounded addition.
template <class Traits>
__device__ __forceinline__ void add_stage(unsigned char* rows, unsigned char* columns, int row,
                                          int column, bool allow_tf32, WarpTile& sums) {
  using T = typename Traits::T;
  constexpr bool kPairs = sizeof(T) == 4;
  WarpTile stage{};
#pragma unroll
  for (int step = 0; step < Traits::kDepth / kMmaDepth<T>; ++step) {
    uint32_t a[kWarpRows][4], small_a[kWarpRows][4];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) load_rows<Traits>(rows, row + 16 * r, step, a[r]);
    if constexpr (kPairs) split_fragments(a, small_a);
#pragma unroll
    for (int first = 0; first < kWarpColumns; first += 2) {
      uint32_t b[2][2], small_b[2][2];
      load_columns<Traits>(columns, column + 8 * first, step, b);
      if constexpr (kPairs) split_fragments(b, small_b);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float (&sum)[4] = stage.element[r][first + c];
          if constexpr (kPairs) {
            if (!allow_tf32) {
              mma_tf32(sum, small_a[r], b[c]);
              mma_tf32(sum, a[r], small_b[c]);
            }
            mma_tf32(sum, a[r], b[c]);
          } else {
            mma_16_bit<T>(sum, a[r], b[c]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
    for (int c = 0; c < kWarpColumns; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.element[r][c][i] += stage.element[r][c][i];
}

// Calls visit(element, r, c, i, row, column) with each of the warp's elements [r][c][i] that this
// lane holds, and its place in the tile.
template <class Visit>
__device__ __forceinline__ void for_each_element(WarpTile& tile, int row, int column, Visit visit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
    for (int i = 0; i < 4; i += 2)
#pragma unroll
      for (int c = 0; c < kWarpColumns; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          visit(tile.element[r][c][i + e], r, c, i + e, row + 16 * r + lane / 4 + 4 * i,
                column + 8 * c + lane % 4 * 2 + e);
}

// totals += the similarities that a sample's sums of products amount to.
template <SimilarityKind kind>
__device__ __forceinline__ void add_similarities(const MapTerms<float>* terms, bool diagonal,
                                                 float per_position, int row, int column,
                                                 WarpTile& sums, WarpTile& totals) {
  for_each_element(sums, row, column, [&](float sum, int r, int c, int i, int m, int n) {
    const MapTerms<float> a = terms[m], b = terms[kMapTile + n];
    totals.element[r][c][i] +=
        diagonal && m == n ? self_similarity<kind>(a) : similarity<kind>(a, b, sum * per_position);
  });
}

// Writes partial[block][kMapTile][kMapTile], the sums over the task's samples. Of a diagonal tile,
// what lies below the diagonal is not written, nor is what lies outside the result.
template <class Traits>
__global__ void __launch_bounds__(kMapThreads, 2)
    map_similarity_tiles(MapSimilarityParams params, MapSimilarityLaunch launch,
                         const MapTerms<float>* x_terms, const MapTerms<float>* y_terms,
                         float* partial) {
  __shared__ MapShared<Traits> shared;
  const ChannelDotLayout& layout = params.maps.layout;
  const int64_t chunks = ceil_div(layout.positions, Traits::kDepth);
  const float scale = static_cast<float>(params.scale);
  const float per_position = scale * scale / static_cast<float>(layout.positions);
  const int warp = threadIdx.x / 32, row = warp / 2 * 32, column = warp % 2 * 32;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const TileIndex tile = launch.tile(params.symmetric, block % launch.tiles);
    const int64_t first_sample = block / launch.tiles * launch.split.length;
    const int64_t left = layout.sample.size - first_sample;
    const MapTask task{{tile.row * kMapTile, tile.column * kMapTile},
                       params.symmetric && tile.row == tile.column,
                       first_sample,
                       left < launch.split.length ? left : launch.split.length};
    const bool computes = task.first_map[0] + row < layout.channel.size &&
                          task.first_map[1] + column < layout.channel.size &&
                          !(task.diagonal && row > column);
    const MapLoader<Traits> loader{params, launch, task, {x_terms, y_terms}, shared};
    WarpTile sums{}, totals{};
    MapCursor loaded{0, 0, 0}, centred{0, 0, 0}, summed{0, 0, 0};
#pragma unroll 1
    for (int stage = 0; stage < kMapStages - 1; ++stage) {
      loader.load(loaded);
      loaded.advance(chunks);
    }
    wait_for_copies<kMapStages - 2>();
    __syncthreads();
    loader.centre(centred);
    centred.advance(chunks);
    while (summed.sample < task.samples) {
      // The next stage has arrived; this one was centred in the last turn.
      wait_for_copies<kMapStages - 3>();
      __syncthreads();
      loader.load(loaded);
      loaded.advance(chunks);
      loader.centre(centred);
      centred.advance(chunks);
      if (computes) {
        auto& panel = shared.panel[summed.stage % kMapStages];
        add_stage<Traits>(panel[0], panel[task.diagonal ? 0 : 1], row, column, params.allow_tf32,
                          sums);
        if (summed.chunk == chunks - 1) {
          with_kind(params.kind, [&](auto kind) {
            add_similarities<decltype(kind)::value>(shared.terms[summed.sample % kMapStages],
                                                    task.diagonal, per_position, row, column, sums,
                                                    totals);
          });
          sums = WarpTile{};
        }
      }
      summed.advance(chunks);
    }
    float* part = partial + block * (kMapTile * kMapTile);
    if (computes)
      for_each_element(totals, row, column, [&](float total, int, int, int, int m, int n) {
        part[m * kMapTile + n] = total;
      });
    wait_for_copies<0>();
    __syncthreads();
  }
}

// out = the mean over all samples: the sum over the parts of partial[part, tile], in their order.
template <class = void>
__global__ void __launch_bounds__(kBlockThreads)
    mean_of_map_parts(MapSimilarityParams params, MapSimilarityLaunch launch,
                      const float* partial) {
  constexpr int64_t kElements = kMapTile * kMapTile;
  const int64_t channels = params.maps.layout.channel.size, count = launch.tiles * kElements;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  float* out = static_cast<float*>(params.maps.out);
  for (int64_t e = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x; e < count;
       e += stride) {
    const TileIndex tile = launch.tile(params.symmetric, e / kElements);
    const int64_t i = tile.row * kMapTile + e % kElements / kMapTile;
    const int64_t j = tile.column * kMapTile + e % kMapTile;
    if (i >= channels || j >= channels || (params.symmetric && i > j)) continue;
    float sum = 0;
    for (int64_t part = 0; part < launch.split.count; ++part) sum += partial[part * count + e];
    const float mean = sum / static_cast<float>(params.maps.layout.sample.size);
    out[i * channels + j] = mean;
    if (params.symmetric) out[j * channels + i] = mean;
  }
}

// Calls use(kernel) with the kernel for this way of loading. Host code, shared by the launcher and
// the emulator's tests.
template <class T, class Use>
void with_map_similarity_kernel(MapLoads loads, Use use) {
  switch (loads) {
    case MapLoads::kRows:
      return use(map_similarity_tiles<MapTraits<T, MapLoads::kRows>>);
    case MapLoads::kUnalignedRows:
      return use(map_similarity_tiles<MapTraits<T, MapLoads::kUnalignedRows>>);
    case MapLoads::kChannelsLast:
      return use(map_similarity_tiles<MapTraits<T, MapLoads::kChannelsLast>>);
    case MapLoads::kStrided:
      return use(map_similarity_tiles<MapTraits<T, MapLoads::kStrided>>);
  }
}

}  // namespace ccp
