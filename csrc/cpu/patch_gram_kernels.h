// The CPU kernels of patch_gram_ and patch_cross_. Included once per instruction set, hence no
// include guard.
#include "csrc/cpu/panels.h"
#include "csrc/cpu/vector.h"
// After both of them.
#include "csrc/cpu/transpose.h"

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

// One panel of rows [begin, begin + depth) of a group's P. Columns beyond the last are zero.
template <class T, class Acc>
void pack_patches(const PatchProductParams& params, const PatchSource& source, int64_t group,
                  int64_t panel, int64_t begin, int64_t depth, Acc* packed) {
  constexpr int kSide = kSquare<Acc>;
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

}  // namespace ccp::cpu::CCP_ISA
