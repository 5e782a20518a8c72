// Transposes columns of a matrix into a panel, [row][kPanel], in registers. Included once per
// instruction set, after tile_product.h and vector.h, hence no include guard.

namespace ccp::cpu::CCP_ISA {

template <class Acc>
using Native = typename NativeVector<Acc>::type;
template <class Acc>
constexpr int kSquare = CCP_VECTOR_BYTES / sizeof(Acc);

template <class Acc>
struct LaneIndex;
template <>
struct LaneIndex<float> {
  typedef int32_t type __attribute__((vector_size(CCP_VECTOR_BYTES)));
};
template <>
struct LaneIndex<double> {
  typedef int64_t type __attribute__((vector_size(CCP_VECTOR_BYTES)));
};

// Exchanges the off-diagonal squares of side kStep between rows a and b, kStep apart.
template <class Acc, int kStep, int... kLane>
CCP_INLINE void exchange(Native<Acc>& a, Native<Acc>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = kSquare<Acc>;
#ifdef __clang__
  const Native<Acc> low =
      __builtin_shufflevector(a, b, (kLane & kStep ? kLane - kStep + kCount : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLane + kCount : kLane + kStep)...);
#else
  using Index = typename LaneIndex<Acc>::type;
  const Native<Acc> low =
      __builtin_shuffle(a, b, Index{(kLane & kStep ? kLane - kStep + kCount : kLane)...});
  b = __builtin_shuffle(a, b, Index{(kLane & kStep ? kLane + kCount : kLane + kStep)...});
#endif
  a = low;
}

template <class Acc, int kStep = 1>
CCP_INLINE void transpose(Native<Acc> (&rows)[kSquare<Acc>]) {
  if constexpr (kStep < kSquare<Acc>) {
    for (int i = 0; i < kSquare<Acc>; ++i)
      if ((i & kStep) == 0)
        exchange<Acc, kStep>(rows[i], rows[i + kStep],
                             std::make_integer_sequence<int, kSquare<Acc>>{});
    transpose<Acc, 2 * kStep>(rows);
  }
}

// to[p][c] = maps[c][p] for kLanes positions and kSquare maps, `channel_stride` apart.
template <class T>
CCP_INLINE void transpose_block(const T* maps, int64_t channel_stride, Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  constexpr int kSide = kSquare<Acc>, kParts = kLanes<Acc> / kSide;
  Native<Acc> rows[kParts][kSide];
  for (int c = 0; c < kSide; ++c) {
    const Vector<Acc> wide = load(maps + c * channel_stride);
    for (int part = 0; part < kParts; ++part)
      __builtin_memcpy(&rows[part][c], reinterpret_cast<const Acc*>(&wide) + part * kSide,
                       sizeof(Native<Acc>));
  }
  for (int part = 0; part < kParts; ++part) {
    transpose<Acc>(rows[part]);
    for (int p = 0; p < kSide; ++p)
      __builtin_memcpy(to + (part * kSide + p) * kPanel<Acc>, &rows[part][p], sizeof(Native<Acc>));
  }
}

// to[p][c] = columns[c][p] for `count` positions and kSquare columns, `stride` apart.
template <class Acc>
CCP_INLINE void transpose_columns(const Acc* columns, int64_t stride, int64_t count, Acc* to) {
  int64_t p = 0;
  for (; p + kLanes<Acc> <= count; p += kLanes<Acc>)
    transpose_block(columns + p, stride, to + p * kPanel<Acc>);
  for (; p < count; ++p)
    for (int c = 0; c < kSquare<Acc>; ++c) to[p * kPanel<Acc> + c] = columns[c * stride + p];
}

}  // namespace ccp::cpu::CCP_ISA
