// Checks and parameters of weighted_gram_ and weighted_grams_, common to every device.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "csrc/check.h"
#include "csrc/memory.h"
#include "csrc/params.h"

namespace ccp {

// The arguments of one call; weighted_gram_ is the call with one layer.
struct GramArguments {
  const char* op;
  std::vector<Tensor> S, a;
  std::vector<Tensor> sigma;  // empty: all ones
  bool grouped;               // whether messages name the layer
};

inline GramArguments single_gram(const Tensor& S, const Tensor& a,
                                 const std::optional<Tensor>& sigma) {
  GramArguments call{"weighted_gram_", {S}, {a}, {}, false};
  if (sigma) call.sigma.push_back(*sigma);
  return call;
}

inline GramArguments grouped_grams(const std::vector<Tensor>& S, const std::vector<Tensor>& a,
                                   const std::optional<std::vector<Tensor>>& sigma) {
  CCP_CHECK(!sigma || sigma->size() == S.size(),
            "weighted_grams_: sigma must have one tensor per matrix of S, got ", sigma->size(),
            " for ", S.size());
  return {"weighted_grams_", S, a, sigma.value_or(std::vector<Tensor>{}), true};
}

// What messages about a layer begin with: "weighted_grams_: layer 3: ".
struct GramLayerName {
  const GramArguments& call;
  size_t layer;
};

inline std::ostream& operator<<(std::ostream& out, const GramLayerName& name) {
  out << name.call.op << ": ";
  return name.call.grouped ? out << "layer " << name.layer << ": " : out;
}

inline void check_gram_sigma(const GramLayerName& name, const Tensor& S, const Tensor& a,
                             const Tensor& sigma) {
  const auto expected = a.sizes().slice(0, a.dim() - 1);
  CCP_CHECK(sigma.sizes().equals(expected), name, "sigma must have one value per row of a ",
            Shape(a), ", shape a.shape[:-1], got ", Shape(sigma));
  const ScalarType dtype = sigma.scalar_type();
  CCP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
            "sigma must be float32 or float64, got ", dtype_name(dtype));
  CCP_CHECK(same_device(S, sigma), name, "sigma must be on the device of S, got S on ",
            device_name(S), " and sigma on ", device_name(sigma));
}

inline void check_gram_layer(const GramLayerName& name, const Tensor& S, const Tensor& a) {
  CCP_CHECK(S.dim() == 2 && S.size(0) == S.size(1), name, "S must be a square matrix [C, C], got ",
            Shape(S));
  CCP_CHECK(a.dim() == 2 || a.dim() == 3, name, "a must be [N, C] or [N, K, C], got ", Shape(a));
  CCP_CHECK(a.size(a.dim() - 1) == S.size(0), name, "a must have as many channels as S, got a ",
            Shape(a), " and S ", Shape(S));
  const ScalarType S_dtype = S.scalar_type(), a_dtype = a.scalar_type();
  CCP_CHECK(S_dtype == ScalarType::Float || S_dtype == ScalarType::Double, name,
            "S must be float32 or float64, got ", dtype_name(S_dtype));
  CCP_CHECK(is_floating(a_dtype), name, "a must be float32, float64, bfloat16 or float16, got ",
            dtype_name(a_dtype));
  CCP_CHECK(S_dtype == ScalarType::Double || a_dtype != ScalarType::Double, name,
            "a must not be wider than S, got a float64 and S float32");
  CCP_CHECK(same_device(S, a), name, "a must be on the device of S, got S on ", device_name(S),
            " and a on ", device_name(a));
  CCP_CHECK(S.size(0) <= 1 || (S.stride(1) == 1 && S.stride(0) >= S.size(0)), name,
            "S must have contiguous rows that do not overlap, got strides [", S.stride(0), ", ",
            S.stride(1), "]");
}

// One kernel serves all layers, hence one dtype of S, one of a, and one device.
inline void check_alike(const GramLayerName& name, const Tensor& tensor, const Tensor& first,
                        const char* argument) {
  CCP_CHECK(tensor.scalar_type() == first.scalar_type(), name, argument,
            " must have the dtype of layer 0's, got ", dtype_name(tensor.scalar_type()), " and ",
            dtype_name(first.scalar_type()));
  CCP_CHECK(same_device(tensor, first), name, argument, " must be on the device of layer 0's, got ",
            device_name(tensor), " and ", device_name(first));
}

// No two S may share memory, nor any S with an input: the order of the additions would matter.
inline void check_gram_memory(const GramArguments& call) {
  std::vector<ByteRange> written;
  for (const Tensor& S : call.S)
    if (S.numel() != 0) written.push_back(byte_range(S));
  std::sort(written.begin(), written.end(),
            [](const ByteRange& x, const ByteRange& y) { return x.begin < y.begin; });
  for (size_t i = 1; i < written.size(); ++i)
    CCP_CHECK(written[i - 1].end <= written[i].begin, call.op,
              ": no two matrices of S may share memory");
  const auto check = [&](const std::vector<Tensor>& inputs, const char* argument) {
    for (size_t layer = 0; layer < inputs.size(); ++layer) {
      const ByteRange read = byte_range(inputs[layer]);
      const auto next =
          std::partition_point(written.begin(), written.end(),
                               [&](const ByteRange& range) { return range.end <= read.begin; });
      CCP_CHECK(read.begin == read.end || next == written.end() || read.end <= next->begin,
                GramLayerName{call, layer}, argument, " must not share memory with S");
    }
  };
  check(call.a, "a");
  check(call.sigma, "sigma");
}

inline void check_weighted_grams(const GramArguments& call) {
  CCP_CHECK(call.a.size() == call.S.size(), call.op,
            ": a must have one tensor per matrix of S, got ", call.a.size(), " for ",
            call.S.size());
  for (size_t layer = 0; layer < call.S.size(); ++layer) {
    const GramLayerName name{call, layer};
    check_gram_layer(name, call.S[layer], call.a[layer]);
    if (!call.sigma.empty())
      check_gram_sigma(name, call.S[layer], call.a[layer], call.sigma[layer]);
    check_alike(name, call.S[layer], call.S[0], "S");
    check_alike(name, call.a[layer], call.a[0], "a");
  }
  check_gram_memory(call);
}

inline WeightedGramParams weighted_gram_params(const Tensor& S, const Tensor& a,
                                               const Tensor* sigma) {
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

// The layers that have something to add.
inline std::vector<WeightedGramParams> weighted_gram_layers(const GramArguments& call) {
  std::vector<WeightedGramParams> layers;
  for (size_t i = 0; i < call.S.size(); ++i)
    if (call.a[i].numel() != 0)
      layers.push_back(weighted_gram_params(call.S[i], call.a[i],
                                            call.sigma.empty() ? nullptr : &call.sigma[i]));
  return layers;
}

}  // namespace ccp
