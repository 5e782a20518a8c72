// Vectors of 64 bytes in the compiler's portable notation, which it lowers to whatever the
// instruction set has. Included once per instruction set, hence no include guard.
namespace ccp::cpu::CCP_ISA {

#define CCP_INLINE inline __attribute__((always_inline))

template <class Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(64)));
};

template <class Acc>
using Vector = typename VectorOf<Acc>::type;
template <class Acc>
constexpr int kLanes = 64 / sizeof(Acc);

typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));

template <class To, class From>
CCP_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
CCP_INLINE Vector<T> load(const T* address) {
  Vector<T> value;
  __builtin_memcpy(&value, address, sizeof value);
  return value;
}

// Integers of the accumulator's width: to count with, and as masks.
template <class Acc>
using LaneInteger = std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>;
template <class Acc>
struct IntegersOf {
  typedef LaneInteger<Acc> type __attribute__((vector_size(64)));
};
template <class Acc>
using Integers = typename IntegersOf<Acc>::type;

// All bits of the lanes from `first` on, none of those before.
template <class Acc>
CCP_INLINE Integers<Acc> lanes_from(int first) {
  Integers<Acc> index;
  for (int i = 0; i < kLanes<Acc>; ++i) index[i] = i;
  return index >= first;
}

// The lanes that the mask has; zero elsewhere, even where the value is not finite.
template <class Acc>
CCP_INLINE Vector<Acc> masked(Vector<Acc> value, Integers<Acc> mask) {
  return bit_cast<Vector<Acc>>(bit_cast<Integers<Acc>>(value) & mask);
}

// The 16-bit types need the processor's own widening instructions: what the compiler makes of the
// portable notation is several times slower.
#if CCP_VECTOR_BYTES == 64

CCP_INLINE __m256i load_16_bits(const void* address) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}
// The maskz forms with a full mask are the plain ones, without GCC's false warning that their
// pass-through operand is uninitialised.
CCP_INLINE Vector<float> load(const BFloat16* address) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, load_16_bits(address));
  return bit_cast<Vector<float>>(bit_cast<U32x16>(wide) << 16);
}
CCP_INLINE Vector<float> load(const Half* address) {
  return bit_cast<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, load_16_bits(address)));
}

#elif CCP_VECTOR_BYTES == 32

CCP_INLINE __m128i load_16_bits(const void* address) {
  return _mm_loadu_si128(static_cast<const __m128i*>(address));
}
CCP_INLINE Vector<float> load(const BFloat16* address) {
  const __m256i wide[2] = {_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bits(address)), 16),
                           _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bits(address + 8)), 16)};
  return bit_cast<Vector<float>>(wide);
}
CCP_INLINE Vector<float> load(const Half* address) {
  const __m256 wide[2] = {_mm256_cvtph_ps(load_16_bits(address)),
                          _mm256_cvtph_ps(load_16_bits(address + 8))};
  return bit_cast<Vector<float>>(wide);
}

#else

CCP_INLINE U32x16 load_16_bits(const void* address) {
  U16x16 bits;
  __builtin_memcpy(&bits, address, sizeof bits);
  return __builtin_convertvector(bits, U32x16);
}
CCP_INLINE Vector<float> load(const BFloat16* address) {
  return bit_cast<Vector<float>>(load_16_bits(address) << 16);
}
// The vector form of widen(Half).
CCP_INLINE Vector<float> load(const Half* address) {
  const U32x16 bits = load_16_bits(address);
  const U32x16 magnitude = (bits & 0x7fffu) << 13;
  const U32x16 special = (magnitude >= 0x0f800000u) & 0x7f800000u;
  const Vector<float> scaled = bit_cast<Vector<float>>(magnitude) * 0x1p112f;
  return bit_cast<Vector<float>>(bit_cast<U32x16>(scaled) | special | (bits & 0x8000u) << 16);
}

#endif

// Sum of the lanes, by halving.
CCP_INLINE float sum_lanes(Vector<float> vector) {
  typedef float F8 __attribute__((vector_size(32)));
  typedef float F4 __attribute__((vector_size(16)));
  F8 eighths[2];
  __builtin_memcpy(eighths, &vector, sizeof vector);
  const F8 eight = eighths[0] + eighths[1];
  F4 quarters[2];
  __builtin_memcpy(quarters, &eight, sizeof eight);
  const F4 four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}
CCP_INLINE double sum_lanes(Vector<double> vector) {
  typedef double D4 __attribute__((vector_size(32)));
  D4 halves[2];
  __builtin_memcpy(halves, &vector, sizeof vector);
  const D4 four = halves[0] + halves[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace ccp::cpu::CCP_ISA
