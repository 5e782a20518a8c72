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

}  // namespace ccp
