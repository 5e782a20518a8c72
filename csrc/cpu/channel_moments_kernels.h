// The CPU kernels of channel_moments. Included once per instruction set, hence no include guard.
#include "csrc/cpu/runs.h"
#include "csrc/cpu/vector.h"

namespace ccp::cpu::CCP_ISA {

template <class Acc>
struct CountOf;
template <>
struct CountOf<float> {
  typedef int32_t type __attribute__((vector_size(64)));
};
template <>
struct CountOf<double> {
  typedef int64_t type __attribute__((vector_size(64)));
};

// The moments of each lane, of so few values that sums keep the accumulator's accuracy.
template <class Acc>
struct LaneMoments {
  using V = Vector<Acc>;
  V sum{}, square_sum{};
  typename CountOf<Acc>::type zeros{};
  V minimum = V{} + static_cast<Acc>(HUGE_VAL), maximum = V{} - static_cast<Acc>(HUGE_VAL);

  CCP_INLINE void add(V value) {
    sum += value;
    square_sum += value * value;
    zeros -= value == 0;  // true is -1
    minimum = (value < minimum) | (value != value) ? value : minimum;
    maximum = (value > maximum) | (value != value) ? value : maximum;
  }

  CCP_INLINE Moments lane(int i) const {
    return {sum[i], square_sum[i], static_cast<double>(zeros[i]), minimum[i], maximum[i]};
  }
};

template <class Acc>
CCP_INLINE Moments moments_of(Acc value) {
  const double wide = value;
  return {wide, wide * wide, wide == 0 ? 1.0 : 0.0, wide, wide};
}

constexpr int64_t kFlush = 64;  // vectors added to a LaneMoments

template <class T>
CCP_INLINE void add_contiguous(const T* x, int64_t count, Moments* moments) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>;
  int64_t i = 0;
  while (i + kStep <= count) {
    LaneMoments<Acc> first, second;  // two chains hide the latency of the additions
    const int64_t end = i + std::min((count - i) / kStep, kFlush) * kStep;
    for (; i + 2 * kStep <= end; i += 2 * kStep) {
      first.add(load(x + i));
      second.add(load(x + i + kStep));
    }
    for (; i < end; i += kStep) first.add(load(x + i));
    for (int lane = 0; lane < kStep; ++lane) {
      moments->add(first.lane(lane));
      moments->add(second.lane(lane));
    }
  }
  for (; i < count; ++i) moments->add(moments_of(widen(x[i])));
}

// One item = one block of positions of one channel; any strides. parts[item], items ordered
// [block, channel].
template <class T>
void channel_moments_by_row(const ChannelMomentsParams& params, int64_t block_length,
                            Moments* parts, int64_t begin, int64_t end) {
  const ChannelDotLayout& layout = params.layout;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / layout.channel.size * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    const T* x =
        static_cast<const T*>(params.x) + item % layout.channel.size * layout.channel.x_stride;
    const int64_t stride = layout.innermost().x_stride;
    Moments moments;
    const auto add_run = [&](int64_t offset, int64_t, int64_t count)
                             __attribute__((always_inline)) {
                               if (stride == 1) {
                                 add_contiguous(x + offset, count, &moments);
                               } else {
                                 for (int64_t p = 0; p < count; ++p)
                                   moments.add(moments_of(widen(x[offset + p * stride])));
                               }
                             };
    for_each_run(layout, first, last, add_run);
    parts[item] = moments;
  }
}

// Adds `count` positions of the channels of one vector.
template <class T>
CCP_INLINE void add_positions(const T* x, int64_t stride, int64_t count, Moments* moments) {
  using Acc = Accumulator<T>;
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    const int64_t end = std::min(begin + kFlush, count);
    LaneMoments<Acc> lanes;
    for (int64_t p = begin; p < end; ++p) lanes.add(load(x + p * stride));
    for (int lane = 0; lane < kLanes<Acc>; ++lane) moments[lane].add(lanes.lane(lane));
  }
}

// One item = one block of positions, all channels; unit channel stride. parts are ordered
// [block, channel].
template <class T>
void channel_moments_by_position(const ChannelMomentsParams& params, int64_t block_length,
                                 Moments* parts, int64_t begin, int64_t end) {
  constexpr int kStep = kLanes<Accumulator<T>>;
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, stride = layout.innermost().x_stride;
  const T* x = static_cast<const T*>(params.x);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    Moments* moments = parts + item * channels;
    std::fill(moments, moments + channels, Moments{});
    const auto add_run = [&](int64_t offset, int64_t, int64_t count)
                             __attribute__((always_inline)) {
                               // Few positions at a time, so that the next vector of channels finds
                               // them in the cache.
                               for (int64_t p = 0; p < count; p += kFlush) {
                                 const T* rows = x + offset + p * stride;
                                 const int64_t height = std::min(kFlush, count - p);
                                 int64_t c = 0;
                                 for (; c + kStep <= channels; c += kStep)
                                   add_positions(rows + c, stride, height, moments + c);
                                 for (; c < channels; ++c)
                                   for (int64_t i = 0; i < height; ++i)
                                     moments[c].add(moments_of(widen(rows[i * stride + c])));
                               }
                             };
    for_each_run(layout, first, last, add_run);
  }
}

}  // namespace ccp::cpu::CCP_ISA
