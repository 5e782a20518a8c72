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

CCP_INLINE U32x16 load_u16(const void* address) {
  U16x16 bits;
  __builtin_memcpy(&bits, address, sizeof bits);
  return __builtin_convertvector(bits, U32x16);
}

CCP_INLINE Vector<float> load(const BFloat16* address) {
  return bit_cast<Vector<float>>(load_u16(address) << 16);
}

// The vector form of widen(Half).
CCP_INLINE Vector<float> load(const Half* address) {
  const U32x16 bits = load_u16(address);
  const U32x16 magnitude = (bits & 0x7fffu) << 13;
  const U32x16 special = (magnitude >= 0x0f800000u) & 0x7f800000u;
  const Vector<float> scaled = bit_cast<Vector<float>>(magnitude) * 0x1p112f;
  return bit_cast<Vector<float>>(bit_cast<U32x16>(scaled) | special | (bits & 0x8000u) << 16);
}

// Pairwise sum of the lanes.
template <class Acc>
CCP_INLINE Acc sum_lanes(Vector<Acc> vector) {
  Acc lanes[kLanes<Acc>];
  __builtin_memcpy(lanes, &vector, sizeof vector);
  for (int width = kLanes<Acc> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace ccp::cpu::CCP_ISA
