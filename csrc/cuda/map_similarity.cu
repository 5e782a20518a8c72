#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "csrc/cuda/map_similarity.cuh"
#include "csrc/cuda/runtime.h"
#include "csrc/dispatch.h"
#include "csrc/map_similarity.h"

namespace ccp::cuda {
namespace {

// [samples, channels] MapTerms of one of the tensors.
template <class T>
Tensor map_terms(const MapSimilarityParams& params, MapSide side, const Tensor& out,
                 cudaStream_t stream) {
  const ChannelDotLayout& layout = params.maps.layout;
  Tensor terms = torch::stable::new_empty(out, {layout.sample.size, layout.channel.size, 4});
  const MapMomentsLaunch launch = plan_map_moments(params, sizeof(T));
  with_map_moments_kernel<T>(layout.kind, launch, [&](auto kernel) {
    kernel<<<launch.grid, kBlockThreads, 0, stream>>>(
        params, launch, side, static_cast<MapTerms<float>*>(terms.mutable_data_ptr()));
  });
  check_launch("map_similarity");
  return terms;
}

template <class T>
void run(const MapSimilarityParams& params, const Tensor& out, cudaStream_t stream) {
  const Tensor x_terms = map_terms<T>(params, left_side(params), out, stream);
  const Tensor y_terms =
      params.symmetric ? x_terms : map_terms<T>(params, right_side(params), out, stream);
  const MapSimilarityLaunch launch = plan_map_similarity(params, sizeof(T));
  Tensor partial = torch::stable::new_empty(out, {launch.blocks, kMapTile, kMapTile});
  with_map_similarity_kernel<T>(launch.loads, [&](auto kernel) {
    kernel<<<launch.grid, kMapThreads, 0, stream>>>(
        params, launch, static_cast<const MapTerms<float>*>(x_terms.const_data_ptr()),
        static_cast<const MapTerms<float>*>(y_terms.const_data_ptr()),
        static_cast<float*>(partial.mutable_data_ptr()));
  });
  check_launch("map_similarity");
  const int64_t elements = launch.tiles * kMapTile * kMapTile;
  mean_of_map_parts<><<<grid_size(ceil_div(elements, kBlockThreads)), kBlockThreads, 0, stream>>>(
      params, launch, static_cast<const float*>(partial.const_data_ptr()));
  check_launch("map_similarity");
}

Tensor map_similarity(const Tensor& x, std::string kind, const std::optional<Tensor>& y,
                      double data_range, bool allow_tf32) {
  const SimilarityKind similarity = check_map_similarity(x, kind, y, data_range);
  CCP_CHECK(x.scalar_type() != ScalarType::Double,
            "map_similarity: x must be float32, bfloat16 or float16 on a GPU, got float64");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {x.size(1), x.size(1)}, ScalarType::Float);
  const MapSimilarityParams params =
      map_similarity_params(x, y, similarity, data_range, allow_tf32, out);
  if (nothing_to_compare(x))
    return torch::stable::fill_(out, std::numeric_limits<double>::quiet_NaN());
  const cudaStream_t stream = current_stream(x.get_device_index());
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) run<T>(params, out, stream);
  });
  return out;
}

}  // namespace
}  // namespace ccp::cuda

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CUDA, m) {
  m.impl("map_similarity", TORCH_BOX(&ccp::cuda::map_similarity));
}
