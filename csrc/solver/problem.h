// The binary quadratic program of channel selection:
//
//     minimise  1/2 m'Sm - u'm + constant   over m in {0,1}^n with exactly r ones.
//
// Where channels weigh other than 1, those chosen weigh exactly r instead; what says "ones" needs
// weights of 1.
//
// Everything here is plain C++ without global state. Equal input gives equal output: no threads,
// ties go to the lowest index, and a clock decides only where branch and bound stops.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace ccp::solver {

using Index = std::ptrdiff_t;
using Mask = std::vector<char>;  // n entries; 1 marks a chosen channel

// Called often by every long loop; it throws to stop the search.
using Checkpoint = std::function<void()>;

// Asked often by a loop that can stop at any time with a worse answer: whether to. It may throw.
using Expired = std::function<bool()>;

// Told the least cost known and the lower bound now and then. It may be empty.
using Report = std::function<void(double, double)>;

struct Problem {
  Index size;                  // n
  const double* quadratic;     // S, n x n, row-major, symmetric, finite; the caller keeps it alive
  std::vector<double> linear;  // u
  std::vector<double> weight;  // n positive integers
  double constant = 0;

  const double* row(Index i) const { return quadratic + i * size; }
  double diagonal(Index i) const { return row(i)[i]; }
};

// The mean of a matrix and its transpose, and what there is to check about the matrix.
struct Symmetrised {
  double asymmetry;     // max |a_ij - a_ji|
  double largest;       // max |a_ij|
  double absolute_sum;  // not finite if an entry is not
};
Symmetrised symmetrise(Index size, const double* matrix, double* mean);

// The cost from its definition, in O(n + r^2).
double objective(const Problem& problem, const Mask& mask);

// The same cost as a function of 1 - m: complement(p) at the inverse mask equals p at the mask.
Problem complement(const Problem& problem);
Mask inverse(Mask mask);

bool all_ones(const std::vector<double>& weight);

// S m - u.
std::vector<double> gradient(const Problem& problem, const Mask& mask);

// Bounds, one per channel, on the rounding error of a gradient entry that was summed afresh and
// then updated at most n times.
std::vector<double> gradient_error(const Problem& problem);

// A lower bound on the cost of every mask with r ones, for any symmetric S: Gilmore-Lawler on the
// chosen and on the unchosen channels, the better of the two, lowered by its own rounding error.
double lower_bound(const Problem& problem, Index r, const Checkpoint& checkpoint);

// Two masks: one grown from the empty set by adding the channel that costs least, one shrunk from
// the full set by giving back the channel that saves most. O(n^2).
std::array<Mask, 2> greedy(const Problem& problem, Index r, const Checkpoint& checkpoint);

// The best of all masks with r ones; among those equal up to rounding, the one whose sorted indices
// come first in lexicographic order. O(1) a mask, O(n) a prefix.
Mask enumerate(const Problem& problem, Index r, const Checkpoint& checkpoint);

// Simulated annealing over random exchanges, with a fixed number of proposals from a temperature
// that the start's changes set; it cools faster where the deadline would come before the end. One
// at time_point::max() is none, and the clock is not looked at. Exchanges channels of equal weight
// only. Returns the best mask met, the start if none was better; S is read in single precision.
Mask anneal(const Problem& problem, Mask start, std::int64_t proposals, std::uint64_t seed,
            std::chrono::steady_clock::time_point deadline, const Expired& expired);

struct Limits {
  std::chrono::steady_clock::time_point deadline;
  std::int64_t nodes;  // to expand at most
  double gap;          // the search may leave masks that are better by no more than this
};

constexpr char kFree = 2;  // beside 0 and 1, of a channel that is not decided

struct Certified {
  Mask mask;
  double lower_bound;       // on every mask with r ones; lowered by the rounding errors
  bool complete;            // no mask is better by more than max(gap, tolerance)
  double tolerance;         // what rounding leaves open
  std::int64_t nodes;       // expanded
  std::vector<char> state;  // 0, 1 or kFree: every mask that differs costs lower_bound or more
};

// What is known before a search of the same costs begins; each may be empty or infinite.
struct Known {
  Mask mask;                // of weight r
  std::vector<char> state;  // as in the result of a search with the same gap
  double lower_bound;
  double tolerance;  // that of the search which found the state
};

// Branch and bound, best bound first, for an S whose least eigenvalue among the free channels is
// -defect or more, defect >= 0. It starts from the known mask, or else from greedy and swap
// descent, and improves it by rounded relaxations and annealing. There must be a mask of weight r.
Certified branch_and_bound(const Problem& problem, Index r, double defect, const Known& known,
                           const Limits& limits, std::uint64_t seed, const Report& report,
                           const Checkpoint& checkpoint);

// The minimum of the cost over the box and over weight r, to a relative precision of 1e-4, from
// `start`. The S of the channels strictly between 0 and 1 must be positive semidefinite.
std::vector<double> relaxed_minimum(const Problem& problem, Index r, std::vector<double> start,
                                    const Checkpoint& checkpoint);

// The bound that the relaxation gives, lowered by the rounding errors, for an S
// whose least eigenvalue is -defect or more. The start has weight r.
double relaxation_bound(const Problem& problem, Index r, double defect, const Mask& start,
                        const Checkpoint& checkpoint);

// The relaxation's solution, rounded, and swap descent from there. S should be positive
// semidefinite, but the mask is one of weight r for any S.
Mask round_relaxation(const Problem& problem, Index r, const Limits& limits,
                      const Checkpoint& checkpoint);

// A uniformly random mask with r ones; the same for a seed on every machine.
Mask random_subset(Index size, Index r, std::uint64_t seed);

}  // namespace ccp::solver
