// Transposes columns of a matrix into a panel, [row][kPanel], in registers. Included once per
// instruction set, after tile_product.h, hence no include guard.

namespace ccp::cpu::CCP_ISA {

// Exchanges the off-diagonal squares of side kStep between rows a and b, kStep apart.
template <class Acc, int kStep, int... kLane>
CCP_INLINE void exchange(Vector<Acc>& a, Vector<Acc>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = kLanes<Acc>;
#ifdef __clang__
  const Vector<Acc> low =
      __builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + kCount : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLane + kCount : kLane + kStep)...);
#else
  const Vector<Acc> low =
      __builtin_shuffle(a, b, Integers<Acc>{(kLane & kStep ? kLane - kStep + kCount : kLane)...});
  b = __builtin_shuffle(a, b, Integers<Acc>{(kLane & kStep ? kLane + kCount : kLane + kStep)...});
#endif
  a = low;
}

template <class Acc, int kStep = 1>
CCP_INLINE void transpose(Vector<Acc> (&rows)[kLanes<Acc>]) {
  if constexpr (kStep < kLanes<Acc>) {
    for (int i = 0; i < kLanes<Acc>; ++i)
      if ((i & kStep) == 0)
        exchange<Acc, kStep>(rows[i], rows[i + kStep],
                             std::make_integer_sequence<int, kLanes<Acc>>{});
    transpose<Acc, 2 * kStep>(rows);
  }
}

// to[p][c] = maps[c][p] for kLanes positions and as many maps, `channel_stride` apart.
template <class T>
CCP_INLINE void transpose_block(const T* maps, int64_t channel_stride, Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  Vector<Acc> rows[kLanes<Acc>];
  for (int c = 0; c < kLanes<Acc>; ++c) rows[c] = load(maps + c * channel_stride);
  transpose<Acc>(rows);
  for (int p = 0; p < kLanes<Acc>; ++p) store(to + p * kPanel<Acc>, rows[p]);
}

// to[p][c] = columns[c][p] for `count` positions and kLanes columns, `stride` apart.
template <class Acc>
CCP_INLINE void transpose_columns(const Acc* columns, int64_t stride, int64_t count, Acc* to) {
  int64_t p = 0;
  for (; p + kLanes<Acc> <= count; p += kLanes<Acc>)
    transpose_block(columns + p, stride, to + p * kPanel<Acc>);
  for (; p < count; ++p)
    for (int c = 0; c < kLanes<Acc>; ++c) to[p * kPanel<Acc> + c] = columns[c * stride + p];
}

}  // namespace ccp::cpu::CCP_ISA
