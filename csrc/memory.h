// Which memory a tensor covers.
#pragma once

#include "csrc/check.h"

namespace ccp {

struct ByteRange {
  const char* begin;
  const char* end;
};

// From the first byte of a tensor to the one after its last; strides are not negative.
inline ByteRange byte_range(const Tensor& tensor) {
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

inline bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const ByteRange first = byte_range(a), second = byte_range(b);
  return first.begin < second.end && second.begin < first.end;
}

}  // namespace ccp
