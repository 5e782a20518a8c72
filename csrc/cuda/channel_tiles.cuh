// Tiles of channels x channels on the matrix units: panels of rows of channels in shared memory,
// their fragments as sums over the rows, and what each warp computes of a tile.
#pragma once

#include "csrc/cuda/mma.cuh"

namespace ccp {

// Rows of kTile channels of type T.
template <class T, int kTile>
struct ChannelPanel {
  static constexpr int kUnit = 16 / sizeof(T);     // elements
  static constexpr int kRowUnits = kTile / kUnit;  // a multiple of eight
  static constexpr int kRowBytes = kRowUnits * 16;

  // Where in a panel unit `unit` of row `row` lies: mixed so that the eight rows that a warp reads
  // at once lie on different memory banks, and so do the two or four neighbouring rows that eight
  // threads write at once. Eight units stay together, so that what is added to the unit or the row
  // in multiples of eight is added to the offset (kRowBytes each row).
  static __device__ __forceinline__ unsigned unit(unsigned row, unsigned unit) {
    const unsigned pairs = row % 2 * 4 + row / 2 % 2 * 2;
    const unsigned mask = sizeof(T) == 2 ? pairs + row / 4 % 2 : pairs;
    return (row * kRowUnits + unit / 8 * 8 + (unit % 8 ^ mask)) * 16;
  }

  // Where the lane begins to read fragments of rows of A, of the channels from `first` on, a
  // multiple of 16 times their number or of 128 bytes.
  static __device__ __forceinline__ unsigned rows_from(unsigned first) {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2)
      return unit(lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2);
    else
      return word(first);
  }

  // The same of columns of B.
  static __device__ __forceinline__ unsigned columns_from(unsigned first) {
    const unsigned lane = threadIdx.x % 32;
    return sizeof(T) == 2 ? unit(lane % 16, first / 8 + lane / 16) : word(first);
  }

  // The r-th fragment of 16 channels (rows of A), at depth step `step`. `from` is rows_from: what
  // is added to the unit is two units, four or six, which mixes as it does there.
  static __device__ __forceinline__ void load_rows(const unsigned char* panel, unsigned from, int r,
                                                   int step, uint32_t (&a)[4]) {
    panel += step * kMmaDepth<T> * kRowBytes;
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(a, panel + (from ^ r * 32));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] =
            read(panel + (from ^ (r % 2 * 2 + i % 2) * 32) + r / 2 * 128 + i / 2 * 4 * kRowBytes);
    }
  }

  // The c-th fragment of 8 channels (columns of B), for an even c, and the one after it.
  static __device__ __forceinline__ void load_columns(const unsigned char* panel, unsigned from,
                                                      int c, int step, uint32_t (&low)[2],
                                                      uint32_t (&high)[2]) {
    panel += step * kMmaDepth<T> * kRowBytes;
    uint32_t both[4];
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(both, panel + (from ^ c * 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        both[i] = read(panel + (from ^ (c + i / 2) * 32) + i % 2 * 4 * kRowBytes);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      low[i] = both[i];
      high[i] = both[2 + i];
    }
  }

  // Of elements of 16 bits: where the lane begins to read pairs.
  static __device__ __forceinline__ unsigned pairs_from(unsigned first) {
    const unsigned lane = threadIdx.x % 32;
    return unit(lane % 8, first / 8 + lane / 8);
  }

  // The p-th 32 channels in eight rows: words[i] has channel 8 * i + lane / 4 in rows
  // 2 * (lane % 4) and the one after it.
  static __device__ __forceinline__ void load_pairs(const unsigned char* panel, unsigned from,
                                                    int p, int step, uint32_t (&words)[4]) {
    load_matrices_transposed(words, panel + step * 8 * kRowBytes + (from ^ p * 64));
  }

 private:
  // The lane's channel of eight from `first` on.
  static __device__ __forceinline__ unsigned word(unsigned first) {
    const unsigned lane = threadIdx.x % 32;
    return unit(lane % 4, first / 4 + lane / 16) + lane / 4 % 4 * 4;
  }

  static __device__ __forceinline__ uint32_t read(const unsigned char* address) {
    return *reinterpret_cast<const uint32_t*>(address);
  }
};

// Where in a tile a warp's part begins: half the rows and 32 columns, for kTile / 16 warps.
struct WarpPlace {
  int row, column;
};

// The lower warps are mirrored: of a diagonal tile, whose lower left is not needed, each pair of
// warps that share a scheduler so has its part.
template <int kTile>
__device__ __forceinline__ WarpPlace warp_place() {
  constexpr int kWarps = kTile / 32;  // beside each other
  const int half = threadIdx.x / 32 / kWarps, place = threadIdx.x / 32 % kWarps;
  return {half * kTile / 2, (half == 0 ? place : kWarps - 1 - place) * 32};
}

// The fragments of 16 rows in the warp's part of which anything is needed, rounded up to none, half
// or all of them, in a tile of which `rows` rows and `columns` columns are.
template <int kTile>
__device__ __forceinline__ int warp_rows(int rows, int columns, bool diagonal) {
  constexpr int kFragments = kTile / 32, kHalf = kFragments * 8;
  const WarpPlace at = warp_place<kTile>();
  int needed = at.column < columns ? rows - at.row : 0;
  if (diagonal && needed > at.column + 32 - at.row) needed = at.column + 32 - at.row;
  return needed <= 0 ? 0 : needed <= kHalf ? kFragments / 2 : kFragments;
}

}  // namespace ccp
