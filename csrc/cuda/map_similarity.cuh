// The CUDA kernels of map_similarity; that for 16 bits on Hopper is in map_similarity_tall.cuh.
//
// A block compares kTile maps with kTile maps, sample after sample. The maps flow through a ring of
// stages in shared memory, kMapRowBytes of each map to a stage, without a break between samples;
// the matrix units sum the products, and after a sample's last stage each thread turns its sums
// into similarities, which it adds up over the samples in registers.
//
// What bounds it, for N samples of C maps of P positions and s bytes, T = ceil(C / kTile):
//   memory: N C P s bytes for the moments, and T times that for the tiles, most of it from the
//     cache;
//   matrix units: N T (T + 1) / 2 tiles of 2 kTile^2 P operations each (P in whole stages), three
//     times that for float32;
//   similarities: as many tiles of kTile^2 pairs, each pair 8 instructions and, for SSIM, a
//     reciprocal, which its own unit takes as long for.
// benchmarks/README.md counts them.
#pragma once

#include "csrc/cuda/channel_tiles.cuh"
#include "csrc/cuda/map_moments.cuh"
#include "csrc/cuda/map_similarity_tall.cuh"
#include "csrc/cuda/shared.cuh"
#include "csrc/cuda/units.cuh"

namespace ccp {

template <class T_, MapLoads kLoads_, int kTile_>
struct MapTraits {
  using T = T_;
  static constexpr MapLoads kLoads = kLoads_;
  static constexpr int kTile = kTile_;
  static constexpr int kThreads = 2 * kTile;
  static constexpr int kBlocks = map_blocks_at_once(kTile);
  static constexpr int kUnit = 16 / sizeof(T);             // elements
  static constexpr int kDepth = kMapRowBytes / sizeof(T);  // positions in a stage
  static constexpr int kSteps = kDepth / kMmaDepth<T>;
  // Of which the columns' fragments fit into registers; those of float32 have small parts as well.
  static constexpr int kStepsAtOnce = sizeof(T) == 2 ? kSteps : 1;
  // A panel holds rows of positions, one for each map; or rows of maps, one for each position.
  static constexpr bool kByPosition = kLoads == MapLoads::kChannelsLast;
  // Rows that begin within a unit reach into one more. All others are mixed (unit_address).
  static constexpr bool kUnaligned = kLoads == MapLoads::kUnalignedRows;
  static constexpr int kLoadedUnits = kByPosition ? kTile / kUnit : kMapRowBytes / 16;  // of a row
  static constexpr int kRowUnits = kLoadedUnits + kUnaligned;
  // A thread's units are the same of rows kRowStep apart.
  static constexpr int kRowStep = kThreads / kLoadedUnits;
  static constexpr int kUnitsPerThread = kTile * kMapRowBytes / 16 / kThreads;
  static constexpr int kRows = kTile / 32;  // fragments of 16 rows: a warp has half the rows
  static constexpr int kColumns = 4;        // fragments of 8 columns
};

template <class Traits>
struct MapShared {
  alignas(16) unsigned char panel[kMapStages][2]
                                 [Traits::kTile * (kMapRowBytes + 16 * Traits::kUnaligned)];
  MapTerms<float> terms[kMapStages][2 * Traits::kTile];  // of a sample's rows, then its columns
  static_assert(Traits::kUnaligned ||
                sizeof panel + sizeof terms == map_shared_bytes(Traits::kTile));
};

// Where unit `unit` of row `row` lies in a panel: mixed so that the eight rows that a warp reads at
// once lie on different memory banks. Rows of nine units do so by themselves. Eight rows further
// the mixture is the same, so that what is added to the row in multiples of eight is added to the
// address (row_bytes).
template <class Traits>
__device__ __forceinline__ unsigned char* unit_address(unsigned char* panel, int row, int unit) {
  int mixed;
  if constexpr (Traits::kUnaligned) {
    mixed = unit;
  } else if constexpr (!Traits::kByPosition || sizeof(typename Traits::T) == 2) {
    mixed = unit ^ (row % 8);
  } else {
    mixed = unit ^ (row % 4 * 2);
  }
  return panel + (row * Traits::kRowUnits + mixed) * 16;
}

template <class Traits>
__device__ __forceinline__ constexpr int row_bytes(int rows) {
  return rows * Traits::kRowUnits * 16;
}

// The tile of a block and its share of the samples.
struct MapTask {
  int first_map[2], maps[2];  // of the rows, of the columns
  bool diagonal;              // rows and columns are the same maps
  int64_t first_sample;
  int samples;
};

template <class Traits>
__device__ __forceinline__ MapTask map_task(const MapSimilarityParams& params,
                                            const MapSimilarityLaunch& launch, int64_t block) {
  const ChannelDotLayout& layout = params.maps.layout;
  const auto at_most = [](int64_t count, int64_t most) {
    return static_cast<int>(count < most ? count : most);
  };
  const TileIndex tile = launch.tile_index(params.symmetric, block % launch.tiles);
  const int64_t row = tile.row * Traits::kTile, column = tile.column * Traits::kTile;
  const int64_t first = block / launch.tiles * launch.split.length;
  return {{static_cast<int>(row), static_cast<int>(column)},
          {at_most(layout.channel.size - row, Traits::kTile),
           at_most(layout.channel.size - column, Traits::kTile)},
          params.symmetric && tile.row == tile.column,
          first,
          at_most(layout.sample.size - first, launch.split.length)};
}

// One thread's part of filling the stages of a task, one after the other. Stages are counted on and
// on; a stage's place in the ring is its number % kMapStages.
template <class Traits>
class MapLoader {
 public:
  using T = typename Traits::T;

