// The emulated instructions of mma.cuh. Arguments: number of schedules, and optionally a defect to
// plant: "early-read" reads what was copied before it has arrived, "drop-barrier" 1 before others
// have waited for theirs, "misaligned" accesses what its next argument names one element off,
// "early-sums" writes a warpgroup's sums before their products are made, "other-operands"
// multiplies other matrices in one warp than in the others.
#include "cuda_emu.h"
// After the emulator, whose macros the kernels need.
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/shared.cuh"
#include "csrc/cuda/vec.cuh"
#include "csrc/cuda/wgmma.cuh"
#include "testing.h"

namespace {

constexpr int kDepth = 64;  // of the test's matrices
constexpr int kSide = 16;   // rows of A, columns of B

enum class Loads { kRows, kTransposed };

template <class T>
void add_product(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2) {
    ccp::mma_16_bit<T>(c, a, b);
  } else {
    uint32_t small_a[4], big_a[4], small_b[2], big_b[2];
    for (int i = 0; i < 4; ++i) {
      const ccp::Tf32Pair pair = ccp::split_tf32(ccp::float_from_bits(a[i]));
      big_a[i] = pair.big;
      small_a[i] = pair.small;
    }
    for (int i = 0; i < 2; ++i) {
      const ccp::Tf32Pair pair = ccp::split_tf32(ccp::float_from_bits(b[i]));
      big_b[i] = pair.big;
      small_b[i] = pair.small;
    }
    ccp::mma_tf32(c, small_a, big_b);
    ccp::mma_tf32(c, big_a, small_b);
    ccp::mma_tf32(c, big_a, big_b);
  }
}

