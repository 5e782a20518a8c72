// The convex relaxation of channel selection:
//
//     minimise  1/2 x'Sx + c'x   over 0 <= x <= w with sum x = r, for a positive semidefinite S.
//
// Where channels weigh 1, x is the relaxed mask. Otherwise x_i is w_i times that of channel i, and
// S and c are those of the problem divided by the weights.
#pragma once

#include <vector>

#include "problem.h"

namespace ccp::solver {

struct Relaxation {
  Index size;
  const double* quadratic;  // S, row-major, rows `stride` apart
  Index stride;
  std::vector<double> linear;    // c
  std::vector<double> capacity;  // w
  double total;                  // r

  const double* row(Index i) const { return quadratic + i * stride; }
};

// When the descent may end: at a bound of `cutoff` or more, once the bound is known to the absolute
// `precision`, once it is clear that no bound reaches a finite cutoff, or if `expired` says so.
struct Target {
  double cutoff;
  double precision;
  const Expired& expired;
};

struct Relaxed {
  std::vector<double> x;         // in the box; sums to r up to rounding
  std::vector<double> gradient;  // S x + c, summed afresh
  double bound;                  // of every feasible point, up to rounding
};

// Sequential minimal optimisation (Platt, 1998; pairs by second-order gain after Fan, Chen and Lin,
// JMLR 6, 2005). The total can be changed; the descent then goes on from where it is.
class PairwiseDescent {
 public:
  // From a point in the box whose sum need not be r.
  PairwiseDescent(Relaxation problem, std::vector<double> start);

  void set_total(double total);
  void run(const Target& target);

  // The bound holds for the current total up to the rounding of a gradient that was summed and then
  // updated at most n times.
  double bound() const;
  double conjugate() const;  // what the bound adds to min g'y: -1/2 x'Sx
  const std::vector<double>& x() const { return x_; }
  const std::vector<double>& gradient() const { return gradient_; }
  const Relaxation& problem() const { return problem_; }

  Relaxed finish();  // with a gradient summed afresh

 private:
  void sum_gradient();
  void restore_sum();
  double spread(double missing, std::vector<Index> channels);
  void set(Index i, double value);
  bool step();
  bool move(Index up, Index down, double amount);
  void minimise_on_face();
  bool reached(const Target& target) const;

  Relaxation problem_;
  std::vector<double> x_;
  std::vector<double> diagonal_;
  std::vector<double> gradient_;
  std::vector<double> rise_;  // 0 where x can be raised, else infinity
  std::vector<double> fall_;  // 0 where x can be lowered, else -infinity
  Index up_ = -1;             // of least gradient among those that can be raised; -1 if not known
  Index updates_ = 0;         // of the gradient since it was summed
  Index rounds_ = 0;
};

Relaxed relax(Relaxation problem, std::vector<double> start, const Target& target);

// The channels that a bound decides: forcing the other value would raise it by `room` or more.
// 0 or 1 where decided, kFree elsewhere.
std::vector<char> reduced_cost_fixing(const std::vector<double>& gradient,
                                      const std::vector<double>& capacity, double total,
                                      double room);

// min g'y over 0 <= y <= w with sum y = r, and the gradients at which y stops: `last_in` is the
// largest of an entry with y > 0, `first_out` the smallest of one with y < w.
struct LinearMinimum {
  double value;
  double last_in;
  double first_out;
};
LinearMinimum linear_minimum(const std::vector<double>& gradient,
                             const std::vector<double>& capacity, double total);

}  // namespace ccp::solver
