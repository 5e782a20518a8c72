// Positions of packed maps.
#pragma once

#include "csrc/params.h"

namespace ccp::cpu {

// Rows of columns of positions in a panel, [position][width]; all in elements.
struct PackedGrid {
  int64_t first, row_step, column_step;
};

// From position (y, x) of a sample on, by the source's strides.
inline PackedGrid packed_grid(const PatchSource& source, int64_t width, int64_t sample, int64_t y,
                              int64_t x) {
  return {((sample * source.size[0] + y) * source.size[1] + x) * width,
          source.stride[0] * source.size[1] * width, source.stride[1] * width};
}

}  // namespace ccp::cpu