// C[16, 16] = A * B for A [16, kDepth] and B [kDepth, 16]. kRows: `a` is A and `b` is B transposed,
// both [16][kDepth]; kTransposed: `a` is A transposed and `b` is B, both [kDepth][16].
template <class T, Loads kLoads>
void multiply(const T* a, const T* b, bool early_read, float* out) {
  constexpr int kColumns = kLoads == Loads::kRows ? kDepth : kSide;
  constexpr int kUnit = 16 / sizeof(T), kUnits = kSide * kDepth / kUnit;
  alignas(16) __shared__ T left[kSide * kDepth / kColumns][kColumns];
  alignas(16) __shared__ T right[kSide * kDepth / kColumns][kColumns];
  const auto copy = [](T* to, const T* from) {
    for (int unit = threadIdx.x; unit < kUnits; unit += 32)
      ccp::copy_async<16>(to + unit * kUnit, from + unit * kUnit, true);
    ccp::commit_copies();
  };
  copy(&left[0][0], a);
  copy(&right[0][0], b);
  if (early_read) {
    ccp::wait_for_copies<1>();
  } else {
    ccp::wait_for_copies<0>();
  }
  __syncthreads();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float c[2][4] = {};
  for (int k = 0; k < kDepth; k += ccp::kMmaDepth<T>) {
    uint32_t fragment_a[4], fragment_b[4];
    if constexpr (kLoads == Loads::kRows) {
      ccp::load_matrices(fragment_a, &left[lane % 16][k + lane / 16 * kUnit]);
      ccp::load_matrices(fragment_b, &right[lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * kUnit]);
    } else {
      ccp::load_matrices_transposed(fragment_a,
                                    &left[k + lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
      ccp::load_matrices_transposed(fragment_b, &right[k + lane % 16][lane / 16 * 8]);
    }
    add_product<T>(c[0], fragment_a, {fragment_b[0], fragment_b[1]});
    add_product<T>(c[1], fragment_a, {fragment_b[2], fragment_b[3]});
  }
  for (int tile = 0; tile < 2; ++tile)
    for (int i = 0; i < 4; ++i)
      out[(g + 8 * (i / 2)) * kSide + 8 * tile + 2 * t + i % 2] = c[tile][i];
}

template <class T, Loads kLoads>
void check_product(const std::string& name, unsigned seed, bool early_read) {
  std::mt19937 random(seed);
  const auto a = testing::random_values<T>(kSide * kDepth, random);
  const auto b = testing::random_values<T>(kSide * kDepth, random);
  auto c = testing::unwritten<float>(kSide * kSide);
  emu::launch(1, 32, seed, multiply<T, kLoads>, a.data(), b.data(), early_read, c.data());
  const auto at = [](const std::vector<T>& matrix, int side, int depth) {
    return static_cast<double>(
        ccp::widen(matrix[kLoads == Loads::kRows ? side * kDepth + depth : depth * kSide + side]));
  };
  for (int m = 0; m < kSide; ++m) {
    for (int n = 0; n < kSide; ++n) {
      double sum = 0, magnitude = 0;
      for (int k = 0; k < kDepth; ++k) {
        sum += at(a, m, k) * at(b, n, k);
        magnitude += std::fabs(at(a, m, k) * at(b, n, k));
      }
      testing::expect_close(name, m * kSide + n, c[m * kSide + n], sum, magnitude);
    }
  }
}

// The operands of warpgroups in panels of rows of kRowBytes. Everything here is written anew, from
// the layouts' description alone.
template <class T, ccp::PanelRows kRows, int kRowBytes>
struct alignas(1024) WarpgroupPanels {
  static constexpr int kRowElements = kRowBytes / 2;
  static constexpr int kDepth = kRows == ccp::PanelRows::kDepths ? kRowElements : 48;
  static constexpr int kMapsBytes = kDepth * kRowBytes;  // of 64 maps in rows of maps
  T a[64 * kDepth], b[128 * kDepth];
  ccp::SharedBarrier filled;

  static int place(int map, int depth) {
    int row = map, element = depth, first = 0;
    if (kRows == ccp::PanelRows::kMaps) {
      row = depth;
      element = map % 64;
      first = map / 64 * 64 * kDepth;
    }
    const int mixture = kRowBytes == 128 ? row % 8 : row / 2 % 4;
    return first + row * kRowElements + (element / 8 ^ mixture) * 8 + element % 8;
  }
};

// C[64, 128] = A * B, and then C += A * B, for A [64][depth] and B transposed, [128][depth].
template <class T, ccp::PanelRows kRows, int kRowBytes>
void multiply_by_warpgroup(const T* a, const T* b, bool early, bool others, float* out) {
  using Panels = WarpgroupPanels<T, kRows, kRowBytes>;
  auto& shared = ccp::dynamic_shared<Panels>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) ccp::init_barrier(shared.filled, ccp::kWarpgroup);
  __syncthreads();
  for (int i = thread; i < 64 * Panels::kDepth; i += ccp::kWarpgroup)
    shared.a[Panels::place(i / Panels::kDepth, i % Panels::kDepth)] = a[i];
  for (int i = thread; i < 128 * Panels::kDepth; i += ccp::kWarpgroup)
    shared.b[Panels::place(i / Panels::kDepth, i % Panels::kDepth)] = b[i];
  ccp::show_to_products();
  ccp::arrive(shared.filled);
  ccp::wait(shared.filled, 0);
  const auto operand = [](const T* panel, int step) {
    const int bytes = kRows == ccp::PanelRows::kDepths ? 32 : 16 * kRowBytes;
    return ccp::matrix_operand<kRows, kRowBytes>(ccp::shared_address(panel), Panels::kMapsBytes) +
           step * bytes;
  };
  ccp::ProductSums sums[1] = {};
  for (int round = 0; round < 2; ++round) {
    for (int step = 0; step < Panels::kDepth / 16; ++step)
      ccp::multiply_async<T, kRows, kRowBytes>(
          sums[0], operand(shared.a, step),
          operand(others && thread < 32 ? shared.a : shared.b, step), round > 0 || step > 0);
    if (early) sums[0][0][0] = 1;
    ccp::wait_for_products(sums);
  }
  const int warp = thread / 32, lane = thread % 32;
  for (int f = 0; f < 16; ++f)
    for (int i = 0; i < 4; ++i)
      out[(16 * warp + lane / 4 + i / 2 * 8) * 128 + 8 * f + lane % 4 * 2 + i % 2] = sums[0][f][i];
}

template <class T, ccp::PanelRows kRows, int kRowBytes>
void check_warpgroup(const std::string& name, unsigned seed, const std::string& defect) {
  constexpr int kDepth = WarpgroupPanels<T, kRows, kRowBytes>::kDepth;
  std::mt19937 random(seed);
  const auto a = testing::random_values<T>(64 * kDepth, random);
  const auto b = testing::random_values<T>(128 * kDepth, random);
  auto c = testing::unwritten<float>(64 * 128);
  emu::launch(1, ccp::kWarpgroup, seed, multiply_by_warpgroup<T, kRows, kRowBytes>, a.data(),
              b.data(), defect == "early-sums", defect == "other-operands", c.data());
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < 128; ++n) {
      double sum = 0, magnitude = 0;
      for (int k = 0; k < kDepth; ++k) {
        const double left = ccp::widen(a[m * kDepth + k]), right = ccp::widen(b[n * kDepth + k]);
        sum += 2 * left * right;
        magnitude += 2 * std::fabs(left * right);
      }
      testing::expect_close(name, m * 128 + n, c[m * 128 + n], sum, magnitude);
    }
  }
}

