#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <vector>

#include "conjugate.h"
#include "curve.h"
#include "problem.h"
#include "semidefinite.h"
#include "swap.h"

namespace py = pybind11;
namespace solver = ccp::solver;

namespace {

constexpr double kRounds = 0.7;  // of the time that semidefinite multipliers may take

using solver::Index;
using Doubles = py::array_t<double, py::array::c_style>;
using Bools = py::array_t<bool, py::array::c_style>;

// Lets Python handle its signals now and then while the interpreter lock is released.
class SignalCheck {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(5)) return;
    py::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    last_ = std::chrono::steady_clock::now();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

solver::Problem make_problem(const Doubles& quadratic, const Doubles& linear,
                             const std::optional<Doubles>& weight = std::nullopt) {
  const Index size = linear.ndim() == 1 ? linear.shape(0) : -1;
  if (quadratic.ndim() != 2 || quadratic.shape(0) != size || quadratic.shape(1) != size) {
    throw std::invalid_argument("expected quadratic [n, n] and linear [n]");
  }
  std::vector<double> weights(size, 1);
  if (weight) {
    if (weight->ndim() != 1 || weight->shape(0) != size) {
      throw std::invalid_argument("expected weight [n]");
    }
    weights.assign(weight->data(), weight->data() + size);
  }
  return {size, quadratic.data(), {linear.data(), linear.data() + size}, std::move(weights)};
}

std::chrono::steady_clock::time_point deadline_in(double seconds) {
  // A century of waiting is forever, and would overflow the clock soon.
  if (seconds > 3e9) return std::chrono::steady_clock::time_point::max();
  const auto patience = std::chrono::duration<double>(seconds);
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(patience);
}

// Calls a Python function of the least cost and the lower bound; None is no report.
solver::Report to_report(const py::object& progress) {
  if (progress.is_none()) return nullptr;
  return [&progress](double objective, double bound) {
    py::gil_scoped_acquire lock;
    progress(objective, bound);
  };
}

void check_count(Index size, Index r) {
  if (size < 0 || r < 0 || r > size) throw std::invalid_argument("expected 0 <= r <= n");
}

solver::Mask to_mask(const Bools& mask, Index size) {
  if (mask.ndim() != 1 || mask.shape(0) != size) {
    throw std::invalid_argument("expected mask [n]");
  }
  return {mask.data(), mask.data() + size};
}

Bools to_array(const solver::Mask& mask) {
  Bools array(static_cast<py::ssize_t>(mask.size()));
  std::copy(mask.begin(), mask.end(), array.mutable_data());
  return array;
}

template <class Solve>
auto without_lock(const Solve& solve) {
  py::gil_scoped_release unlock;
  return solve(solver::Checkpoint(SignalCheck()));
}

py::tuple symmetrise(const Doubles& matrix) {
  if (matrix.ndim() != 2 || matrix.shape(0) != matrix.shape(1)) {
    throw std::invalid_argument("expected matrix [n, n]");
  }
  Doubles mean({matrix.shape(0), matrix.shape(0)});
  const solver::Symmetrised found =
      solver::symmetrise(matrix.shape(0), matrix.data(), mean.mutable_data());
  return py::make_tuple(mean, found.asymmetry, found.largest, found.absolute_sum);
}

double objective(const Doubles& quadratic, const Doubles& linear, const Bools& mask) {
  const solver::Problem problem = make_problem(quadratic, linear);
  return solver::objective(problem, to_mask(mask, problem.size));
}

double lower_bound(const Doubles& quadratic, const Doubles& linear, Index r) {
  const solver::Problem problem = make_problem(quadratic, linear);
  check_count(problem.size, r);
  return without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::lower_bound(problem, r, checkpoint);
  });
}

py::tuple greedy(const Doubles& quadratic, const Doubles& linear, Index r) {
  const solver::Problem problem = make_problem(quadratic, linear);
  check_count(problem.size, r);
  const auto [grown, shrunk] = without_lock(
      [&](const solver::Checkpoint& checkpoint) { return solver::greedy(problem, r, checkpoint); });
  return py::make_tuple(to_array(grown), to_array(shrunk));
}

Bools swap_descent(const Doubles& quadratic, const Doubles& linear, const Bools& start) {
  const solver::Problem problem = make_problem(quadratic, linear);
  const solver::Mask mask = to_mask(start, problem.size);
  return to_array(without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::swap_descent(problem, mask, checkpoint);
  }));
}

Bools enumerate(const Doubles& quadratic, const Doubles& linear, Index r) {
  const solver::Problem problem = make_problem(quadratic, linear);
  check_count(problem.size, r);
  return to_array(without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::enumerate(problem, r, checkpoint);
  }));
}

using Bytes = py::array_t<std::int8_t, py::array::c_style>;

