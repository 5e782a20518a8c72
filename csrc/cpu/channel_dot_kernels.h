// The CPU kernels of channel_dot. Included once per instruction set, hence no include guard.
#include "csrc/cpu/runs.h"
#include "csrc/cpu/vector.h"

namespace ccp::cpu::CCP_ISA {

// Four independent accumulators hide the latency of the multiply-add.
constexpr int kChains = 4;

// The right-hand side of a product of rows: side by side in memory, or one value for all of x.
template <class T>
struct Row {
  const T* g;
  CCP_INLINE Vector<Accumulator<T>> vector(int64_t i) const { return load(g + i); }
  CCP_INLINE Accumulator<T> value(int64_t i) const { return widen(g[i]); }
};
template <class T>
struct Constant {
  Accumulator<T> g;
  CCP_INLINE Vector<Accumulator<T>> vector(int64_t) const { return g - Vector<Accumulator<T>>{}; }
  CCP_INLINE Accumulator<T> value(int64_t) const { return g; }
};

// Additions to a lane before its sum joins the others in float64: equal terms round alike.
constexpr int64_t kAdditions = 32;

// The sum of x * right. What is left of the last vector is read with the values before it, which
// are masked.
template <class T, class Right>
CCP_INLINE double dot_contiguous(const T* x, const Right& right, int64_t count) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>;
  double sum = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t end = std::min(i + kAdditions * kChains * kStep, count);
    Vector<Acc> acc[kChains] = {};
    for (; i + kChains * kStep <= end; i += kChains * kStep)
      for (int k = 0; k < kChains; ++k)
        acc[k] += load(x + i + k * kStep) * right.vector(i + k * kStep);
    for (; i + kStep <= end; i += kStep) acc[0] += load(x + i) * right.vector(i);
    if (i < end && count >= kStep) {
      const int64_t last = count - kStep;
      const Integers<Acc> left = lanes_from<Acc>(static_cast<int>(i - last));
      acc[1] += masked<Acc>(load(x + last) * right.vector(last), left);
      i = end;
    }
    for (; i < end; ++i) acc[1][0] += widen(x[i]) * right.value(i);
    sum += sum_lanes<Acc>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  return sum;
}

constexpr int64_t kStridedBlock = 256;  // summed in the accumulator's type before the sum joins

template <class T>
CCP_INLINE double dot_strided(const T* x, const T* g, const Dim& dim, int64_t count) {
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kStridedBlock) {
    const int64_t end = std::min(begin + kStridedBlock, count);
    Accumulator<T> acc[kChains] = {};
    int64_t i = begin;
    for (; i + kChains <= end; i += kChains)
      for (int k = 0; k < kChains; ++k)
        acc[k] += widen(x[(i + k) * dim.x_stride]) * widen(g[(i + k) * dim.g_stride]);
    for (; i < end; ++i) acc[0] += widen(x[i * dim.x_stride]) * widen(g[i * dim.g_stride]);
    sum += (acc[0] + acc[1]) + (acc[2] + acc[3]);
  }
  return sum;
}

template <class T>
CCP_INLINE double dot_run(const T* x, const T* g, const Dim& dim, int64_t count) {
  if (unit_stride(dim)) return dot_contiguous(x, Row<T>{g}, count);
  if (dim.x_stride == 1 && dim.g_stride == 0)
    return dot_contiguous(x, Constant<T>{widen(*g)}, count);
  if (dim.x_stride == 0 && dim.g_stride == 1)
    return dot_contiguous(g, Constant<T>{widen(*x)}, count);
  return dot_strided(x, g, dim, count);
}

// One item = one block of positions of one (sample, channel), which lie side by side in memory.
// sums[item] with items ordered [block, sample, channel].
template <class T>
void channel_dot_by_row(const ChannelDotParams& params, int64_t block_length, Accumulator<T>* sums,
                        int64_t begin, int64_t end) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, samples = layout.sample.size;
  while (begin < end) {
    const int64_t c = begin % channels, n = begin / channels % samples;
    const int64_t first = begin / channels / samples * block_length;
    const int64_t count = std::min(block_length, layout.positions - first);
    const Offset sample = offset_in(layout.sample, n), channel = offset_in(layout.channel, c);
    const T* x = static_cast<const T*>(params.x) + sample.x + channel.x + first;
    const T* g = static_cast<const T*>(params.g) + sample.g + channel.g + first;
    for (const int64_t row = std::min(end, begin + channels - c); begin < row; ++begin) {
      sums[begin] = static_cast<Accumulator<T>>(dot_contiguous(x, Row<T>{g}, count));
      x += layout.channel.x_stride;
      g += layout.channel.g_stride;
    }
  }
}