  __device__ __forceinline__ MapLoader(const MapSimilarityParams& params,
                                       const MapSimilarityLaunch& launch, const MapTask& task,
                                       const MapTerms<float>* x_terms,
                                       const MapTerms<float>* y_terms, MapShared<Traits>& shared)
      : params_(params),
        launch_(launch),
        task_(task),
        all_terms_{x_terms, y_terms},
        shared_(shared) {
    const ChannelDotLayout& layout = params.maps.layout;
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      const MapSide from = side(panel);
      next_[panel] = static_cast<const T*>(from.data) + sample_offset(panel, 0) +
                     map_of(0) * from.stride(layout.channel) +
                     position_of(0) * position_stride(panel);
    }
  }

  // Begins to copy a stage, one after the other.
  __device__ __forceinline__ void load(unsigned stage) {
    if (loaded_.sample < task_.samples) {
      if (loaded_.chunk == 0) load_terms();
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        if (panel == 1 && task_.diagonal) break;
        if constexpr (Traits::kLoads == MapLoads::kStrided) {
          load_elements(panel, stage);
        } else if constexpr (Traits::kUnaligned) {
          load_unaligned(panel, stage);
        } else {
          load_units(panel, stage);
        }
      }
    }
    commit_copies();
    loaded_.advance(launch_.chunks);
  }

  // Centres what has arrived of a stage; in unaligned rows also what other threads loaded.
  __device__ __forceinline__ void centre(const MapCursor& at, unsigned stage) {
    if constexpr (Traits::kLoads != MapLoads::kStrided) {
      if (at.sample >= task_.samples || launch_.packed) return;
      if (at.chunk == 0) shifted_ = any_shift(at);
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        if (panel == 1 && task_.diagonal) break;
        if constexpr (Traits::kUnaligned) {
          straighten(panel, at, stage);
        } else if (shifted_) {
          centre_units(panel, at, stage);
        }
      }
    }
  }

 private:
  static constexpr int kUnit = Traits::kUnit;
  using Values = Unit<T, kUnit>;

  static __device__ __forceinline__ int first_row() { return threadIdx.x / Traits::kLoadedUnits; }
  static __device__ __forceinline__ int unit() { return threadIdx.x % Traits::kLoadedUnits; }
  // The first map of the thread's i-th unit, counted from the panel's first, and its first
  // position, counted from the stage's.
  static __device__ __forceinline__ int map_of(int i) {
    return Traits::kByPosition ? unit() * kUnit : first_row() + i * Traits::kRowStep;
  }
  static __device__ __forceinline__ int position_of(int i) {
    return Traits::kByPosition ? first_row() + i * Traits::kRowStep : unit() * kUnit;
  }

  // Of the stage.
  __device__ __forceinline__ int positions(const MapCursor& at) const {
    return at.chunk == launch_.chunks - 1 ? launch_.last_positions : Traits::kDepth;
  }

  __device__ __forceinline__ MapSide side(int panel) const {
    return panel == 0 ? left_side(params_) : right_side(params_);
  }

  __device__ __forceinline__ int64_t position_stride(int panel) const {
    return Traits::kByPosition ? side(panel).stride(params_.maps.layout.position[0]) : 1;
  }

  // Where a sample's maps begin, in elements.
  __device__ __forceinline__ int64_t sample_offset(int panel, int sample) const {
    const ChannelDotLayout& layout = params_.maps.layout;
    const MapSide from = side(panel);
    return (task_.first_sample + sample) * from.stride(layout.sample) +
           task_.first_map[panel] * from.stride(layout.channel);
  }

  __device__ __forceinline__ unsigned char* panel_of(int panel, unsigned stage) const {
    return shared_.panel[stage % kMapStages][panel];
  }
  __device__ __forceinline__ const MapTerms<float>* terms_of(int panel, const MapCursor& at) const {
    return shared_.terms[at.sample % kMapStages] + panel * Traits::kTile;
  }
  // The thread's i-th unit.
  __device__ __forceinline__ T* unit_of(int panel, unsigned stage, int i) const {
    return reinterpret_cast<T*>(unit_address<Traits>(panel_of(panel, stage), first_row(), unit()) +
                                row_bytes<Traits>(i * Traits::kRowStep));
  }

  __device__ __forceinline__ void load_terms() const {
    const bool row = threadIdx.x < Traits::kTile;
    const int64_t channels = params_.maps.layout.channel.size;
    const int64_t channel =
        (row ? task_.first_map[0] : task_.first_map[1]) + threadIdx.x % Traits::kTile;
    const bool valid = channel < channels;
    const int64_t index = (task_.first_sample + loaded_.sample) * channels + (valid ? channel : 0);
    copy_async<16>(&shared_.terms[loaded_.sample % kMapStages][threadIdx.x],
                   (row ? all_terms_[0] : all_terms_[1]) + index, valid);
  }

  __device__ __forceinline__ void load_units(int panel, unsigned stage) {
    const ChannelDotLayout& layout = params_.maps.layout;
    const MapSide from = side(panel);
    const int along = Traits::kByPosition ? task_.maps[panel] : positions(loaded_);
    const int across = Traits::kByPosition ? positions(loaded_) : task_.maps[panel];
    const int rows_left = unit() * kUnit < along ? across - first_row() : 0;
    const int64_t step =
        Traits::kRowStep * from.stride(Traits::kByPosition ? layout.position[0] : layout.channel);
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i)
      copy_async<16>(unit_of(panel, stage, i), next_[panel] + i * step,
                     i * Traits::kRowStep < rows_left);
    const int64_t depth = Traits::kDepth * position_stride(panel);
    next_[panel] += depth;
    if (loaded_.chunk == launch_.chunks - 1)
      next_[panel] += from.stride(layout.sample) - launch_.chunks * depth;
  }

  // From the boundary of 16 bytes at or before each row's beginning on.
  __device__ __forceinline__ void load_unaligned(int panel, unsigned stage) const {
    constexpr int kUnits = Traits::kTile * Traits::kRowUnits;
    const ChannelDotLayout& layout = params_.maps.layout;
    const MapSide from = side(panel);
    const T* data = static_cast<const T*>(from.data);
    const int64_t maps = sample_offset(panel, loaded_.sample);
    unsigned char* to = panel_of(panel, stage);
#pragma unroll
    for (int first = 0; first < kUnits; first += Traits::kThreads) {
      const int index = first + threadIdx.x;
      if (index >= kUnits) break;
      const int row = index / Traits::kRowUnits, unit = index % Traits::kRowUnits;
      const int64_t map = maps + row * from.stride(layout.channel);
      const int64_t begin =
          map / kUnit * kUnit + static_cast<int64_t>(loaded_.chunk) * Traits::kDepth + unit * kUnit;
      const bool valid = row < task_.maps[panel] && begin < map + layout.positions;
      const int64_t left = launch_.extent[panel] - begin;
      const int elements = left < kUnit ? static_cast<int>(left) : kUnit;
      copy_part_async<16>(unit_address<Traits>(to, row, unit), data + (valid ? begin : 0),
                          valid ? elements * static_cast<int>(sizeof(T)) : 0);
    }
  }

  // Element by element, centred at once.
  __device__ __forceinline__ void load_elements(int panel, unsigned stage) const {
    const ChannelDotLayout& layout = params_.maps.layout;
    const MapSide from = side(panel);
    const T* maps = static_cast<const T*>(from.data) + sample_offset(panel, loaded_.sample);
    const MapTerms<float>* terms = all_terms_[panel] +
                                   (task_.first_sample + loaded_.sample) * layout.channel.size +
                                   task_.first_map[panel];
    unsigned char* to = panel_of(panel, stage);
#pragma unroll 4
    for (int i = threadIdx.x; i < Traits::kTile * Traits::kDepth; i += Traits::kThreads) {
      const int map = i / Traits::kDepth, depth = i % Traits::kDepth;
      const int64_t position = static_cast<int64_t>(loaded_.chunk) * Traits::kDepth + depth;
      T centred{};
      if (map < task_.maps[panel] && depth < positions(loaded_))
        centred = narrow<T>(
            widen(maps[map * from.stride(layout.channel) + from.position(layout, position)]) -
            terms[map].shift);
      T* unit = reinterpret_cast<T*>(unit_address<Traits>(to, map, depth / kUnit));
      unit[depth % kUnit] = centred;
    }
  }

  // Whether any map of which this thread loads units is to be shifted.
  __device__ __forceinline__ bool any_shift(const MapCursor& at) const {
    constexpr int kMaps = Traits::kByPosition ? kUnit : Traits::kUnitsPerThread;
    bool any = false;
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      if (panel == 1 && task_.diagonal) break;
#pragma unroll
      for (int i = 0; i < kMaps; ++i)
        any |= terms_of(panel, at)[Traits::kByPosition ? map_of(0) + i : map_of(i)].shift != 0;
    }
    return any;
  }

  // The unit less the shifts of its maps.
  __device__ __forceinline__ Values centred(const Values& values,
                                            const MapTerms<float>* terms) const {
    Values result{};
#pragma unroll
    for (int e = 0; e < kUnit; ++e)
      result.put(e, narrow<T>(values.value(e) - terms[Traits::kByPosition ? e : 0].shift));
    return result;
  }

  // What lies outside the maps stays zero, as do the terms of maps outside the panel.
  __device__ __forceinline__ void centre_units(int panel, const MapCursor& at,
                                               unsigned stage) const {
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i) {
      if (position_of(i) >= positions(at)) continue;
      T* address = unit_of(panel, stage, i);
      store_unit(centred(load_unit<T, kUnit>(address), terms_of(panel, at) + map_of(i)), address);
    }
  }

  // Moves every row to the beginning of its units, centres it, and writes zeros behind its end. The
  // threads of a row are of one warp.
  __device__ __forceinline__ void straighten(int panel, const MapCursor& at, unsigned stage) const {
    const int64_t maps = sample_offset(panel, at.sample);
    const int64_t stride = side(panel).stride(params_.maps.layout.channel);
    const MapTerms<float>* terms = terms_of(panel, at);
    Values straight[Traits::kUnitsPerThread];
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i) {
      const T* address = unit_of(panel, stage, i);
      const int first = static_cast<unsigned>(maps + map_of(i) * stride) % kUnit;
      Values moved =
          elements_from(first, load_unit<T, kUnit>(address), load_unit<T, kUnit>(address + kUnit));
      if (shifted_) moved = centred(moved, terms + map_of(i));
      const int left = map_of(i) < task_.maps[panel] ? positions(at) - position_of(i) : 0;
      straight[i] = zero_outside(moved, unit_mask<T, kUnit>(bits_within<kUnit>(0, 0, left)));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Traits::kUnitsPerThread; ++i)
      store_unit(straight[i], unit_of(panel, stage, i));
  }

  const MapSimilarityParams& params_;
  const MapSimilarityLaunch& launch_;
  const MapTask& task_;
  const MapTerms<float>* const all_terms_[2];
  MapShared<Traits>& shared_;
  MapCursor loaded_;
  bool shifted_ = false;  // whether any map of the sample that is centred is
  const T* next_[2];      // where the thread's first unit of the next stage lies
};

