#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/channel_dot.h"
#include "csrc/cuda/channel_dot.cuh"
#include "csrc/cuda/runtime.h"
#include "csrc/dispatch.h"

namespace ccp::cuda {
namespace {

template <class T>
void launch_kernel(const ChannelDotParams& params, const ChannelDotLaunch& launch, void* sums,
                   cudaStream_t stream) {
  with_channel_dot_kernel<T>(params.layout.kind, launch, [&](auto kernel) {
    kernel<<<launch.grid, kBlockThreads, 0, stream>>>(params, launch, sums);
  });
  check_launch("channel_dot");
}

template <class T>
void run(const ChannelDotParams& params, const Tensor& out, cudaStream_t stream) {
  using Acc = Accumulator<T>;
  const ChannelDotLaunch launch = plan_channel_dot(params, sizeof(T));
  if (launch.split.count == 1) {
    return launch_kernel<T>(params, launch, params.out, stream);
  }
  const int64_t outputs = out.numel();
  const Tensor partial = torch::stable::new_empty(out, {launch.split.count, outputs});
  launch_kernel<T>(params, launch, partial.mutable_data_ptr(), stream);
  const int64_t threads = outputs * part_threads(launch.split.count);
  sum_parts<Acc><<<grid_size(ceil_div(threads, kBlockThreads)), kBlockThreads, 0, stream>>>(
      static_cast<const Acc*>(partial.const_data_ptr()), launch.split.count, outputs,
      static_cast<Acc*>(params.out));
  check_launch("channel_dot");
}

Tensor channel_dot(const Tensor& x, const Tensor& g, int64_t channel_dim) {
  const int64_t channel = check_channel_dot(x, g, channel_dim);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(channel)}, channel_dot_dtype(x));
  const ChannelDotParams params = channel_dot_params(x, g, channel, out);
  if (out.numel() == 0) return out;
  if (params.layout.positions == 0) return torch::stable::zero_(out);
  const cudaStream_t stream = current_stream(x.get_device_index());
  dispatch_floating(x.scalar_type(),
                    [&](auto type) { run<typename decltype(type)::type>(params, out, stream); });
  return out;
}

}  // namespace
}  // namespace ccp::cuda

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CUDA, m) {
  m.impl("channel_dot", TORCH_BOX(&ccp::cuda::channel_dot));
}
