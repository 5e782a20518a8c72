// Launch arithmetic of channel_moments; see launch.h.
#pragma once

#include "csrc/cuda/launch.h"

namespace ccp {

constexpr int kMomentLoads = 4;  // in flight per thread

// A channel's rows are the runs of its innermost dimension. A group of threads reads them in units
// of 16 bytes from a boundary of 16 bytes on, wherever they begin and end; a chunk is as many units
// of a row as the group has threads.
struct MomentRows {
  int threads;  // of a group: 8 or 32
  int64_t length, stride;
  int64_t chunks;      // of a row
  int64_t all_chunks;  // of all rows of a channel
  WholeRows whole;     // of single units
  // Rows of one chunk each, `step` elements apart, that all begin equally far behind a boundary.
  bool alike;
  int64_t step;
};

struct ChannelMomentsLaunch {
  int vector;           // elements per load: 1, or as many as kVectorBytes hold
  int channel_threads;  // channels-last kernel: threads side by side along the channels; else 0
  MomentRows rows;      // row kernel
  int64_t tasks;        // tiles of channels
  Split split;          // of the positions, or of the chunks
  int64_t blocks;       // of work: tasks times parts
  unsigned grid;
};

inline ChannelMomentsLaunch finish_plan(ChannelMomentsLaunch launch) {
  launch.blocks = launch.tasks * launch.split.count;
  launch.grid = grid_size(launch.blocks);
  return launch;
}

inline ChannelMomentsLaunch plan_moments_channels_last(const ChannelMomentsParams& params,
                                                       int element_size) {
  const ChannelDotLayout& layout = params.layout;
  const int width = kVectorBytes / element_size;
  const bool wide = reinterpret_cast<uintptr_t>(params.x) % kVectorBytes == 0 &&
                    layout.channel.size % width == 0 &&
                    strides_divisible(layout.position[0], width);
  ChannelMomentsLaunch launch{};
  launch.vector = wide ? width : 1;
  const int64_t loads = ceil_div(layout.channel.size, launch.vector);
  launch.channel_threads = static_cast<int>(std::min<int64_t>(next_power_of_two(loads), 32));
  launch.tasks = ceil_div(loads, launch.channel_threads);
  const int64_t lines = kBlockThreads / launch.channel_threads;
  launch.split = split_work(layout.positions, lines * kMomentLoads, 1, launch.tasks);
  return finish_plan(launch);
}

inline ChannelMomentsLaunch plan_moments_rows(const ChannelMomentsParams& params,
                                              int element_size) {
  const ChannelDotLayout& layout = params.layout;
  const Dim& inner = layout.innermost();
  ChannelMomentsLaunch launch{};
  launch.vector = unit_stride(inner) ? kVectorBytes / element_size : 1;
  const int64_t length = inner.size, unit = launch.vector;
  bool aligned = reinterpret_cast<uintptr_t>(params.x) % kVectorBytes == 0 &&
                 layout.channel.x_stride % unit == 0;
  for (int d = 0; d < layout.position_dims - 1; ++d)
    aligned = aligned && layout.position[d].x_stride % unit == 0;
  const int64_t units = ceil_div(length + (aligned ? 0 : unit - 1), unit);  // at most
  MomentRows& rows = launch.rows;
  rows.threads = units <= 32 ? 8 : 32;
  rows.length = length;
  rows.stride = inner.x_stride;
  rows.chunks = std::max<int64_t>(ceil_div(units, rows.threads), 1);
  rows.all_chunks = length == 0 ? 0 : layout.positions / length * rows.chunks;
  int64_t extent = (layout.channel.size - 1) * layout.channel.x_stride + 1;
  for (int d = 0; d < layout.position_dims; ++d)
    extent += (layout.position[d].size - 1) * layout.position[d].x_stride;
  rows.whole = whole_rows(params.x, extent, unit, unit, element_size);
  rows.step = layout.position_dims == 2 ? layout.position[0].x_stride : 0;
  rows.alike = rows.chunks == 1 && layout.position_dims <= 2 && rows.step % unit == 0;
  const int64_t groups = kBlockThreads / rows.threads;
  launch.tasks = ceil_div(layout.channel.size, groups);
  launch.split = split_work(rows.all_chunks, 4 * kMomentLoads, 1, launch.tasks);
  const int64_t channels = std::clamp<int64_t>(layout.channel.size, 1, groups);
  const int64_t chunk_bytes = std::max<int64_t>(channels * length * element_size / rows.chunks, 1);
  // Fewer chunks than a thread reads at once would be read one after another.
  const int64_t least = std::max<int64_t>(kMomentLoads, ceil_div(kLeastPartBytes, chunk_bytes));
  launch.split =
      fill_multiprocessors(launch.split, rows.all_chunks, least, kMomentLoads, launch.tasks);
  return finish_plan(launch);
}

inline ChannelMomentsLaunch plan_channel_moments(const ChannelMomentsParams& params,
                                                 int element_size) {
  return params.layout.kind == LayoutKind::kChannelsLast
             ? plan_moments_channels_last(params, element_size)
             : plan_moments_rows(params, element_size);
}

}  // namespace ccp