// One warp's sums: element i of fragment [r][c] is as mma.cuh says.
template <class Traits>
struct WarpTile {
  float element[Traits::kRows][Traits::kColumns][4];
};

// What a warp computes of a tile: from row `row` and column `column` on.
struct WarpPart {
  int row, column;
  int rows;  // fragments of which anything is needed: none, half or all of them
};

template <class Traits>
__device__ __forceinline__ WarpPart warp_part(const MapTask& task) {
  const WarpPlace at = warp_place<Traits::kTile>();
  return {at.row, at.column, warp_rows<Traits::kTile>(task.maps[0], task.maps[1], task.diagonal)};
}

// The lane's number of the eight maps from first + map on, at position `depth`: lane / 4 counts the
// maps, lane % 4 the positions. `first` is a multiple of 32.
template <class Traits>
__device__ __forceinline__ uint32_t word(unsigned char* panel, int first, int map, int depth) {
  const int lane = threadIdx.x % 32;
  unsigned char* from = panel + row_bytes<Traits>(depth) + (first + map / 32 * 32) * 4;
  unsigned char* unit = unit_address<Traits>(from, lane % 4, map % 32 / 4 + lane / 16);
  return reinterpret_cast<uint32_t*>(unit)[lane / 4 % 4];
}

// The fragments of 16 maps from first + map on (rows of A), at depth step `step` of a stage.
template <class Traits>
__device__ __forceinline__ void load_rows(unsigned char* panel, int first, int map, int step,
                                          uint32_t (&a)[4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (!Traits::kByPosition) {
    load_matrices(a, unit_address<Traits>(panel + row_bytes<Traits>(first + map), lane % 16,
                                          2 * step + lane / 16));
  } else if constexpr (sizeof(typename Traits::T) == 2) {
    load_matrices_transposed(a, unit_address<Traits>(panel, 16 * step + lane % 8 + lane / 16 * 8,
                                                     (first + map) / 8 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r)
      a[r] = word<Traits>(panel, first, map + r % 2 * 8, 8 * step + r / 2 * 4);
  }
}

// The fragments of 16 maps from first + map on, as two neighbouring groups of columns of B.
template <class Traits>
__device__ __forceinline__ void load_columns(unsigned char* panel, int first, int map, int step,
                                             uint32_t (&low)[2], uint32_t (&high)[2]) {
  const int lane = threadIdx.x % 32;
  uint32_t both[4];
  if constexpr (!Traits::kByPosition) {
    load_matrices(both, unit_address<Traits>(panel + row_bytes<Traits>(first + map),
                                             lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  } else if constexpr (sizeof(typename Traits::T) == 2) {
    load_matrices_transposed(
        both, unit_address<Traits>(panel, 16 * step + lane % 16, (first + map) / 8 + lane / 16));
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r)
      both[r] = word<Traits>(panel, first, map + r / 2 * 8, 8 * step + r % 2 * 4);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    low[r] = both[r];
    high[r] = both[2 + r];
  }
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

// C += A * B. float32 values are multiplied as pairs of TF32 values: three products keep 20 bits,
// one keeps 11.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&small_a)[4], const uint32_t (&b)[2],
                                         const uint32_t (&small_b)[2], bool allow_tf32) {
  if constexpr (sizeof(T) == 2) {
    mma_16_bit<T>(c, a, b);
  } else {
    if (!allow_tf32) {
      mma_tf32(c, small_a, b);
      mma_tf32(c, a, small_b);
    }
    mma_tf32(c, a, b);
  }
}

// The warp's first kRows fragments of rows: sums += the products over kStepsAtOnce steps of a stage
// from `first` on, or sums = those of a sample's first. The matrix units round sums towards zero;
// these steps' own sum is short, and joins the others by a rounded addition.
template <class Traits, int kRows, bool kFirst>
__device__ __forceinline__ void add_products(unsigned char* rows, unsigned char* columns,
                                             const WarpPart& part, int first, bool allow_tf32,
                                             WarpTile<Traits>& sums) {
  using T = typename Traits::T;
  constexpr int kSteps = Traits::kStepsAtOnce, kColumns = Traits::kColumns;
  constexpr bool kPairs = sizeof(T) == 4;
  uint32_t b[kSteps][kColumns][2], small_b[kSteps][kColumns][2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int c = 0; c < kColumns; c += 2)
      load_columns<Traits>(columns, part.column, 8 * c, first + step, b[step][c], b[step][c + 1]);
    if constexpr (kPairs) split_fragments(b[step], small_b[step]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float own[kColumns][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[1][4], small_a[1][4];
      load_rows<Traits>(rows, part.row, 16 * r, first + step, a[0]);
      if constexpr (kPairs) split_fragments(a, small_a);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        multiply<T>(own[c], a[0], small_a[0], b[step][c], small_b[step][c], allow_tf32);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums.element[r][c][i] = kFirst ? own[c][i] : sums.element[r][c][i] + own[c][i];
  }
}

// sums += the products over one stage, or sums = those of a sample's first.
template <class Traits>
__device__ __forceinline__ void add_stage(unsigned char* rows, unsigned char* columns,
                                          const WarpPart& part, bool is_first, bool allow_tf32,
                                          WarpTile<Traits>& sums) {
  const auto add = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
#pragma unroll 1  // or fragments would be loaded before there are registers for them
    for (int step = 0; step < Traits::kSteps; step += Traits::kStepsAtOnce) {
      if (is_first && step == 0) {
        add_products<Traits, kRows, true>(rows, columns, part, step, allow_tf32, sums);
      } else {
        add_products<Traits, kRows, false>(rows, columns, part, step, allow_tf32, sums);
      }
    }
  };
  if (part.rows == Traits::kRows) {
    add(std::integral_constant<int, Traits::kRows>{});
  } else if (part.rows > 0) {
    add(std::integral_constant<int, Traits::kRows / 2>{});
  }
}

// Calls visit(element, r, c, i, row, column) with each of the needed elements [r][c][i] of the part
// that this lane holds, and its place in the tile.
template <class Traits, class Visit>
__device__ __forceinline__ void for_each_element(WarpTile<Traits>& tile, const WarpPart& part,
                                                 Visit visit) {
  const int lane = threadIdx.x % 32;
  const int row = part.row + lane / 4, column = part.column + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < Traits::kRows; ++r) {
    if (r % (Traits::kRows / 2) == 0 && r >= part.rows) break;
#pragma unroll
    for (int i = 0; i < 4; i += 2)
#pragma unroll
      for (int c = 0; c < Traits::kColumns; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          visit(tile.element[r][c][i + e], r, c, i + e, row + 16 * r + 4 * i, column + 8 * c + e);
  }
}

// totals += the similarities that a sample's sums of products amount to; self += the similarity of
// the thread's own map to itself.
template <SimilarityKind kind, class Traits>
__device__ __forceinline__ void add_similarities(const MapTerms<float>* terms, const WarpPart& part,
                                                 float per_position, WarpTile<Traits>& sums,
                                                 WarpTile<Traits>& totals, float& self) {
  for_each_element(sums, part, [&](float sum, int r, int c, int i, int m, int n) {
    totals.element[r][c][i] +=
        similarity<kind>(terms[m], terms[Traits::kTile + n], sum, per_position);
  });
  self += self_similarity<kind>(terms[threadIdx.x]);
}

// Writes partial[block][kTile][kTile], the sums over the task's samples. Of a diagonal tile, what
// lies below the diagonal is not written, nor is what lies outside the result.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    map_similarity_tiles(MapSimilarityParams params, MapSimilarityLaunch launch,
                         const MapTerms<float>* x_terms, const MapTerms<float>* y_terms,
                         float* partial) {
  constexpr int kTile = Traits::kTile;
  auto& shared = dynamic_shared<MapShared<Traits>>();
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const MapTask task = map_task<Traits>(params, launch, block);
    const WarpPart part = warp_part<Traits>(task);
    MapLoader<Traits> loader(params, launch, task, x_terms, y_terms, shared);
    WarpTile<Traits> sums{}, totals{};
    float self = 0;
    MapCursor summed;
#pragma unroll 1
    for (unsigned stage = 0; stage < kMapStages - 1; ++stage) loader.load(stage);
    wait_for_copies<kMapStages - 2>();
    __syncthreads();
    loader.centre(summed, 0);
    for (unsigned stage = 0; summed.sample < task.samples; ++stage) {
      // The next stage has arrived; this one was centred in the last turn.
      wait_for_copies<kMapStages - 3>();
      __syncthreads();
      MapCursor next = summed;
      next.advance(launch.chunks);
      loader.load(stage + kMapStages - 1);
      loader.centre(next, stage + 1);
      auto& panel = shared.panel[stage % kMapStages];
      add_stage<Traits>(panel[0], panel[task.diagonal ? 0 : 1], part, summed.chunk == 0,
                        params.allow_tf32, sums);
      if (summed.chunk == launch.chunks - 1) {
        with_kind(params.kind, [&](auto kind) {
          add_similarities<decltype(kind)::value>(shared.terms[summed.sample % kMapStages], part,
                                                  launch.per_position, sums, totals, self);
        });
      }
      summed = next;
    }
    float* out = partial + block * (kTile * kTile);
    for_each_element(totals, part, [&](float total, int, int, int, int m, int n) {
      if (!task.diagonal || m != n) out[m * kTile + n] = total;
    });
    if (task.diagonal && threadIdx.x < kTile) out[threadIdx.x * (kTile + 1)] = self;
    wait_for_copies<0>();
    __syncthreads();
  }
}

// out = the mean over all samples: the sum over the parts of partial[part, tile], in their order.
template <class = void>
__global__ void __launch_bounds__(kBlockThreads)
    mean_of_map_parts(MapSimilarityParams params, MapSimilarityLaunch launch,
                      const float* partial) {
  const int64_t elements = static_cast<int64_t>(launch.rows) * launch.tile;
  const int64_t channels = params.maps.layout.channel.size, count = launch.tiles * elements;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  float* out = static_cast<float*>(params.maps.out);
  for (int64_t e = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x; e < count;
       e += stride) {
    const DivMod at = div_mod(e, elements), in_tile = div_mod(at.remainder, launch.tile);
    const TileIndex tile = launch.tile_index(params.symmetric, at.quotient);
    const int64_t i = tile.row * launch.rows + in_tile.quotient;
    const int64_t j = tile.column * launch.tile + in_tile.remainder;
    if (i >= channels || j >= channels || (params.symmetric && i > j)) continue;
    float sum = 0;
#pragma unroll 8
    for (int64_t part = 0; part < launch.split.count; ++part) sum += partial[part * count + e];
    const float mean = sum / static_cast<float>(params.maps.layout.sample.size);
    out[i * channels + j] = mean;
    if (params.symmetric) out[j * channels + i] = mean;
  }
}

// Copies centred maps to out[sample][channel][padded], zeros behind their ends.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    centre_maps(MapSimilarityParams params, MapSide side, const MapTerms<float>* terms,
                int64_t padded, T* out) {
  constexpr int kUnit = 16 / sizeof(T);
  const ChannelDotLayout& layout = params.maps.layout;
  const int64_t units = padded / kUnit, count = layout.sample.size * layout.channel.size * units;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t index = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x;
       index < count; index += stride) {
    const DivMod at = div_mod(index, units), map = div_mod(at.quotient, layout.channel.size);
    const T* from = static_cast<const T*>(side.data) + map.quotient * side.stride(layout.sample) +
                    map.remainder * side.stride(layout.channel);
    const float shift = terms[at.quotient].shift;
    Unit<T, kUnit> unit{};
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const int64_t position = at.remainder * kUnit + e;
      if (position < layout.positions)
        unit.put(e, narrow<T>(widen(from[side.position(layout, position)]) - shift));
    }
    store_unit(unit, out + index * kUnit);
  }
}

