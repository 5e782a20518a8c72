// From torch's run-time dtype to the kernels' element type.
#pragma once

#include <utility>

#include "csrc/check.h"
#include "csrc/math.h"

namespace ccp {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the element type of `dtype`, one of the four that is_floating accepts.
template <class F>
decltype(auto) dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    default:
      fail("unsupported dtype ", dtype_name(dtype));
  }
}

}  // namespace ccp
