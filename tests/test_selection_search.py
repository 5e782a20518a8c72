"""What the selection's search reports, and the structure it makes use of."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ccp_ext import _solver
from ccp_ext.selection import convex, search, select
from ccp_ext.selection.quadratic import QuadraticCost


def gram(seed, c, samples):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(samples, c))
    return q.T @ q / samples, q.mean(axis=0)


def test_the_spread_starts_at_the_mean_over_all_masks():
    S, u = gram(0, 9, 5)
    masks = np.array(list(itertools.product((0, 1), repeat=9)))
    costs = 0.5 * ((masks @ S) * masks).sum(axis=1) - masks @ u
    for r in range(10):
        choice = select(S, u=u, r=r)
        assert choice.random == pytest.approx(costs[masks.sum(axis=1) == r].mean())
        assert choice.relative_gap == 0


def test_the_relative_gap_is_the_gap_over_the_spread_and_does_not_change_with_the_scale():
    S, u = gram(4, 120, 40)
    choice = select(S, u=u, r=50, time_limit=math.inf, node_limit=5)
    spread = choice.random - choice.lower_bound
    assert choice.relative_gap == pytest.approx(choice.gap / spread)
    assert 0 < choice.relative_gap < 0.2
    larger = select(1024 * S, u=1024 * u, r=50, time_limit=math.inf, node_limit=5)
    assert larger.relative_gap == pytest.approx(choice.relative_gap, rel=1e-9)
    assert select(S, u=u, r=50, method="round").relative_gap == 1


def test_progress_is_told_improving_costs_and_bounds():
    S, u = gram(4, 120, 40)
    told = []
    choice = select(
        S, u=u, r=50, time_limit=math.inf, node_limit=400, progress=lambda *v: told.append(v)
    )
    assert len(told) >= 3
    for earlier, later in itertools.pairwise([*told, (choice.objective, choice.lower_bound)]):
        assert later[0] <= earlier[0] + 1e-12 and later[1] >= earlier[1] - 1e-12
    silent = select(S, u=u, r=50, time_limit=math.inf, node_limit=400)
    assert silent.objective == choice.objective


def test_an_error_in_the_progress_function_ends_the_search():
    def stop(objective, bound):
        raise RuntimeError("enough")

    S, u = gram(4, 120, 40)
    with pytest.raises(RuntimeError, match="enough"):
        select(S, u=u, r=50, time_limit=math.inf, progress=stop)


def test_a_bar_appears_only_on_long_searches(capfd):
    S, u = gram(4, 120, 40)
    select(S, u=u, r=50, time_limit=math.inf, node_limit=70, progress=True)
    assert capfd.readouterr().err.strip() == ""


def test_equal_channels_do_not_multiply_the_tree():
    S, u = gram(2, 10, 4)
    integers, linear = np.round(8 * S), np.round(8 * u) + 0.5
    repeated = np.tile(integers, (6, 6)), np.tile(linear, 6)
    choice = select(repeated[0], u=repeated[1], r=29, time_limit=math.inf, node_limit=2000)
    assert choice.status == "optimal"
    assert choice.nodes < 2000
    ties = select(
        np.ones((40, 40)), r=20, method="branch_and_bound", time_limit=math.inf, node_limit=5
    )
    assert (ties.status, ties.objective) == ("optimal", 200.0)


@pytest.mark.parametrize("c", [5, 12, 30])
def test_the_bound_of_the_root_with_weights_is_the_value_of_the_convex_relaxation(c):
    piqp = pytest.importorskip("piqp", reason="piqp solves the same convex program independently")
    rng = np.random.default_rng(c)
    S, u = gram(c, c, 2 * c)
    weight = rng.integers(1, 6, size=c).astype(float)
    for r in (int(weight[0]), int(weight[: c // 2].sum())):
        bound = _solver.branch_and_bound(S, u, r, 0.0, math.inf, 0, 0.0, 0, weight)[1]
        oracle = piqp.DenseSolver()
        oracle.settings.eps_abs = oracle.settings.eps_rel = 1e-10
        oracle.setup(S, -u, weight[None], np.array([float(r)]), x_l=np.zeros(c), x_u=np.ones(c))
        assert oracle.solve() == piqp.PIQP_SOLVED
        value = oracle.result.info.primal_obj
        assert bound == pytest.approx(value, abs=1e-6)
        assert bound <= value + 1e-8


def test_a_permutation_of_the_channels_permutes_the_certified_choice():
    S, u = gram(9, 50, 20)
    order = np.random.default_rng(1).permutation(50)
    choice = select(S, u=u, r=20, time_limit=math.inf)
    permuted = select(S[np.ix_(order, order)], u=u[order], r=20, time_limit=math.inf)
    assert choice.status == permuted.status == "optimal"
    assert np.array_equal(permuted.removed.numpy(), choice.removed.numpy()[order])


@pytest.mark.parametrize("c", [40, 300])
def test_rounding_is_locally_optimal_and_near_the_best(c):
    S, u = gram(3, c, c // 4)
    rounded = select(S, u=u, r=c // 2, method="round")
    assert rounded.removed.sum() == c // 2
    mask = rounded.removed.numpy()
    slope = S @ mask - u + 0.5 * np.diagonal(S) * np.where(mask, -1, 1)
    change = slope[~mask][:, None] - slope[mask][None] - S[np.ix_(~mask, mask)]
    assert change.min() >= -1e-10
    best = select(S, u=u, r=c // 2, time_limit=math.inf, node_limit=100)
    assert rounded.objective - best.objective <= 0.01 * (best.random - best.lower_bound)


def lowered_cost(c=80, decided=10):
    S, u = gram(6, c, 2 * c)
    cost = convex.convexified(QuadraticCost(S, u))
    free = np.arange(c) >= decided
    mask = np.arange(c) % 2 == 0
    return cost, free, convex.lowered_where_free(cost, c // 2, None, mask, free, math.inf)


def test_lowering_the_diagonal_changes_no_cost_of_a_mask_and_keeps_the_free_part_convex():
    cost, free, lowered = lowered_cost()
    assert np.linalg.eigvalsh(lowered.quadratic[np.ix_(free, free)])[0] >= -lowered.defect
    change = np.diagonal(cost.quadratic - lowered.quadratic)
    assert not change[~free].any() and change[free].max() > 0.1 * np.diagonal(cost.quadratic).mean()
    for mask in np.random.default_rng(0).random((20, len(free))) < 0.5:
        costs = [_solver.objective(k.quadratic, k.linear, mask) for k in (cost, lowered)]
        assert costs[0] == pytest.approx(costs[1], rel=1e-12, abs=1e-12)


def test_the_lowered_diagonal_takes_a_third_off_the_gap_of_the_root():
    S, u = gram(6, 120, 240)
    root = select(S, u=u, r=60, time_limit=math.inf, node_limit=0)
    plain = _solver.branch_and_bound(S, u, 60, 0.0, math.inf, 0, 0.0, 0)[1]
    best = select(S, u=u, r=60, time_limit=math.inf, node_limit=500).objective
    assert best - root.lower_bound <= 0.67 * (best - plain)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_search_with_a_lowered_diagonal_proves_the_true_optimum(monkeypatch, weighted):
    monkeypatch.setattr(convex, "_SMALLEST_LOWERED", 2)
    masks = np.array(list(itertools.product((0, 1), repeat=9)))
    for seed in range(25):
        S, u = gram(seed, 9, 12)
        weight = np.random.default_rng(seed).integers(1, 4, 9) if weighted else np.ones(9, int)
        total = int(weight[seed % 9 :].sum())
        least = (0.5 * ((masks @ S) * masks).sum(axis=1) - masks @ u)[masks @ weight == total].min()
        weights = weight if weighted else None
        for nodes in (0, None):
            choice = select(
                S,
                u=u,
                r=total,
                weights=weights,
                method="branch_and_bound",
                time_limit=math.inf,
                node_limit=nodes,
            )
            assert choice.lower_bound <= least <= choice.objective + 1e-12
        assert choice.status == "optimal"
        assert choice.objective == pytest.approx(least, abs=1e-12)


def coupled(seed, c):
    """Samples of few common directions beside noise of their own."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(2 * c, 3)) @ rng.normal(size=(3, c)) + rng.normal(size=(2 * c, c))
    q += rng.normal(size=c)
    q /= np.sqrt(c)
    return q.T @ q / len(q), q.mean(axis=0)


