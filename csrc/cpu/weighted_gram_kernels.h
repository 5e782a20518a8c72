// The CPU kernels of weighted_gram_. Included once per instruction set, hence no include guard.
#include "csrc/cpu/panels.h"

namespace ccp::cpu::CCP_ISA {

// One panel of rows [begin, begin + depth) of a, and the same times `weights` unless that is null.
// Channels beyond the last are zero.
template <class T, class Acc>
void pack_panel(const WeightedGramParams& params, const double* weights, int64_t begin,
                int64_t depth, int64_t panel, Acc* plain, Acc* weighted) {
  const int64_t first = panel * kPanel<Acc>;
  const int64_t count = std::min<int64_t>(kPanel<Acc>, params.channels - first);
  const int64_t stride = params.a_channel_stride;
  int64_t n = begin / params.terms, k = begin % params.terms;
  for (int64_t d = 0; d < depth; ++d) {
    const T* a = static_cast<const T*>(params.a) + n * params.a_sample_stride +
                 k * params.a_term_stride + first * stride;
    Acc* to = plain + d * kPanel<Acc>;
    if (stride == 1) {
      for (int64_t c = 0; c < count; ++c) to[c] = static_cast<Acc>(widen(a[c]));
    } else {
      for (int64_t c = 0; c < count; ++c) to[c] = static_cast<Acc>(widen(a[c * stride]));
    }
    std::fill(to + count, to + kPanel<Acc>, Acc{0});
    if (++k == params.terms) {
      k = 0;
      ++n;
    }
    if (weights == nullptr) continue;
    Acc* scaled = weighted + d * kPanel<Acc>;
    for (int c = 0; c < kPanel<Acc>; ++c) scaled[c] = static_cast<Acc>(weights[d] * to[c]);
  }
}

}  // namespace ccp::cpu::CCP_ISA
