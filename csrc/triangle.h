// Numbering of the tiles of a matrix's upper triangle.
#pragma once

#include <cmath>

#include "csrc/math.h"

namespace ccp {

struct TileIndex {
  int64_t row, column;  // row <= column
};

// The index-th tile, counted down the columns: (0,0), (0,1), (1,1), (0,2), (1,2), (2,2), ...
CCP_HD TileIndex upper_tile(int64_t index) {
  int64_t column = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1) - 1) / 2);
  while (column * (column + 1) / 2 > index) --column;
  while ((column + 1) * (column + 2) / 2 <= index) ++column;
  return {index - column * (column + 1) / 2, column};
}

// The same for tiles of two rows by one column, of which those are counted that reach the triangle:
// (0,0), (0,1), (0,2), (1,2), (0,3), (1,3), ..., where row i stands for rows 2 * i and 2 * i + 1.
// Columns 2 * pair and 2 * pair + 1 have pair + 1 tiles each; pairs are few.
CCP_HD TileIndex upper_tall_tile(int64_t index) {
  int64_t pair = 0;
  while ((pair + 1) * (pair + 2) <= index) ++pair;
  const int64_t rest = index - pair * (pair + 1);
  return rest <= pair ? TileIndex{rest, 2 * pair} : TileIndex{rest - pair - 1, 2 * pair + 1};
}

CCP_HD int64_t upper_tall_index(const TileIndex& tile) {
  const int64_t pair = tile.column / 2;
  return (pair + tile.column % 2) * (pair + 1) + tile.row;
}

// The same tiles in units that read equally much: one tile, or both that meet the diagonal in
// columns 2 * pair and 2 * pair + 1, of which a diagonal block is read as rows only. A pair has
// 2 * pair + 1 units; `step` 0 is a unit's first tile, 1 the other.
CCP_HD TileIndex upper_tall_unit(int64_t unit, int step) {
  int64_t pair = 0;
  while ((pair + 1) * (pair + 1) <= unit) ++pair;
  const int64_t rest = unit - pair * pair;  // down one column, and from the diagonal down the other
  return rest <= pair ? TileIndex{rest, 2 * pair + step} : TileIndex{rest - pair - 1, 2 * pair + 1};
}

}  // namespace ccp
