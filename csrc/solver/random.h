#pragma once

#include <cstdint>

namespace ccp::solver {

// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
class SplitMix64 {
 public:
  explicit SplitMix64(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // Uniform in [0, bound): draws from the incomplete last interval are rejected.
  std::uint64_t below(std::uint64_t bound) {
    const std::uint64_t incomplete = -bound % bound;  // 2^64 modulo bound
    std::uint64_t draw = next();
    while (draw < incomplete) draw = next();
    return draw % bound;
  }

  // In [0, bound) for a bound below 2^32, uniform but for a bias of less than bound / 2^32.
  std::uint64_t index(std::uint64_t bound) { return (next() >> 32) * bound >> 32; }

  // Uniform in [0, 1), a multiple of 2^-53.
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  std::uint64_t state_;
};

}  // namespace ccp::solver
