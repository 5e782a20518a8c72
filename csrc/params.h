// What the kernels receive: plain data, all strides in elements.
#pragma once

#include "csrc/layout.h"
#include "csrc/moments.h"
#include "csrc/similarity.h"

namespace ccp {

struct ChannelDotParams {
  const void* x;
  const void* g;
  void* out;  // [N, C] contiguous, in the accumulator's type
  ChannelDotLayout layout;
};

// S += sum over samples n and terms k of sigma[n, k] * a[n, k, :] a[n, k, :]^T.
struct WeightedGramParams {
  void* S;            // [channels, channels], unit column stride
  const void* a;      // [samples, terms, channels]
  const void* sigma;  // [samples, terms], or null for all ones
  bool sigma_is_double;
  int64_t channels, samples, terms;
  int64_t S_stride;
  int64_t a_sample_stride, a_term_stride, a_channel_stride;
  int64_t sigma_sample_stride, sigma_term_stride;
};

// The moments of every channel over all samples and positions.
struct ChannelMomentsParams {
  const void* x;
  double* out;  // [kMomentRows, C] contiguous
  // Without samples: they are positions here. Both strides of a dimension are those of x.
  ChannelDotLayout layout;
};

// Means over the samples of the similarity between map i of x and map j of g, or of x itself.
struct MapSimilarityParams {
  ChannelDotParams maps;  // out is [C, C], contiguous; g is x if symmetric
  bool symmetric;
  SimilarityKind kind;
  double scale;  // map_scale
  bool allow_tf32;
};

}  // namespace ccp
