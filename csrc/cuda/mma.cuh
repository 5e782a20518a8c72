// The matrix units, their fragment loads and asynchronous copies: each instruction is one function
// with two bodies, PTX for nvcc and a collective of the warp for the emulator. For sm_80 and later.
//
// A fragment is a small matrix spread over the 32 lanes of a warp. With g = lane / 4, t = lane % 4
// and E elements in a 32-bit register (2 of bfloat16 and float16, 1 of float32), D = 8 * E deep:
//   A, 16 x D: register r holds row g + 8 * (r % 2), columns E * t + 4 * E * (r / 2) and following;
//   B, D x 8:  register r holds rows E * t + 4 * E * r and following, column g;
//   C, 16 x 8: element i is in row g + 8 * (i / 2), column 2 * t + i % 2.
// All lanes of the warp must call together, and pass fragments of the same matrices.
#pragma once

#include "csrc/math.h"

namespace ccp {

// The depth D of one matrix product of elements of type T.
template <class T>
constexpr int kMmaDepth = 32 / sizeof(T);

#ifdef __CUDACC__

// C += A * B with float32 accumulation; the products are exact.
template <class T>
__device__ __forceinline__ void mma_16_bit(float (&c)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2);
  if constexpr (kIsBFloat16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// C += A * B for float32 values of which the unit uses 11 significant bits (TF32).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// `value` rounded to TF32.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Loads four matrices of 8 rows of 16 bytes from shared memory: lane l gives the address of row
// l % 8 of matrix l / 8, aligned to 16 bytes; register m receives bytes 4 * t to 4 * t + 3 of row g
// of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same, transposing matrices of 8 x 8 elements of 16 bits: register m receives rows 2 * t and
// 2 * t + 1 of column g.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Begins to copy the first `bytes` of kBytes from global to shared memory, and to write zeros in
// place of the others. Both addresses are aligned to kBytes. What is written may be read by this
// thread after wait_for_copies, by others after a barrier that follows.
template <int kBytes>
__device__ __forceinline__ void copy_part_async(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Begins to copy 16 bytes, or to write zeros unless `valid`: without a number of bytes, which takes
// six instructions more. Both addresses are aligned to 16 bytes.
__device__ __forceinline__ void copy_or_zero_async(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{.reg .pred invalid; setp.eq.u32 invalid, %2, 0; "
      "cp.async.cg.shared.global [%0], [%1], 16, invalid;}" ::"r"(to),
      "l"(global), "r"(static_cast<uint32_t>(valid))
      : "memory");
}

// Ends a group of copies of this thread; a group may be empty.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the latest kPending groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else  // in the emulator

struct MmaOperands {
  uint32_t a[4], b[2];
};

// kElements to a register; element(register, index) widens one of them.
template <int kElements, class Element>
void emulate_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Element element) {
  constexpr int kHalf = 4 * kElements;  // of the depth
  MmaOperands mine;
  memcpy(mine.a, a, sizeof a);
  memcpy(mine.b, b, sizeof b);
  const auto warp = emu::gather(mine);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row_register = i / 2, column = 2 * t + i % 2;
    double sum = 0;
    for (int k = 0; k < 2 * kHalf; ++k) {
      const int owner = k % kHalf / kElements, half = k / kHalf;
      const MmaOperands& left = warp[4 * g + owner];
      const MmaOperands& right = warp[4 * column + owner];
      sum += element(left.a[2 * half + row_register], k % kElements) *
             element(right.b[half], k % kElements);
    }
    c[i] = static_cast<float>(c[i] + sum);
  }
}

template <class T>
void mma_16_bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2);
  emulate_mma<2>(c, a, b, [](uint32_t bits, int index) {
    return static_cast<double>(widen(T{static_cast<uint16_t>(bits >> 16 * index)}));
  });
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma<1>(c, a, b, [](uint32_t bits, int) {
    return static_cast<double>(float_from_bits(bits & 0xffffe000u));
  });
}

inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = bits_from_float(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

// What each lane of the warp passed.
inline auto gather_matrix_rows(const void* row) {
  emu::require_aligned(row, 16, "a matrix row");
  return emu::gather(static_cast<const char*>(row));
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto rows = gather_matrix_rows(row);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int m = 0; m < 4; ++m) memcpy(&r[m], rows[8 * m + g] + 4 * t, sizeof r[m]);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto rows = gather_matrix_rows(row);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t low, high;
    memcpy(&low, rows[8 * m + 2 * t] + 2 * g, sizeof low);
    memcpy(&high, rows[8 * m + 2 * t + 1] + 2 * g, sizeof high);
    r[m] = low | static_cast<uint32_t>(high) << 16;
  }
}

template <int kBytes>
void copy_part_async(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emu::require_aligned(global, kBytes, "the source of a copy");
  emu::require_aligned(shared, kBytes, "the target of a copy");
  emu::begin_copy(shared, global, bytes, kBytes);
}

inline void copy_or_zero_async(void* shared, const void* global, bool valid) {
  copy_part_async<16>(shared, global, valid ? 16 : 0);
}

inline void commit_copies() { emu::commit_copies(); }

template <int kPending>
void wait_for_copies() {
  emu::finish_copies(kPending);
}

#endif

// All kBytes, or zeros unless `valid`.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  copy_part_async<kBytes>(shared, global, valid ? kBytes : 0);
}

// A float32 value as the sum of two numbers, to within 2^-21 of it by the 11 bits that the matrix
// units use of each. Without round_to_tf32, which takes as many instructions as all of this and
// keeps every NaN; here `big` loses some, but `small` is NaN then.
struct Tf32Pair {
  uint32_t big, small;
};

__device__ __forceinline__ Tf32Pair split_tf32(float value) {
  const uint32_t big = (bits_from_float(value) + 0x1000u) & 0xffffe000u;
  return {big, bits_from_float(value - float_from_bits(big))};
}

}  // namespace ccp
