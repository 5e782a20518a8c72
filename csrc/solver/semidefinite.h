#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "problem.h"

namespace ccp::solver {

struct Multipliers {
  std::vector<double> diagonal;  // replaces that of S, so that the matrix is about semidefinite
  std::vector<double> products;  // n x n, symmetric, of m_i m_j >= 0: zero or more, to subtract
};

// The vectors' sweeps; a worse answer after the deadline.
struct MixingSchedule {
  Index rank;    // of X
  Index rounds;  // of sweeps, with multipliers that rise where X_ij < 0
  Index sweeps;  // a round
  Index last;    // sweeps with the multipliers' mean over the rounds, mostly the late ones
  std::chrono::steady_clock::time_point rounds_end;
  std::chrono::steady_clock::time_point deadline;
};

// A nearly optimal point of the dual of
//
//     minimise  1/2 <S, X> - u'x   over X - xx' positive semidefinite, X_ii = x_i, X_ij >= 0,
//
// by coordinate descent on X_ij = w_i'w_j, where w_i'w_i = w_i'e (P.-W. Wang, W.-C. Chang and J. Z.
// Kolter, "The mixing method", 2017). The vectors start around x, in directions that are drawn.
// Entries too large for single precision make multipliers that are not finite.
Multipliers semidefinite_multipliers(const Problem& problem, const std::vector<double>& x,
                                     const MixingSchedule& schedule, std::uint64_t seed,
                                     const Checkpoint& checkpoint);

}  // namespace ccp::solver
