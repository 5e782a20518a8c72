// The CUDA kernels of channel_dot.
#pragma once

#include "csrc/cuda/div_mod.cuh"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/reduce.cuh"
#include "csrc/cuda/vec.cuh"

namespace ccp {

struct Offset {
  int64_t x, g;
};

__device__ __forceinline__ Offset offset_in(const Dim& dim, int64_t index) {
  return {index * dim.x_stride, index * dim.g_stride};
}

__device__ __forceinline__ Offset operator+(const Offset& a, const Offset& b) {
  return {a.x + b.x, a.g + b.g};
}

__device__ __forceinline__ Offset position_offset(const ChannelDotLayout& layout, int64_t index) {
  Offset offset{0, 0};
  for (int d = layout.position_dims - 1; d > 0; --d) {
    const DivMod split = div_mod(index, layout.position[d].size);
    offset = offset + offset_in(layout.position[d], split.remainder);
    index = split.quotient;
  }
  return offset + offset_in(layout.position[0], index);
}

// sums[v] += the products of the v-th elements of all loads.
template <class T, int kVector, int kLoads>
__device__ __forceinline__ void add_products(const Packed<T, kVector> (&xs)[kLoads],
                                             const Packed<T, kVector> (&gs)[kLoads],
                                             Accumulator<T> (&sums)[kVector]) {
#pragma unroll
  for (int load = 0; load < kLoads; ++load)
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      sums[v] += widen(xs[load].element[v]) * widen(gs[load].element[v]);
}

template <class T_, int kVector_, int kThreadsPerRow_, bool kStrided_>
struct RowTraits {
  using T = T_;
  static constexpr int kVector = kVector_;
  static constexpr int kThreadsPerRow = kThreadsPerRow_;
  static constexpr bool kStrided = kStrided_;
};

// One thread's share of the sum over positions [begin, end) of the row that x and g point to.
template <class Traits, class T>
__device__ __forceinline__ Accumulator<T> partial_row_sum(const T* x, const T* g,
                                                          const ChannelDotLayout& layout,
                                                          int64_t begin, int64_t end) {
  constexpr int kVector = Traits::kVector;
  constexpr int kLoads = unrolled_loads(kVector);
  constexpr int kStep = Traits::kThreadsPerRow * kVector;
  using Vector = Packed<T, kVector>;
  Accumulator<T> sums[kVector] = {};
  const int64_t first = begin + threadIdx.x % Traits::kThreadsPerRow * kVector;
  for (int64_t base = first; base < end; base += kStep * kLoads) {
    Vector xs[kLoads], gs[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t position = base + load * kStep;
      xs[load] = gs[load] = Vector{};
      if (position >= end) continue;
      const Offset offset =
          Traits::kStrided ? position_offset(layout, position) : Offset{position, position};
      xs[load] = load_packed<T, kVector>(x + offset.x);
      gs[load] = load_packed<T, kVector>(g + offset.g);
    }
    add_products(xs, gs, sums);
  }
  for (int v = 1; v < kVector; ++v) sums[0] += sums[v];
  return sums[0];
}

// kThreadsPerRow threads sum one part of the positions of one (sample, channel). Writes
// sums[part, sample, channel].
template <class Traits>
__global__ void __launch_bounds__(kBlockThreads)
    channel_dot_rows(ChannelDotParams params, ChannelDotLaunch launch, void* sums) {
  using T = typename Traits::T;
  constexpr int kThreads = Traits::kThreadsPerRow;
  constexpr int kRowsPerBlock = kBlockThreads / kThreads;
  const ChannelDotLayout& layout = params.layout;
  const int64_t rows = layout.sample.size * layout.channel.size;
  const int64_t tasks = rows * launch.split.count;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const int64_t task = block * kRowsPerBlock + threadIdx.x / kThreads;
    Accumulator<T> sum = 0;
    if (task < tasks) {
      const DivMod part = div_mod(task, rows);
      const DivMod row = div_mod(part.remainder, layout.channel.size);
      const Offset start =
          offset_in(layout.sample, row.quotient) + offset_in(layout.channel, row.remainder);
      const int64_t begin = part.quotient * launch.split.length;
      const int64_t end = begin + launch.split.length;
      sum = partial_row_sum<Traits>(static_cast<const T*>(params.x) + start.x,
                                    static_cast<const T*>(params.g) + start.g, layout, begin,
                                    end < layout.positions ? end : layout.positions);
    }
    if constexpr (kThreads <= 32) {
      sum = warp_group_sum<kThreads>(sum);
    } else {
      sum = block_sum<kThreads>(sum);
    }
    if (task < tasks && threadIdx.x % kThreads == 0) static_cast<Accumulator<T>*>(sums)[task] = sum;
  }
}