solver::Known to_known(Index size, const std::optional<Bools>& mask,
                       const std::optional<Bytes>& state, double lower_bound, double tolerance) {
  solver::Known known{{}, {}, lower_bound, tolerance};
  if (mask) known.mask = to_mask(*mask, size);
  if (state) {
    if (state->ndim() != 1 || state->shape(0) != size) {
      throw std::invalid_argument("expected state [n]");
    }
    known.state.assign(state->data(), state->data() + size);
  }
  return known;
}

py::tuple branch_and_bound(const Doubles& quadratic, const Doubles& linear, Index r, double defect,
                           double time_limit, std::int64_t node_limit, double gap,
                           std::uint64_t seed, const std::optional<Doubles>& weight,
                           const py::object& progress, const std::optional<Bools>& mask,
                           const std::optional<Bytes>& state, double lower_bound,
                           double tolerance) {
  const solver::Limits limits{deadline_in(time_limit), node_limit, gap};
  const solver::Problem problem = make_problem(quadratic, linear, weight);
  if (!weight) check_count(problem.size, r);
  const solver::Known known = to_known(problem.size, mask, state, lower_bound, tolerance);
  const solver::Report report = to_report(progress);
  const auto found = without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::branch_and_bound(problem, r, defect, known, limits, seed, report, checkpoint);
  });
  Bytes decided(static_cast<py::ssize_t>(found.state.size()));
  std::copy(found.state.begin(), found.state.end(), decided.mutable_data());
  return py::make_tuple(to_array(found.mask), found.lower_bound, found.complete, found.tolerance,
                        found.nodes, decided);
}

Doubles relaxed_minimum(const Doubles& quadratic, const Doubles& linear, Index r,
                        const Doubles& start, const std::optional<Doubles>& weight) {
  const solver::Problem problem = make_problem(quadratic, linear, weight);
  if (start.ndim() != 1 || start.shape(0) != problem.size) {
    throw std::invalid_argument("expected start [n]");
  }
  const std::vector<double> x = without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::relaxed_minimum(problem, r, {start.data(), start.data() + problem.size},
                                   checkpoint);
  });
  return Doubles(static_cast<py::ssize_t>(x.size()), x.data());
}

py::tuple semidefinite_multipliers(const Doubles& quadratic, const Doubles& linear,
                                   const Doubles& start, Index rank, Index rounds, Index sweeps,
                                   Index last, double time_limit, std::uint64_t seed) {
  const solver::MixingSchedule schedule{
      rank, rounds, sweeps, last, deadline_in(kRounds * time_limit), deadline_in(time_limit)};
  const solver::Problem problem = make_problem(quadratic, linear);
  if (start.ndim() != 1 || start.shape(0) != problem.size) {
    throw std::invalid_argument("expected start [n]");
  }
  const std::vector<double> x(start.data(), start.data() + problem.size);
  const solver::Multipliers found = without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::semidefinite_multipliers(problem, x, schedule, seed, checkpoint);
  });
  const auto size = static_cast<py::ssize_t>(problem.size);
  return py::make_tuple(Doubles(size, found.diagonal.data()),
                        Doubles({size, size}, found.products.data()));
}

double relaxation_bound(const Doubles& quadratic, const Doubles& linear, Index r, double defect,
                        const Bools& mask) {
  const solver::Problem problem = make_problem(quadratic, linear);
  check_count(problem.size, r);
  const solver::Mask start = to_mask(mask, problem.size);
  return without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::relaxation_bound(problem, r, defect, start, checkpoint);
  });
}

Bools round_relaxation(const Doubles& quadratic, const Doubles& linear, Index r, double time_limit,
                       const std::optional<Doubles>& weight) {
  const solver::Limits limits{deadline_in(time_limit), 0, 0};
  const solver::Problem problem = make_problem(quadratic, linear, weight);
  if (!weight) check_count(problem.size, r);
  return to_array(without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::round_relaxation(problem, r, limits, checkpoint);
  }));
}

py::tuple curve(const Doubles& quadratic, const Doubles& linear, const std::vector<Index>& counts,
                double defect, double time_limit) {
  const auto deadline = deadline_in(time_limit);
  const solver::Problem problem = make_problem(quadratic, linear);
  for (Index count : counts) check_count(problem.size, count);
  if (!std::is_sorted(counts.begin(), counts.end())) {
    throw std::invalid_argument("expected ascending counts");
  }
  const auto points = without_lock([&](const solver::Checkpoint& checkpoint) {
    return solver::curve(problem, counts, defect, deadline, checkpoint);
  });
  const py::ssize_t size = static_cast<py::ssize_t>(points.size());
  Doubles objective(size), bound(size);
  Bools masks({size, static_cast<py::ssize_t>(problem.size)});
  for (py::ssize_t k = 0; k < size; ++k) {
    objective.mutable_at(k) = points[k].objective;
    bound.mutable_at(k) = points[k].lower_bound;
    std::copy(points[k].mask.begin(), points[k].mask.end(),
              masks.mutable_data() + k * problem.size);
  }
  return py::make_tuple(objective, bound, masks);
}