@pytest.mark.parametrize("seed", range(8))
def test_the_semidefinite_bound_is_below_the_optimum_and_above_the_relaxation(monkeypatch, seed):
    monkeypatch.setattr(convex, "_SMALLEST_MIXED", 2)
    S, u = coupled(seed, 14)
    cost = convex.convexified(QuadraticCost(S, u))
    masks = np.array(list(itertools.product((False, True), repeat=14)))
    gains = []
    for r in (3, 7, 12):
        allowed = masks[masks.sum(axis=1) == r]
        costs = 0.5 * ((allowed @ S) * allowed).sum(axis=1) - allowed @ u
        best, spread = allowed[costs.argmin()], costs.mean() - costs.min()
        free = np.arange(14) > 1  # among the masks that agree with the best elsewhere
        for open_ in (np.ones(14, bool), free):
            bound = convex.semidefinite_bound(cost, r, best, open_, math.inf, seed)
            assert costs.min() - 0.2 * spread < bound <= costs.min()
        root = _solver.relaxation_bound(cost.quadratic, cost.linear, r, cost.defect, best)
        bound = convex.semidefinite_bound(cost, r, best, np.ones(14, bool), math.inf, seed)
        gains.append((bound - root) / (costs.min() - root))
    assert min(gains) > 0.1 and np.median(gains) > 0.3


