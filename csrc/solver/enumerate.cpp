#include <cmath>
#include <limits>

#include "problem.h"

namespace ccp::solver {
namespace {

// Depth-first search over sorted index tuples. A level holds what each further channel would add to
// the cost of the prefix above it, so a complete tuple costs one addition.
class Enumeration {
 public:
  Enumeration(const Problem& problem, Index r, const Checkpoint& checkpoint)
      : problem_(problem), r_(r), checkpoint_(checkpoint), chosen_(r) {
    increase_.assign(r, std::vector<double>(problem.size));
    for (Index i = 0; i < problem.size; ++i) {
      increase_[0][i] = 0.5 * problem.diagonal(i) - problem.linear[i];
    }
  }

  // Calls visit(chosen, cost) for every tuple, in lexicographic order.
  template <class Visit>
  void run(const Visit& visit) {
    search(0, 0, problem_.constant, visit);
  }

 private:
  template <class Visit>
  void search(Index depth, Index first, double cost, const Visit& visit) {
    const std::vector<double>& increase = increase_[depth];
    const Index end = problem_.size - (r_ - 1 - depth);
    const bool last = depth == r_ - 1;
    if (last) checkpoint_();
    for (Index i = first; i < end; ++i) {
      chosen_[depth] = i;
      if (last) {
        visit(chosen_, cost + increase[i]);
        continue;
      }
      std::vector<double>& next = increase_[depth + 1];
      const double* row = problem_.row(i);
      for (Index j = i + 1; j < problem_.size; ++j) next[j] = increase[j] + row[j];
      search(depth + 1, i + 1, cost + increase[i], visit);
    }
  }

  const Problem& problem_;
  const Index r_;
  const Checkpoint& checkpoint_;
  std::vector<Index> chosen_;
  std::vector<std::vector<double>> increase_;
};

double rounding_error(const Problem& problem, const std::vector<Index>& chosen) {
  double scale = std::abs(problem.constant);
  for (Index i : chosen) {
    scale += std::abs(problem.linear[i]);
    for (Index j : chosen) scale += std::abs(problem.row(i)[j]);
  }
  return 4.0 * (chosen.size() + 4) * std::numeric_limits<double>::epsilon() * scale;
}

enum class Tie { kFirst, kLast };

Mask best_tuple(const Problem& problem, Index r, Tie tie, const Checkpoint& checkpoint) {
  Mask mask(problem.size, 0);
  if (r == 0) return mask;
  Enumeration enumeration(problem, r, checkpoint);

  std::vector<Index> best;
  double least = std::numeric_limits<double>::infinity();
  enumeration.run([&](const std::vector<Index>& chosen, double cost) {
    if (cost < least) {
      least = cost;
      best = chosen;
    }
  });

  const double limit = least + rounding_error(problem, best);
  bool found = false;
  enumeration.run([&](const std::vector<Index>& chosen, double cost) {
    if (cost > limit || (found && tie == Tie::kFirst)) return;
    best = chosen;
    found = true;
  });
  for (Index i : best) mask[i] = 1;
  return mask;
}

}  // namespace

Mask enumerate(const Problem& problem, Index r, const Checkpoint& checkpoint) {
  // Of a large subset the complement is enumerated. Its last tuple leaves out the first subset.
  if (2 * r <= problem.size) return best_tuple(problem, r, Tie::kFirst, checkpoint);
  const Problem mirrored = complement(problem);
  return inverse(best_tuple(mirrored, problem.size - r, Tie::kLast, checkpoint));
}

}  // namespace ccp::solver