template <class T_, int kVector_>
struct ChannelsLastTraits {
  using T = T_;
  static constexpr int kVector = kVector_;
};

// Blocks on a multiprocessor. Left to itself the compiler aims higher on some GPUs, and spills.
constexpr int kChannelsLastBlocks = 2;

// A block's threads stand channel_threads wide along the channels, the others along the positions
// of one part. Writes sums[part, sample, channel].
template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, kChannelsLastBlocks)
    channel_dot_channels_last(ChannelDotParams params, ChannelDotLaunch launch, void* sums) {
  using T = typename Traits::T;
  using Acc = Accumulator<T>;
  constexpr int kVector = Traits::kVector;
  constexpr int kLoads = unrolled_loads(kVector);
  __shared__ Acc shared[kVector][kBlockThreads];
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size, samples = layout.sample.size;
  const int width = launch.channel_threads, height = kBlockThreads / width;
  const int column = threadIdx.x % width, line = threadIdx.x / width;
  const int64_t tiles = ceil_div(channels, static_cast<int64_t>(width) * kVector);
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const DivMod tile = div_mod(block, tiles);
    const DivMod part = div_mod(tile.quotient, samples);
    const int64_t channel = (tile.remainder * width + column) * kVector;
    const int64_t begin = part.quotient * launch.split.length;
    int64_t end = begin + launch.split.length;
    if (end > layout.positions) end = layout.positions;
    if (channel >= channels) end = begin;
    const Offset start = offset_in(layout.sample, part.remainder);
    const T* x = static_cast<const T*>(params.x) + start.x + channel;
    const T* g = static_cast<const T*>(params.g) + start.g + channel;
    Acc acc[kVector] = {};
    for (int64_t base = begin + line; base < end; base += height * kLoads) {
      Packed<T, kVector> xs[kLoads], gs[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const int64_t position = base + load * height;
        xs[load] = gs[load] = Packed<T, kVector>{};
        if (position >= end) continue;
        const Offset offset = offset_in(layout.position[0], position);
        xs[load] = load_packed<T, kVector>(x + offset.x);
        gs[load] = load_packed<T, kVector>(g + offset.g);
      }
      add_products(xs, gs, acc);
    }
    for (int v = 0; v < kVector; ++v) shared[v][threadIdx.x] = acc[v];
    __syncthreads();
    for (int lines = height / 2; lines > 0; lines /= 2) {
      if (line < lines)
        for (int v = 0; v < kVector; ++v)
          shared[v][threadIdx.x] += shared[v][threadIdx.x + lines * width];
      __syncthreads();
    }
    Acc* out = static_cast<Acc*>(sums) + tile.quotient * channels;  // row [part, sample]
    if (line == 0 && channel < channels)
      for (int v = 0; v < kVector; ++v) out[channel + v] = shared[v][threadIdx.x];
    __syncthreads();
  }
}

// Calls use(kernel) with the row kernel for this launch.
template <class T, int kVector, bool kStrided, class Use>
void with_row_kernel(const ChannelDotLaunch& launch, Use use) {
  switch (launch.threads_per_row) {
    case 8:
      return use(channel_dot_rows<RowTraits<T, kVector, 8, kStrided>>);
    case 32:
      return use(channel_dot_rows<RowTraits<T, kVector, 32, kStrided>>);
    default:
      return use(channel_dot_rows<RowTraits<T, kVector, kBlockThreads, kStrided>>);
  }
}

// Calls use(kernel) with the kernel for this layout and launch. Host code, shared by the launcher
// and the emulator's tests.
template <class T, class Use>
void with_channel_dot_kernel(LayoutKind kind, const ChannelDotLaunch& launch, Use use) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  const bool wide = launch.vector == kWide;
  switch (kind) {
    case LayoutKind::kRows:
      return wide ? with_row_kernel<T, kWide, false>(launch, use)
                  : with_row_kernel<T, 1, false>(launch, use);
    case LayoutKind::kChannelsLast:
      return wide ? use(channel_dot_channels_last<ChannelsLastTraits<T, kWide>>)
                  : use(channel_dot_channels_last<ChannelsLastTraits<T, 1>>);
    case LayoutKind::kStrided:
      return with_row_kernel<T, 1, true>(launch, use);
  }
}

// out[i] = sum over parts of partial[part, i], in the order of the parts.
template <class Acc>
__global__ void __launch_bounds__(kBlockThreads)
    sum_parts(const Acc* partial, int64_t parts, int64_t count, Acc* out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlockThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x; i < count;
       i += stride) {
    Acc sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + i];
    out[i] = sum;
  }
}

}  // namespace ccp
