// Matrix products of packed panels. A panel holds kPanel columns of a matrix, laid out
// [depth][kPanel]; a tile is the product of two panels. Included once per instruction set, hence no
// include guard.
#include "csrc/cpu/tile_product.h"

namespace ccp::cpu::CCP_ISA {

constexpr int64_t kTileDepth = 128;  // two stretches of panels as deep fit in the first cache

template <class Acc>
using Tile = Acc[kPanel<Acc>][kPanel<Acc>];

// The first `rows` rows of the product; more are written, without meaning.
template <class Acc>
inline __attribute__((always_inline)) void multiply_panels(const Acc* left, const Acc* right,
                                                           int64_t depth, int64_t rows,
                                                           Tile<Acc>& tile) {
  constexpr int kSide = kPanel<Acc>;
  std::fill(&tile[0][0], &tile[0][0] + kSide * kSide, Acc{0});
  for (int64_t d = 0; d < depth; d += kTileDepth) {
    for (int r = 0; r < rows; r += kTileRows) {
      alignas(64) Acc block[kTileRows * kSide];
      multiply_rows(left + d * kSide + r, right + d * kSide, std::min(kTileDepth, depth - d),
                    block);
      for (int i = 0; i < kTileRows * kSide; ++i) tile[r + i / kSide][i % kSide] += block[i];
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
  multiply_panels(left, right, depth, height, tile);
  const bool diagonal = symmetric && index.row == index.column;
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = diagonal ? i : 0; j < width; ++j)
      out[(i0 + i) * stride + j0 + j] += tile[i][j];
  if (!symmetric) return;
  for (int64_t j = 0; j < width; ++j)
    for (int64_t i = 0; i < (diagonal ? j : height); ++i)
      out[(j0 + j) * stride + i0 + i] += tile[i][j];
}

}  // namespace ccp::cpu::CCP_ISA
