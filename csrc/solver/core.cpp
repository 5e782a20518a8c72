#include "core.h"

#include <algorithm>
#include <utility>

#include "kernels.h"

namespace ccp::solver {
namespace {

void gather(const double* matrix, Index stride, const std::vector<Index>& chosen,
            std::vector<double>& storage) {
  const Index size = static_cast<Index>(chosen.size());
  storage.resize(size * size);
  for (Index i = 0; i < size; ++i) {
    const double* row = matrix + chosen[i] * stride;
    for (Index k = 0; k < size; ++k) storage[i * size + k] = row[chosen[k]];
  }
}

bool are_twins(const Problem& problem, Index a, Index b) {
  if (problem.linear[a] != problem.linear[b] || problem.weight[a] != problem.weight[b] ||
      problem.diagonal(a) != problem.diagonal(b)) {
    return false;
  }
  for (Index k = 0; k < problem.size; ++k) {
    if (k != a && k != b && problem.row(a)[k] != problem.row(b)[k]) return false;
  }
  return true;
}

std::vector<std::vector<Index>> find_twins(const Problem& problem) {
  std::vector<std::vector<Index>> twins(problem.size);
  for (Index i = 0; i < problem.size; ++i) {
    if (!twins[i].empty()) continue;
    std::vector<Index> members{i};
    for (Index j = i + 1; j < problem.size; ++j) {
      if (twins[j].empty() && are_twins(problem, i, j)) members.push_back(j);
    }
    for (Index j : members) twins[j] = members;
  }
  return twins;
}

}  // namespace

Core make_core(const Problem& problem, const std::vector<char>& state, Index r) {
  Core core;
  core.fixed.assign(problem.size, 0);
  for (Index i = 0; i < problem.size; ++i) {
    if (state[i] == kFree) core.channels.push_back(i);
    if (state[i] == 1) {
      core.fixed[i] = 1;
      r -= static_cast<Index>(problem.weight[i]);
    }
  }
  gather(problem.quadratic, problem.size, core.channels, core.quadratic);
  const std::vector<double> slope = gradient(problem, core.fixed);
  core.problem = {static_cast<Index>(core.channels.size()), core.quadratic.data(), {}, {}, 0};
  for (Index i : core.channels) {
    core.problem.linear.push_back(-slope[i]);
    core.problem.weight.push_back(problem.weight[i]);
  }
  core.problem.constant = objective(problem, core.fixed);
  core.relaxation = relaxation_of(core.problem, r, core.scaled);
  core.twins = find_twins(core.problem);
  return core;
}

Relaxation relaxation_of(const Problem& problem, Index r, std::vector<double>& scaled) {
  Relaxation relaxation{problem.size,   problem.quadratic, problem.size,
                        problem.linear, problem.weight,    static_cast<double>(r)};
  for (Index i = 0; i < problem.size; ++i) relaxation.linear[i] /= -problem.weight[i];
  if (all_ones(problem.weight)) return relaxation;
  scaled.resize(problem.size * problem.size);
  for (Index i = 0; i < problem.size; ++i) {
    for (Index j = 0; j < problem.size; ++j) {
      scaled[i * problem.size + j] = problem.row(i)[j] / (problem.weight[i] * problem.weight[j]);
    }
  }
  relaxation.quadratic = scaled.data();
  return relaxation;
}

Relaxation restrict(const Relaxation& whole, const std::vector<Index>& free, const Mask& fixed,
                    std::vector<double>& storage) {
  const Index size = static_cast<Index>(free.size());
  std::vector<double> linear(whole.linear);
  double total = whole.total;
  for (Index i = 0; i < whole.size; ++i) {
    if (!fixed[i]) continue;
    rows.add(whole.size, whole.capacity[i], whole.row(i), linear.data());
    total -= whole.capacity[i];
  }
  std::vector<double> slope(size), capacity(size);
  for (Index k = 0; k < size; ++k) {
    slope[k] = linear[free[k]];
    capacity[k] = whole.capacity[free[k]];
  }
  gather(whole.quadratic, whole.stride, free, storage);
  return {size, storage.data(), size, std::move(slope), std::move(capacity), total};
}

}  // namespace ccp::solver
