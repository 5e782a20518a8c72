// Packs maps into a panel, [position][kPanel]. Included once per instruction set, after
// transpose.h, hence no include guard.

namespace ccp::cpu::CCP_ISA {

// to[p][c] = maps[c * channel_stride + p * position_stride] for `count` positions.
template <class T>
CCP_INLINE void pack_run(const T* maps, int64_t channel_stride, int64_t position_stride,
                         int64_t count, int64_t channels, Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  constexpr int kSide = kLanes<Acc>;
  int64_t p = 0;
  if (position_stride == 1) {
    for (; p + kSide <= count; p += kSide) {
      int64_t c = 0;
      for (; c + kSide <= channels; c += kSide)
        transpose_block(maps + c * channel_stride + p, channel_stride, to + p * kPanel<Acc> + c);
      for (; c < channels; ++c)
        for (int i = 0; i < kSide; ++i)
          to[(p + i) * kPanel<Acc> + c] = widen(maps[c * channel_stride + p + i]);
    }
  } else if (channel_stride == 1) {
    for (; p < count; ++p) {
      int64_t c = 0;
      for (; c + kSide <= channels; c += kSide) {
        store<Acc>(to + p * kPanel<Acc> + c, load(maps + p * position_stride + c));
      }
      for (; c < channels; ++c) to[p * kPanel<Acc> + c] = widen(maps[p * position_stride + c]);
    }
  }
  for (; p < count; ++p)
    for (int64_t c = 0; c < channels; ++c)
      to[p * kPanel<Acc> + c] = widen(maps[c * channel_stride + p * position_stride]);
}

}  // namespace ccp::cpu::CCP_ISA
