// Vectors as wide as the registers, in the compiler's portable notation. (Wider ones it would keep
// in memory.) Included once per instruction set, hence no include guard.
namespace ccp::cpu::CCP_ISA {

#define CCP_INLINE inline __attribute__((always_inline))

template <class Element, int kBytes = CCP_VECTOR_BYTES>
struct VectorOf {
  static_assert(std::is_arithmetic_v<Element>);
  typedef Element type __attribute__((vector_size(kBytes)));
};

template <class Acc>
using Vector = typename VectorOf<Acc>::type;
template <class Acc>
constexpr int kLanes = CCP_VECTOR_BYTES / sizeof(Acc);

template <class To, class From>
CCP_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Integers of the accumulator's width: to count with, and as masks.
template <class Acc>
using LaneInteger = std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>;
template <class Acc>
using Integers = Vector<LaneInteger<Acc>>;

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

template <class Acc, class = std::enable_if_t<std::is_arithmetic_v<Acc>>>
CCP_INLINE Vector<Acc> load(const Acc* address) {
  Vector<Acc> value;
  __builtin_memcpy(&value, address, sizeof value);
  return value;
}
template <class Acc>
CCP_INLINE void store(Acc* address, Vector<Acc> value) {
  __builtin_memcpy(address, &value, sizeof value);
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
  return bit_cast<Vector<float>>(bit_cast<Vector<uint32_t>>(wide) << 16);
}
CCP_INLINE Vector<float> load(const Half* address) {
  return bit_cast<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, load_16_bits(address)));
}

#elif CCP_VECTOR_BYTES == 32

CCP_INLINE __m128i load_16_bits(const void* address) {
  return _mm_loadu_si128(static_cast<const __m128i*>(address));
}
CCP_INLINE Vector<float> load(const BFloat16* address) {
  return bit_cast<Vector<float>>(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bits(address)), 16));
}
CCP_INLINE Vector<float> load(const Half* address) {
  return bit_cast<Vector<float>>(_mm256_cvtph_ps(load_16_bits(address)));
}

#else

CCP_INLINE Vector<uint32_t> load_16_bits(const void* address) {
  VectorOf<uint16_t, CCP_VECTOR_BYTES / 2>::type bits;
  __builtin_memcpy(&bits, address, sizeof bits);
  return __builtin_convertvector(bits, Vector<uint32_t>);
}
CCP_INLINE Vector<float> load(const BFloat16* address) {
  return bit_cast<Vector<float>>(load_16_bits(address) << 16);
}
// The vector form of widen(Half).
CCP_INLINE Vector<float> load(const Half* address) {
  const Vector<uint32_t> bits = load_16_bits(address);
  const Vector<uint32_t> magnitude = (bits & 0x7fffu) << 13;
  const Vector<uint32_t> special = (magnitude >= 0x0f800000u) & 0x7f800000u;
  const Vector<float> scaled = bit_cast<Vector<float>>(magnitude) * 0x1p112f;
  return bit_cast<Vector<float>>(bit_cast<Vector<uint32_t>>(scaled) | special |
                                 (bits & 0x8000u) << 16);
}

#endif

// Sum of the lanes, by halving.
template <class Acc, int kBytes = CCP_VECTOR_BYTES>
CCP_INLINE Acc sum_lanes(typename VectorOf<Acc, kBytes>::type vector) {
  if constexpr (kBytes == sizeof(Acc)) {
    return vector[0];
  } else {
    typename VectorOf<Acc, kBytes / 2>::type halves[2];
    __builtin_memcpy(halves, &vector, sizeof vector);
    return sum_lanes<Acc, kBytes / 2>(halves[0] + halves[1]);
  }
}

}  // namespace ccp::cpu::CCP_ISA
