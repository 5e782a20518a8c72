#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/runtime.h"
#include "csrc/cuda/weighted_gram.cuh"
#include "csrc/dispatch.h"
#include "csrc/weighted_gram.h"

namespace ccp::cuda {
namespace {

template <class T, class Acc>
void run(const WeightedGramParams& params, const Tensor& S, cudaStream_t stream) {
  const WeightedGramLaunch launch = plan_weighted_gram(params);
  const auto kernel = weighted_gram<GramTraits<T, Acc>>;
  if (launch.split.count == 1) {
    kernel<<<launch.grid, kBlockThreads, 0, stream>>>(params, launch, nullptr);
    return check_launch("weighted_gram_");
  }
  const int64_t elements = launch.tiles * kGramTile * kGramTile;
  const Tensor partial = torch::stable::new_empty(S, {launch.split.count, elements});
  kernel<<<launch.grid, kBlockThreads, 0, stream>>>(params, launch, partial.mutable_data_ptr());
  check_launch("weighted_gram_");
  add_gram_parts<Acc><<<grid_size(ceil_div(elements, kBlockThreads)), kBlockThreads, 0, stream>>>(
      params, launch, static_cast<const Acc*>(partial.const_data_ptr()));
  check_launch("weighted_gram_");
}

void weighted_gram_(const Tensor& S, const Tensor& a, const std::optional<Tensor>& sigma) {
  check_weighted_gram(S, a, sigma);
  if (a.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(S.get_device_index());
  const WeightedGramParams params = weighted_gram_params(S, a, sigma);
  const cudaStream_t stream = current_stream(S.get_device_index());
  dispatch_floating(a.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (S.scalar_type() == ScalarType::Float) return run<T, float>(params, S, stream);
    }
    run<T, double>(params, S, stream);
  });
}

}  // namespace
}  // namespace ccp::cuda

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CUDA, m) {
  m.impl("weighted_gram_", TORCH_BOX(&ccp::cuda::weighted_gram_));
}
