// The CPU kernels of patch_gram_ and patch_cross_. Included once per instruction set, hence no
// include guard.
#include "csrc/cpu/panels.h"

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

// Writes rows [begin, begin + depth) of one column of P, kPanel<Acc> elements apart.
template <class T, class Acc>
inline __attribute__((always_inline)) void pack_column(const PatchProductParams& params,
                                                       const PatchSource& source, int64_t group,
                                                       int64_t column, int64_t begin, int64_t depth,
                                                       Acc* to) {
  const int64_t kernel_width = source.kernel[1], outputs = params.positions[1];
  const int64_t kx = column % kernel_width, ky = column / kernel_width % source.kernel[0];
  const int64_t channel = group * source.channels + column / kernel_width / source.kernel[0];
  const OutputRange rows = outputs_inside(source, 0, ky, params.positions[0]);
  const OutputRange columns = outputs_inside(source, 1, kx, outputs);
  const int64_t step = source.stride[1] * source.position_stride[1];
  for (int64_t d = 0; d < depth;) {
    const int64_t line = (begin + d) / outputs, first = (begin + d) % outputs;
    const int64_t n = line / params.positions[0], oy = line % params.positions[0];
    const int64_t count = std::min(outputs - first, depth - d);
    const bool inside = rows.first <= oy && oy < rows.last;
    const int64_t left = inside ? std::clamp(columns.first - first, int64_t{0}, count) : count;
    const int64_t right = inside ? std::clamp(columns.last - first, left, count) : count;
    const int64_t y = oy * source.stride[0] + ky * source.dilation[0] - source.padding[0];
    const int64_t x = kx * source.dilation[1] - source.padding[1];
    const int64_t line_start = n * source.sample_stride + channel * source.channel_stride +
                               y * source.position_stride[0] + x * source.position_stride[1] +
                               first * step;
    const T* data = static_cast<const T*>(source.data);
    Acc* out = to + d * kPanel<Acc>;
    for (int64_t i = 0; i < left; ++i) out[i * kPanel<Acc>] = 0;
    for (int64_t i = left; i < right; ++i)
      out[i * kPanel<Acc>] = static_cast<Acc>(widen(data[line_start + i * step]));
    for (int64_t i = right; i < count; ++i) out[i * kPanel<Acc>] = 0;
    d += count;
  }
}

// One panel of rows [begin, begin + depth) of a group's P. Columns beyond the last are zero.
template <class T, class Acc>
void pack_patches(const PatchProductParams& params, const PatchSource& source, int64_t group,
                  int64_t panel, int64_t begin, int64_t depth, Acc* packed) {
  for (int c = 0; c < kPanel<Acc>; ++c) {
    const int64_t column = panel * kPanel<Acc> + c;
    if (column < source.columns()) {
      pack_column<T, Acc>(params, source, group, column, begin, depth, packed + c);
    } else {
      for (int64_t d = 0; d < depth; ++d) packed[d * kPanel<Acc> + c] = 0;
    }
  }
}

}  // namespace ccp::cpu::CCP_ISA
