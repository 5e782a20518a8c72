// The CPU kernels of channel_moments. Included once per instruction set, hence no include guard.
#include "csrc/cpu/runs.h"
#include "csrc/cpu/vector.h"

namespace ccp::cpu::CCP_ISA {

// Lanes [first, first + kLanes<double>) of `lanes`, whose elements are of type Element.
template <class Element, class Lanes>
CCP_INLINE Vector<double> widen_lanes(const Lanes& lanes, int first) {
  typedef Element Part __attribute__((vector_size(kLanes<double> * sizeof(Element))));
  Part part;
  __builtin_memcpy(&part, reinterpret_cast<const char*>(&lanes) + first * sizeof(Element),
                   sizeof part);
  return __builtin_convertvector(part, Vector<double>);
}

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
    zeros -= value == 0;  // true is -1
    minimum = value < minimum ? value : minimum;
    maximum = value > maximum ? value : maximum;
  }

  // Adds the lanes of `value` from `first` on; the others were added before.
  CCP_INLINE void add_from(int first, V value) {
    const Integers<Acc> mask = lanes_from<Acc>(first);
    const V counted = masked<Acc>(value, mask);
    sum += counted;
    square_sum += counted * counted;
    zeros -= (value == 0) & mask;
    minimum = value < minimum ? value : minimum;
    maximum = value > maximum ? value : maximum;
  }

  CCP_INLINE Moments total() const {
    Vector<double> sums{}, squares{}, counts{};
    for (int i = 0; i < kLanes<Acc>; i += kLanes<double>) {
      sums += widen_lanes<Acc>(sum, i);
      squares += widen_lanes<Acc>(square_sum, i);
      counts += widen_lanes<LaneInteger<Acc>>(zeros, i);
    }
    Acc least = minimum[0], greatest = maximum[0];
    for (int i = 1; i < kLanes<Acc>; ++i) {
      least = minimum[i] < least ? minimum[i] : least;
      greatest = maximum[i] > greatest ? maximum[i] : greatest;
    }
    return {sum_lanes(sums), sum_lanes(squares), sum_lanes(counts), least, greatest};
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
      for (int k = 0; k < kMomentRows; ++k)
        __builtin_memcpy(rows + k * stride + i, &row[k], sizeof row[k]);
    }
  }
};

template <class Acc>
CCP_INLINE Moments moments_of(Acc value) {
  const double wide = value;
  return {wide, wide * wide, wide == 0 ? 1.0 : 0.0, wide, wide};
}

constexpr int64_t kFlush = 64;  // values added to a lane in the accumulator's type

// The moments of one channel while its runs are added.
template <class T>
class RunMoments {
  using Acc = Accumulator<T>;
  static constexpr int kStep = kLanes<Acc>;

 public:
  CCP_INLINE void add_contiguous(const T* x, int64_t count) {
    int64_t i = 0;
    while (i + kStep <= count) {
      if (pending_ >= kFlush) flush();
      const int64_t vectors = std::min((count - i) / kStep, kFlush - pending_);
      const int64_t end = i + vectors * kStep;
      pending_ += vectors;
      LaneMoments<Acc> lanes = lanes_;  // in registers
      for (; i < end; i += kStep) lanes.add(load(x + i));
      lanes_ = lanes;
    }
    if (i == count) return;
    if (count < kStep) return add_strided(x, 1, count);
    lanes_.add_from(kStep - static_cast<int>(count - i), load(x + count - kStep));
    ++pending_;
  }

  CCP_INLINE void add_strided(const T* x, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) total_.add(moments_of(widen(x[i * stride])));
  }

  CCP_INLINE Moments total() {
    flush();
    return total_;
  }

 private:
  CCP_INLINE void flush() {
    total_.add(lanes_.total());
    lanes_ = LaneMoments<Acc>{};
    pending_ = 0;
  }

  LaneMoments<Acc> lanes_;
  int64_t pending_ = 0;  // values in each lane, at most kFlush + 1
  Moments total_;
};

// Channels whose runs are added in turn, so that memory is read in order where they are
// neighbours: every jump costs about as much as reading 16 KiB.
constexpr int64_t kRowChannels = 64;

// One item = one block of positions of kRowChannels channels; any strides. Items are ordered
// [block, channels], parts [block, kMomentRows, channel].
template <class T>
void channel_moments_by_row(const ChannelMomentsParams& params, int64_t block_length, double* parts,
                            int64_t begin, int64_t end) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, tiles = ceil_div(channels, kRowChannels);
  const int64_t stride = layout.innermost().x_stride;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / tiles, c = item % tiles * kRowChannels;
    const int64_t tile = std::min(kRowChannels, channels - c);
    const int64_t first = block * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    const T* x = static_cast<const T*>(params.x) + c * layout.channel.x_stride;
    RunMoments<T> moments[kRowChannels];
    const auto add_run = [&](int64_t offset, int64_t, int64_t count)
                             __attribute__((always_inline)) {
                               for (int64_t i = 0; i < tile; ++i) {
                                 const T* run = x + i * layout.channel.x_stride + offset;
                                 if (stride == 1) {
                                   moments[i].add_contiguous(run, count);
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

constexpr int kColumns = CCP_VECTOR_BYTES == 64 ? 4 : 1;  // vectors of channels in registers

// Adds `count` positions of `columns` vectors of channels to `rows`, [kMomentRows, channels].
template <int columns, class T>
CCP_INLINE void add_columns(const T* x, int64_t stride, int64_t count, double* rows,
                            int64_t channels) {
  constexpr int kStep = kLanes<Accumulator<T>>;
  LaneMoments<Accumulator<T>> lanes[columns];
  for (int64_t p = 0; p < count; ++p)
    for (int i = 0; i < columns; ++i) lanes[i].add(load(x + p * stride + i * kStep));
  for (int i = 0; i < columns; ++i) lanes[i].add_to(rows + i * kStep, channels);
}

// One item = one block of positions, all channels; unit channel stride.
template <class T>
void channel_moments_by_position(const ChannelMomentsParams& params, int64_t block_length,
                                 double* parts, int64_t begin, int64_t end) {
  constexpr int kStep = kLanes<Accumulator<T>>;
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, stride = layout.innermost().x_stride;
  const T* x = static_cast<const T*>(params.x);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    double* rows = parts + item * kMomentRows * channels;
    for (int64_t c = 0; c < channels; ++c) Moments{}.write(rows, channels, c);
    const auto add_positions = [&](const T* from, int64_t count) __attribute__((always_inline)) {
      int64_t c = 0;
      for (; c + kColumns * kStep <= channels; c += kColumns * kStep)
        add_columns<kColumns>(from + c, stride, count, rows + c, channels);
      for (; c + kStep <= channels; c += kStep)
        add_columns<1>(from + c, stride, count, rows + c, channels);
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
