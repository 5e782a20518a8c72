// Checks and parameters of map_similarity, common to every device.
#pragma once

#include <cmath>
#include <optional>

#include "csrc/check.h"
#include "csrc/params.h"

namespace ccp {

inline SimilarityKind similarity_kind(const std::string& name) {
  if (name == "ssim") return SimilarityKind::kSsim;
  if (name == "psnr") return SimilarityKind::kPsnr;
  if (name == "mse") return SimilarityKind::kMse;
  if (name == "cosine") return SimilarityKind::kCosine;
  if (name == "pearson") return SimilarityKind::kPearson;
  fail("map_similarity: kind must be ssim, psnr, mse, cosine or pearson, got ", name);
}

// Returns what `kind` names.
inline SimilarityKind check_map_similarity(const Tensor& x, const std::string& kind,
                                           const std::optional<Tensor>& y, double data_range) {
  CCP_CHECK(x.dim() >= 2, "map_similarity: x must have at least 2 dimensions, [N, C, ...], got ",
            Shape(x));
  CCP_CHECK(is_floating(x.scalar_type()),
            "map_similarity: x must be float32, float64, bfloat16 or float16, got ",
            dtype_name(x.scalar_type()));
  const SimilarityKind similarity = similarity_kind(kind);
  CCP_CHECK(data_range > 0 && std::isfinite(data_range),
            "map_similarity: data_range must be positive and finite, got ", data_range);
  if (!y) return similarity;
  CCP_CHECK(same_shape(x, *y), "map_similarity: y must have the shape of x, got x ", Shape(x),
            " and y ", Shape(*y));
  CCP_CHECK(x.scalar_type() == y->scalar_type(),
            "map_similarity: y must have the dtype of x, got x ", dtype_name(x.scalar_type()),
            " and y ", dtype_name(y->scalar_type()));
  CCP_CHECK(same_device(x, *y), "map_similarity: y must be on the device of x, got x on ",
            device_name(x), " and y on ", device_name(*y));
  return similarity;
}

inline ScalarType map_similarity_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline MapSimilarityParams map_similarity_params(const Tensor& x, const std::optional<Tensor>& y,
                                                 SimilarityKind kind, double data_range,
                                                 bool allow_tf32, const Tensor& out) {
  const Tensor& other = y ? *y : x;
  MapSimilarityParams params{
      {x.const_data_ptr(), other.const_data_ptr(), out.mutable_data_ptr(), {}},
      !y.has_value(),
      kind,
      map_scale(kind, data_range),
      allow_tf32};
  CCP_CHECK(make_layout(x.dim(), x.sizes().data(), x.strides().data(), other.strides().data(), 1,
                        &params.maps.layout),
            "map_similarity: x and y must merge into at most ", kMaxPositionDims,
            " strided position dimensions, got x ", Shape(x));
  return params;
}

// The mean over no samples, or of maps without positions, is not a number.
inline bool nothing_to_compare(const Tensor& x) { return x.numel() == 0; }

}  // namespace ccp
