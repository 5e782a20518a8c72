// Checks and parameters of channel_dot, common to every device.
#pragma once

#include "csrc/check.h"
#include "csrc/params.h"

namespace ccp {

// Checks the arguments; returns channel_dim counted from the front.
inline int64_t check_channel_dot(const Tensor& x, const Tensor& g, int64_t channel_dim) {
  const int64_t dims = x.dim();
  CCP_CHECK(dims >= 2, "channel_dot: x must have at least 2 dimensions, [N, C, ...], got ",
            Shape(x));
  CCP_CHECK(same_shape(x, g), "channel_dot: g must have the shape of x, got x ", Shape(x),
            " and g ", Shape(g));
  const int64_t channel = channel_dim < 0 ? channel_dim + dims : channel_dim;
  CCP_CHECK(channel > 0 && channel < dims, "channel_dot: channel_dim must name a dimension of x ",
            Shape(x), " other than 0 (the samples), got ", channel_dim);
  CCP_CHECK(is_floating(x.scalar_type()),
            "channel_dot: x must be float32, float64, bfloat16 or float16, got ",
            dtype_name(x.scalar_type()));
  CCP_CHECK(x.scalar_type() == g.scalar_type(), "channel_dot: g must have the dtype of x, got x ",
            dtype_name(x.scalar_type()), " and g ", dtype_name(g.scalar_type()));
  CCP_CHECK(same_device(x, g), "channel_dot: g must be on the device of x, got x on ",
            device_name(x), " and g on ", device_name(g));
  return channel;
}

inline ScalarType channel_dot_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ChannelDotParams channel_dot_params(const Tensor& x, const Tensor& g, int64_t channel,
                                           const Tensor& out) {
  ChannelDotParams params{x.const_data_ptr(), g.const_data_ptr(), out.mutable_data_ptr(), {}};
  CCP_CHECK(make_layout(x.dim(), x.sizes().data(), x.strides().data(), g.strides().data(), channel,
                        &params.layout),
            "channel_dot: x and g must merge into at most ", kMaxPositionDims,
            " strided position dimensions, got x ", Shape(x));
  return params;
}

}  // namespace ccp
