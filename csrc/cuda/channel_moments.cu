#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/channel_moments.h"
#include "csrc/cuda/channel_moments.cuh"
#include "csrc/cuda/runtime.h"
#include "csrc/dispatch.h"

namespace ccp::cuda {
namespace {

Tensor channel_moments(const Tensor& x, int64_t channel_dim) {
  const int64_t channel = check_channel_moments(x, channel_dim);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {kMomentRows, x.size(channel)}, ScalarType::Double);
  const ChannelMomentsParams params = channel_moments_params(x, channel, out);
  const int64_t channels = x.size(channel);
  if (channels == 0) return out;
  const auto element_size = static_cast<int>(x.element_size());
  const ChannelMomentsLaunch launch = plan_channel_moments(params, element_size);
  const cudaStream_t stream = current_stream(x.get_device_index());
  Tensor parts = torch::stable::new_empty(out, {launch.split.count, kMomentRows, channels});
  double* sums = static_cast<double*>(parts.mutable_data_ptr());
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    with_channel_moments_kernel<T>(launch, [&](auto kernel) {
      kernel<<<launch.grid, kBlockThreads, 0, stream>>>(params, launch, sums);
    });
  });
  check_launch("channel_moments");
  finish_channel_moments<>
      <<<grid_size(ceil_div(channels, kBlockThreads / 32)), kBlockThreads, 0, stream>>>(
          sums, launch.split.count, channels, params.out);
  check_launch("channel_moments");
  return out;
}

}  // namespace
}  // namespace ccp::cuda

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CUDA, m) {
  m.impl("channel_moments", TORCH_BOX(&ccp::cuda::channel_moments));
}
