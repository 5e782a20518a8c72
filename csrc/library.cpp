// Every operator's schema, in one place, and the Python module whose import registers them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// setup.py defines CCP_BUILD_*; GPUS and NVCC only where the CUDA kernels are built.
#define CCP_TEXT_(...) #__VA_ARGS__
#define CCP_TEXT(...) CCP_TEXT_(__VA_ARGS__)
#ifndef CCP_BUILD_NVCC
#define CCP_BUILD_NVCC
#define CCP_BUILD_GPUS
#endif
#ifdef __clang__
#define CCP_COMPILER "clang " __clang_version__
#else
#define CCP_COMPILER "gcc " __VERSION__
#endif

STABLE_TORCH_LIBRARY(ccp_ext, m) {
  m.def("channel_dot(Tensor x, Tensor g, int channel_dim=1) -> Tensor");
  m.def("weighted_gram_(Tensor(a!) S, Tensor a, Tensor? sigma=None) -> ()");
  m.def("channel_moments(Tensor x, int channel_dim=1) -> Tensor");
  m.def(
      "map_similarity(Tensor x, str kind=\"ssim\", Tensor? y=None, *, float data_range=1.0, "
      "bool allow_tf32=False) -> Tensor");
  m.def("weighted_grams_(Tensor(a!)[] S, Tensor[] a, Tensor[]? sigma=None) -> ()");
  m.def(
      "patch_gram_(Tensor(a!) A, Tensor x, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups=1, bool allow_tf32=False) -> ()");
  m.def(
      "patch_cross_(Tensor(a!) B, Tensor x, Tensor y, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups=1, bool allow_tf32=False) -> ()");
}

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s, s:s, s:s, s:s, s:s}", "version", CCP_TEXT(CCP_BUILD_VERSION), "torch",
                       CCP_TEXT(CCP_BUILD_TORCH), "compiler", CCP_COMPILER, "nvcc",
                       CCP_TEXT(CCP_BUILD_NVCC), "architectures", CCP_TEXT(CCP_BUILD_GPUS));
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built from, as text values."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
