// The CPU kernels of map_similarity. Included once per instruction set, hence no include guard.
//
// The maps of a sample are packed into panels of kPanel maps, laid out [position][kPanel], each map
// centred by its mean and followed by its terms; a tile of similarities is then made from the
// product of two panels.
#include "csrc/cpu/tile_product.h"
// After it.
#include "csrc/cpu/transpose.h"
// After both of them.
#include "csrc/cpu/pack_run.h"

namespace ccp::cpu::CCP_ISA {

// Positions summed before the sum joins the others, so that rounding errors stay small.
constexpr int64_t kSumBlock = 128;

constexpr int kTermRows = 3;  // of a packed panel: offsets, means, spreads

template <class Acc>
CCP_INLINE MapTerms<Acc> terms_of(const Acc* terms, int map) {
  return {0, terms[map], terms[kPanel<Acc> + map], terms[2 * kPanel<Acc> + map]};
}

// Elements of a packed panel.
template <class Acc>
int64_t packed_size(int64_t positions) {
  return (positions + kTermRows) * kPanel<Acc>;
}

template <int kVectors, class Acc>
struct PanelSums {
  Vector<Acc> first[kVectors], second[kVectors];

  CCP_INLINE PanelSums& operator+=(const PanelSums& other) {
    for (int h = 0; h < kVectors; ++h) {
      first[h] += other.first[h];
      second[h] += other.second[h];
    }
    return *this;
  }
};

// Sums over the positions, in blocks, of what visit(position's values, block's sums) adds.
template <int kVectors, class Acc, class Visit>
CCP_INLINE PanelSums<kVectors, Acc> sum_positions(Acc* panel, int64_t positions, Visit visit) {
  PanelSums<kVectors, Acc> total{};
  for (int64_t begin = 0; begin < positions; begin += kSumBlock) {
    const int64_t end = std::min(begin + kSumBlock, positions);
    PanelSums<kVectors, Acc> block{};
    for (int64_t p = begin; p < end; ++p) {
      Vector<Acc> values[kVectors];
      __builtin_memcpy(values, panel + p * kPanel<Acc>, sizeof values);
      visit(values, block);
      __builtin_memcpy(panel + p * kPanel<Acc>, values, sizeof values);
    }
    total += block;
  }
  return total;
}

// Subtracts from each map its mean and multiplies by `scale`. The mean is found relative to the
// map's first value, so that a constant map becomes exactly zero; what rounding left of it in the
// centred map is corrected for (Chan, Golub and LeVeque, 1983).
template <int kVectors, class Acc>
CCP_INLINE void centre(SimilarityKind kind, Acc scale, Acc* panel, int64_t positions) {
  Vector<Acc> origin[kVectors];
  __builtin_memcpy(origin, panel, sizeof origin);
  const auto add_differences = [&](Vector<Acc>(&values)[kVectors], PanelSums<kVectors, Acc>& sums)
                                   __attribute__((always_inline)) {
                                     for (int h = 0; h < kVectors; ++h)
                                       sums.first[h] += values[h] - origin[h];
                                   };
  const Acc count = static_cast<Acc>(positions);
  const PanelSums<kVectors, Acc> differences =
      sum_positions<kVectors>(panel, positions, add_differences);
  Vector<Acc> mean[kVectors];
  for (int h = 0; h < kVectors; ++h) mean[h] = origin[h] + differences.first[h] / count;
  const auto centre_values = [&](Vector<Acc>(&values)[kVectors], PanelSums<kVectors, Acc>& sums)
                                 __attribute__((always_inline)) {
                                   for (int h = 0; h < kVectors; ++h) {
                                     values[h] = (values[h] - mean[h]) * scale;
                                     sums.first[h] += values[h];
                                     sums.second[h] += values[h] * values[h];
                                   }
                                 };
  const PanelSums<kVectors, Acc> centred = sum_positions<kVectors>(panel, positions, centre_values);
  Acc* terms = panel + positions * kPanel<Acc>;
  for (int map = 0; map < kVectors * kLanes<Acc>; ++map) {
    const int h = map / kLanes<Acc>, lane = map % kLanes<Acc>;
    const Acc offset = centred.first[h][lane] / count;
    const Acc variance = at_least(Acc{0}, centred.second[h][lane] / count - offset * offset);
    const Acc needed_mean = map_mean(kind, mean[h][lane] * scale, offset);
    terms[map] = offset;
    terms[kPanel<Acc> + map] = needed_mean;
    terms[2 * kPanel<Acc> + map] = map_spread(kind, needed_mean, variance);
  }
}

// Which of the two tensors: the members of ChannelDotParams and Dim that describe it.
struct MapSide {
  const void* ChannelDotParams::* data;
  int64_t Dim::* stride;
};

CCP_INLINE MapSide map_side(bool right) {
  return right ? MapSide{&ChannelDotParams::g, &Dim::g_stride}
               : MapSide{&ChannelDotParams::x, &Dim::x_stride};
}

// Packs the maps of one panel of one sample of x, or of g if `right`; maps beyond the last are
// zero up to a whole vector, and without meaning from there on.
template <class T>
void pack_maps(const MapSimilarityParams& params, bool right, int64_t sample, int64_t panel,
               Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  const ChannelDotLayout& layout = params.maps.layout;
  const MapSide side = map_side(right);
  const auto stride = [&](const Dim& dim) { return dim.*side.stride; };
  const int64_t first = panel * kPanel<Acc>;
  const int64_t channels = std::min<int64_t>(kPanel<Acc>, layout.channel.size - first);
  if (channels % kLanes<Acc> != 0) std::fill(to, to + layout.positions * kPanel<Acc>, Acc{0});
  const T* maps = static_cast<const T*>(params.maps.*side.data) + sample * stride(layout.sample) +
                  first * stride(layout.channel);
  const int64_t length = layout.innermost().size;
  for (int64_t begin = 0; begin < layout.positions; begin += length) {
    int64_t offset = 0, index = begin / length;
    for (int d = layout.position_dims - 2; d >= 0; --d) {
      offset += index % layout.position[d].size * stride(layout.position[d]);
      index /= layout.position[d].size;
    }
    pack_run(maps + offset, stride(layout.channel), stride(layout.innermost()), length, channels,
             to + begin * kPanel<Acc>);
  }
  const Acc scale = static_cast<Acc>(params.scale);
  if (channels <= kLanes<Acc>) {
    centre<1>(params.kind, scale, to, layout.positions);
  } else {
    centre<2>(params.kind, scale, to, layout.positions);
  }
}

constexpr int64_t kProductDepth = 128;  // two panels of this depth fit in the first cache

// add_similarities for the first kVectors vectors of columns.
template <SimilarityKind kind, int kVectors, class Acc>
CCP_INLINE void add_columns(const Acc* left, const Acc* right, int64_t positions, int64_t rows,
                            bool diagonal, Acc* sums) {
  constexpr int kSide = kPanel<Acc>, kColumns = kVectors * kLanes<Acc>;
  alignas(64) Acc products[kSide][kColumns] = {};
  for (int64_t begin = 0; begin < positions; begin += kProductDepth) {
    const int64_t depth = std::min(kProductDepth, positions - begin);
    for (int r = 0; r < rows; r += kTileRows) {
      alignas(64) Acc block[kTileRows][kSide];
      multiply_rows<kVectors>(left + begin * kSide + r, right + begin * kSide, depth, block[0]);
      for (int i = 0; i < kTileRows; ++i)
        for (int c = 0; c < kColumns; ++c) products[r + i][c] += block[i][c];
    }
  }
  const Acc* left_terms = left + positions * kSide;
  const Acc* right_terms = right + positions * kSide;
  const Acc per_position = 1 / static_cast<Acc>(positions);
  for (int r = 0; r < rows; ++r) {
    const MapTerms<Acc> terms = terms_of(left_terms, r);
    alignas(64) Acc row[kColumns];
    for (int c = 0; c < kColumns; ++c)
      row[c] = similarity<kind>(terms, terms_of(right_terms, c), products[r][c], per_position);
    if (diagonal) row[r] = self_similarity<kind>(terms);
    for (int c = 0; c < kColumns; ++c) sums[r * kSide + c] += row[c];
  }
}

// sums[r][c] += the similarity of map r of the left panel, one of its first `rows`, and map c of
// the right one, one of its first `columns`; on the diagonal of a symmetric result, of each map
// with itself.
template <SimilarityKind kind, class Acc>
void add_similarities(const Acc* left, const Acc* right, int64_t positions, int64_t rows,
                      int64_t columns, bool diagonal, Acc* sums) {
  if (columns <= kLanes<Acc>) {
    add_columns<kind, 1>(left, right, positions, rows, diagonal, sums);
  } else {
    add_columns<kind, 2>(left, right, positions, rows, diagonal, sums);
  }
}

}  // namespace ccp::cpu::CCP_ISA
