// The CPU kernels of channel_moments. Included once per instruction set, hence no include guard.
#include "csrc/cpu/runs.h"
#include "csrc/cpu/vector.h"

namespace ccp::cpu::CCP_ISA {

// Lanes [first, first + kLanes<double>) of `lanes`, whose elements are of type Element. Copied as a
// whole: what has its address taken would stay in memory while it is summed.
template <class Element, class Lanes>
CCP_INLINE Vector<double> widen_lanes(const Lanes& lanes, int first) {
  typedef Element Part __attribute__((vector_size(kLanes<double> * sizeof(Element))));
  Part parts[sizeof lanes / sizeof(Part)];
  __builtin_memcpy(parts, &lanes, sizeof lanes);
  return __builtin_convertvector(parts[first / kLanes<double>], Vector<double>);
}

// The lesser and the greater of each lane, `b` where one is NaN, and counts of zeros. What GCC
// makes of the portable notation for AVX-512, a mask and a blend, takes several cycles more, one
// value after the other. (maskz: as in vector.h.)
#if CCP_VECTOR_BYTES == 64

CCP_INLINE Vector<float> lesser(Vector<float> a, Vector<float> b) {
  return _mm512_maskz_min_ps(0xffff, a, b);
}
CCP_INLINE Vector<double> lesser(Vector<double> a, Vector<double> b) {
  return _mm512_maskz_min_pd(0xff, a, b);
}
CCP_INLINE Vector<float> greater(Vector<float> a, Vector<float> b) {
  return _mm512_maskz_max_ps(0xffff, a, b);
}
CCP_INLINE Vector<double> greater(Vector<double> a, Vector<double> b) {
  return _mm512_maskz_max_pd(0xff, a, b);
}
CCP_INLINE Integers<float> count_zeros(Integers<float> count, Vector<float> value) {
  const __m512i wide = bit_cast<__m512i>(count);
  const __mmask16 zero = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_EQ_OQ);
  return bit_cast<Integers<float>>(_mm512_mask_add_epi32(wide, zero, wide, _mm512_set1_epi32(1)));
}
CCP_INLINE Integers<double> count_zeros(Integers<double> count, Vector<double> value) {
  const __m512i wide = bit_cast<__m512i>(count);
  const __mmask8 zero = _mm512_cmp_pd_mask(value, _mm512_setzero_pd(), _CMP_EQ_OQ);
  return bit_cast<Integers<double>>(_mm512_mask_add_epi64(wide, zero, wide, _mm512_set1_epi64(1)));
}

#else

template <class V>
CCP_INLINE V lesser(V a, V b) {
  return a < b ? a : b;
}
template <class V>
CCP_INLINE V greater(V a, V b) {
  return a > b ? a : b;
}
template <class Count, class V>
CCP_INLINE Count count_zeros(Count count, V value) {
  return count - (value == 0);  // true is -1
}

#endif

// The moments of each lane, of so few values that sums keep the accumulator's accuracy.
template <class Acc>
struct LaneMoments {
  using V = Vector<Acc>;
  V sum{}, square_sum{};
  Integers<Acc> zeros{};
  V minimum = V{} + static_cast<Acc>(HUGE_VAL), maximum = V{} - static_cast<Acc>(HUGE_VAL);

  CCP_INLINE void add(V value) {
    sum += value;
    square_sum += value * value;
    zeros = count_zeros(zeros, value);
    minimum = lesser(value, minimum);
    maximum = greater(value, maximum);
  }

  // Two values at once: shorter chains of sums.
  CCP_INLINE void add(V a, V b) {
    sum += a + b;
    square_sum += a * a + b * b;
    zeros = count_zeros(count_zeros(zeros, a), b);
    minimum = lesser(lesser(a, b), minimum);
    maximum = greater(greater(a, b), maximum);
  }

  // Adds the lanes of `value` from `first` on; the others were added before.
  CCP_INLINE void add_from(int first, V value) {
    const Integers<Acc> mask = lanes_from<Acc>(first);
    const V counted = masked<Acc>(value, mask);
    sum += counted;
    square_sum += counted * counted;
    zeros -= (value == 0) & mask;
    minimum = lesser(value, minimum);
    maximum = greater(value, maximum);
  }

