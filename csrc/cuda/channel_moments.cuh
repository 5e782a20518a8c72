// The CUDA kernels of channel_moments.
#pragma once

#include "csrc/cuda/channel_dot.cuh"
#include "csrc/cuda/moments_launch.h"
#include "csrc/moments.h"

namespace ccp {

// The moments of the values of one turn of a loop, few enough for sums in the accumulator's type.
template <class Acc>
struct TurnMoments {
  Acc sum = 0, square_sum = 0, minimum = HUGE_VAL, maximum = -HUGE_VAL;
  int zeros = 0;

  __device__ __forceinline__ void add(Acc value) {
    sum += value;
    square_sum += value * value;
    zeros += value == 0;
    minimum = fmin(minimum, value);
    maximum = fmax(maximum, value);
  }
};

// One thread's moments. Sums go to float64 once a turn; the others stay as they are.
template <class Acc>
struct ThreadMoments {
  double sum = 0, square_sum = 0;
  int64_t zeros = 0;
  Acc minimum = HUGE_VAL, maximum = -HUGE_VAL;

  __device__ __forceinline__ void add(const TurnMoments<Acc>& turn) {
    sum += turn.sum;
    square_sum += turn.square_sum;
    zeros += turn.zeros;
    minimum = fmin(minimum, turn.minimum);
    maximum = fmax(maximum, turn.maximum);
  }

  __device__ __forceinline__ Moments moments() const {
    return {sum, square_sum, static_cast<double>(zeros), static_cast<double>(minimum),
            static_cast<double>(maximum)};
  }
};

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

struct PositionRange {
  int64_t begin, end;
};

__device__ __forceinline__ PositionRange positions_of_part(const ChannelMomentsParams& params,
                                                           const ChannelMomentsLaunch& launch,
                                                           int64_t part) {
  const int64_t begin = part * launch.split.length, end = begin + launch.split.length;
  return {begin, end < params.layout.positions ? end : params.layout.positions};
}

// One block sums one part of the positions of one channel. Writes
// parts[part][kMomentRows][channel].
template <class T, int kVector>
__global__ void __launch_bounds__(kBlockThreads)
    channel_moments_rows(ChannelMomentsParams params, ChannelMomentsLaunch launch, double* parts) {
  using Acc = Accumulator<T>;
  constexpr int kLoads = kMomentLoads, kStep = kBlockThreads * kVector;
  const ChannelDotLayout& layout = params.layout;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const DivMod task = div_mod(block, launch.tasks);
    const T* x = static_cast<const T*>(params.x) + task.remainder * layout.channel.x_stride;
    const PositionRange range = positions_of_part(params, launch, task.quotient);
    ThreadMoments<Acc> thread;
    for (int64_t base = range.begin + threadIdx.x * kVector; base < range.end;
         base += kStep * kLoads) {
      Packed<T, kVector> values[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const int64_t position = base + load * kStep;
        if (position < range.end)
          values[load] = load_packed<T, kVector>(x + position_offset(layout, position).x);
      }
      TurnMoments<Acc> turn;
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        if (base + load * kStep >= range.end) continue;
#pragma unroll
        for (int v = 0; v < kVector; ++v) turn.add(widen(values[load].element[v]));
      }
      thread.add(turn);
    }
    const Moments moments = column_moments(thread.moments(), 1);
    if (threadIdx.x == 0)
      moments.write(parts + task.quotient * kMomentRows * layout.channel.size, layout.channel.size,
                    task.remainder);
    __syncthreads();
  }
}

// A block's threads stand channel_threads wide along the channels, the others along the positions
// of one part. Writes parts[part][kMomentRows][channel].
template <class T, int kVector>
__global__ void __launch_bounds__(kBlockThreads)
    channel_moments_channels_last(ChannelMomentsParams params, ChannelMomentsLaunch launch,
                                  double* parts) {
  using Acc = Accumulator<T>;
  constexpr int kLoads = kMomentLoads;
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, stride = layout.position[0].x_stride;
  const int width = launch.channel_threads, height = kBlockThreads / width;
  const int column = threadIdx.x % width, line = threadIdx.x / width;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const DivMod task = div_mod(block, launch.tasks);
    const int64_t channel = (task.remainder * width + column) * kVector;
    PositionRange range = positions_of_part(params, launch, task.quotient);
    if (channel >= channels) range.end = range.begin;
    const T* x = static_cast<const T*>(params.x) + channel;
    ThreadMoments<Acc> thread[kVector];
    for (int64_t base = range.begin + line; base < range.end; base += height * kLoads) {
      Packed<T, kVector> values[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const int64_t position = base + load * height;
        if (position < range.end) values[load] = load_packed<T, kVector>(x + position * stride);
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        TurnMoments<Acc> turn;
#pragma unroll
        for (int load = 0; load < kLoads; ++load)
          if (base + load * height < range.end) turn.add(widen(values[load].element[v]));
        thread[v].add(turn);
      }
    }
    double* out = parts + task.quotient * kMomentRows * channels;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const Moments moments = column_moments(thread[v].moments(), width);
      if (line == 0 && channel < channels) moments.write(out, channels, channel + v);
      __syncthreads();
    }
  }
}

// Adds the parts of every channel, in their order, and writes [kMomentRows, channels].
template <class = void>
__global__ void __launch_bounds__(kBlockThreads)
    finish_channel_moments(const double* parts, int64_t count, int64_t channels, double* out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t c = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x; c < channels;
       c += stride) {
    Moments moments;
    for (int64_t part = 0; part < count; ++part)
      moments.add(Moments::read(parts + part * kMomentRows * channels, channels, c));
    moments.finished().write(out, channels, c);
  }
}

// Calls use(kernel) with the kernel for this launch. Host code, shared by the launcher and the
// emulator's tests.
template <class T, class Use>
void with_channel_moments_kernel(const ChannelMomentsLaunch& launch, Use use) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  const bool wide = launch.vector == kWide;
  if (launch.channel_threads == 0)
    return wide ? use(channel_moments_rows<T, kWide>) : use(channel_moments_rows<T, 1>);
  return wide ? use(channel_moments_channels_last<T, kWide>)
              : use(channel_moments_channels_last<T, 1>);
}

}  // namespace ccp