// Calls use(kernel, threads, shared_bytes) with the kernel for this launch. Host code, shared by
// the launcher and the emulator's tests.
template <class T, class Use>
void with_map_similarity_kernel(const MapSimilarityLaunch& launch, Use use) {
  const auto with = [&](auto traits) {
    using Traits = decltype(traits);
    use(map_similarity_tiles<Traits>, Traits::kThreads, sizeof(MapShared<Traits>));
  };
  if constexpr (sizeof(T) == 2) {
    if (launch.tall()) return with_tall_map_kernel<T>(launch.loads, use);
  }
  const bool large = launch.tile == kLargeMapTile;
  switch (launch.loads) {
    case MapLoads::kRows:
      return large ? with(MapTraits<T, MapLoads::kRows, kLargeMapTile>{})
                   : with(MapTraits<T, MapLoads::kRows, kSmallMapTile>{});
    case MapLoads::kUnalignedRows:
      return with(MapTraits<T, MapLoads::kUnalignedRows, kSmallMapTile>{});
    case MapLoads::kChannelsLast:
      return large ? with(MapTraits<T, MapLoads::kChannelsLast, kLargeMapTile>{})
                   : with(MapTraits<T, MapLoads::kChannelsLast, kSmallMapTile>{});
    case MapLoads::kStrided:
      return with(MapTraits<T, MapLoads::kStrided, kSmallMapTile>{});
  }
}

}  // namespace ccp
