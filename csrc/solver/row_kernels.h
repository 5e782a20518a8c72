// Loops over rows of doubles and of floats. Included once per instruction set, hence no include
// guard. Eight fixed lanes and no contraction: every instruction set gives the same bits.
namespace ccp::cpu::CCP_ISA {

using solver::Index;
using solver::kFloats;

typedef double Doubles __attribute__((vector_size(64)));
typedef long long Integers __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef float EightFloats __attribute__((vector_size(32)));
constexpr Index kLanes = 8;

#define CCP_INLINE inline __attribute__((always_inline))

CCP_INLINE Doubles load(const double* address) {
  Doubles value;
  __builtin_memcpy(&value, address, sizeof value);
  return value;
}

CCP_INLINE Floats load(const float* address) {
  Floats value;
  __builtin_memcpy(&value, address, sizeof value);
  return value;
}

CCP_INLINE Doubles load_as_doubles(const float* address) {
  EightFloats value;
  __builtin_memcpy(&value, address, sizeof value);
  return __builtin_convertvector(value, Doubles);
}

template <class Value, class Vector>
CCP_INLINE void store(Value* address, Vector value) {
  __builtin_memcpy(address, &value, sizeof value);
}

// A running minimum that remembers where; of equal values, the first.
struct Least {
  Doubles value = Doubles{} + std::numeric_limits<double>::infinity();
  Integers index = Integers{} - 1;
  Integers here = {0, 1, 2, 3, 4, 5, 6, 7};

  CCP_INLINE void take(Doubles next) {
    const Integers less = next < value;
    value = less ? next : value;
    index = less ? here : index;
    here += kLanes;
  }

  // -1 if no value was below infinity. The tail's values follow those of the lanes.
  template <class Tail>
  CCP_INLINE Index finish(Index from, Index size, const Tail& tail) const {
    double least = std::numeric_limits<double>::infinity();
    Index best = -1;
    for (Index k = 0; k < kLanes; ++k) {
      if (value[k] < least || (value[k] == least && index[k] < best)) {
        least = value[k];
        best = index[k];
      }
    }
    for (Index j = from; j < size; ++j) {
      const double next = tail(j);
      if (next < least) {
        least = next;
        best = j;
      }
    }
    return best;
  }
};

void add(Index size, double factor, const double* row, double* sum) {
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) store(sum + j, load(sum + j) + factor * load(row + j));
  for (; j < size; ++j) sum[j] += factor * row[j];
}

void add_difference(Index size, double factor, const double* plus, const double* minus,
                    double* sum) {
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    store(sum + j, load(sum + j) + factor * (load(plus + j) - load(minus + j)));
  }
  for (; j < size; ++j) sum[j] += factor * (plus[j] - minus[j]);
}

void add_float_difference(Index size, const float* plus, const float* minus, double* sum) {
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    store(sum + j, load(sum + j) + (load_as_doubles(plus + j) - load_as_doubles(minus + j)));
  }
  for (; j < size; ++j) sum[j] += static_cast<double>(plus[j]) - minus[j];
}

Index add_difference_and_find_least(Index size, double factor, const double* plus,
                                    const double* minus, const double* penalty, double* sum) {
  Least least;
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    const Doubles updated = load(sum + j) + factor * (load(plus + j) - load(minus + j));
    store(sum + j, updated);
    least.take(updated + load(penalty + j));
  }
  const auto tail = [=](Index k) {
    sum[k] += factor * (plus[k] - minus[k]);
    return sum[k] + penalty[k];
  };
  return least.finish(j, size, tail);
}

Index find_least_sum(Index size, const double* a, const double* b) {
  Least least;
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) least.take(load(a + j) + load(b + j));
  return least.finish(j, size, [=](Index k) { return a[k] + b[k]; });
}

Index find_least_difference(Index size, double factor, const double* a, const double* b) {
  Least least;
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) least.take(load(a + j) - factor * load(b + j));
  return least.finish(j, size, [=](Index k) { return a[k] - factor * b[k]; });
}

Index find_largest_gain(Index size, const GainTerms& terms) {
  constexpr double kFlat = solver::kFlatCurvature;
  Least least;
  Index j = 0;
  const Doubles zero{};
  for (; j + kLanes <= size; j += kLanes) {
    Doubles slope = load(terms.gradient + j) + load(terms.penalty + j) - terms.least;
    slope = slope > zero ? slope : zero;
    const Doubles scale = terms.diagonal_up + load(terms.diagonal + j);
    const Doubles exact = scale - 2 * load(terms.row + j);
    const Doubles floor = kFlat * (scale + kFlat);
    least.take(zero - slope * slope / (exact > floor ? exact : floor));
  }
  const auto tail = [&](Index k) {
    const double slope = std::max(terms.gradient[k] + terms.penalty[k] - terms.least, 0.0);
    const double scale = terms.diagonal_up + terms.diagonal[k];
    const double curvature = std::max(scale - 2 * terms.row[k], kFlat * (scale + kFlat));
    return -(slope * slope) / curvature;
  };
  return least.finish(j, size, tail);
}

