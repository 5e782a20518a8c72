// How two maps compare, from their moments: shared by the CPU kernels, the CUDA kernels and the
// emulator.
#pragma once

#include <cmath>
#include <type_traits>

#include "csrc/math.h"

namespace ccp {

enum class SimilarityKind { kSsim, kPsnr, kMse, kCosine, kPearson };

// SSIM's (K1 L)^2 and (K2 L)^2, with K1 = 0.01 and K2 = 0.03, for maps divided by L.
constexpr double kLuminanceConstant = 1e-4;
constexpr double kContrastConstant = 9e-4;
// The least MSE / L^2 that PSNR tells apart, about what float32 sums resolve, and its decibels.
constexpr double kPsnrFloor = 1e-6;
constexpr double kPsnrCap = 60;

// SSIM and PSNR depend on the maps divided by the data range only, and are computed from those.
inline double map_scale(SimilarityKind kind, double data_range) {
  const bool relative = kind == SimilarityKind::kSsim || kind == SimilarityKind::kPsnr;
  return relative ? 1 / data_range : 1;
}

// One map of one sample. All but `shift` refer to the map times map_scale.
template <class Acc>
struct alignas(4 * sizeof(Acc)) MapTerms {
  Acc shift;   // subtracted from the map before products are summed
  Acc offset;  // mean of the map after that
  Acc mean;    // what the kind needs of the mean: map_mean
  Acc spread;  // what the kind needs of the variance: map_spread
};

// A difference of means must not suffer from their rounding: where one is needed, the offsets are
// left out here, and mse_of adds their difference to that of the shifts. (Those of PSNR are still
// rounded once, by a data range that is no power of two.)
template <class Acc>
CCP_HD Acc map_mean(SimilarityKind kind, Acc scaled_shift, Acc offset) {
  const bool subtracted = kind == SimilarityKind::kMse || kind == SimilarityKind::kPsnr;
  return subtracted ? scaled_shift : scaled_shift + offset;
}

template <class Acc>
CCP_HD Acc map_spread(SimilarityKind kind, Acc mean, Acc variance) {
  switch (kind) {
    case SimilarityKind::kSsim:
      return variance + static_cast<Acc>(kContrastConstant / 2);
    case SimilarityKind::kCosine: {
      const Acc power = variance + mean * mean;
      return power == 0 ? 0 : 1 / std::sqrt(power);
    }
    case SimilarityKind::kPearson:
      return variance == 0 ? 0 : 1 / std::sqrt(variance);
    default:
      return variance;
  }
}

// The bounds are written so that NaN passes both.
template <class Acc>
CCP_HD Acc at_least(Acc bound, Acc value) {
  return value < bound ? bound : value;
}
template <class Acc>
CCP_HD Acc within_one(Acc value) {
  return value > 1 ? Acc{1} : at_least(Acc{-1}, value);
}

#ifdef __CUDA_ARCH__
// Within 2 units of the last place, and several times faster than the exact ones. `b` is no
// subnormal number.
CCP_HD float quotient(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
CCP_HD float log2_of(float value) { return __log2f(value); }
#else
template <class Acc>
CCP_HD Acc quotient(Acc a, Acc b) {
  return a / b;
}
template <class Acc>
CCP_HD Acc log2_of(Acc value) {
  return std::log2(value);
}
#endif

// `covariance` is that of the maps plus half of kContrastConstant. Arranged so that what depends on
// one map only is computed once for many pairs, and the rest is eight operations and a reciprocal.
template <class Acc>
CCP_HD Acc ssim_of(const MapTerms<Acc>& a, const MapTerms<Acc>& b, Acc covariance) {
  constexpr Acc kLuminance = static_cast<Acc>(kLuminanceConstant);
  const Acc numerator = (4 * a.mean * b.mean + 2 * kLuminance) * covariance;
  const Acc luminance = (a.mean * a.mean + kLuminance / 2) + (b.mean * b.mean + kLuminance / 2);
  return quotient(numerator, luminance * (a.spread + b.spread));
}

template <class Acc>
CCP_HD Acc mse_of(const MapTerms<Acc>& a, const MapTerms<Acc>& b, Acc covariance) {
  const Acc distance = (a.mean - b.mean) + (a.offset - b.offset);
  return at_least(Acc{0}, (a.spread + b.spread - 2 * covariance) + distance * distance);
}

template <class Acc>
CCP_HD Acc psnr_of(Acc relative_mse) {
  constexpr Acc kDecibelsPerOctave = static_cast<Acc>(3.0102999566398120);
  if (relative_mse < static_cast<Acc>(kPsnrFloor)) return static_cast<Acc>(kPsnrCap);
  return -kDecibelsPerOctave * log2_of(relative_mse);
}

// `sum` is that of the products of the two maps, each after its shift, over the positions.
template <SimilarityKind kind, class Acc>
CCP_HD Acc similarity(const MapTerms<Acc>& a, const MapTerms<Acc>& b, Acc sum, Acc per_position) {
  const auto covariance_plus = [&](Acc constant) {
    return sum * per_position + (constant - a.offset * b.offset);
  };
  if constexpr (kind == SimilarityKind::kSsim)
    return ssim_of(a, b, covariance_plus(static_cast<Acc>(kContrastConstant / 2)));
  const Acc covariance = covariance_plus(0);
  if constexpr (kind == SimilarityKind::kMse) return mse_of(a, b, covariance);
  if constexpr (kind == SimilarityKind::kPsnr) return psnr_of(mse_of(a, b, covariance));
  if constexpr (kind == SimilarityKind::kCosine)
    return within_one((covariance + a.mean * b.mean) * a.spread * b.spread);
  if constexpr (kind == SimilarityKind::kPearson)
    return within_one(covariance * a.spread * b.spread);
}

// A map's similarity to itself: NaN if the map holds NaN or infinity, else the same for all maps.
template <SimilarityKind kind, class Acc>
CCP_HD Acc self_similarity(const MapTerms<Acc>& a) {
  const Acc zero_or_nan = 0 * (a.mean + a.spread);
  if constexpr (kind == SimilarityKind::kMse) return zero_or_nan;
  if constexpr (kind == SimilarityKind::kPsnr) return zero_or_nan + static_cast<Acc>(kPsnrCap);
  return 1 + zero_or_nan;
}

// Calls use(integral_constant of kind).
template <class Use>
CCP_HD void with_kind(SimilarityKind kind, Use&& use) {
  switch (kind) {
    case SimilarityKind::kSsim:
      return use(std::integral_constant<SimilarityKind, SimilarityKind::kSsim>{});
    case SimilarityKind::kPsnr:
      return use(std::integral_constant<SimilarityKind, SimilarityKind::kPsnr>{});
    case SimilarityKind::kMse:
      return use(std::integral_constant<SimilarityKind, SimilarityKind::kMse>{});
    case SimilarityKind::kCosine:
      return use(std::integral_constant<SimilarityKind, SimilarityKind::kCosine>{});
    default:
      return use(std::integral_constant<SimilarityKind, SimilarityKind::kPearson>{});
  }
}

}  // namespace ccp
