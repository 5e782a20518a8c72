// How the elements of x and g lie in memory, as channel_dot sees them: samples x channels x
// positions. No torch header: the CPU kernels, the CUDA launchers and the emulator share it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ccp {

struct Dim {
  int64_t size;
  int64_t x_stride;  // in elements, as all strides here
  int64_t g_stride;
};

enum class LayoutKind {
  kRows,          // all positions of a channel are contiguous in x and in g
  kChannelsLast,  // all channels of a position are contiguous; one stride between positions
  kStrided,       // anything else
};

constexpr int kMaxPositionDims = 8;

struct ChannelDotLayout {
  LayoutKind kind;
  Dim sample;
  Dim channel;
  int64_t positions;               // product of the sizes of `position`
  int position_dims;               // at least 1
  Dim position[kMaxPositionDims];  // outermost first, neighbours merged where possible

  const Dim& innermost() const { return position[position_dims - 1]; }
};

// Strides of dimensions of size 1 carry no meaning; zero makes them compare equal.
inline Dim make_dim(int64_t size, int64_t x_stride, int64_t g_stride) {
  return size == 1 ? Dim{1, 0, 0} : Dim{size, x_stride, g_stride};
}

inline bool unit_stride(const Dim& dim) { return dim.x_stride == 1 && dim.g_stride == 1; }

inline LayoutKind classify(const ChannelDotLayout& layout) {
  if (layout.position_dims > 1) return LayoutKind::kStrided;
  if (unit_stride(layout.position[0])) return LayoutKind::kRows;
  if (unit_stride(layout.channel)) return LayoutKind::kChannelsLast;
  return LayoutKind::kStrided;
}

// True on success; false when more than kMaxPositionDims dimensions remain after merging.
// Requires dims >= 2 and 0 < channel_dim < dims.
inline bool make_layout(int64_t dims, const int64_t* sizes, const int64_t* x_strides,
                        const int64_t* g_strides, int64_t channel_dim, ChannelDotLayout* layout) {
  const auto dim = [&](int64_t i) { return make_dim(sizes[i], x_strides[i], g_strides[i]); };
  layout->sample = dim(0);
  layout->channel = dim(channel_dim);
  layout->positions = 1;
  layout->position_dims = 0;
  constexpr int kMaxTensorDims = 64;  // torch's own limit
  Dim unmerged[kMaxTensorDims];
  int count = 0;
  for (int64_t i = 1; i < dims && count < kMaxTensorDims; ++i) {
    if (i == channel_dim) continue;
    layout->positions *= sizes[i];
    if (sizes[i] != 1) unmerged[count++] = dim(i);
  }
  // The sum's order is free: walk memory from the largest stride to the smallest.
  std::stable_sort(unmerged, unmerged + count, [](const Dim& a, const Dim& b) {
    return a.x_stride + a.g_stride > b.x_stride + b.g_stride;
  });
  for (int i = 0; i < count; ++i) {
    const Dim& inner = unmerged[i];
    Dim* outer = layout->position_dims ? &layout->position[layout->position_dims - 1] : nullptr;
    if (outer && outer->x_stride == inner.x_stride * inner.size &&
        outer->g_stride == inner.g_stride * inner.size) {
      *outer = Dim{outer->size * inner.size, inner.x_stride, inner.g_stride};
    } else {
      if (layout->position_dims == kMaxPositionDims) return false;
      layout->position[layout->position_dims++] = inner;
    }
  }
  if (layout->position_dims == 0) layout->position[layout->position_dims++] = Dim{1, 0, 0};
  layout->kind = classify(*layout);
  return true;
}

}  // namespace ccp
