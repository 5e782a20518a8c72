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
    for (int v = 0; v < kVector; ++v) sums[v] += widened(xs[load], v) * widened(gs[load], v);
}

// Blocks on a multiprocessor. Left to itself the compiler aims higher on some GPUs, and spills.
template <class T>
constexpr int kRowBlocks = sizeof(T) == 8 ? 2 : 3;
constexpr int kChannelsLastBlocks = 2;

template <class T_, int kUnit_, int kThreads_, int kRows_, int kLoads_>
struct RowTraits {
  using T = T_;
  static constexpr int kUnit = kUnit_;        // elements per load
  static constexpr int kThreads = kThreads_;  // a group, which reads a row
  static constexpr int kRows = kRows_;        // that a group reads at once
  static constexpr int kLoads = kLoads_;      // of each of those rows at once
  static constexpr int kGroups = kBlockThreads / kThreads;
  static constexpr int kStep = kThreads * kUnit;
  static constexpr int kSums = kUnit > kRows ? kUnit / kRows : 1;  // of a thread, for each row
};

// One thread's loads of one turn.
template <class Traits>
struct RowLoads {
  using T = typename Traits::T;
  static constexpr int kUnit = Traits::kUnit;
  Packed<T, kUnit> x[Traits::kRows][Traits::kLoads], g[Traits::kRows][Traits::kLoads];
  unsigned inside[Traits::kRows][Traits::kLoads];  // which elements belong to the sum

  __device__ __forceinline__ void load(int r, int l, unsigned bits, const T* x_unit,
                                       const T* g_unit) {
    inside[r][l] = bits;
    if (bits == 0) return;
    x[r][l] = load_packed<T, kUnit>(x_unit);
    g[r][l] = load_packed<T, kUnit>(g_unit);
  }

  __device__ __forceinline__ void add_products(int r, int l,
                                               Accumulator<T> (&sums)[Traits::kSums]) const {
#pragma unroll
    for (int v = 0; v < kUnit; ++v)
      if (inside[r][l] >> v & 1)
        sums[v % Traits::kSums] += widened(x[r][l], v) * widened(g[r][l], v);
  }
};

__device__ __forceinline__ Offset row_offset(const RowLaunch& launch, int64_t row) {
  const DivMod index = div_mod(row, launch.inner.size);
  return offset_in(launch.outer, index.quotient) + offset_in(launch.inner, index.remainder);
}

// Part `part` of the rows of a group, kGroups apart: `turns` times kRows rows from `row` on,
// without those from row `end` on. Writes out[row].
template <class Traits, class Acc>
__device__ __forceinline__ void sum_rows(const ChannelDotParams& params,
                                         const ChannelDotLaunch& launch, int64_t part, int64_t row,
                                         int64_t end, Acc* out) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kLoads = Traits::kLoads, kUnit = Traits::kUnit;
  constexpr int kGroups = Traits::kGroups, kTurn = kRows * kGroups;
  const int lane = threadIdx.x % Traits::kThreads;
  const int64_t first = part * launch.split.length, left = params.layout.positions - first;
  const int length = static_cast<int>(launch.split.length);
  const Offset start = row_offset(launch.row, row);
  const Offset step = offset_in(launch.row.inner, kGroups);
  const T* x = static_cast<const T*>(params.x) + start.x;
  const T* g = static_cast<const T*>(params.g) + start.g;
  // All rows of the group lie alike in their units, since they are multiples of 16 bytes apart.
  const int shift = unit_remainder<kUnit>(x);
  const int range_begin = first == 0 ? shift : 0;
  const int range_end = left + shift < length ? static_cast<int>(left) + shift : length;
  if (kUnit > 1) x += first - shift, g += first - shift;
  out += row;
  // Below 1 if there are none: whole warps take part in the sums.
  int rows = static_cast<int>(end - row < kMostTurns * kTurn ? end - row : kMostTurns * kTurn);
  for (int turn = 0; turn < launch.row.turns; ++turn) {
    Acc sums[kRows][Traits::kSums] = {};
    for (int base = lane * kUnit; base < range_end; base += Traits::kStep * kLoads) {
      RowLoads<Traits> loads;
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int position = base + l * Traits::kStep;
        const unsigned inside = bits_within<kUnit>(position, range_begin, range_end);
        const Offset in_row = kUnit == 1 ? position_offset(params.layout, first + position)
                                         : Offset{position, position};
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          loads.load(r, l, r * kGroups < rows ? inside : 0, x + in_row.x + r * step.x,
                     g + in_row.g + r * step.g);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int l = 0; l < kLoads; ++l) loads.add_products(r, l, sums[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int s = 1; s < Traits::kSums; ++s) sums[r][0] += sums[r][s];
      const Acc sum = group_sum<Traits::kThreads>(sums[r][0]);
      if (lane == 0 && r * kGroups < rows) out[r * kGroups] = sum;
    }
    out += kTurn;
    rows -= kTurn;
    x += kRows * step.x;
    g += kRows * step.g;
  }
}

