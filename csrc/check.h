// Argument checks. A failed check throws std::invalid_argument, which reaches Python as an error
// whose text is exactly the message: op, argument, offending value, what is accepted.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ccp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Shape {
  explicit Shape(const Tensor& tensor) : sizes(tensor.sizes()) {}
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (size_t i = 0; i < shape.sizes.size(); ++i) out << (i ? ", " : "") << shape.sizes[i];
  return out << ']';
}

inline bool same_shape(const Tensor& a, const Tensor& b) { return a.sizes().equals(b.sizes()); }

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// The name that Python prints, without "torch."; for rarer types torch's C++ name.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string kind = tensor.is_cuda() ? "cuda:" : "device ";
  return kind + std::to_string(tensor.get_device_index());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace ccp

#define CCP_CHECK(condition, ...)               \
  do {                                          \
    if (!(condition)) ::ccp::fail(__VA_ARGS__); \
  } while (0)
