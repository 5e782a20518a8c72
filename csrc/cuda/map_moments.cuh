// The moments of every map, which map_similarity needs before it compares them.
#pragma once

#include "csrc/cuda/channel_dot.cuh"
#include "csrc/cuda/map_launch.h"
#include "csrc/cuda/reduce.cuh"
#include "csrc/cuda/vec.cuh"
#include "csrc/narrow.h"

namespace ccp {

// One of the two tensors, with its strides.
struct MapSide {
  const void* data;
  bool is_x;

  __device__ __forceinline__ int64_t stride(const Dim& dim) const {
    return is_x ? dim.x_stride : dim.g_stride;
  }
  __device__ __forceinline__ int64_t position(const ChannelDotLayout& layout, int64_t index) const {
    const Offset offset = position_offset(layout, index);
    return is_x ? offset.x : offset.g;
  }
};

CCP_HD MapSide left_side(const MapSimilarityParams& params) { return {params.maps.x, true}; }
CCP_HD MapSide right_side(const MapSimilarityParams& params) { return {params.maps.g, false}; }

// What to subtract from a map before its products are summed. float32 maps are centred. In 16 bits
// the differences would be rounded, and where the mean does not dominate nothing is subtracted: the
// products themselves are exact. Where it does, most values lie within a factor of two of it, and
// their differences from it are exact.
template <class T>
__device__ __forceinline__ float map_shift(float mean, float variance) {
  constexpr float kDominant = 16;  // mean^2 / variance
  if (sizeof(T) == 2 && !(mean * mean > kDominant * variance)) return 0;
  return widen(narrow<T>(mean));
}

// `mean` is rounded; `residual` and `square` are the sums of the differences from it and of their
// squares, which correct for that (Chan, Golub and LeVeque, 1983).
template <class T>
__device__ __forceinline__ MapTerms<float> make_map_terms(const MapSimilarityParams& params,
                                                          float mean, float residual,
                                                          float square) {
  const float per_position = 1.0f / static_cast<float>(params.maps.layout.positions);
  const float scale = static_cast<float>(params.scale);
  residual *= per_position;
  const float variance = at_least(0.0f, square * per_position - residual * residual);
  const float shift = map_shift<T>(mean, variance);
  const float offset = (mean - shift + residual) * scale;
  const float needed_mean = map_mean(params.kind, shift * scale, offset);
  return {shift, offset, needed_mean,
          map_spread(params.kind, needed_mean, variance * scale * scale)};
}

// Calls visit(value) with each value of a map that belongs to this lane of kThreads. The map is
// read in units, whole ones unless they reach beyond the tensor; strided maps by their elements.
template <int kUnit, int kThreads, class T, class Visit>
__device__ __forceinline__ void for_each_value(const T* map, MapSide side, bool whole,
                                               const ChannelDotLayout& layout, Visit visit) {
  const int64_t first = threadIdx.x % kThreads * kUnit;
  if constexpr (kUnit == 1) {
#pragma unroll 1
    for (int64_t p = first; p < layout.positions; p += kThreads)
      visit(widen(map[side.position(layout, p)]));
  } else {
    const int64_t shift = unit_remainder<kUnit>(map), end = layout.positions + shift;
#pragma unroll 4
    for (int64_t p = first; p < end; p += kThreads * kUnit) {
      const unsigned inside = bits_within<kUnit>(p, shift, end);
      const T* unit = map - shift + p;
      Packed<T, kUnit> values{};
      if (whole) {
        values = load_packed<T, kUnit>(unit);
      } else {
#pragma unroll
        for (int v = 0; v < kUnit; ++v)
          if (inside >> v & 1) values.element[v] = unit[v];
      }
#pragma unroll
      for (int v = 0; v < kUnit; ++v)
        if (inside >> v & 1) visit(widened(values, v));
    }
  }
}

// Blocks on a multiprocessor. Left to itself the compiler aims higher on some GPUs, and spills.
constexpr int kRowMomentBlocks = 5;
constexpr int kChannelsLastMomentBlocks = 3;

// kThreads a map. The mean is found relative to the map's first value, so that a constant map has
// exactly that mean and no variance.
template <class T, int kUnit, int kThreads>
__global__ void __launch_bounds__(kBlockThreads, kRowMomentBlocks)
    map_moments_rows(MapSimilarityParams params, MapMomentsLaunch launch, MapSide side,
                     MapTerms<float>* terms) {
  const ChannelDotLayout& layout = params.maps.layout;
  const int64_t maps = layout.sample.size * layout.channel.size;
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const int64_t index = block * (kBlockThreads / kThreads) + threadIdx.x / kThreads;
    // Whole warps take part in the sums: those without a map read the last one.
    const DivMod row = div_mod(index < maps ? index : maps - 1, layout.channel.size);
    const int64_t start =
        row.quotient * side.stride(layout.sample) + row.remainder * side.stride(layout.channel);
    const bool whole = side.is_x ? launch.whole_x.contain(start) : launch.whole_g.contain(start);
    const T* map = static_cast<const T*>(side.data) + start;
    const float origin = widen(*map);
    float difference = 0, residual = 0, square = 0;
    for_each_value<kUnit, kThreads>(map, side, whole, layout,
                                    [&](float value) { difference += value - origin; });
    const float mean = origin + warp_group_sum<kThreads>(difference) / layout.positions;
    for_each_value<kUnit, kThreads>(map, side, whole, layout, [&](float value) {
      residual += value - mean;
      square += (value - mean) * (value - mean);
    });
    residual = warp_group_sum<kThreads>(residual);
    square = warp_group_sum<kThreads>(square);
    if (threadIdx.x % kThreads == 0 && index < maps)
      terms[index] = make_map_terms<T>(params, mean, residual, square);
  }
}