// The same for any strides.
template <class T>
void channel_dot_by_run(const ChannelDotParams& params, int64_t block_length, Accumulator<T>* sums,
                        int64_t begin, int64_t end) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, samples = layout.sample.size;
  int64_t c = begin % channels, n = begin / channels % samples, b = begin / channels / samples;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = b * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    const Offset sample = offset_in(layout.sample, n), channel = offset_in(layout.channel, c);
    const T* x = static_cast<const T*>(params.x) + sample.x + channel.x;
    const T* g = static_cast<const T*>(params.g) + sample.g + channel.g;
    double sum = 0;
    const auto add_run = [&](int64_t x_offset, int64_t g_offset,
                             int64_t count) __attribute__((always_inline)) {
      sum += dot_run(x + x_offset, g + g_offset, layout.innermost(), count);
    };
    for_each_run(layout, first, last, add_run);
    sums[item] = static_cast<Accumulator<T>>(sum);
    if (++c < channels) continue;
    c = 0;
    if (++n < samples) continue;
    n = 0;
    ++b;
  }
}

constexpr int kChannelTile = 512;  // accumulators held on the stack
// So many vectors of channels, at most, have their sums in registers while positions are read in
// their order: up to 256 channels (AVX-512; 128 in float64), memory is then read without a jump.
constexpr int kColumns = CCP_VECTOR_BYTES == 64 ? 16 : 8;
constexpr int64_t kPositionGroup = 64;  // positions summed in registers before `acc` is met

// acc[c] += sum over `count` positions of x[p, c] * g[p, c], `columns` vectors of channels wide.
template <int columns, class T>
CCP_INLINE void add_columns(const T* x, const T* g, const Dim& dim, int64_t count,
                            Accumulator<T>* acc) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>;
  Vector<Acc> sums[columns] = {};
  for (int64_t p = 0; p < count; ++p, x += dim.x_stride, g += dim.g_stride)
    for (int i = 0; i < columns; ++i) sums[i] += load(x + i * kStep) * load(g + i * kStep);
  for (int i = 0; i < columns; ++i) {
    sums[i] += load(acc + i * kStep);
    store(acc + i * kStep, sums[i]);
  }
}

// The same for `channels` channels, whole vectors: as wide as possible, then half as wide.
template <int columns, class T>
CCP_INLINE void add_channels(const T* x, const T* g, const Dim& dim, int64_t count,
                             int64_t channels, Accumulator<T>* acc) {
  constexpr int kWidth = columns * kLanes<Accumulator<T>>;
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth)
    add_columns<columns>(x + c, g + c, dim, count, acc + c);
  if constexpr (columns > 1)
    add_channels<columns / 2>(x + c, g + c, dim, count, channels - c, acc + c);
}

// How many of `count` positions may be read `excess` elements beyond their last channel without
// leaving the memory that the run's last position ends.
CCP_INLINE int64_t readable_positions(const Dim& dim, int64_t excess, int64_t count) {
  const int64_t stride = std::min(dim.x_stride, dim.g_stride);
  if (excess == 0) return count;
  return stride == 0 ? 0 : std::max<int64_t>(0, count - ceil_div(excess, stride));
}

// acc[c] += sum over `count` positions of x[p, c] * g[p, c]. `acc` is padded to whole vectors;
// the padding receives values of no meaning.
template <class T>
CCP_INLINE void add_positions(const T* x, const T* g, const Dim& dim, int64_t count,
                              int64_t channels, Accumulator<T>* acc) {
  constexpr int kStep = kLanes<Accumulator<T>>;
  const int64_t padded = ceil_div(channels, kStep) * kStep;
  const int64_t readable = readable_positions(dim, padded - channels, count);
  for (int64_t p = 0; p < readable; p += kPositionGroup)
    add_channels<kColumns>(x + p * dim.x_stride, g + p * dim.g_stride, dim,
                           std::min(kPositionGroup, readable - p), padded, acc);
  for (int64_t p = readable; p < count; ++p)
    for (int64_t c = 0; c < channels; ++c)
      acc[c] += widen(x[p * dim.x_stride + c]) * widen(g[p * dim.g_stride + c]);
}

// One item = one block of positions of one sample, all channels; unit channel stride.
// sums are ordered [block, sample, channel].
template <class T>
void channel_dot_by_position(const ChannelDotParams& params, int64_t block_length,
                             Accumulator<T>* sums, int64_t begin, int64_t end) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, samples = layout.sample.size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item % samples, first = item / samples * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    const T* x = static_cast<const T*>(params.x) + n * layout.sample.x_stride;
    const T* g = static_cast<const T*>(params.g) + n * layout.sample.g_stride;
    for (int64_t c = 0; c < channels; c += kChannelTile) {
      const int64_t tile = std::min<int64_t>(kChannelTile, channels - c);
      alignas(64) Accumulator<T> acc[kChannelTile];
      std::fill(acc, acc + ceil_div(tile, kLanes<Accumulator<T>>) * kLanes<Accumulator<T>>, 0);
      const auto add_run = [&](int64_t x_offset, int64_t g_offset,
                               int64_t count) __attribute__((always_inline)) {
        add_positions(x + c + x_offset, g + c + g_offset, layout.innermost(), count, tile, acc);
      };
      for_each_run(layout, first, last, add_run);
      std::copy(acc, acc + tile, sums + item * channels + c);
    }
  }
}

}  // namespace ccp::cpu::CCP_ISA