Bools random_subset(Index size, Index r, std::uint64_t seed) {
  check_count(size, r);
  return to_array(solver::random_subset(size, r, seed));
}

std::vector<double> to_vector(const Doubles& array) {
  if (array.ndim() != 1) throw std::invalid_argument("expected a vector");
  return {array.data(), array.data() + array.shape(0)};
}

Doubles conjugate(const Doubles& values, const Doubles& points, const Doubles& offset,
                  const Doubles& step) {
  const auto x = to_vector(points), t0 = to_vector(offset), t1 = to_vector(step);
  const auto size = static_cast<py::ssize_t>(x.size()), rows = static_cast<py::ssize_t>(t0.size());
  if (values.ndim() != 2 || size == 0 || values.shape(1) != size || values.shape(0) == 0 ||
      rows % values.shape(0) != 0) {
    throw std::invalid_argument("expected values [r, n], points [n], offset [m r] and step [k]");
  }
  const bool increasing = std::adjacent_find(x.begin(), x.end(), std::greater_equal<>()) == x.end();
  if (!increasing || !std::is_sorted(t1.begin(), t1.end())) {
    throw std::invalid_argument("expected increasing points and a step that does not decrease");
  }
  Doubles result({rows, static_cast<py::ssize_t>(t1.size())});
  double* const out = result.mutable_data();
  const Index repeat = rows / values.shape(0);
  py::gil_scoped_release unlock;
  solver::conjugate(values.data(), x, repeat, t0, t1, out);
  return result;
}

}  // namespace

PYBIND11_MODULE(_solver, module) {
  module.doc() =
      "min 1/2 m'Sm - u'm over bool masks m [n] with r ones; quadratic = S [n, n] symmetric and "
      "linear = u [n], both float64.";
  module.def("symmetrise", &symmetrise, py::arg("matrix"),
             "((A + A') / 2, max |A - A'|, max |A|, sum |A|) for a matrix A [n, n]");
  module.def("objective", &objective, py::arg("quadratic"), py::arg("linear"), py::arg("mask"));
  module.def("lower_bound", &lower_bound, py::arg("quadratic"), py::arg("linear"), py::arg("r"));
  module.def("greedy", &greedy, py::arg("quadratic"), py::arg("linear"), py::arg("r"));
  module.def("swap_descent", &swap_descent, py::arg("quadratic"), py::arg("linear"),
             py::arg("start"));
  module.def("enumerate", &enumerate, py::arg("quadratic"), py::arg("linear"), py::arg("r"));
  module.def(
      "branch_and_bound", &branch_and_bound, py::arg("quadratic"), py::arg("linear"), py::arg("r"),
      py::arg("defect"), py::arg("time_limit"), py::arg("node_limit"), py::arg("gap"),
      py::arg("seed"), py::arg("weight") = py::none(), py::arg("progress") = py::none(),
      py::arg("mask") = py::none(), py::arg("state") = py::none(),
      py::arg("lower_bound") = -std::numeric_limits<double>::infinity(), py::arg("tolerance") = 0.0,
      "(mask, lower bound, complete, tolerance, nodes, state [n]); a state is 0, 1 or 2, "
      "which is free. The last four arguments are known from an earlier search.");
  module.def("relaxed_minimum", &relaxed_minimum, py::arg("quadratic"), py::arg("linear"),
             py::arg("r"), py::arg("start"), py::arg("weight") = py::none());
  module.def("semidefinite_multipliers", &semidefinite_multipliers, py::arg("quadratic"),
             py::arg("linear"), py::arg("start"), py::arg("rank"), py::arg("rounds"),
             py::arg("sweeps"), py::arg("last"), py::arg("time_limit"), py::arg("seed"),
             "(diagonal [n], products [n, n])");
  module.def("relaxation_bound", &relaxation_bound, py::arg("quadratic"), py::arg("linear"),
             py::arg("r"), py::arg("defect"), py::arg("mask"));
  module.def("round_relaxation", &round_relaxation, py::arg("quadratic"), py::arg("linear"),
             py::arg("r"), py::arg("time_limit"), py::arg("weight") = py::none());
  module.def("curve", &curve, py::arg("quadratic"), py::arg("linear"), py::arg("counts"),
             py::arg("defect"), py::arg("time_limit"),
             "(objective [K], lower bound [K], masks [K, n]) for ascending counts [K]");
  module.def("conjugate", &conjugate, py::arg("values"), py::arg("points"), py::arg("offset"),
             py::arg("step"),
             "[m r, k] of min_j values[i // m, j] + (offset[i] + step[k]) * points[j]");
  module.def("random_subset", &random_subset, py::arg("size"), py::arg("r"), py::arg("seed"));
}
