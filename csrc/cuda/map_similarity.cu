#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>

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

// [samples, channels, padded positions] centred maps of one of the tensors.
template <class T>
Tensor centred_maps(const Tensor& x, const MapSimilarityParams& params, MapSide side,
                    const Tensor& terms, cudaStream_t stream) {
  const ChannelDotLayout& layout = params.maps.layout;
  const int64_t padded = padded_positions(layout, sizeof(T));
  Tensor maps = torch::stable::new_empty(x, {layout.sample.size, layout.channel.size, padded});
  const int64_t units = maps.numel() * sizeof(T) / kVectorBytes;
  centre_maps<T><<<grid_size(ceil_div(units, kBlockThreads)), kBlockThreads, 0, stream>>>(
      params, side, static_cast<const MapTerms<float>*>(terms.const_data_ptr()), padded,
      static_cast<T*>(maps.mutable_data_ptr()));
  check_launch("map_similarity");
  return maps;
}

template <class T>
MapDevice map_device(const MapSimilarityParams& params, int32_t index) {
  int shared_bytes = 0;
  check_cuda("map_similarity",
             cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  MapDevice device{shared_bytes, false};
  if constexpr (sizeof(T) == 2) {
    if (!suits_tall_tiles(params, sizeof(T))) return device;  // the question takes a lock
    // What was compiled for other architectures than sm_90a has no kernel of tall tiles in it. What
    // this device loads says so itself.
    with_tall_map_kernel<T>(MapLoads::kRows, [&](auto kernel, int threads, int) {
      cudaFuncAttributes attributes{};
      check_cuda("map_similarity", cudaFuncGetAttributes(&attributes, kernel));
      device.tall_tiles = attributes.maxThreadsPerBlock >= threads;
    });
  }
  return device;
}

template <class T>
void run(const Tensor& x, MapSimilarityParams params, const Tensor& out, cudaStream_t stream) {
  const Tensor x_terms = map_terms<T>(params, left_side(params), out, stream);
  const Tensor y_terms =
      params.symmetric ? x_terms : map_terms<T>(params, right_side(params), out, stream);
  const MapSimilarityLaunch launch =
      plan_map_similarity(params, sizeof(T), map_device<T>(params, x.get_device_index()));
  std::optional<Tensor> x_maps, y_maps;
  if (launch.packed) {
    x_maps = centred_maps<T>(x, params, left_side(params), x_terms, stream);
    y_maps =
        params.symmetric ? x_maps : centred_maps<T>(x, params, right_side(params), y_terms, stream);
    params = packed_maps(params, x_maps->const_data_ptr(), y_maps->const_data_ptr(), sizeof(T));
  }
  Tensor partial =
      torch::stable::new_empty(out, {launch.split.count * launch.tiles, launch.rows, launch.tile});
  with_map_similarity_kernel<T>(launch, [&](auto kernel, int threads, int bytes) {
    check_cuda("map_similarity",
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<launch.grid, threads, bytes, stream>>>(
        params, launch, static_cast<const MapTerms<float>*>(x_terms.const_data_ptr()),
        static_cast<const MapTerms<float>*>(y_terms.const_data_ptr()),
        static_cast<float*>(partial.mutable_data_ptr()));
  });
  check_launch("map_similarity");
  mean_of_map_parts<>
      <<<grid_size(ceil_div(partial.numel() / launch.split.count, kBlockThreads)), kBlockThreads, 0,
         stream>>>(params, launch, static_cast<const float*>(partial.const_data_ptr()));
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
    if constexpr (!std::is_same_v<T, double>) run<T>(x, params, out, stream);
  });
  return out;
}

}  // namespace
}  // namespace ccp::cuda

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CUDA, m) {
  m.impl("map_similarity", TORCH_BOX(&ccp::cuda::map_similarity));
}
