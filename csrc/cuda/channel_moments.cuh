// The CUDA kernels of channel_moments.
#pragma once

#include "csrc/cuda/channel_dot.cuh"
#include "csrc/cuda/moments_launch.h"
#include "csrc/cuda/units.cuh"
#include "csrc/moments.h"

namespace ccp {

// Sums of the values of one turn of a loop, few enough for the accumulator's type.
template <class Acc>
struct TurnSums {
  Acc sum = 0, square_sum = 0;

  __device__ __forceinline__ void add(Acc value) {
    sum += value;
    square_sum += value * value;
  }
};

// One thread's sums of a channel.
struct ThreadSums {
  double sum = 0, square_sum = 0;
  unsigned zeros = 0;

  template <class Acc>
  __device__ __forceinline__ void add(const TurnSums<Acc>& turn) {
    sum += turn.sum;
    square_sum += turn.square_sum;
  }

  template <class Acc>
  __device__ __forceinline__ Moments with_extremes(Acc minimum, Acc maximum) const {
    return {sum, square_sum, static_cast<double>(zeros), static_cast<double>(minimum),
            static_cast<double>(maximum)};
  }
};

template <class T>
__device__ __forceinline__ T infinity(float sign) {
  if constexpr (sizeof(T) == 8) {
    return sign * HUGE_VAL;
  } else {
    return narrow<T>(sign * static_cast<float>(HUGE_VAL));
  }
}

// The extremes of the first, second, ... elements of some units. NaN is passed over.
template <class T, int kUnit>
struct Extremes {
  Unit<T, kUnit> minimum{}, maximum{};

  __device__ __forceinline__ Extremes() {
#pragma unroll
    for (int v = 0; v < kUnit; ++v) {
      minimum.put(v, infinity<T>(1));
      maximum.put(v, infinity<T>(-1));
    }
  }

  __device__ __forceinline__ void add(const Unit<T, kUnit>& unit) {
    minimum = smaller(minimum, unit);
    maximum = larger(maximum, unit);
  }
};

// Blocks on a multiprocessor. Left to itself the compiler aims higher on some GPUs, and spills.
template <class T>
constexpr int kRowMomentsBlocks = sizeof(T) == 8 ? 2 : 3;

// The moments of the block's threads `stride` apart, in the first `stride` threads.
__device__ __forceinline__ Moments column_moments(Moments mine, int stride) {
  __shared__ double shared[kMomentRows * kBlockThreads];
  mine.write(shared, kBlockThreads, threadIdx.x);
  __syncthreads();
  for (int half = kBlockThreads / 2; half >= stride; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      mine.add(Moments::read(shared, kBlockThreads, threadIdx.x + half));
      mine.write(shared, kBlockThreads, threadIdx.x);
    }
    __syncthreads();
  }
  return mine;
}

// The moments of each group of kThreads neighbouring lanes, in every lane.
template <int kThreads>
__device__ __forceinline__ Moments group_moments(Moments mine) {
  for (int lanes = kThreads / 2; lanes > 0; lanes /= 2)
    mine.add({__shfl_xor_sync(kFullWarp, mine.sum, lanes),
              __shfl_xor_sync(kFullWarp, mine.square_sum, lanes),
              __shfl_xor_sync(kFullWarp, mine.zeros, lanes),
              __shfl_xor_sync(kFullWarp, mine.minimum, lanes),
              __shfl_xor_sync(kFullWarp, mine.maximum, lanes)});
  return mine;
}

// Of part `part` of `count` positions or chunks.
struct PartRange {
  int64_t begin, end;

  __device__ __forceinline__ PartRange(const ChannelMomentsLaunch& launch, int64_t part,
                                       int64_t count)
      : begin(part * launch.split.length), end(begin + launch.split.length) {
    if (end > count) end = count;
  }
};

// Where the index-th row begins: all position dimensions but the innermost.
__device__ __forceinline__ int64_t moment_row_offset(const ChannelDotLayout& layout,
                                                     int64_t index) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = layout.position_dims - 2; d > 0; --d) {
    const DivMod split = div_mod(index, layout.position[d].size);
    offset += split.remainder * layout.position[d].x_stride;
    index = split.quotient;
  }
  return layout.position_dims > 1 ? offset + index * layout.position[0].x_stride : 0;
}

