"""What the selection's search reports, and the structure it makes use of."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ccp_ext import _solver
from ccp_ext.selection import select


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