// Part `part` of the rows that share a unit with what lies beyond x and g, element by element.
// Writes out[row].
template <class Traits, class Acc>
__device__ __forceinline__ void sum_end_rows(const ChannelDotParams& params,
                                             const ChannelDotLaunch& launch, int64_t part,
                                             Acc* out) {
  using T = typename Traits::T;
  const int lane = threadIdx.x % Traits::kThreads, group = threadIdx.x / Traits::kThreads;
  const int64_t first = part * launch.split.length, left = params.layout.positions - first;
  const int64_t length = left < launch.split.length ? left : launch.split.length;
  const int64_t before = launch.row.whole_begin, whole = launch.row.whole_end - before;
  const int64_t count = launch.row.rows() - whole;
  for (int64_t i = group; i - group < count; i += Traits::kGroups) {
    const int64_t row = i < before ? i : i + whole;
    const Offset start = row_offset(launch.row, row);
    const T* x = static_cast<const T*>(params.x) + start.x + first;
    const T* g = static_cast<const T*>(params.g) + start.g + first;
    Acc sum = 0;
#pragma unroll 4
    for (int64_t p = i < count ? lane : length; p < length; p += Traits::kThreads)
      sum += widen(x[p]) * widen(g[p]);
    sum = group_sum<Traits::kThreads>(sum);
    if (lane == 0 && i < count) out[row] = sum;
  }
}

// Writes sums[part, sample, channel]. The first block of a part also sums the rows at the ends of x
// and g, where a unit holds what lies beyond them.
template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, kRowBlocks<typename Traits::T>)
    channel_dot_rows(ChannelDotParams params, ChannelDotLaunch launch, void* sums) {
  using Acc = Accumulator<typename Traits::T>;
  const RowLaunch& row = launch.row;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const DivMod task = div_mod(block, row.blocks);
    Acc* out = static_cast<Acc*>(sums) + task.quotient * row.rows();
    if (Traits::kUnit > 1 && task.remainder == 0)
      sum_end_rows<Traits>(params, launch, task.quotient, out);
    const int64_t rows = static_cast<int64_t>(row.turns) * Traits::kRows * Traits::kGroups;
    const int group = threadIdx.x / Traits::kThreads;
    sum_rows<Traits>(params, launch, task.quotient, row.whole_begin + task.remainder * rows + group,
                     row.whole_end, out);
  }
}

template <class T_, int kVector_>
struct ChannelsLastTraits {
  using T = T_;
  static constexpr int kVector = kVector_;
};

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

// Calls use(kernel) with the kernel for this layout and launch. Host code, shared by the launcher
// and the emulator's tests.
template <class T, class Use>
void with_channel_dot_kernel(LayoutKind kind, const ChannelDotLaunch& launch, Use use) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  const bool wide = launch.vector == kWide;
  if (kind == LayoutKind::kChannelsLast)
    return wide ? use(channel_dot_channels_last<ChannelsLastTraits<T, kWide>>)
                : use(channel_dot_channels_last<ChannelsLastTraits<T, 1>>);
  const RowLaunch& row = launch.row;
  if (row.at_once == 4) return use(channel_dot_rows<RowTraits<T, kWide, 8, 4, 1>>);
  if (row.at_once == 2) return use(channel_dot_rows<RowTraits<T, kWide, 8, 2, 2>>);
  if (row.threads == 8)
    return wide ? use(channel_dot_rows<RowTraits<T, kWide, 8, 1, 4>>)
                : use(channel_dot_rows<RowTraits<T, 1, 8, 1, 8>>);
  if (row.threads == 32)
    return wide ? use(channel_dot_rows<RowTraits<T, kWide, 32, 1, 4>>)
                : use(channel_dot_rows<RowTraits<T, 1, 32, 1, 8>>);
  return wide ? use(channel_dot_rows<RowTraits<T, kWide, kBlockThreads, 1, 4>>)
              : use(channel_dot_rows<RowTraits<T, 1, kBlockThreads, 1, 8>>);
}

template <int kThreads, class Acc>
__device__ __forceinline__ void sum_parts_by(const Acc* partial, int64_t parts, int64_t count,
                                             Acc* out) {
  const int lane = threadIdx.x % kThreads;
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kBlockThreads) + threadIdx.x;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * kBlockThreads / kThreads;
  for (int64_t i = thread / kThreads; i < count; i += groups) {
    Acc sum = 0;
#pragma unroll 4
    for (int64_t part = lane; part < parts; part += kThreads) sum += partial[part * count + i];
    sum = group_sum<kThreads>(sum);
    if (lane == 0) out[i] = sum;
  }
}

// out[i] = sum over parts of partial[part, i], in an order that follows from their number.
template <class Acc>
__global__ void __launch_bounds__(kBlockThreads)
    sum_parts(const Acc* partial, int64_t parts, int64_t count, Acc* out) {
  if (part_threads(parts) == 1)
    sum_parts_by<1>(partial, parts, count, out);
  else
    sum_parts_by<32>(partial, parts, count, out);
}

}  // namespace ccp
