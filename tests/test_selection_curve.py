"""The selection over all counts: bounds and masks against exact solutions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ccp_ext import _solver
from ccp_ext.errors import InputError
from ccp_ext.selection import curve, select


def problems(count, largest=12):
    rng = np.random.default_rng(3)
    for k in range(count):
        c = int(rng.integers(1, largest + 1))
        rank = int(rng.integers(1, 2 * c + 1))
        q = rng.normal(size=(rank, c)) + 0.5 * rng.normal()
        if k % 4 == 0:
            q[:, rng.integers(c)] = 0
        if k % 5 == 0:
            q[:, rng.integers(c)] = q[:, rng.integers(c)]
        F = q.T @ q / rank
        yield (F - 0.3 * np.eye(c) if k % 7 == 0 else F), q.mean(axis=0)


def test_two_hundred_random_problems_are_exact_at_every_count_and_the_curve_encloses_them():
    for S, u in problems(200):
        found = curve(S, u=u)
        rounding = 1e-13 * (np.abs(S).sum() + np.abs(u).sum())
        assert found.counts == tuple(range(len(u) + 1))
        for r in found.counts:
            least = _solver.objective(S, u, _solver.enumerate(S, u, r))
            searched = select(S, u=u, r=r, method="branch_and_bound", time_limit=math.inf)
            assert searched.objective == pytest.approx(least, abs=10 * rounding)
            assert searched.lower_bound <= least
            assert found.lower_bound[r] <= least <= found.objective[r] + rounding
            m = found.removed[r].astype(float)
            assert m.sum() == r
            assert found.objective[r] == pytest.approx(0.5 * m @ S @ m - u @ m, abs=rounding)


def layer(c=120, rank=30):
    rng = np.random.default_rng(0)
    q = (
        rng.normal(size=(200, rank)) @ rng.normal(size=(rank, c)) / rank
        + rng.normal(size=(200, c)) / 5
    )
    q += 0.2 * rng.normal(size=c)
    return q.T @ q / len(q), q.mean(axis=0)


def test_the_curve_is_nearly_as_tight_as_the_root_of_a_search_and_its_masks_are_near_the_best():
    S, u = layer()
    found = curve(S, u=u)
    for r in range(5, 120, 11):
        root = select(S, u=u, r=r, time_limit=math.inf, node_limit=0)
        spread = root.random - root.lower_bound
        weaker = (root.lower_bound - found.lower_bound[r]) / spread
        assert -5e-3 <= weaker <= 1.5e-2  # a search suits the diagonal to its own count
        assert found.objective[r] <= root.objective + 0.02 * spread


def test_the_bound_is_convex_in_the_count_up_to_its_precision():
    S, u = layer()
    bound = curve(S, u=u).lower_bound
    assert np.diff(bound, 2).min() >= -1e-3 * np.ptp(bound)


def test_some_counts_give_valid_bounds_in_ascending_order():
    S, u = layer()
    found = curve(S, u=u, counts=[60, 3, 60, 119])
    assert found.counts == (3, 60, 119)
    for k, r in enumerate(found.counts):
        choice = select(S, u=u, r=r, time_limit=math.inf, node_limit=300)
        assert found.lower_bound[k] <= choice.objective
        assert found.objective[k] >= choice.lower_bound
        assert found.removed[k].sum() == r
    empty = curve(S, u=u, counts=[])
    assert empty.counts == () and empty.removed.shape == (0, 120)


def test_protected_channels_are_never_removed():
    S, u = layer(14, 5)
    found = curve(S, u=u, protected=[0, 7, 9])
    assert found.counts == tuple(range(12))
    assert not found.removed[:, [0, 7, 9]].any()
    for r in found.counts:
        least = select(S, u=u, r=r, protected=[0, 7, 9]).objective
        assert found.lower_bound[r] <= least <= found.objective[r] + 1e-12


def test_without_time_the_curve_still_encloses_the_optima():
    for S, u in itertools.islice(problems(40), 40):
        found = curve(S, u=u, time_limit=0)
        for r in found.counts:
            least = _solver.objective(S, u, _solver.enumerate(S, u, r))
            assert found.lower_bound[r] <= least <= found.objective[r] + 1e-9
            assert found.removed[r].sum() == r


def test_equal_input_gives_equal_bits_and_samples_the_same_as_their_matrix():
    S, u = layer()
    first, again = curve(S, u=u), curve(torch.tensor(S), u=u)
    assert np.array_equal(first.removed, again.removed)
    assert np.array_equal(first.lower_bound, again.lower_bound)
    Q = np.random.default_rng(1).normal(size=(10, 20))
    by_samples, by_matrix = curve(Q=Q), curve(Q.T @ Q / 10)
    assert np.allclose(by_samples.lower_bound, by_matrix.lower_bound, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_curve_is_safe_at_every_scale(scale):
    S, u = layer(12, 4)
    plain, scaled = curve(S, u=u), curve(scale * S, u=scale * u)
    assert np.allclose(scaled.objective / scale, plain.objective, atol=1e-9)
    for r in plain.counts:
        least = _solver.objective(S, u, _solver.enumerate(S, u, r))
        assert scaled.lower_bound[r] / scale <= least + 1e-9


BAD = {
    "count": (dict(counts=[4]), "0 <= r <= C = 3; got 4"),
    "protected count": (dict(counts=[3], protected=[0]), "0 <= r <= C = 2; got 3"),
    "NaN": (dict(F=np.full((3, 3), np.nan)), r"F\[0, 0\] is nan"),
    "time": (dict(time_limit=-1), "time_limit must be"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=f"curve: .*{message}"):
        curve(**{"F": np.eye(3), **arguments})
