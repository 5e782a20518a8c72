// The CPU kernels of weighted_gram_. Included once per instruction set, hence no include guard.
//
// The rows of a are taken in blocks. A block is packed into panels of kPanel channels, laid out
// [depth][kPanel]; a tile of S is the product of two panels, held in registers kTileRows rows at a
// time.
#include "csrc/cpu/tile_product.h"

namespace ccp::cpu::CCP_ISA {

// One panel of rows [begin, begin + depth) of a, and the same times `weights` unless that is null.
// Channels beyond the last are zero.
template <class T, class Acc>
void pack_panel(const WeightedGramParams& params, const double* weights, int64_t begin,
                int64_t depth, int64_t panel, Acc* plain, Acc* weighted) {
  const int64_t first = panel * kPanel<Acc>;
  const int64_t count = std::min<int64_t>(kPanel<Acc>, params.channels - first);
  const int64_t stride = params.a_channel_stride;
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t n = (begin + d) / params.terms, k = (begin + d) % params.terms;
    const T* a = static_cast<const T*>(params.a) + n * params.a_sample_stride +
                 k * params.a_term_stride + first * stride;
    Acc* to = plain + d * kPanel<Acc>;
    for (int64_t c = 0; c < count; ++c) to[c] = static_cast<Acc>(widen(a[c * stride]));
    std::fill(to + count, to + kPanel<Acc>, Acc{0});
    if (weights == nullptr) continue;
    Acc* scaled = weighted + d * kPanel<Acc>;
    for (int c = 0; c < kPanel<Acc>; ++c) scaled[c] = static_cast<Acc>(weights[d] * to[c]);
  }
}

// Adds the product of two panels to the upper triangle of S and, mirrored, to the lower one.
template <class Acc>
void add_tile(const WeightedGramParams& params, const Acc* left, const Acc* right, int64_t depth,
              TileIndex index) {
  constexpr int kSide = kPanel<Acc>;
  alignas(64) Acc tile[kSide][kSide];
  for (int r = 0; r < kSide; r += kTileRows) multiply_rows(left + r, right, depth, tile[r]);
  Acc* S = static_cast<Acc*>(params.S);
  const int64_t i0 = index.row * kSide, j0 = index.column * kSide, stride = params.S_stride;
  const int64_t rows = std::min<int64_t>(kSide, params.channels - i0);
  const int64_t columns = std::min<int64_t>(kSide, params.channels - j0);
  const bool diagonal = index.row == index.column;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = diagonal ? i : 0; j < columns; ++j)
      S[(i0 + i) * stride + j0 + j] += tile[i][j];
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < (diagonal ? j : rows); ++i) S[(j0 + j) * stride + i0 + i] += tile[i][j];
}

}  // namespace ccp::cpu::CCP_ISA
