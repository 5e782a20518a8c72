#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "csrc/cuda/gram_product.cuh"
#include "csrc/cuda/runtime.h"
#include "csrc/cuda/weighted_gram.cuh"
#include "csrc/dispatch.h"
#include "csrc/weighted_gram.h"

namespace ccp::cuda {
namespace {

// Uninitialised; none of no elements.
std::optional<Tensor> scratch(const Tensor& like, int64_t elements) {
  if (elements == 0) return std::nullopt;
  return torch::stable::new_empty(like, {elements});
}

template <class T>
T* data_of(const std::optional<Tensor>& storage) {
  return storage ? static_cast<T*>(storage->mutable_data_ptr()) : nullptr;
}

template <int kTile, class Acc>
void add_parts(const GramLaunch& launch, const Acc* partial, const char* op, cudaStream_t stream) {
  const unsigned grid = grid_size(launch.split_tiles * (kTile / kGramSliceRows));
  add_gram_parts<Acc, kTile><<<grid, kBlockThreads, 0, stream>>>(launch, partial);
  check_launch(op);
}

template <class T>
void add_in_float(const WeightedGramParams* layers, int count, const GramArguments& call,
                  cudaStream_t stream) {
  GramLaunch launch = plan_weighted_grams(layers, count, sizeof(T));
  const auto rows = scratch(call.a[0], launch.packed_rows);
  const auto weights = scratch(call.S[0], launch.packed_weights);
  const auto parts = scratch(call.S[0], launch.parts * launch.tile * launch.tile);
  place_packed_copies(data_of<T>(rows), data_of<float>(weights), sizeof(T), launch);
  if (rows) {
    constexpr int64_t kElements = kBlockThreads * kVectorBytes / sizeof(T);
    pack_gram_rows<T>
        <<<grid_size(ceil_div(launch.packed_rows, kElements)), kBlockThreads, 0, stream>>>(
            launch, data_of<T>(rows));
    check_launch(call.op);
  }
  if (weights) {
    pack_gram_weights<>
        <<<grid_size(ceil_div(launch.packed_weights, kBlockThreads)), kBlockThreads, 0, stream>>>(
            launch, data_of<float>(weights));
    check_launch(call.op);
  }
  with_gram_product<T>(launch.tile, !call.sigma.empty(), [&](auto kernel, auto traits) {
    using Traits = decltype(traits);
    const int bytes = sizeof(GramProductShared<Traits>);
    check_cuda(call.op,
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<grid_size(launch.blocks), Traits::kThreads, bytes, stream>>>(launch,
                                                                          data_of<float>(parts));
    check_launch(call.op);
    if (parts) add_parts<Traits::kTile>(launch, data_of<float>(parts), call.op, stream);
  });
}

template <class T>
void add_in_double(const WeightedGramParams* layers, int count, const GramArguments& call,
                   cudaStream_t stream) {
  using Traits = GramTraits<T>;
  const GramLaunch launch = plan_weighted_grams(layers, count, sizeof(T), kDoubleGramTiles);
  const auto parts = scratch(call.S[0], launch.parts * launch.tile * launch.tile);
  weighted_grams<Traits>
      <<<grid_size(launch.blocks), Traits::kThreads, 0, stream>>>(launch, data_of<double>(parts));
  check_launch(call.op);
  if (parts) add_parts<kSmallGramTile>(launch, data_of<double>(parts), call.op, stream);
}

void add_grams(const GramArguments& call) {
  check_weighted_grams(call);
  const std::vector<WeightedGramParams> layers = weighted_gram_layers(call);
  if (layers.empty()) return;
  const int32_t device = call.S[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const bool in_float = call.S[0].scalar_type() == ScalarType::Float;
  dispatch_floating(call.a[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for (size_t first = 0; first < layers.size(); first += kGramLayers) {
      const int count = static_cast<int>(std::min<size_t>(kGramLayers, layers.size() - first));
      if constexpr (!std::is_same_v<T, double>) {
        if (in_float) {
          add_in_float<T>(layers.data() + first, count, call, stream);
          continue;
        }
      }
      add_in_double<T>(layers.data() + first, count, call, stream);
    }
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
