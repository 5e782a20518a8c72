// The CPU kernels of patch_gram_ and patch_cross_. Included once per instruction set, hence no
// include guard.
#include "csrc/cpu/packed_grid.h"
#include "csrc/cpu/panels.h"
// After them.
#include "csrc/cpu/transpose.h"
// After all of them.
#include "csrc/cpu/pack_run.h"
#include "csrc/patch_pieces.h"

namespace ccp::cpu::CCP_ISA {

// The outputs along one dimension for which kernel offset `offset` meets the map: [first, last).
struct OutputRange {
  int64_t first, last;
};

inline OutputRange outputs_inside(const PatchSource& source, int dim, int64_t offset,
                                  int64_t outputs) {
  const int64_t shift = source.padding[dim] - offset * source.dilation[dim];
  const int64_t stride = source.stride[dim], beyond = source.size[dim] + shift;
  const int64_t first = shift > 0 ? ceil_div(shift, stride) : 0;
  const int64_t last = beyond > 0 ? std::min(ceil_div(beyond, stride), outputs) : 0;
  return {std::min(first, last), last};
}

// Writes rows [begin, begin + depth) of one column of P.
template <class T, class Acc>
CCP_INLINE void read_column(const PatchProductParams& params, const PatchSource& source,
                            int64_t group, int64_t column, int64_t begin, int64_t depth, Acc* out) {
  const int64_t kernel_width = source.kernel[1], outputs = params.positions[1];
  const int64_t kx = column % kernel_width, ky = column / kernel_width % source.kernel[0];
  const int64_t channel = group * source.channels + column / kernel_width / source.kernel[0];
  const OutputRange rows = outputs_inside(source, 0, ky, params.positions[0]);
  const OutputRange columns = outputs_inside(source, 1, kx, outputs);
  const int64_t step = source.stride[1] * source.position_stride[1];
  const int64_t x = kx * source.dilation[1] - source.padding[1];
  const T* data = static_cast<const T*>(source.data);
  const int64_t origin = channel * source.channel_stride + x * source.position_stride[1];
  int64_t first = begin % outputs, line = begin / outputs;
  int64_t oy = line % params.positions[0], n = line / params.positions[0];
  for (const Acc* end = out + depth; out < end; first = 0) {
    const int64_t count = std::min<int64_t>(outputs - first, end - out);
    const bool inside = rows.first <= oy && oy < rows.last;
    const int64_t left = inside ? std::clamp(columns.first - first, int64_t{0}, count) : count;
    const int64_t right = inside ? std::clamp(columns.last - first, left, count) : count;
    const int64_t y = oy * source.stride[0] + ky * source.dilation[0] - source.padding[0];
    const int64_t start =
        origin + n * source.sample_stride + y * source.position_stride[0] + first * step;
    std::fill(out, out + left, Acc{0});
    if (step == 1) {
      for (int64_t i = left; i < right; ++i) out[i] = static_cast<Acc>(widen(data[start + i]));
    } else {
      for (int64_t i = left; i < right; ++i)
        out[i] = static_cast<Acc>(widen(data[start + i * step]));
    }
    std::fill(out + right, out + count, Acc{0});
    out += count;
    if (++oy == params.positions[0]) {
      oy = 0;
      ++n;
    }
  }
}

constexpr int64_t kColumnRows = 128;  // of P that are read of each column at a time

// Whether every position is a patch of its own.
inline bool is_whole(const PatchSource& source) {
  bool whole = true;
  for (int dim = 0; dim < 2; ++dim)
    whole = whole && source.kernel[dim] == 1 && source.stride[dim] == 1 && source.padding[dim] == 0;
  return whole;
}

// pack_patches for such a source: the maps' own rows or planes, transposed.
template <class T>
CCP_INLINE void pack_whole(const PatchSource& source, int64_t group, int64_t panel, int64_t begin,
                           int64_t depth, Accumulator<T>* packed) {
  using Acc = Accumulator<T>;
  const int64_t channel = panel * kPanel<Acc>;
  const int64_t channels = std::min<int64_t>(kPanel<Acc>, source.channels - channel);
  if (channels % kLanes<Acc> != 0) std::fill(packed, packed + depth * kPanel<Acc>, Acc{0});
  const int64_t width = source.size[1], plane = source.size[0] * width;
  const bool one_run = source.position_stride[0] == width * source.position_stride[1];
  const int64_t length = one_run ? plane : width;
  const T* maps = static_cast<const T*>(source.data) +
                  (group * source.channels + channel) * source.channel_stride;
  for (int64_t d = 0, count; d < depth; d += count) {
    const int64_t sample = (begin + d) / plane, position = (begin + d) % plane;
    const int64_t row = position / length, first = position % length;
    count = std::min(length - first, depth - d);
    pack_run(maps + sample * source.sample_stride + row * source.position_stride[0] +
                 first * source.position_stride[1],
             source.channel_stride, source.position_stride[1], count, channels,
             packed + d * kPanel<Acc>);
  }
}

// One panel of rows [begin, begin + depth) of a group's P. Columns beyond the last are zero up to a
// whole vector, and without meaning from there on.
template <class T, class Acc>
void pack_patches(const PatchProductParams& params, const PatchSource& source, int64_t group,
                  int64_t panel, int64_t begin, int64_t depth, Acc* packed) {
  if constexpr (std::is_same_v<Acc, Accumulator<T>>)
    if (is_whole(source)) return pack_whole<T>(source, group, panel, begin, depth, packed);
  constexpr int kSide = kLanes<Acc>;
  for (int64_t d = 0; d < depth; d += kColumnRows) {
    const int64_t count = std::min(kColumnRows, depth - d);
    for (int c = 0; c < kPanel<Acc>; c += kSide) {
      alignas(64) Acc columns[kSide][kColumnRows] = {};
      for (int i = 0; i < kSide; ++i) {
        const int64_t column = panel * kPanel<Acc> + c + i;
        if (column < source.columns())
          read_column<T>(params, source, group, column, begin + d, count, columns[i]);
      }
      transpose_columns(columns[0], kColumnRows, count, packed + d * kPanel<Acc> + c);
    }
  }
}

constexpr int64_t kChain = 128;  // positions summed before the sum joins the others

// tile[r][c] = sum over rows x columns of left[r] * right[c], as multiply_rows for positions that
// need not follow one another.
template <int kVectors, class Acc>
CCP_INLINE void multiply_grid(const Acc* left, const PackedGrid& left_grid, const Acc* right,
                              const PackedGrid& right_grid, int64_t rows, int64_t columns,
                              Acc (&tile)[kTileRows][kVectors * kLanes<Acc>]) {
  Vector<Acc> sums[kTileRows][kVectors] = {};
  for (int64_t y = 0; y < rows; ++y) {
    const Acc* l = left + left_grid.first + y * left_grid.row_step;
    const Acc* r = right + right_grid.first + y * right_grid.row_step;
    for (int64_t x = 0; x < columns; ++x) {
      Vector<Acc> values[kVectors];
      __builtin_memcpy(values, r, sizeof values);
      for (int i = 0; i < kTileRows; ++i)
        for (int v = 0; v < kVectors; ++v) sums[i][v] += l[i] * values[v];
      l += left_grid.column_step;
      r += right_grid.column_step;
    }
  }
  __builtin_memcpy(tile, sums, sizeof sums);
}

template <int kVectors, class Acc>
CCP_INLINE void add_grid(const Acc* left, PackedGrid left_grid, const Acc* right,
                         PackedGrid right_grid, int64_t rows, int64_t columns, int64_t left_maps,
                         Acc* tile) {
  const int64_t width = std::min(columns, kChain), height = std::max<int64_t>(1, kChain / width);
  for (int64_t y = 0; y < rows; y += height) {
    for (int64_t x = 0; x < columns; x += width) {
      const auto at = [&](PackedGrid grid) {
        grid.first += y * grid.row_step + x * grid.column_step;
        return grid;
      };
      for (int64_t map = 0; map < left_maps; map += kTileRows) {
        alignas(64) Acc block[kTileRows][kVectors * kLanes<Acc>];
        multiply_grid<kVectors>(left + map, at(left_grid), right, at(right_grid),
                                std::min(height, rows - y), std::min(width, columns - x), block);
        for (int i = 0; i < kTileRows; ++i)
          for (int c = 0; c < kVectors * kLanes<Acc>; ++c)
            tile[(map + i) * kPanel<Acc> + c] += block[i][c];
      }
    }
  }
}

// tile[r][c] += sum over rows x columns of left[r] * right[c], for the first `left_maps` maps of a
// packed panel and the first `right_maps` of another; more are written, without meaning.
template <class Acc>
void add_correlation(const Acc* left, const PackedGrid& left_grid, const Acc* right,
                     const PackedGrid& right_grid, int64_t rows, int64_t columns, int64_t left_maps,
                     int64_t right_maps, Acc* tile) {
  if (right_maps <= kLanes<Acc>) {
    add_grid<1>(left, left_grid, right, right_grid, rows, columns, left_maps, tile);
  } else {
    add_grid<2>(left, left_grid, right, right_grid, rows, columns, left_maps, tile);
  }
}

// out[r][q c] += values[r][c], and the mirror image if `mirrored`, both for a pair of taps: in
// `out` neighbouring maps are `left_taps` rows and `right_taps` columns apart. On the diagonal only
// the values above it count.
template <class Acc>
CCP_INLINE void scatter(const Acc (&values)[kPanel<Acc>][kPanel<Acc>], int64_t left_maps,
                        int64_t right_maps, int64_t left_taps, int64_t right_taps, bool mirrored,
                        bool diagonal, Acc* out, Acc* mirror, int64_t stride) {
  for (int64_t r = 0; r < left_maps; ++r) {
    Acc* row = out + r * left_taps * stride;
    for (int64_t c = diagonal ? r : 0; c < right_maps; ++c) row[c * right_taps] += values[r][c];
  }
  if (!mirrored) return;
  for (int64_t c = 0; c < right_maps; ++c) {
    Acc* row = mirror + c * right_taps * stride;
    for (int64_t r = 0; r < (diagonal ? c : left_maps); ++r) row[r * left_taps] += values[r][c];
  }
}

// Adds the correlations of left panel tile.row and right panel tile.column, one
// [kPanel][kPanel] for each piece, to every pair of taps of a group's `out`.
template <class Acc>
void add_pieces(const PatchProductParams& params, const PatchAxis& rows, const PatchAxis& columns,
                const Acc* correlations, TileIndex tile, Acc* out) {
  constexpr int kSide = kPanel<Acc>;
  const PatchSource &left = params.left, &right = params.right;
  const int64_t left_taps = left.kernel[0] * left.kernel[1];
  const int64_t right_taps = right.kernel[0] * right.kernel[1];
  const int64_t left_maps = std::min<int64_t>(kSide, left.channels - tile.row * kSide);
  const int64_t right_maps = std::min<int64_t>(kSide, right.channels - tile.column * kSide);
  const auto place = [&](int64_t i, int64_t j) { return out + i * params.out_row_stride + j; };
  for (int64_t p = 0; p < left_taps; ++p) {
    for (int64_t q = params.symmetric ? p : 0; q < right_taps; ++q) {
      if (params.symmetric && p == q && tile.row > tile.column) continue;
      const PieceRange row_range =
          rows.ranges[p / left.kernel[1] * right.kernel[0] + q / right.kernel[1]];
      const PieceRange column_range =
          columns.ranges[p % left.kernel[1] * right.kernel[1] + q % right.kernel[1]];
      alignas(64) Acc values[kSide][kSide] = {};
      for (int i = row_range.first; i < row_range.last; ++i)
        for (int j = column_range.first; j < column_range.last; ++j) {
          const Acc* piece = correlations + (i * columns.pieces.size() + j) * kSide * kSide;
          for (int r = 0; r < kSide; ++r)
            for (int c = 0; c < kSide; ++c) values[r][c] += piece[r * kSide + c];
        }
      const int64_t i0 = tile.row * kSide * left_taps + p;
      const int64_t j0 = tile.column * kSide * right_taps + q;
      scatter(values, left_maps, right_maps, left_taps, right_taps, params.symmetric,
              params.symmetric && p == q && tile.row == tile.column, place(i0, j0), place(j0, i0),
              params.out_row_stride);
    }
  }
}

}  // namespace ccp::cpu::CCP_ISA
