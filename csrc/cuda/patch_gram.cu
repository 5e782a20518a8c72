#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "csrc/cuda/patch_correlation.cuh"
#include "csrc/cuda/patch_gram.cuh"
#include "csrc/cuda/runtime.h"
#include "csrc/dispatch.h"
#include "csrc/patch_gram.h"

namespace ccp::cuda {
namespace {

template <class Traits>
void launch_product(const char* op, const Tensor& out, const PatchProductParams& params,
                    cudaStream_t stream) {
  using Acc = typename Traits::Acc;
  const PatchLaunch launch = plan_patch_product(params);
  const unsigned grid = grid_size(launch.blocks);
  if (launch.split.count == 1) {
    patch_product<Traits><<<grid, Traits::kThreads, 0, stream>>>(params, launch, nullptr);
    return check_launch(op);
  }
  const Tensor partial = torch::stable::new_empty(out, {launch.blocks, kPatchElements});
  patch_product<Traits>
      <<<grid, Traits::kThreads, 0, stream>>>(params, launch, partial.mutable_data_ptr());
  check_launch(op);
  add_patch_parts<Traits><<<grid_size(launch.tiles * params.groups), Traits::kThreads, 0, stream>>>(
      params, launch, static_cast<const Acc*>(partial.const_data_ptr()));
  check_launch(op);
}

// The maps of one side, packed into `memory` where they must be.
template <class T>
CorrelationMaps correlation_maps(const char* op, const Tensor& x, const PatchSource& source,
                                 const PatchProductParams& params, std::optional<Tensor>& memory,
                                 cudaStream_t stream) {
  if (readable_in_place(source, params.samples, sizeof(T))) return maps_in_place(source);
  const int64_t padded = padded_channels(source, sizeof(T));
  const int64_t positions = source.size[0] * source.size[1];
  memory = torch::stable::new_empty(x, {params.samples, positions, params.groups, padded});
  const int64_t blocks =
      params.samples * params.groups * ceil_div(padded, kPackSide) * ceil_div(positions, kPackSide);
  pack_maps<T><<<grid_size(blocks), kBlockThreads, 0, stream>>>(
      source, params.samples, params.groups, padded, static_cast<T*>(memory->mutable_data_ptr()));
  check_launch(op);
  return packed_maps(source, params.groups, sizeof(T), memory->const_data_ptr());
}

template <class Traits>
void launch_correlations(const char* op, const Tensor& out, const PatchProductParams& params,
                         const CorrelationLaunch& launch, cudaStream_t stream) {
  constexpr int kDepth = Traits::kDepth;
  const Tensor memory =
      torch::stable::new_empty(out, {launch.slots(), launch.tile, launch.tile}, ScalarType::Float);
  auto* slots = static_cast<float*>(memory.mutable_data_ptr());
  const auto kernel = correlate_pieces<Traits>;
  const int bytes = sizeof(CorrelationShared<Traits>);
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<grid_size(launch.blocks), Traits::kThreads, bytes, stream>>>(launch, slots);
  check_launch(op);
  const int64_t shares = launch.tiles() * launch.tile * launch.tile / (4 * kBlockThreads);
  sum_correlation_slots<><<<grid_size(shares), kBlockThreads, 0, stream>>>(launch, kDepth, slots);
  check_launch(op);
  add_correlations<><<<grid_size(spread_blocks(params)), kSpreadThreads, 0, stream>>>(
      launch, params, kDepth, slots);
  check_launch(op);
}

// By pieces, where that is possible and pays; returns whether it was done.
template <class T, PatchPrecision kPrecision>
bool run_correlations(const char* op, const Tensor& out, const Tensor& x,
                      const PatchProductParams& params, cudaStream_t stream) {
  const PatchAxis axis[] = {patch_axis(params, 0), patch_axis(params, 1)};
  if (!fits_correlations(axis, params)) return false;
  CorrelationLaunch launch = plan_correlations(params, axis, kCorrelationDepth<T>);
  if (!correlations_pay(launch, params, kCorrelationDepth<T>)) return false;
  if (launch.stages() == 0) return true;
  std::optional<Tensor> left, right;
  launch.left = correlation_maps<T>(op, x, params.left, params, left, stream);
  launch.right = params.symmetric ? launch.left
                                  : correlation_maps<T>(op, x, params.right, params, right, stream);
  if (launch.tile == kLargeTile) {
    launch_correlations<CorrelationTraits<T, kLargeTile, kPrecision>>(op, out, params, launch,
                                                                      stream);
  } else {
    launch_correlations<CorrelationTraits<T, kSmallTile, kPrecision>>(op, out, params, launch,
                                                                      stream);
  }
  return true;
}

template <class T, class Acc, PatchPrecision kPrecision = PatchPrecision::kExact>
void run(const char* op, const Tensor& out, const Tensor& x, const PatchProductParams& params,
         cudaStream_t stream) {
  if constexpr (std::is_same_v<Acc, float>)
    if (run_correlations<T, kPrecision>(op, out, x, params, stream)) return;
  if (channels_first_in_memory(params.left)) {
    launch_product<PatchTraits<T, Acc, true, kPrecision>>(op, out, params, stream);
  } else {
    launch_product<PatchTraits<T, Acc, false, kPrecision>>(op, out, params, stream);
  }
}

void add_patches(const char* op, const Tensor& out, const Tensor& x,
                 const PatchProductParams& params, bool allow_tf32) {
  if (params.rows() == 0 || out.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const cudaStream_t stream = current_stream(out.get_device_index());
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (out.scalar_type() == ScalarType::Float) {
        if constexpr (std::is_same_v<T, float>) {
          if (allow_tf32) return run<T, float, PatchPrecision::kTf32>(op, out, x, params, stream);
        }
        return run<T, float>(op, out, x, params, stream);
      }
    }
    run<T, double>(op, out, x, params, stream);
  });
}

void patch_gram_(const Tensor& A, const Tensor& x, const std::vector<int64_t>& kernel_size,
                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                 const std::vector<int64_t>& dilation, int64_t groups, bool allow_tf32) {
  const Window window{kernel_size, stride, padding, dilation, groups};
  add_patches("patch_gram_", A, x, check_patch_gram(A, x, window), allow_tf32);
}

void patch_cross_(const Tensor& B, const Tensor& x, const Tensor& y,
                  const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                  int64_t groups, bool allow_tf32) {
  const Window window{kernel_size, stride, padding, dilation, groups};
  add_patches("patch_cross_", B, x, check_patch_cross(B, x, y, window), allow_tf32);
}

}  // namespace
}  // namespace ccp::cuda

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CUDA, m) {
  m.impl("patch_gram_", TORCH_BOX(&ccp::cuda::patch_gram_));
  m.impl("patch_cross_", TORCH_BOX(&ccp::cuda::patch_cross_));
}