  // Column `lane` of `rows`, a matrix [kMomentRows, stride], takes this lane's moments.
  CCP_INLINE void add_to(double* rows, int64_t stride) const {
    constexpr int kStep = kLanes<double>;
    for (int i = 0; i < kLanes<Acc>; i += kStep) {
      Vector<double> row[kMomentRows];
      for (int k = 0; k < kMomentRows; ++k) row[k] = load(rows + k * stride + i);
      row[0] += widen_lanes<Acc>(sum, i);
      row[1] += widen_lanes<Acc>(square_sum, i);
      row[2] += widen_lanes<LaneInteger<Acc>>(zeros, i);
      const Vector<double> least = widen_lanes<Acc>(minimum, i);
      const Vector<double> greatest = widen_lanes<Acc>(maximum, i);
      row[3] = least < row[3] ? least : row[3];
      row[4] = greatest > row[4] ? greatest : row[4];
      for (int k = 0; k < kMomentRows; ++k) store(rows + k * stride + i, row[k]);
    }
  }
};

template <class Acc>
CCP_INLINE Moments moments_of(Acc value) {
  const double wide = value;
  return {wide, wide * wide, wide == 0 ? 1.0 : 0.0, wide, wide};
}

// Fetches the memory `ahead` elements after those of x; it need not be anybody's.
template <class T>
CCP_INLINE void prefetch(const T* x, int64_t count, int64_t ahead) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(x) + ahead * sizeof(T);
  for (uintptr_t byte = 0; byte < count * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(from + byte));
}

constexpr int64_t kFlush = 64;  // values added to a lane in the accumulator's type

// The moments of one channel while its runs are added.
template <class T>
class RunMoments {
  using Acc = Accumulator<T>;
  static constexpr int kStep = kLanes<Acc>;

 public:
  // The values `ahead` of these are fetched meanwhile.
  CCP_INLINE void add_contiguous(const T* x, int64_t count, int64_t ahead) {
    if (count < kStep) return add_strided(x, 1, count);
    for (int64_t i = 0; i < count;) {
      if (pending_ >= kFlush) flush();
      const int64_t vectors = std::min((count - i) / kStep, kFlush - pending_);
      const int64_t end = i + vectors * kStep;
      LaneMoments<Acc> lanes = lanes_;  // in registers
      prefetch(x + i, end - i, ahead);
      for (; i + kStep < end; i += 2 * kStep) lanes.add(load(x + i), load(x + i + kStep));
      for (; i < end; i += kStep) lanes.add(load(x + i));
      pending_ += vectors;
      if (i < count && count - i < kStep) {
        lanes.add_from(kStep - static_cast<int>(count - i), load(x + count - kStep));
        ++pending_;
        i = count;
      }
      lanes_ = lanes;
    }
  }

  CCP_INLINE void add_strided(const T* x, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) single_.add(moments_of(widen(x[i * stride])));
  }

  CCP_INLINE Moments total() {
    flush();
    Moments total{sum_lanes<double>(sum_), sum_lanes<double>(square_sum_),
                  sum_lanes<double>(zeros_)};
    for (int i = 0; i < kStep; ++i) {
      total.minimum = std::min<double>(total.minimum, lanes_.minimum[i]);
      total.maximum = std::max<double>(total.maximum, lanes_.maximum[i]);
    }
    total.add(single_);
    return total;
  }

 private:
  // Minimum and maximum stay in their lanes: they are not rounded.
  CCP_INLINE void flush() {
    for (int i = 0; i < kStep; i += kLanes<double>) {
      sum_ += widen_lanes<Acc>(lanes_.sum, i);
      square_sum_ += widen_lanes<Acc>(lanes_.square_sum, i);
      zeros_ += widen_lanes<LaneInteger<Acc>>(lanes_.zeros, i);
    }
    lanes_.sum = lanes_.square_sum = Vector<Acc>{};
    lanes_.zeros = Integers<Acc>{};
    pending_ = 0;
  }

  LaneMoments<Acc> lanes_;
  int64_t pending_ = 0;  // values in each lane, at most kFlush + 1
  Vector<double> sum_{}, square_sum_{}, zeros_{};
  Moments single_;  // of values that fill no vector
};

// Channels whose runs are added in turn, so that memory is read in order where they are
// neighbours: every jump costs about as much as reading 16 KiB.
constexpr int64_t kRowChannels = 64;
constexpr int64_t kAhead = 8192;        // bytes fetched ahead of their use
constexpr int64_t kNextRuns = 1 << 15;  // bytes of runs that stay in the cache until they are used

// How many elements ahead to fetch: the channel's next run, where those of all channels fit the
// cache. The processor by itself would begin anew after a jump, and between jumps it falls behind,
// since the channels' moments fill the first cache.
template <class T>
CCP_INLINE int64_t elements_ahead(const ChannelDotLayout& layout, int64_t channels) {
  constexpr int64_t kSize = sizeof(T);
  const bool near = layout.innermost().size * channels * kSize <= kNextRuns;
  if (layout.position_dims == 1 || !near) return kAhead / kSize;
  return layout.position[layout.position_dims - 2].x_stride;
}

