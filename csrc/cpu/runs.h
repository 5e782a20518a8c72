// Stretches of positions of one stride. Included once per instruction set, hence no include guard.
namespace ccp::cpu::CCP_ISA {

struct Offset {
  int64_t x, g;
};

inline __attribute__((always_inline)) Offset offset_in(const Dim& dim, int64_t index) {
  return {index * dim.x_stride, index * dim.g_stride};
}

// Where the `index`-th stretch of positions along the innermost dimension begins.
inline __attribute__((always_inline)) Offset outer_offset(const ChannelDotLayout& layout,
                                                          int64_t index) {
  Offset offset{0, 0};
  for (int d = layout.position_dims - 2; d >= 0; --d) {
    const Offset step = offset_in(layout.position[d], index % layout.position[d].size);
    offset = {offset.x + step.x, offset.g + step.g};
    index /= layout.position[d].size;
  }
  return offset;
}

// Calls f(x offset, g offset, count) for each stretch of positions [begin, end) that has one
// stride, that of the innermost dimension.
template <class F>
inline __attribute__((always_inline)) void for_each_run(const ChannelDotLayout& layout,
                                                        int64_t begin, int64_t end, F f) {
  const Dim& inner = layout.innermost();
  if (layout.position_dims == 1) {
    const Offset start = offset_in(inner, begin);
    return f(start.x, start.g, end - begin);
  }
  while (begin < end) {
    const Offset outer = outer_offset(layout, begin / inner.size);
    const Offset start = offset_in(inner, begin % inner.size);
    const int64_t count = std::min(inner.size - begin % inner.size, end - begin);
    f(outer.x + start.x, outer.g + start.g, count);
    begin += count;
  }
}

}  // namespace ccp::cpu::CCP_ISA