// One thread's reading of the rows of one channel, and its moments of them.
template <class T, int kUnit, int kThreads>
class RowMoments {
 public:
  // Begins with chunk `chunk` of the channel's rows.
  __device__ __forceinline__ RowMoments(const ChannelMomentsParams& params, const MomentRows& rows,
                                        int64_t channel, int64_t chunk)
      : layout_(params.layout), rows_(rows), x_(static_cast<const T*>(params.x)) {
    const DivMod first = div_mod(chunk, rows.chunks);
    channel_ = channel * params.layout.channel.x_stride;
    row_ = first.quotient;
    chunk_ = first.remainder;
    find_unit();
  }

  // Adds the next kLoads units.
  template <int kLoads>
  __device__ __forceinline__ void add_next() {
    Unit<T, kUnit> units[kLoads];
    unsigned inside[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      units[load] = load_next();
      inside[load] = inside_;
      advance();
    }
    TurnSums<Acc> turn;
    ZeroCount<T, kUnit> zeros;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) add(units[load], inside[load], turn, zeros);
    sums_.add(turn);
    sums_.zeros += zeros.total();
  }

  __device__ __forceinline__ Moments moments() const {
    Acc minimum = extremes_.minimum.value(0), maximum = extremes_.maximum.value(0);
#pragma unroll
    for (int v = 1; v < kUnit; ++v) {
      minimum = fmin(minimum, extremes_.minimum.value(v));
      maximum = fmax(maximum, extremes_.maximum.value(v));
    }
    return sums_.with_extremes(minimum, maximum);
  }

 private:
  using Acc = Accumulator<T>;

  __device__ __forceinline__ void find_unit() {
    const int64_t row = channel_ + moment_row_offset(layout_, row_);
    const int shift = kUnit == 1 ? 0 : unit_remainder<kUnit>(x_ + row);
    const int64_t position = (chunk_ * kThreads + threadIdx.x % kThreads) * kUnit - shift;
    unit_ = row + position * rows_.stride;
    left_ = rows_.length - position;
    find_inside(position < 0 ? static_cast<int>(-position) : 0);
  }

  __device__ __forceinline__ void find_inside(int begin) {
    inside_ = bits_within<kUnit>(0, begin, left_ < kUnit ? static_cast<int>(left_) : kUnit);
  }

  __device__ __forceinline__ void advance() {
    if (rows_.alike) {
      unit_ += rows_.step;
    } else if (++chunk_ < rows_.chunks) {
      unit_ += kThreads * kUnit * rows_.stride;
      left_ -= kThreads * kUnit;
      find_inside(0);
    } else {
      chunk_ = 0;
      ++row_;
      find_unit();
    }
  }

  __device__ __forceinline__ Unit<T, kUnit> load_next() const {
    if (inside_ == 0) return {};
    if (kUnit == 1 || rows_.whole.contain(unit_)) return load_unit<T, kUnit>(x_ + unit_);
    return load_part<T, kUnit>(x_ + unit_, inside_);
  }

  __device__ __forceinline__ void add(const Unit<T, kUnit>& unit, unsigned inside,
                                      TurnSums<Acc>& turn, ZeroCount<T, kUnit>& zeros) {
    if (inside != masked_) {  // seldom: most rows lie alike in their units
      masked_ = inside;
      mask_ = unit_mask<T, kUnit>(inside);
    }
    extremes_.add(nan_outside(unit, mask_));
    const Unit<T, kUnit> added = zero_outside(unit, mask_);
#pragma unroll
    for (int v = 0; v < kUnit; ++v) turn.add(added.value(v));
    zeros.add(added);
    sums_.zeros -= Unit<T, kUnit>::kPlaces - __popc(inside);
  }

  const ChannelDotLayout& layout_;
  const MomentRows& rows_;
  const T* x_;
  int64_t channel_;      // where it begins, in elements
  int64_t row_, chunk_;  // of the next unit
  int64_t unit_, left_;  // where the next unit begins, and the row's elements from there on
  unsigned inside_;      // which of its elements belong to the row
  ThreadSums sums_;
  Extremes<T, kUnit> extremes_;
  unsigned masked_ = 0;  // what mask_ stands for
  Unit<T, kUnit> mask_{};
};