// One item = one block of positions of kRowChannels channels; any strides. Items are ordered
// [block, channels], parts [block, kMomentRows, channel].
template <class T>
void channel_moments_by_row(const ChannelMomentsParams& params, int64_t block_length, double* parts,
                            int64_t begin, int64_t end) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, tiles = ceil_div(channels, kRowChannels);
  const int64_t stride = layout.innermost().x_stride;
  RunMoments<T> moments[kRowChannels];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / tiles, c = item % tiles * kRowChannels;
    const int64_t tile = std::min(kRowChannels, channels - c);
    const int64_t first = block * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    const T* x = static_cast<const T*>(params.x) + c * layout.channel.x_stride;
    const int64_t ahead = elements_ahead<T>(layout, tile);
    std::fill(moments, moments + tile, RunMoments<T>());
    const auto add_run = [&](int64_t offset, int64_t, int64_t count)
                             __attribute__((always_inline)) {
                               for (int64_t i = 0; i < tile; ++i) {
                                 const T* run = x + i * layout.channel.x_stride + offset;
                                 if (stride == 1) {
                                   moments[i].add_contiguous(run, count, ahead);
                                 } else {
                                   moments[i].add_strided(run, stride, count);
                                 }
                               }
                             };
    for_each_run(layout, first, last, add_run);
    double* rows = parts + block * kMomentRows * channels + c;
    for (int64_t i = 0; i < tile; ++i) moments[i].total().write(rows, channels, i);
  }
}

constexpr int kColumns = CCP_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of channels in registers

// Adds `count` positions of `columns` vectors of channels to `rows`, [kMomentRows, channels].
template <int columns, class T>
CCP_INLINE void add_columns(const T* x, int64_t stride, int64_t count, double* rows,
                            int64_t channels) {
  constexpr int kStep = kLanes<Accumulator<T>>;
  LaneMoments<Accumulator<T>> lanes[columns];
  int64_t p = 0;
  for (; p + 1 < count; p += 2, x += 2 * stride)
    for (int i = 0; i < columns; ++i)
      lanes[i].add(load(x + i * kStep), load(x + stride + i * kStep));
  for (; p < count; ++p, x += stride)
    for (int i = 0; i < columns; ++i) lanes[i].add(load(x + i * kStep));
  for (int i = 0; i < columns; ++i) lanes[i].add_to(rows + i * kStep, channels);
}

// The same for all channels that fill vectors, from channel `c` on: as wide as possible, then half
// as wide. Returns the first channel that is left.
template <int columns, class T>
CCP_INLINE int64_t add_channels(const T* x, int64_t stride, int64_t count, double* rows,
                                int64_t channels, int64_t c) {
  constexpr int kWidth = columns * kLanes<Accumulator<T>>;
  for (; c + kWidth <= channels; c += kWidth)
    add_columns<columns>(x + c, stride, count, rows + c, channels);
  if constexpr (columns > 1) c = add_channels<columns / 2>(x, stride, count, rows, channels, c);
  return c;
}

// One item = one block of positions, all channels; unit channel stride.
template <class T>
void channel_moments_by_position(const ChannelMomentsParams& params, int64_t block_length,
                                 double* parts, int64_t begin, int64_t end) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, stride = layout.innermost().x_stride;
  const T* x = static_cast<const T*>(params.x);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    double* rows = parts + item * kMomentRows * channels;
    for (int64_t c = 0; c < channels; ++c) Moments{}.write(rows, channels, c);
    const auto add_positions = [&](const T* from, int64_t count) __attribute__((always_inline)) {
      int64_t c = add_channels<kColumns>(from, stride, count, rows, channels, 0);
      for (; c < channels; ++c) {
        Moments moments;
        for (int64_t p = 0; p < count; ++p) moments.add(moments_of(widen(from[p * stride + c])));
        moments.add(Moments::read(rows, channels, c));
        moments.write(rows, channels, c);
      }
    };
    const auto add_run = [&](int64_t offset, int64_t,
                             int64_t count) __attribute__((always_inline)) {
      for (int64_t p = 0; p < count; p += kFlush)
        add_positions(x + offset + p * stride, std::min(kFlush, count - p));
    };
    for_each_run(layout, first, last, add_run);
  }
}

}  // namespace ccp::cpu::CCP_ISA
