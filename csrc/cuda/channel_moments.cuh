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

  // Without a branch: what is not `inside` adds zero to the sums and NaN, which they pass over, to
  // the others.
  __device__ __forceinline__ void add_if(bool inside, Acc value) {
    const Acc added = inside ? value : 0, seen = inside ? value : static_cast<Acc>(NAN);
    sum += added;
    square_sum += added * added;
    zeros += seen == 0;
    minimum = fmin(minimum, seen);
    maximum = fmax(maximum, seen);
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

// One thread's reading of the rows of one channel, chunk after chunk.
template <class T, int kUnit, int kThreads>
struct MomentReader {
  const ChannelDotLayout& layout;
  const MomentRows& rows;
  const T* x;              // the tensor's
  int64_t channel_offset;  // elements
  int64_t row, chunk;      // the next to read

  // Reads a unit; returns which of its elements are to be added. Those of a unit that reaches
  // beyond x are added here.
  __device__ __forceinline__ unsigned read_next(Packed<T, kUnit>& values,
                                                TurnMoments<Accumulator<T>>& turn) {
    const int64_t start = channel_offset + moment_row_offset(layout, row);
    const int64_t shift = kUnit == 1 ? 0 : unit_remainder<kUnit>(x + start);
    const int64_t position = (chunk * kThreads + threadIdx.x % kThreads) * kUnit;
    if (++chunk == rows.chunks) {
      chunk = 0;
      ++row;
    }
    const unsigned inside = bits_within<kUnit>(position, shift, shift + rows.length);
    if (inside == 0) return 0;
    if constexpr (kUnit == 1) {
      values = load_packed<T, kUnit>(x + start + position * rows.stride);
      return inside;
    } else {
      const T* unit = x + start - shift + position;
      if (rows.whole.contain(start)) {
        values = load_packed<T, kUnit>(unit);
        return inside;
      }
#pragma unroll 1
      for (int v = 0; v < kUnit; ++v)
        if (inside >> v & 1) turn.add(widen(unit[v]));
      return 0;
    }
  }
};

// A group of kThreads sums one part of the chunks of one channel; neighbouring groups take
// neighbouring channels. Writes parts[part][kMomentRows][channel].
template <class T, int kUnit, int kThreads>
__global__ void __launch_bounds__(kBlockThreads, kRowMomentsBlocks<T>)
    channel_moments_rows(ChannelMomentsParams params, ChannelMomentsLaunch launch, double* parts) {
  using Acc = Accumulator<T>;
  constexpr int kLoads = kMomentLoads, kGroups = kBlockThreads / kThreads;
  const int64_t channels = params.layout.channel.size;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const DivMod task = div_mod(block, launch.tasks);
    const int64_t channel = task.remainder * kGroups + threadIdx.x / kThreads;
    const PartRange range(launch, task.quotient, launch.rows.all_chunks);
    const DivMod first = div_mod(range.begin, launch.rows.chunks);
    MomentReader<T, kUnit, kThreads> reader{params.layout,
                                            launch.rows,
                                            static_cast<const T*>(params.x),
                                            channel * params.layout.channel.x_stride,
                                            first.quotient,
                                            first.remainder};
    ThreadMoments<Acc> thread;
    const int64_t end = channel < channels ? range.end : range.begin;
    for (int64_t base = range.begin; base < end; base += kLoads) {
      Packed<T, kUnit> values[kLoads] = {};
      unsigned inside[kLoads];
      TurnMoments<Acc> turn;
#pragma unroll
      for (int load = 0; load < kLoads; ++load)
        inside[load] = base + load < end ? reader.read_next(values[load], turn) : 0;
#pragma unroll
      for (int load = 0; load < kLoads; ++load)
#pragma unroll
        for (int v = 0; v < kUnit; ++v)
          turn.add_if(inside[load] >> v & 1, widened(values[load], v));
      thread.add(turn);
    }
    const Moments moments = group_moments<kThreads>(thread.moments());
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
  using Acc = Accumulator<T>;
  constexpr int kLoads = kMomentLoads;
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
          if (base + load * height < range.end) turn.add(widened(values[load], v));
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
