// Checks and parameters of channel_moments, common to every device.
#pragma once

#include <vector>

#include "csrc/check.h"
#include "csrc/params.h"

namespace ccp {

// Checks the arguments; returns channel_dim counted from the front.
inline int64_t check_channel_moments(const Tensor& x, int64_t channel_dim) {
  const int64_t dims = x.dim();
  CCP_CHECK(dims >= 2, "channel_moments: x must have at least 2 dimensions, [N, C, ...], got ",
            Shape(x));
  const int64_t channel = channel_dim < 0 ? channel_dim + dims : channel_dim;
  CCP_CHECK(channel > 0 && channel < dims,
            "channel_moments: channel_dim must name a dimension of x ", Shape(x),
            " other than 0 (the samples), got ", channel_dim);
  CCP_CHECK(is_floating(x.scalar_type()),
            "channel_moments: x must be float32, float64, bfloat16 or float16, got ",
            dtype_name(x.scalar_type()));
  return channel;
}

inline ChannelMomentsParams channel_moments_params(const Tensor& x, int64_t channel,
                                                   const Tensor& out) {
  std::vector<int64_t> sizes{1}, strides{0};
  for (int64_t i = 0; i < x.dim(); ++i) {
    sizes.push_back(x.size(i));
    strides.push_back(x.stride(i));
  }
  ChannelMomentsParams params{x.const_data_ptr(), static_cast<double*>(out.mutable_data_ptr()), {}};
  CCP_CHECK(make_layout(x.dim() + 1, sizes.data(), strides.data(), strides.data(), channel + 1,
                        &params.layout),
            "channel_moments: x must merge into at most ", kMaxPositionDims,
            " strided position dimensions, got x ", Shape(x));
  return params;
}

}  // namespace ccp
