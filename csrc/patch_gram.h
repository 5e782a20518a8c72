// Checks and parameters of patch_gram_ and patch_cross_, common to every device.
#pragma once

#include <optional>
#include <vector>

#include "csrc/check.h"
#include "csrc/memory.h"
#include "csrc/params.h"

namespace ccp {

// A convolution's window: two values each, the vertical one first.
struct Window {
  const std::vector<int64_t>&kernel_size, &stride, &padding, &dilation;
  int64_t groups;
};

struct Listed {
  const std::vector<int64_t>& values;
};

inline std::ostream& operator<<(std::ostream& out, const Listed& list) {
  out << '[';
  for (size_t i = 0; i < list.values.size(); ++i) out << (i ? ", " : "") << list.values[i];
  return out << ']';
}

inline void check_window_values(const char* op, const char* name,
                                const std::vector<int64_t>& values, int64_t least) {
  CCP_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, op, ": ", name,
            " must be two integers of at least ", least, ", got ", Listed{values});
}

// Along one dimension; 0 where the kernel does not fit.
inline int64_t output_size(const Tensor& x, const Window& window, int dim) {
  const int64_t extent = window.dilation[dim] * (window.kernel_size[dim] - 1) + 1;
  const int64_t room = x.size(2 + dim) + 2 * window.padding[dim] - extent;
  return room < 0 ? 0 : room / window.stride[dim] + 1;
}

inline void check_patch_input(const char* op, const Tensor& x, const Window& window) {
  CCP_CHECK(x.dim() == 4, op, ": x must be [N, C, H, W], got ", Shape(x));
  CCP_CHECK(is_floating(x.scalar_type()), op,
            ": x must be float32, float64, bfloat16 or float16, got ", dtype_name(x.scalar_type()));
  check_window_values(op, "kernel_size", window.kernel_size, 1);
  check_window_values(op, "stride", window.stride, 1);
  check_window_values(op, "padding", window.padding, 0);
  check_window_values(op, "dilation", window.dilation, 1);
  CCP_CHECK(window.groups >= 1 && x.size(1) % window.groups == 0, op,
            ": groups must divide the channels of x ", Shape(x), ", got ", window.groups);
  CCP_CHECK(output_size(x, window, 0) > 0 && output_size(x, window, 1) > 0, op,
            ": the kernel must fit into the padded input, got x ", Shape(x), ", kernel_size ",
            Listed{window.kernel_size}, ", padding ", Listed{window.padding}, " and dilation ",
            Listed{window.dilation});
  CCP_CHECK((x.size(2) + 2 * window.padding[0]) * (x.size(3) + 2 * window.padding[1]) <= 1 << 30,
            op, ": the padded maps must have at most 2^30 positions, got x ", Shape(x),
            " and padding ", Listed{window.padding});
}

// `out` must be [rows, columns], or with a leading dimension of `groups` where there are several.
inline void check_patch_output(const char* op, const char* name, const Tensor& out, const Tensor& x,
                               int64_t groups, int64_t rows, int64_t columns) {
  std::vector<int64_t> expected{rows, columns};
  if (groups > 1) expected.insert(expected.begin(), groups);
  CCP_CHECK(out.sizes().equals({expected.data(), expected.size()}), op, ": ", name, " must be ",
            Listed{expected}, " for x ", Shape(x), ", got ", Shape(out));
  const ScalarType dtype = out.scalar_type();
  CCP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": ", name,
            " must be float32 or float64, got ", dtype_name(dtype));
  CCP_CHECK(dtype == ScalarType::Double || x.scalar_type() != ScalarType::Double, op,
            ": x must not be wider than ", name, ", got x float64 and ", name, " float32");
  CCP_CHECK(same_device(out, x), op, ": x must be on the device of ", name, ", got ", name, " on ",
            device_name(out), " and x on ", device_name(x));
  const int64_t last = out.dim() - 1;
  const int64_t row_stride = out.stride(last - 1);
  CCP_CHECK(out.numel() <= 1 ||
                ((columns <= 1 || out.stride(last) == 1) && (rows <= 1 || row_stride >= columns) &&
                 (groups == 1 || out.stride(0) >= (rows - 1) * row_stride + columns)),
            op, ": ", name, " must have contiguous rows that do not overlap");
  CCP_CHECK(!may_overlap(out, x), op, ": x must not share memory with ", name);
}

inline PatchSource patch_source(const Tensor& x, int64_t groups) {
  return {x.const_data_ptr(),
          x.size(1) / groups,
          {x.size(2), x.size(3)},
          x.stride(0),
          x.stride(1),
          {x.stride(2), x.stride(3)},
          {1, 1},
          {1, 1},
          {0, 0},
          {1, 1}};
}

inline PatchProductParams patch_params(const Tensor& out, const Tensor& x, const Window& window) {
  PatchProductParams params{};
  params.out = out.mutable_data_ptr();
  params.out_group_stride = window.groups > 1 ? out.stride(0) : 0;
  params.out_row_stride = out.stride(out.dim() - 2);
  params.left = patch_source(x, window.groups);
  for (int dim = 0; dim < 2; ++dim) {
    params.left.kernel[dim] = window.kernel_size[dim];
    params.left.stride[dim] = window.stride[dim];
    params.left.padding[dim] = window.padding[dim];
    params.left.dilation[dim] = window.dilation[dim];
    params.positions[dim] = output_size(x, window, dim);
  }
  params.groups = window.groups;
  params.samples = x.size(0);
  return params;
}

inline int64_t patch_columns(const Tensor& x, const Window& window) {
  return x.size(1) / window.groups * window.kernel_size[0] * window.kernel_size[1];
}

inline PatchProductParams check_patch_gram(const Tensor& A, const Tensor& x, const Window& window) {
  check_patch_input("patch_gram_", x, window);
  const int64_t columns = patch_columns(x, window);
  check_patch_output("patch_gram_", "A", A, x, window.groups, columns, columns);
  PatchProductParams params = patch_params(A, x, window);
  params.right = params.left;
  params.symmetric = true;
  return params;
}

inline PatchProductParams check_patch_cross(const Tensor& B, const Tensor& x, const Tensor& y,
                                            const Window& window) {
  const char* op = "patch_cross_";
  check_patch_input(op, x, window);
  const std::vector<int64_t> positions{output_size(x, window, 0), output_size(x, window, 1)};
  CCP_CHECK(y.dim() == 4 && y.size(0) == x.size(0) && y.size(2) == positions[0] &&
                y.size(3) == positions[1] && y.size(1) % window.groups == 0,
            op, ": y must be [N, K, Ho, Wo] with N = ", x.size(0), ", output positions ",
            Listed{positions}, " and K a multiple of groups, got ", Shape(y));
  CCP_CHECK(y.scalar_type() == x.scalar_type(), op, ": y must have the dtype of x, got x ",
            dtype_name(x.scalar_type()), " and y ", dtype_name(y.scalar_type()));
  check_patch_output(op, "B", B, x, window.groups, patch_columns(x, window),
                     y.size(1) / window.groups);
  CCP_CHECK(same_device(x, y), op, ": y must be on the device of x, got x on ", device_name(x),
            " and y on ", device_name(y));
  CCP_CHECK(!may_overlap(B, y), op, ": y must not share memory with B");
  PatchProductParams params = patch_params(B, x, window);
  params.right = patch_source(y, window.groups);
  return params;
}

}  // namespace ccp
