#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/runtime.h"
#include "csrc/cuda/weighted_gram.cuh"
#include "csrc/dispatch.h"
#include "csrc/weighted_gram.h"

namespace ccp::cuda {
namespace {

template <class T, class Acc>
void launch_layers(const WeightedGramParams* layers, int count, const GramArguments& call,
                   cudaStream_t stream) {
  using Traits = GramTraits<T, Acc>;
  const GramLaunch launch = plan_weighted_grams(layers, count);
  Acc* partial = nullptr;
  std::optional<Tensor> storage;
  if (launch.parts > 0) {
    storage = torch::stable::new_empty(call.S[0], {launch.parts, kGramElements});
    partial = static_cast<Acc*>(storage->mutable_data_ptr());
  }
  weighted_grams<Traits>
      <<<grid_size(launch.blocks), Traits::kThreads, 0, stream>>>(launch, partial);
  check_launch(call.op);
  if (launch.parts == 0) return;
  add_gram_parts<Acc><<<grid_size(launch.split_tiles), kBlockThreads, 0, stream>>>(launch, partial);
  check_launch(call.op);
}

template <class T, class Acc>
void run(const std::vector<WeightedGramParams>& layers, const GramArguments& call,
         cudaStream_t stream) {
  for (size_t first = 0; first < layers.size(); first += kGramLayers) {
    const size_t count = std::min<size_t>(kGramLayers, layers.size() - first);
    launch_layers<T, Acc>(layers.data() + first, static_cast<int>(count), call, stream);
  }
}

void add_grams(const GramArguments& call) {
  check_weighted_grams(call);
  const std::vector<WeightedGramParams> layers = weighted_gram_layers(call);
  if (layers.empty()) return;
  const int32_t device = call.S[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  dispatch_floating(call.a[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (call.S[0].scalar_type() == ScalarType::Float) return run<T, float>(layers, call, stream);
    }
    run<T, double>(layers, call, stream);
  });
}

void weighted_gram_(const Tensor& S, const Tensor& a, const std::optional<Tensor>& sigma) {
  add_grams(single_gram(S, a, sigma));
}

void weighted_grams_(const std::vector<Tensor>& S, const std::vector<Tensor>& a,
                     const std::optional<std::vector<Tensor>>& sigma) {
  add_grams(grouped_grams(S, a, sigma));
}

}  // namespace
}  // namespace ccp::cuda

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CUDA, m) {
  m.impl("weighted_gram_", TORCH_BOX(&ccp::cuda::weighted_gram_));
  m.impl("weighted_grams_", TORCH_BOX(&ccp::cuda::weighted_grams_));
}
