// Matrix products of packed panels. A panel holds kPanel columns of a matrix, laid out
// [depth][kPanel]; a tile is the product of two panels. Included once per instruction set, hence no
// include guard.
#include "csrc/cpu/tile_product.h"

namespace ccp::cpu::CCP_ISA {

constexpr int64_t kTileDepth = 128;  // two stretches of panels as deep fit in the first cache

template <class Acc>
using Tile = Acc[kPanel<Acc>][kPanel<Acc>];

// Adds the product of kTileRows columns and kVectors vectors of columns to rows of a tile.
template <int kVectors, class Acc>
inline __attribute__((always_inline)) void add_rows(const Acc* left, const Acc* right,
                                                    int64_t depth, Acc* tile) {
  constexpr int kSide = kPanel<Acc>;
  alignas(64) Acc block[kTileRows * kSide];
  multiply_rows<kVectors>(left, right, depth, block);
  for (int r = 0; r < kTileRows; ++r)
    for (int c = 0; c < kVectors * kSide / 2; ++c) tile[r * kSide + c] += block[r * kSide + c];
}

// The first `rows` rows and `columns` columns of the product, or of those what is on and above the
// diagonal if `upper`; more is written, without meaning.
template <class Acc>
inline __attribute__((always_inline)) void multiply_panels(const Acc* left, const Acc* right,
                                                           int64_t depth, int64_t rows,
                                                           int64_t columns, bool upper,
                                                           Tile<Acc>& tile) {
  constexpr int kSide = kPanel<Acc>, kHalf = kSide / 2;  // a vector
  std::fill(&tile[0][0], &tile[0][0] + kSide * kSide, Acc{0});
  for (int64_t d = 0; d < depth; d += kTileDepth) {
    const int64_t stretch = std::min(kTileDepth, depth - d);
    for (int r = 0; r < kSide && r < rows; r += kTileRows) {
      const Acc *row = left + d * kSide + r, *column = right + d * kSide;
      if (upper && r >= kHalf) {
        add_rows<1>(row, column + kHalf, stretch, &tile[r][kHalf]);
      } else if (columns <= kHalf) {
        add_rows<1>(row, column, stretch, tile[r]);
      } else {
        add_rows<2>(row, column, stretch, tile[r]);
      }
    }
  }
}

// Adds the product of two panels to tile (row, column) of `out`, which has `rows` x `columns`
// elements. If `symmetric`, the tile is of the upper triangle and is mirrored to the lower one.
template <class Acc>
void add_tile(Acc* out, int64_t stride, int64_t rows, int64_t columns, bool symmetric,
              const Acc* left, const Acc* right, int64_t depth, TileIndex index) {
  constexpr int kSide = kPanel<Acc>;
  alignas(64) Tile<Acc> tile;
  const int64_t i0 = index.row * kSide, j0 = index.column * kSide;
  const int64_t height = std::min<int64_t>(kSide, rows - i0);
  const int64_t width = std::min<int64_t>(kSide, columns - j0);
  const bool diagonal = symmetric && index.row == index.column;
  multiply_panels(left, right, depth, height, width, diagonal, tile);
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = diagonal ? i : 0; j < width; ++j)
      out[(i0 + i) * stride + j0 + j] += tile[i][j];
  if (!symmetric) return;
  for (int64_t j = 0; j < width; ++j)
    for (int64_t i = 0; i < (diagonal ? j : height); ++i)
      out[(j0 + j) * stride + i0 + i] += tile[i][j];
}

}  // namespace ccp::cpu::CCP_ISA
