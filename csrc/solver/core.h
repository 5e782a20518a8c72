#pragma once

#include <vector>

#include "problem.h"
#include "relaxation.h"

namespace ccp::solver {

// The channels that a root bound leaves open, as a problem of their own.
struct Core {
  std::vector<Index> channels;  // of the whole problem
  Mask fixed;                   // the whole problem's mask with the core at 0
  std::vector<double> quadratic;
  Problem problem;                        // points into `quadratic`, which keeps its place
  std::vector<double> scaled;             // empty where channels weigh 1
  Relaxation relaxation;                  // points into `scaled`, or into `quadratic`
  std::vector<std::vector<Index>> twins;  // of each channel, itself included, in order: exchanging
                                          // two of them changes no cost
};

// `state` says 0, 1 or kFree of each channel.
Core make_core(const Problem& problem, const std::vector<char>& state, Index r);

// In variables w_i m_i, so that the constraint is a plain sum. It points into the problem or, where
// channels do not weigh 1, into `scaled`.
Relaxation relaxation_of(const Problem& problem, Index r, std::vector<double>& scaled);

// The relaxation among some channels, given those fixed to one. It points into `storage`.
Relaxation restrict(const Relaxation& whole, const std::vector<Index>& free, const Mask& fixed,
                    std::vector<double>& storage);

}  // namespace ccp::solver
