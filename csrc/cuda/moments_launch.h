// Launch arithmetic of channel_moments; see launch.h.
#pragma once

#include "csrc/cuda/launch.h"

namespace ccp {

constexpr int kMomentLoads = 4;  // in flight per thread

struct ChannelMomentsLaunch {
  int vector;           // elements per load: 1, or as many as kVectorBytes hold
  int channel_threads;  // channels-last kernel: threads side by side along the channels; else 0
  int64_t tasks;        // channels, or tiles of channels
  Split split;          // of the positions
  int64_t blocks;       // of work: tasks times parts
  unsigned grid;
};

// Runs of positions are read in vectors wherever the innermost dimension allows it.
inline int moments_vector_width(const ChannelMomentsParams& params, int element_size) {
  const ChannelDotLayout& layout = params.layout;
  const int width = kVectorBytes / element_size;
  const bool by_channel = layout.kind == LayoutKind::kChannelsLast;
  const Dim& inner = by_channel ? layout.channel : layout.innermost();
  const Dim& outer = by_channel ? layout.position[0] : layout.channel;
  bool whole = reinterpret_cast<uintptr_t>(params.x) % kVectorBytes == 0 && unit_stride(inner) &&
               inner.size % width == 0 && strides_divisible(outer, width);
  for (int d = 0; d < layout.position_dims - 1; ++d)
    whole = whole && strides_divisible(layout.position[d], width);
  return whole ? width : 1;
}

inline ChannelMomentsLaunch plan_channel_moments(const ChannelMomentsParams& params,
                                                 int element_size) {
  const ChannelDotLayout& layout = params.layout;
  const int vector = moments_vector_width(params, element_size);
  ChannelMomentsLaunch launch{};
  launch.vector = vector;
  if (layout.kind == LayoutKind::kChannelsLast) {
    const int64_t loads = ceil_div(layout.channel.size, vector);
    launch.channel_threads = static_cast<int>(std::min<int64_t>(next_power_of_two(loads), 32));
    launch.tasks = ceil_div(loads, launch.channel_threads);
    const int64_t lines = kBlockThreads / launch.channel_threads;
    launch.split = split_work(layout.positions, lines * kMomentLoads, 1, launch.tasks);
  } else {
    launch.tasks = layout.channel.size;
    launch.split =
        split_work(layout.positions, kBlockThreads * vector * kMomentLoads, vector, launch.tasks);
  }
  launch.blocks = launch.tasks * launch.split.count;
  launch.grid = grid_size(launch.blocks);
  return launch;
}

}  // namespace ccp
