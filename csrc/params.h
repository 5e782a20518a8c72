// What the kernels receive: plain data, all strides in elements.
#pragma once

#include "csrc/layout.h"
#include "csrc/math.h"
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

// Maps whose patches are the columns of a matrix P: one row per sample and output position, one
// column per (channel, kernel row, kernel column) in this order. Beyond the map's border P is zero.
struct PatchSource {
  const void* data;  // [samples, groups * channels, height, width]
  int64_t channels;  // of one group
  int64_t size[2];   // height and width; also below, the vertical comes first
  int64_t sample_stride, channel_stride, position_stride[2];
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  CCP_HD int64_t columns() const { return channels * kernel[0] * kernel[1]; }
};

// Per group, out += left^T right, the sums running over all samples and output positions.
struct PatchProductParams {
  void* out;  // [groups, left columns, right columns], unit column stride
  int64_t out_group_stride, out_row_stride;
  PatchSource left, right;
  bool symmetric;  // left and right are the same: the upper triangle is computed and mirrored
  int64_t groups, samples;
  int64_t positions[2];  // of the output

  CCP_HD int64_t rows() const { return samples * positions[0] * positions[1]; }
};

}  // namespace ccp
