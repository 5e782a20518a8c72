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
CCP_HD TileIndex upper_tall_tile(int64_t index) {
  // Columns 2 * pair and 2 * pair + 1 have pair + 1 tiles each, all before pair * (pair + 1).
  int64_t pair = static_cast<int64_t>((sqrt(4.0 * static_cast<double>(index) + 1) - 1) / 2);
  while (pair * (pair + 1) > index) --pair;
  while ((pair + 1) * (pair + 2) <= index) ++pair;
  const int64_t rest = index - pair * (pair + 1);
  return {rest % (pair + 1), 2 * pair + rest / (pair + 1)};
}

}  // namespace ccp
