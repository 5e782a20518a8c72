// Launch arithmetic: which kernel variant, how many blocks, how the work is split. Pure functions
// of shapes, strides and alignment, so that they are tested without a GPU and two runs are split
// alike.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/math.h"
#include "csrc/params.h"

namespace ccp {

constexpr int kBlockThreads = 256;
constexpr int kVectorBytes = 16;  // the widest load
constexpr int64_t kMaxGrid = 0x7fffffff;
// Eight blocks on each of 132 multiprocessors. Fixed, so that every GPU sums in the same order.
constexpr int64_t kTargetBlocks = 8 * 132;

struct Split {
  int64_t count;
  int64_t length;  // of every part but the last, a multiple of the granule
};

// Splits `length` items so that `blocks` blocks become about kTargetBlocks, each part no shorter
// than `minimum`; both `minimum` and the parts are multiples of `granule`.
inline Split split_work(int64_t length, int64_t minimum, int64_t granule, int64_t blocks) {
  const int64_t wanted = ceil_div(kTargetBlocks, std::max<int64_t>(blocks, 1));
  const int64_t possible = std::max<int64_t>(length / minimum, 1);
  const int64_t part = ceil_div(length, std::min(wanted, possible));
  const int64_t rounded = std::max<int64_t>(ceil_div(part, granule) * granule, granule);
  return {std::max<int64_t>(ceil_div(length, rounded), 1), rounded};
}

inline unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>(std::min(std::max<int64_t>(blocks, 1), kMaxGrid));
}

inline int64_t next_power_of_two(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

struct ChannelDotLaunch {
  int vector;           // elements per load: 1, or as many as kVectorBytes hold
  int threads_per_row;  // row kernel: 8, 32 or kBlockThreads
  int channel_threads;  // channels-last kernel: threads side by side along the channels
  Split split;          // of the positions
  int64_t blocks;       // blocks of work; each thread block takes every gridDim.x-th
  unsigned grid;
};

inline bool strides_divisible(const Dim& dim, int64_t by) {
  return dim.x_stride % by == 0 && dim.g_stride % by == 0;
}

// Loads in flight per thread and tensor.
CCP_HD constexpr int unrolled_loads(int vector) { return vector == 1 ? 8 : 4; }

inline int vector_width(const ChannelDotParams& params, int element_size) {
  const ChannelDotLayout& layout = params.layout;
  const int width = kVectorBytes / element_size;
  const bool aligned = reinterpret_cast<uintptr_t>(params.x) % kVectorBytes == 0 &&
                       reinterpret_cast<uintptr_t>(params.g) % kVectorBytes == 0;
  if (!aligned || !strides_divisible(layout.sample, width)) return 1;
  switch (layout.kind) {
    case LayoutKind::kRows:
      return layout.positions % width == 0 && strides_divisible(layout.channel, width) ? width : 1;
    case LayoutKind::kChannelsLast:
      return layout.channel.size % width == 0 && strides_divisible(layout.position[0], width)
                 ? width
                 : 1;
    default:
      return 1;
  }
}

inline ChannelDotLaunch plan_rows(const ChannelDotParams& params, int vector) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t rows = layout.sample.size * layout.channel.size;
  const int64_t loads = ceil_div(layout.positions, vector);
  const int threads = loads <= 64 ? 8 : loads <= 1024 ? 32 : kBlockThreads;
  const int64_t rows_per_block = kBlockThreads / threads;
  const int64_t minimum = static_cast<int64_t>(threads) * vector * unrolled_loads(vector);
  const Split split = split_work(layout.positions, minimum, vector, ceil_div(rows, rows_per_block));
  const int64_t blocks = ceil_div(rows * split.count, rows_per_block);
  return {vector, threads, 0, split, blocks, grid_size(blocks)};
}

inline ChannelDotLaunch plan_channels_last(const ChannelDotParams& params, int vector) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channel_loads = ceil_div(layout.channel.size, vector);
  // A warp along the channels reads whole cache lines; with few positions, the more.
  const int64_t widest = layout.positions >= 8 ? 32 : kBlockThreads;
  const int64_t side = std::min(next_power_of_two(channel_loads), widest);
  const int64_t minimum = kBlockThreads / side * unrolled_loads(vector);
  const int64_t tasks = layout.sample.size * ceil_div(channel_loads, side);
  const Split split = split_work(layout.positions, minimum, 1, tasks);
  const int64_t blocks = tasks * split.count;
  return {vector, 0, static_cast<int>(side), split, blocks, grid_size(blocks)};
}

inline ChannelDotLaunch plan_channel_dot(const ChannelDotParams& params, int element_size) {
  const int vector = vector_width(params, element_size);
  return params.layout.kind == LayoutKind::kChannelsLast ? plan_channels_last(params, vector)
                                                         : plan_rows(params, vector);
}

}  // namespace ccp
