// The CUDA runtime as the launchers see it.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

namespace ccp {

// torch's current stream. Its accessor lives in libtorch_cuda and is looked up at run time, so that
// the same module imports under a CPU build of torch, where that library does not exist.
inline cudaStream_t current_stream(int32_t device) {
  using Accessor = AOTITorchError (*)(int32_t, void**);
  static const Accessor accessor = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library
               ? reinterpret_cast<Accessor>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
               : nullptr;
  }();
  STD_TORCH_CHECK(accessor != nullptr, "ccp_ext: this build of torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(accessor(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* kernel, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "ccp_ext: CUDA error in ", kernel, ": ",
                  cudaGetErrorString(error));
}

// To follow every launch: reports a launch that failed, and errors of earlier asynchronous work.
inline void check_launch(const char* kernel) { check_cuda(kernel, cudaGetLastError()); }

}  // namespace ccp