// The sums over the threads of one column, width apart, in all of them.
template <int kVector>
__device__ __forceinline__ void column_sums(float (&sums)[kVector], int width) {
  __shared__ float shared[kVector][kBlockThreads];
  for (int v = 0; v < kVector; ++v) shared[v][threadIdx.x] = sums[v];
  __syncthreads();
  for (int half = kBlockThreads / 2; half >= width; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half)
      for (int v = 0; v < kVector; ++v) shared[v][threadIdx.x] += shared[v][threadIdx.x + half];
    __syncthreads();
  }
  for (int v = 0; v < kVector; ++v) sums[v] = shared[v][threadIdx.x % width];
  __syncthreads();
}

// A block's threads stand channel_threads wide along the channels of one sample, the others along
// the positions.
template <class T, int kVector>
__global__ void __launch_bounds__(kBlockThreads, kChannelsLastMomentBlocks)
    map_moments_channels_last(MapSimilarityParams params, MapMomentsLaunch launch, MapSide side,
                              MapTerms<float>* terms) {
  const ChannelDotLayout& layout = params.maps.layout;
  const int64_t channels = layout.channel.size, stride = side.stride(layout.position[0]);
  const int width = launch.channel_threads, height = kBlockThreads / width;
  const int column = threadIdx.x % width, line = threadIdx.x / width;
  const int64_t tiles = ceil_div(channels, static_cast<int64_t>(width) * kVector);
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const DivMod task = div_mod(block, tiles);
    const int64_t channel = (task.remainder * width + column) * kVector;
    const int64_t positions = channel < channels ? layout.positions : 0;
    const T* maps =
        static_cast<const T*>(side.data) + task.quotient * side.stride(layout.sample) + channel;
    Packed<T, kVector> origin{};
    if (positions > 0) origin = load_packed<T, kVector>(maps);
    float mean[kVector] = {}, residual[kVector] = {}, square[kVector] = {};
#pragma unroll 4
    for (int64_t p = line; p < positions; p += height) {
      const auto values = load_packed<T, kVector>(maps + p * stride);
      for (int v = 0; v < kVector; ++v)
        mean[v] += widen(values.element[v]) - widen(origin.element[v]);
    }
    column_sums(mean, width);
    for (int v = 0; v < kVector; ++v)
      mean[v] = widen(origin.element[v]) + mean[v] / layout.positions;
#pragma unroll 4
    for (int64_t p = line; p < positions; p += height) {
      const auto values = load_packed<T, kVector>(maps + p * stride);
      for (int v = 0; v < kVector; ++v) {
        const float centred = widen(values.element[v]) - mean[v];
        residual[v] += centred;
        square[v] += centred * centred;
      }
    }
    column_sums(residual, width);
    column_sums(square, width);
    if (line == 0 && positions > 0)
      for (int v = 0; v < kVector; ++v)
        terms[task.quotient * channels + channel + v] =
            make_map_terms<T>(params, mean[v], residual[v], square[v]);
  }
}

// Calls use(kernel) with the kernel for this layout. Host code, shared by the launcher and the
// emulator's tests.
template <class T, class Use>
void with_map_moments_kernel(LayoutKind kind, const MapMomentsLaunch& launch, Use use) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  const bool wide = launch.vector == kWide;
  switch (kind) {
    case LayoutKind::kRows:
      return launch.map_threads == 8 ? use(map_moments_rows<T, kWide, 8>)
                                     : use(map_moments_rows<T, kWide, 32>);
    case LayoutKind::kChannelsLast:
      return wide ? use(map_moments_channels_last<T, kWide>) : use(map_moments_channels_last<T, 1>);
    case LayoutKind::kStrided:
      return use(map_moments_rows<T, 1, 32>);
  }
}

}  // namespace ccp