// kHigh rows of a product, kWide vectors of each.
template <Index kHigh, Index kWide>
CCP_INLINE void add_tile(const FloatProduct& terms, Index row, Index column, Index from,
                         Index end) {
  const float* const left = terms.left + row * terms.left_stride;
  const float* const right = terms.right + column;
  float* const sum = terms.sum + row * terms.sum_stride + column;
  Floats total[kHigh][kWide];
  for (Index i = 0; i < kHigh; ++i) {
    for (Index j = 0; j < kWide; ++j) {
      total[i][j] = load(sum + i * terms.sum_stride + j * kFloats);
    }
  }
  for (Index k = from; k < end; ++k) {
    Floats line[kWide];
    for (Index j = 0; j < kWide; ++j) line[j] = load(right + k * terms.right_stride + j * kFloats);
    for (Index i = 0; i < kHigh; ++i) {
      const float factor = left[i * terms.left_stride + k];
      for (Index j = 0; j < kWide; ++j) total[i][j] += factor * line[j];
    }
  }
  for (Index i = 0; i < kHigh; ++i) {
    for (Index j = 0; j < kWide; ++j) {
      store(sum + i * terms.sum_stride + j * kFloats, total[i][j]);
    }
  }
}

template <Index kHigh, Index kWide>
CCP_INLINE void add_columns(const FloatProduct& terms, Index column, Index from, Index end) {
  Index row = 0;
  for (; row + kHigh <= terms.rows; row += kHigh) {
    add_tile<kHigh, kWide>(terms, row, column, from, end);
  }
  for (; row < terms.rows; ++row) add_tile<1, kWide>(terms, row, column, from, end);
}

// A panel of the right matrix stays in the cache for all rows of the left one, a tile of the sum in
// the registers for a panel.
void add_product(const FloatProduct& terms) {
  constexpr Index kPanel = 128;
  constexpr Index kHigh = CCP_VECTOR_BYTES == 64 ? 8 : 4;
  constexpr Index kWide = CCP_VECTOR_BYTES == 64 ? 3 : 1;
  for (Index from = 0; from < terms.count; from += kPanel) {
    const Index end = std::min(from + kPanel, terms.count);
    Index column = 0;
    for (; column + kWide * kFloats <= terms.width; column += kWide * kFloats) {
      add_columns<kHigh, kWide>(terms, column, from, end);
    }
    for (; column < terms.width; column += kFloats) {
      add_columns<kHigh, 1>(terms, column, from, end);
    }
  }
}

void move_multipliers(Index size, float step, float share, const float* products,
                      const float* given, float* modified, float* mean) {
  for (Index j = 0; j < size; ++j) {
    const float moved = given[j] - modified[j] - step * products[j];
    const float after = moved > 0 ? moved : 0;
    modified[j] = given[j] - after;
    mean[j] += share * (after - mean[j]);
  }
}

double dot(Index size, const double* a, const double* b) {
  Doubles lanes{};
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) lanes += load(a + j) * load(b + j);
  double total = 0;
  for (; j < size; ++j) total += a[j] * b[j];
  for (Index k = 0; k < kLanes; ++k) total += lanes[k];
  return total;
}

double absolute_sum(Index size, const double* row) {
  Doubles lanes{};
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    const Doubles value = load(row + j);
    lanes += value < 0 ? -value : value;
  }
  double total = 0;
  for (; j < size; ++j) total += std::abs(row[j]);
  for (Index k = 0; k < kLanes; ++k) total += lanes[k];
  return total;
}

double largest(Index size, const double* row) {
  double most = -std::numeric_limits<double>::infinity();
  Doubles lanes = Doubles{} + most;
  Index j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    const Doubles value = load(row + j);
    lanes = value > lanes ? value : lanes;
  }
  for (; j < size; ++j) most = std::max(most, row[j]);
  for (Index k = 0; k < kLanes; ++k) most = std::max(most, lanes[k]);
  return most;
}

solver::RowKernels row_kernels() {
  return {add,
          add_difference,
          add_float_difference,
          add_difference_and_find_least,
          find_least_sum,
          find_least_difference,
          find_largest_gain,
          add_product,
          move_multipliers,
          dot,
          absolute_sum,
          largest};
}

#undef CCP_INLINE

}  // namespace ccp::cpu::CCP_ISA
