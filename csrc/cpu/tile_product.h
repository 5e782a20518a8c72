// Products of two panels, [depth][kPanel] each, held in registers kTileRows rows at a time.
// Included once per instruction set, hence no include guard.
#include "csrc/cpu/vector.h"

namespace ccp::cpu::CCP_ISA {

constexpr int kTileRows = CCP_VECTOR_BYTES == 64 ? 8 : 4;  // 2 * kTileRows registers accumulate
template <class Acc>
constexpr int kPanel = 2 * CCP_VECTOR_BYTES / sizeof(Acc);

template <class Acc>
int panel_width() {
  return kPanel<Acc>;
}

template <class Acc>
CCP_INLINE Vector<Acc> multiply_add(Acc left, Vector<Acc> right, Vector<Acc> sum) {
  return sum + left * right;
}

#ifdef CCP_PAIRS
// Each word is two bfloat16 values.
template <>
CCP_INLINE Vector<float> multiply_add<float>(float left, Vector<float> right, Vector<float> sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(left), (__m512bh)right);
}
#endif

// tile[r][c] = sum over d of left[d][r] * right[d][c] for kTileRows rows and kVectors (1 or 2)
// vectors of columns; the tile's rows are kPanel apart.
template <int kVectors = 2, class Acc>
CCP_INLINE void multiply_rows(const Acc* left, const Acc* right, int64_t depth, Acc* tile) {
  Vector<Acc> acc[kTileRows][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector<Acc> column[kVectors];
    __builtin_memcpy(column, right + d * kPanel<Acc>, sizeof column);
    for (int r = 0; r < kTileRows; ++r) {
      const Acc row = left[d * kPanel<Acc> + r];
      acc[r][0] = multiply_add<Acc>(row, column[0], acc[r][0]);
      if constexpr (kVectors == 2) acc[r][1] = multiply_add<Acc>(row, column[1], acc[r][1]);
    }
  }
  if constexpr (kVectors == 2) {
    __builtin_memcpy(tile, acc, sizeof acc);
  } else {
    for (int r = 0; r < kTileRows; ++r)
      __builtin_memcpy(tile + r * kPanel<Acc>, acc[r], sizeof acc[r]);
  }
}

}  // namespace ccp::cpu::CCP_ISA
