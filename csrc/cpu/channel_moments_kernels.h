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
    minimum = value < minimum ? value : minimum;
    maximum = value > maximum ? value : maximum;
  }

  // Column `lane` of `rows`, a matrix [kMomentRows, stride], takes this lane's moments.
  CCP_INLINE void add_to(double* rows, int64_t stride) const {
    for (int i = 0; i < kLanes<Acc>; ++i) {
      rows[i] += sum[i];
      rows[stride + i] += square_sum[i];
      rows[2 * stride + i] += zeros[i];
    }
    double* least = rows + 3 * stride;
    double* greatest = rows + 4 * stride;
    for (int i = 0; i < kLanes<Acc>; ++i) least[i] = minimum[i] < least[i] ? minimum[i] : least[i];
    for (int i = 0; i < kLanes<Acc>; ++i)
      greatest[i] = maximum[i] > greatest[i] ? maximum[i] : greatest[i];
  }
};

template <class Acc>
CCP_INLINE Moments moments_of(Acc value) {
  const double wide = value;
  return {wide, wide * wide, wide == 0 ? 1.0 : 0.0, wide, wide};
}

constexpr int64_t kFlush = 128;  // values added to a lane in the accumulator's type

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
      LaneMoments<Acc> first = chains_[0], second = chains_[1];  // in registers
      for (; i + 2 * kStep <= end; i += 2 * kStep) {
        first.add(load(x + i));
        second.add(load(x + i + kStep));
      }
      if (i < end) first.add(load(x + i));
      chains_[0] = first;
      chains_[1] = second;
      i = end;
    }
    for (; i < count; ++i) total_.add(moments_of(widen(x[i])));
  }

  CCP_INLINE void add_strided(const T* x, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) total_.add(moments_of(widen(x[i * stride])));
  }

  Moments total() {
    flush();
    return total_;
  }

 private:
  void flush() {
    double rows[kMomentRows][kStep];
    for (int lane = 0; lane < kStep; ++lane) Moments{}.write(rows[0], kStep, lane);
    for (const LaneMoments<Acc>& chain : chains_) chain.add_to(rows[0], kStep);
    for (int lane = 0; lane < kStep; ++lane) total_.add(Moments::read(rows[0], kStep, lane));
    chains_[0] = chains_[1] = LaneMoments<Acc>{};
    pending_ = 0;
  }

  LaneMoments<Acc> chains_[2];  // two hide the latency of the additions
  int64_t pending_ = 0;         // vectors in the chains
  Moments total_;
};

// One item = one block of positions of one channel; any strides. Items are ordered
// [block, channel], parts [block, kMomentRows, channel].
template <class T>
void channel_moments_by_row(const ChannelMomentsParams& params, int64_t block_length, double* parts,
                            int64_t begin, int64_t end) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, stride = layout.innermost().x_stride;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / channels, c = item % channels;
    const int64_t first = block * block_length;
    const int64_t last = std::min(first + block_length, layout.positions);
    const T* x = static_cast<const T*>(params.x) + c * layout.channel.x_stride;
    RunMoments<T> moments;
    const auto add_run = [&](int64_t offset, int64_t, int64_t count)
                             __attribute__((always_inline)) {
                               if (stride == 1) {
                                 moments.add_contiguous(x + offset, count);
                               } else {
                                 moments.add_strided(x + offset, stride, count);
                               }
                             };
    for_each_run(layout, first, last, add_run);
    moments.total().write(parts + block * kMomentRows * channels, channels, c);
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
