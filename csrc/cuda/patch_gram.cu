#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>
#include <vector>

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

template <class T, class Acc, PatchPrecision kPrecision = PatchPrecision::kExact>
void run(const char* op, const Tensor& out, const PatchProductParams& params, cudaStream_t stream) {
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
          if (allow_tf32) return run<T, float, PatchPrecision::kTf32>(op, out, params, stream);
        }
        return run<T, float>(op, out, params, stream);
      }
    }
    run<T, double>(op, out, params, stream);
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
