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
// Fixed, so that every GPU sums in the same order.
constexpr int64_t kMultiprocessors = 132;
constexpr int64_t kTargetBlocks = 8 * kMultiprocessors;

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

// What makes a part worth a block, of one tensor: a load for each thread.
constexpr int64_t kLeastPartBytes = kBlockThreads * kVectorBytes;

// The same split, but where its parts leave multiprocessors without a block, shorter ones: about as
// many as there are multiprocessors, no shorter than `least`, multiples of `granule`.
inline Split fill_multiprocessors(const Split& split, int64_t length, int64_t least,
                                  int64_t granule, int64_t blocks) {
  blocks = std::max<int64_t>(blocks, 1);
  if (split.count * blocks >= kMultiprocessors) return split;
  const int64_t wanted = ceil_div(kMultiprocessors, blocks);
  const int64_t part =
      std::max(length / wanted / granule * granule, ceil_div(least, granule) * granule);
  if (part >= split.length) return split;
  return {ceil_div(length, part), part};
}

inline unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>(std::min(std::max<int64_t>(blocks, 1), kMaxGrid));
}

inline int64_t next_power_of_two(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

// The rows of x and g: one for each (sample, channel), in this order. A group of threads reads a
// row in units: 16 bytes from a boundary of 16 bytes on, wherever the row begins and ends.
struct RowLaunch {
  int threads;                     // of a group: 8, 32 or kBlockThreads
  int at_once;                     // rows that a group reads at once
  int turns;                       // how often
  Dim outer, inner;                // samples, channels; one dimension where the strides allow it
  int64_t whole_begin, whole_end;  // rows all of whose units lie within x and g
  int64_t blocks;                  // of one part

  CCP_HD int64_t rows() const { return outer.size * inner.size; }
};

// Where, in elements from the tensor's first, a row must begin for all its units to lie within.
struct WholeRows {
  int64_t first, last;

  CCP_HD bool contain(int64_t start) const { return start >= first && start <= last; }
};

// Of rows of `length` in the `extent` elements from `data` on, in units of `unit`.
inline WholeRows whole_rows(const void* data, int64_t extent, int64_t length, int64_t unit,
                            int element_size) {
  const int64_t shift = reinterpret_cast<uintptr_t>(data) / element_size % unit;
  return {shift == 0 ? 0 : unit - shift, (extent + shift) / unit * unit - shift - length};
}

struct ChannelDotLaunch {
  int vector;           // elements per load: 1, or as many as kVectorBytes hold
  RowLaunch row;        // of the row kernel
  int channel_threads;  // channels-last kernel: threads side by side along the channels
  Split split;          // of the positions
  int64_t blocks;       // blocks of work; each thread block takes every gridDim.x-th
  unsigned grid;
};

inline bool strides_divisible(const Dim& dim, int64_t by) {
  return dim.x_stride % by == 0 && dim.g_stride % by == 0;
}

// Of the positions. What fits in one part stays in one: it needs no second kernel, which would cost
// more than shorter parts save.
inline Split split_positions(int64_t length, int64_t minimum, int64_t least, int64_t granule,
                             int64_t blocks) {
  const Split split = split_work(length, minimum, granule, blocks);
  return split.count == 1 ? split : fill_multiprocessors(split, length, least, granule, blocks);
}

// Neighbouring threads that sum the parts of one output. One thread alone would take longer for
// many parts than the blocks for x and g.
CCP_HD constexpr int part_threads(int64_t parts) { return parts > 32 ? 32 : 1; }

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

// Whether row after row of x and g begins equally far behind a boundary of 16 bytes, and later in
// memory than the one before.
inline bool rows_allow_units(const ChannelDotParams& params, int element_size) {
  const ChannelDotLayout& layout = params.layout;
  const Dim &sample = layout.sample, &channel = layout.channel;
  const auto alike = [&](const Dim& dim) {
    return (dim.x_stride - dim.g_stride) * element_size % kVectorBytes == 0;
  };
  const auto ascending = [&](int64_t sample_stride, int64_t channel_stride) {
    return (channel.size == 1 || channel_stride > 0) &&
           (sample.size == 1 || sample_stride > (channel.size - 1) * channel_stride);
  };
  const uintptr_t x = reinterpret_cast<uintptr_t>(params.x);
  const uintptr_t g = reinterpret_cast<uintptr_t>(params.g);
  return layout.kind == LayoutKind::kRows && (x - g) % kVectorBytes == 0 && alike(sample) &&
         alike(channel) && ascending(sample.x_stride, channel.x_stride) &&
         ascending(sample.g_stride, channel.g_stride);
}

inline void merge_rows(RowLaunch* row) {
  Dim &outer = row->outer, &inner = row->inner;
  if (outer.x_stride != inner.size * inner.x_stride ||
      outer.g_stride != inner.size * inner.g_stride)
    return;
  inner.size *= outer.size;
  outer = Dim{1, 0, 0};
}

// Sets whole_begin and whole_end, for ascending rows of units of `vector` elements.
inline void find_whole_rows(const ChannelDotParams& params, int vector, int element_size,
                            RowLaunch* row) {
  const int64_t rows = row->rows(), positions = params.layout.positions;
  const int64_t shift = reinterpret_cast<uintptr_t>(params.x) % kVectorBytes / element_size;
  const auto whole = [&](int64_t index, bool at_begin) {
    const int64_t i = index / row->inner.size, j = index % row->inner.size;
    const auto inside = [&](int64_t outer_stride, int64_t inner_stride) {
      const int64_t last = (row->outer.size - 1) * outer_stride +
                           (row->inner.size - 1) * inner_stride + positions + shift;
      const int64_t begin = i * outer_stride + j * inner_stride + shift;
      return at_begin ? begin / vector * vector >= shift
                      : ceil_div(begin + positions, vector) * vector <= last;
    };
    return inside(row->outer.x_stride, row->inner.x_stride) &&
           inside(row->outer.g_stride, row->inner.g_stride);
  };
  while (row->whole_begin < rows && !whole(row->whole_begin, true)) ++row->whole_begin;
  row->whole_end = rows;
  while (row->whole_end > row->whole_begin && !whole(row->whole_end - 1, false)) --row->whole_end;
}

constexpr int64_t kLongestRowPart = 1 << 30;  // the kernel counts a part's elements in 32 bits
constexpr int kMostTurns = 8;

inline ChannelDotLaunch plan_rows(const ChannelDotParams& params, int element_size) {
  const ChannelDotLayout& layout = params.layout;
  const bool whole = vector_width(params, element_size) > 1;
  const bool in_units = whole || rows_allow_units(params, element_size);
  const int vector = in_units ? kVectorBytes / element_size : 1;
  const int64_t shift = whole ? 0 : vector - 1;  // of a row's first element in its unit, at most
  const int64_t loads = ceil_div(layout.positions + shift, vector);
  RowLaunch row{};
  row.outer = layout.sample;
  row.inner = layout.channel;
  merge_rows(&row);
  row.whole_end = row.rows();
  if (!whole && in_units) find_whole_rows(params, vector, element_size, &row);
  row.threads = loads <= 64 ? 8 : loads <= 1024 ? 32 : kBlockThreads;
  const bool evenly_apart = in_units && row.outer.size == 1;
  row.at_once = !evenly_apart || loads > 16 ? 1 : loads > 8 ? 2 : 4;
  const int64_t groups = kBlockThreads / row.threads;
  const int64_t turns = ceil_div(row.whole_end - row.whole_begin, groups * row.at_once);
  row.turns = evenly_apart && groups > 1
                  ? static_cast<int>(std::clamp<int64_t>(turns / kTargetBlocks, 1, kMostTurns))
                  : 1;
  row.blocks = std::max<int64_t>(ceil_div(turns, row.turns), 1);
  const int64_t minimum =
      static_cast<int64_t>(row.threads) * vector * unrolled_loads(vector) / row.at_once;
  const int64_t span = layout.positions + shift;
  const int64_t block_rows = std::clamp<int64_t>(row.rows(), 1, groups);
  const int64_t least = ceil_div(kLeastPartBytes, block_rows * element_size);
  Split split = split_positions(span, minimum, least, vector, row.blocks);
  if (split.length > kLongestRowPart) split = {ceil_div(span, kLongestRowPart), kLongestRowPart};
  const int64_t blocks = row.blocks * split.count;
  return {vector, row, 0, split, blocks, grid_size(blocks)};
}

inline ChannelDotLaunch plan_channels_last(const ChannelDotParams& params, int vector,
                                           int element_size) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channel_loads = ceil_div(layout.channel.size, vector);
  // A warp along the channels reads whole cache lines; with few positions, the more.
  const int64_t widest = layout.positions >= 8 ? 32 : kBlockThreads;
  const int64_t side = std::min(next_power_of_two(channel_loads), widest);
  const int64_t minimum = kBlockThreads / side * unrolled_loads(vector);
  const int64_t tasks = layout.sample.size * ceil_div(channel_loads, side);
  const int64_t channels = std::clamp<int64_t>(layout.channel.size, 1, side * vector);
  const int64_t least = ceil_div(kLeastPartBytes, channels * element_size);
  const Split split = split_positions(layout.positions, minimum, least, 1, tasks);
  const int64_t blocks = tasks * split.count;
  return {vector, {}, static_cast<int>(side), split, blocks, grid_size(blocks)};
}

inline ChannelDotLaunch plan_channel_dot(const ChannelDotParams& params, int element_size) {
  if (params.layout.kind != LayoutKind::kChannelsLast) return plan_rows(params, element_size);
  return plan_channels_last(params, vector_width(params, element_size), element_size);
}

}  // namespace ccp