// A group of kThreads sums one part of the chunks of one channel; neighbouring groups take
// neighbouring channels. Writes parts[part][kMomentRows][channel].
template <class T, int kUnit, int kThreads>
__global__ void __launch_bounds__(kBlockThreads, kRowMomentsBlocks<T>)
    channel_moments_rows(ChannelMomentsParams params, ChannelMomentsLaunch launch, double* parts) {
  constexpr int kGroups = kBlockThreads / kThreads;
  const int64_t channels = params.layout.channel.size;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const DivMod task = div_mod(block, launch.tasks);
    const int64_t channel = task.remainder * kGroups + threadIdx.x / kThreads;
    const PartRange range(launch, task.quotient, launch.rows.all_chunks);
    int64_t left = channel < channels ? range.end - range.begin : 0;
    Moments mine;
    if (left > 0) {  // without rows their place is undefined
      RowMoments<T, kUnit, kThreads> thread(params, launch.rows, channel, range.begin);
      for (; left >= kMomentLoads; left -= kMomentLoads) thread.template add_next<kMomentLoads>();
      for (; left > 0; --left) thread.template add_next<1>();
      mine = thread.moments();
    }
    const Moments moments = group_moments<kThreads>(mine);
    if (threadIdx.x % kThreads == 0 && channel < channels)
      moments.write(parts + task.quotient * kMomentRows * channels, channels, channel);
  }
}

// A block's threads stand channel_threads wide along the channels, the others along the positions
// of one part. Writes parts[part][kMomentRows][channel].
template <class T, int kVector>
__global__ void __launch_bounds__(kBlockThreads)
    channel_moments_channels_last(ChannelMomentsParams params, ChannelMomentsLaunch launch,
                                  double* parts) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, stride = layout.position[0].x_stride;
  const int width = launch.channel_threads, height = kBlockThreads / width;
  const int column = threadIdx.x % width, line = threadIdx.x / width;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const DivMod task = div_mod(block, launch.tasks);
    const int64_t channel = (task.remainder * width + column) * kVector;
    PartRange range(launch, task.quotient, layout.positions);
    if (channel >= channels) range.end = range.begin;
    const T* x = static_cast<const T*>(params.x) + channel;
    ThreadSums sums[kVector];
    Extremes<T, kVector> extremes;
    int64_t position = range.begin + line;
    const auto add = [&](auto loads) {
      constexpr int kLoads = decltype(loads)::value;
      Unit<T, kVector> units[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load)
        units[load] = load_unit<T, kVector>(x + (position + load * height) * stride);
#pragma unroll
      for (int load = 0; load < kLoads; ++load) extremes.add(units[load]);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        TurnSums<Accumulator<T>> turn;
#pragma unroll
        for (int load = 0; load < kLoads; ++load) {
          turn.add(units[load].value(v));
          sums[v].zeros += units[load].value(v) == 0;
        }
        sums[v].add(turn);
      }
      position += kLoads * height;
    };
    while (position + (kMomentLoads - 1) * height < range.end)
      add(std::integral_constant<int, kMomentLoads>{});
    while (position < range.end) add(std::integral_constant<int, 1>{});
    double* out = parts + task.quotient * kMomentRows * channels;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const Moments moments = column_moments(
          sums[v].with_extremes(extremes.minimum.value(v), extremes.maximum.value(v)), width);
      if (line == 0 && channel < channels) moments.write(out, channels, channel + v);
      __syncthreads();
    }
  }
}

// Adds the parts of every channel, a warp each, and writes [kMomentRows, channels].
template <class = void>
__global__ void __launch_bounds__(kBlockThreads)
    finish_channel_moments(const double* parts, int64_t count, int64_t channels, double* out) {
  constexpr int kWarps = kBlockThreads / 32;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t c = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32; c < channels;
       c += stride) {
    Moments moments;
    for (int64_t part = threadIdx.x % 32; part < count; part += 32)
      moments.add(Moments::read(parts + part * kMomentRows * channels, channels, c));
    moments = group_moments<32>(moments);
    if (threadIdx.x % 32 == 0) moments.finished().write(out, channels, c);
  }
}

// Calls use(kernel) with the kernel for this launch. Host code, shared by the launcher and the
// emulator's tests.
template <class T, class Use>
void with_channel_moments_kernel(const ChannelMomentsLaunch& launch, Use use) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  const bool wide = launch.vector == kWide;
  if (launch.channel_threads > 0)
    return wide ? use(channel_moments_channels_last<T, kWide>)
                : use(channel_moments_channels_last<T, 1>);
  if (launch.rows.threads == 8)
    return wide ? use(channel_moments_rows<T, kWide, 8>) : use(channel_moments_rows<T, 1, 8>);
  return wide ? use(channel_moments_rows<T, kWide, 32>) : use(channel_moments_rows<T, 1, 32>);
}

}  // namespace ccp