def test_multipliers_of_products_raise_the_bound(monkeypatch):
    monkeypatch.setattr(convex, "_SMALLEST_MIXED", 2)
    S, u = coupled(3, 60)
    cost = convex.convexified(QuadraticCost(S, u))
    mask = select(S, u=u, r=30, method="round").removed.numpy()
    free = np.ones(60, bool)
    found = convex.semidefinite_bound(cost, 30, mask, free, math.inf, 0)
    assert found == convex.semidefinite_bound(cost, 30, mask, free, math.inf, 0)
    monkeypatch.setattr(convex, "_ROUNDS", 0)
    assert found > convex.semidefinite_bound(cost, 30, mask, free, math.inf, 0)


@pytest.mark.parametrize("exponent", [-500, -130, -120, 60, 130, 1000])
def test_costs_beyond_single_precision_never_make_a_semidefinite_bound_nan(monkeypatch, exponent):
    monkeypatch.setattr(convex, "_SMALLEST_MIXED", 2)
    S, u = coupled(3, 30)
    least = select(S, u=u, r=12, time_limit=math.inf).objective
    scaled = QuadraticCost(np.ldexp(S, exponent), np.ldexp(u, exponent))
    cost = convex.convexified(scaled)
    mask = np.arange(30) < 12
    bound = convex.semidefinite_bound(cost, 12, mask, np.ones(30, bool), math.inf, 0)
    assert bound <= np.ldexp(least, exponent)
    assert math.isfinite(bound) == (exponent <= 60)


def test_a_search_with_a_semidefinite_bound_proves_the_true_optimum(monkeypatch):
    S, u = coupled(5, 30)
    plain = select(S, u=u, r=12, time_limit=math.inf)
    monkeypatch.setattr(convex, "_SMALLEST_MIXED", 2)
    bounded = select(S, u=u, r=12, time_limit=math.inf)
    assert bounded.status == plain.status == "optimal"
    assert np.array_equal(bounded.removed, plain.removed)
    stopped = select(S, u=u, r=12, time_limit=math.inf, node_limit=1)
    assert stopped.lower_bound <= plain.objective + 1e-12


def root_and_calls_of_the_bound(monkeypatch, gap):
    """What a search with this gap learns at its root: mask, state, calls of the bound after it."""
    S, u = coupled(0, 30)
    roots, calls = [], []
    solve = _solver.branch_and_bound

    def searched(*arguments, **options):
        roots.append(solve(*arguments, **options))
        return roots[-1]

    def bound(*arguments):
        calls.append(arguments)
        return -math.inf

    with monkeypatch.context() as patch:
        patch.setattr(_solver, "branch_and_bound", searched)
        patch.setattr(search, "semidefinite_bound", bound)
        select(S, u=u, r=15, time_limit=math.inf, gap=gap)
    mask, _, complete, _, _, state = roots[0]
    assert not complete
    return mask, state, len(calls)


def test_the_semidefinite_bound_is_left_out_where_the_best_mask_differs_from_the_state(monkeypatch):
    S, u = coupled(0, 30)
    root = select(S, u=u, r=15, time_limit=math.inf, node_limit=0)
    # The gap allows for better masks than the best one, so that the state may decide against it.
    mask, state, calls = root_and_calls_of_the_bound(monkeypatch, 1.2 * root.gap)
    decided = state != convex.FREE
    assert (mask[decided] != (state[decided] == 1)).any()
    assert calls == 0
    mask, state, calls = root_and_calls_of_the_bound(monkeypatch, 0.5 * root.gap)
    assert calls == 1


HURRYING_CLOCK = """
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>

/* Every look at the clock takes an hour. */
int clock_gettime(clockid_t clock, struct timespec *time) {
  static long hours;
  const int failed = (int)syscall(SYS_clock_gettime, clock, time);
  time->tv_sec += 3600L * ++hours;
  return failed;
}
"""

ANNEALED = """
import importlib.util, math, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_solver", sys.argv[1])
solver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(solver)
with np.load(sys.argv[2]) as cost:
    S, u = cost["S"], cost["u"]
mask = solver.branch_and_bound(S, u, len(u) // 2, 0.0, float(sys.argv[3]), 0, 0.0, 0)[0]
print(repr(solver.objective(S, u, mask)))
"""


@pytest.mark.skipif(
    shutil.which("cc") is None or not sys.platform.startswith("linux"),
    reason="the clock is replaced by a C function that is loaded first, as Linux can",
)
def test_without_a_time_limit_the_clock_does_not_change_the_annealing(tmp_path):
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(HURRYING_CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    S, u = gram(0, 300, 100)
    np.savez(tmp_path / "cost.npz", S=S, u=u)

    def annealed(limit, **environment):
        command = [sys.executable, "-c", ANNEALED, _solver.__file__, tmp_path / "cost.npz", limit]
        run = subprocess.run(
            command, env=os.environ | environment, check=True, capture_output=True, text=True
        )
        return float(run.stdout)

    hurried = {"LD_PRELOAD": str(library)}
    assert annealed("inf", **hurried) == annealed("inf")
    assert annealed("1e3", **hurried) != annealed("1e3")  # the replaced clock is the solver's