template <class T>
void check_warpgroups(const std::string& type, unsigned seed, const std::string& defect) {
  using ccp::PanelRows;
  check_warpgroup<T, PanelRows::kDepths, 64>(type + ", rows of 32 depths", seed, defect);
  check_warpgroup<T, PanelRows::kDepths, 128>(type + ", rows of 64 depths", seed, defect);
  check_warpgroup<T, PanelRows::kMaps, 128>(type + ", rows of 64 maps", seed, defect);
}

void copy_some(const float* from, int valid, float* out) {
  __shared__ float to[32];
  ccp::copy_async<4>(&to[threadIdx.x], &from[threadIdx.x], static_cast<int>(threadIdx.x) < valid);
  ccp::commit_copies();
  ccp::wait_for_copies<0>();
  out[threadIdx.x] = to[threadIdx.x];
}

void check_zero_fill() {
  const std::vector<float> from(5, 3.0f);
  auto out = testing::unwritten<float>(32);
  emu::launch(1, 32, 0, copy_some, from.data(), 5, out.data());
  for (int i = 0; i < 32; ++i) testing::expect("zero fill", out[i] == (i < 5 ? 3.0f : 0.0f));
}

// One access of each kind by a warp, `source`, `target`, `row` and `vector` elements off.
void access_all(const float* from, int source, int target, int row, int vector, float* out) {
  alignas(16) __shared__ float shared[32 * 4 + 1];
  const int first = threadIdx.x * 4;
  ccp::copy_async<16>(&shared[first + target], &from[first + source], true);
  ccp::commit_copies();
  ccp::wait_for_copies<0>();
  __syncwarp();
  uint32_t registers[4];
  ccp::load_matrices(registers, &shared[first + row]);
  const auto loaded = ccp::load_packed<float, 4>(&from[first + vector]);
  out[threadIdx.x] = ccp::float_from_bits(registers[0]) + loaded.element[0];
}

void check_alignment(const std::string& misaligned) {
  const std::vector<float> from(32 * 4 + 1, 2.0f);
  auto out = testing::unwritten<float>(32);
  const auto offset = [&](const char* name) { return misaligned == name ? 1 : 0; };
  emu::launch(1, 32, 0, access_all, from.data(), offset("source"), offset("target"), offset("row"),
              offset("vector"), out.data());
  for (const float value : out) testing::expect("aligned accesses", value == 4.0f);
}

void check_tf32() {
  std::mt19937 random(3);
  for (const float value : testing::random_values<float>(1000, random)) {
    const ccp::Tf32Pair pair = ccp::split_tf32(value);
    const double big = ccp::float_from_bits(pair.big);
    const double small = ccp::float_from_bits(pair.small & 0xffffe000u);  // what the units use
    testing::expect("TF32 has 11 significant bits", (pair.big & 0x1fffu) == 0);
    testing::expect("rounded to nearest",
                    std::fabs(value - big) <= std::ldexp(std::fabs(value), -11));
    testing::expect("the pair is the value",
                    std::fabs(value - big - small) <= std::ldexp(std::fabs(value), -21));
  }
  for (const uint32_t bits : {0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0x7f800000u, 0xff800000u}) {
    const ccp::Tf32Pair pair = ccp::split_tf32(ccp::float_from_bits(bits));
    const float sum = ccp::float_from_bits(pair.big) + ccp::float_from_bits(pair.small);
    testing::expect("NaN and infinity stay no numbers", !std::isfinite(sum));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int schedules = std::stoi(argv[1]);
  const std::string defect = argc > 2 ? argv[2] : "";
  if (defect == "drop-barrier") emu::dropped_barrier = std::stoi(argv[3]);
  for (int seed = 0; seed < schedules; ++seed) {
    const bool early = defect == "early-read";
    check_product<ccp::BFloat16, Loads::kRows>("bfloat16", seed, early);
    check_product<ccp::Half, Loads::kRows>("float16", seed, early);
    check_product<float, Loads::kRows>("three TF32 products", seed, early);
    check_product<ccp::BFloat16, Loads::kTransposed>("bfloat16, transposed", seed, early);
    check_product<ccp::Half, Loads::kTransposed>("float16, transposed", seed, early);
  }
  for (int seed = 0; seed < schedules; ++seed) {
    check_warpgroups<ccp::BFloat16>("bfloat16", seed, defect);
    check_warpgroups<ccp::Half>("float16", seed, defect);
  }
  check_zero_fill();
  check_alignment(defect == "misaligned" ? argv[3] : "");
  check_tf32();
  return testing::report();
}
