// Checks and parameters of weighted_gram_, common to every device.
#pragma once

#include <optional>

#include "csrc/check.h"
#include "csrc/params.h"

namespace ccp {

struct ByteRange {
  const char* begin;
  const char* end;
};

// From the first byte of a non-empty tensor to the one after its last; strides are not negative.
inline ByteRange byte_range(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

inline bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const ByteRange first = byte_range(a), second = byte_range(b);
  return first.begin < second.end && second.begin < first.end;
}

inline void check_gram_sigma(const Tensor& S, const Tensor& a, const Tensor& sigma) {
  const auto expected = a.sizes().slice(0, a.dim() - 1);
  CCP_CHECK(sigma.sizes().equals(expected),
            "weighted_gram_: sigma must have one value per row of a ", Shape(a),
            ", shape a.shape[:-1], got ", Shape(sigma));
  const ScalarType dtype = sigma.scalar_type();
  CCP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
            "weighted_gram_: sigma must be float32 or float64, got ", dtype_name(dtype));
  CCP_CHECK(same_device(S, sigma), "weighted_gram_: sigma must be on the device of S, got S on ",
            device_name(S), " and sigma on ", device_name(sigma));
  CCP_CHECK(!may_overlap(S, sigma), "weighted_gram_: sigma must not share memory with S");
}

inline void check_weighted_gram(const Tensor& S, const Tensor& a,
                                const std::optional<Tensor>& sigma) {
  CCP_CHECK(S.dim() == 2 && S.size(0) == S.size(1),
            "weighted_gram_: S must be a square matrix [C, C], got ", Shape(S));
  CCP_CHECK(a.dim() == 2 || a.dim() == 3, "weighted_gram_: a must be [N, C] or [N, K, C], got ",
            Shape(a));
  CCP_CHECK(a.size(a.dim() - 1) == S.size(0),
            "weighted_gram_: a must have as many channels as S, got a ", Shape(a), " and S ",
            Shape(S));
  const ScalarType S_dtype = S.scalar_type(), a_dtype = a.scalar_type();
  CCP_CHECK(S_dtype == ScalarType::Float || S_dtype == ScalarType::Double,
            "weighted_gram_: S must be float32 or float64, got ", dtype_name(S_dtype));
  CCP_CHECK(is_floating(a_dtype),
            "weighted_gram_: a must be float32, float64, bfloat16 or float16, got ",
            dtype_name(a_dtype));
  CCP_CHECK(S_dtype == ScalarType::Double || a_dtype != ScalarType::Double,
            "weighted_gram_: a must not be wider than S, got a float64 and S float32");
  CCP_CHECK(same_device(S, a), "weighted_gram_: a must be on the device of S, got S on ",
            device_name(S), " and a on ", device_name(a));
  CCP_CHECK(S.size(0) <= 1 || (S.stride(1) == 1 && S.stride(0) >= S.size(0)),
            "weighted_gram_: S must have contiguous rows that do not overlap, got strides [",
            S.stride(0), ", ", S.stride(1), "]");
  CCP_CHECK(!may_overlap(S, a), "weighted_gram_: a must not share memory with S");
  if (sigma) check_gram_sigma(S, a, *sigma);
}

inline WeightedGramParams weighted_gram_params(const Tensor& S, const Tensor& a,
                                               const std::optional<Tensor>& sigma) {
  const bool has_terms = a.dim() == 3;
  WeightedGramParams params{};
  params.S = S.mutable_data_ptr();
  params.a = a.const_data_ptr();
  params.channels = S.size(0);
  params.samples = a.size(0);
  params.terms = has_terms ? a.size(1) : 1;
  params.S_stride = S.stride(0);
  params.a_sample_stride = a.stride(0);
  params.a_term_stride = has_terms ? a.stride(1) : 0;
  params.a_channel_stride = a.stride(a.dim() - 1);
  if (sigma) {
    params.sigma = sigma->const_data_ptr();
    params.sigma_is_double = sigma->scalar_type() == ScalarType::Double;
    params.sigma_sample_stride = sigma->stride(0);
    params.sigma_term_stride = has_terms ? sigma->stride(1) : 0;
  }
  return params;
}

}  // namespace ccp
