"""Weights, groups and protected channels in the selection against brute force over all masks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ccp_ext.errors import InputError
from ccp_ext.selection import select


def gram(rng, c, rank=None):
    q = rng.normal(size=(2 * c, c)) if rank is None else rng.normal(size=(rank, c))
    return q.T @ q / len(q), q.mean(axis=0)


class BruteForce:
    """All masks that keep groups whole and protected channels in place, by weight."""

    def __init__(self, S, u, weights=None, groups=None, protected=None):
        c = len(u)
        masks = np.array(list(itertools.product((0, 1), repeat=c)))
        allowed = np.ones(len(masks), bool)
        for label in set(np.arange(c) if groups is None else groups):
            members = masks[:, np.arange(c) == label if groups is None else groups == label]
            allowed &= members.min(axis=1) == members.max(axis=1)
        if protected is not None:
            allowed &= ~masks[:, protected].any(axis=1)
        self.masks = masks[allowed]
        self.weight = self.masks @ (np.ones(c, int) if weights is None else weights)
        self.costs = 0.5 * ((self.masks @ S) * self.masks).sum(axis=1) - self.masks @ u
        self.rounding = 1e-13 * (np.abs(S).sum() + np.abs(u).sum())

    def least(self, r):
        return self.costs[self.weight == r].min()

    def allows(self, mask, r):
        return bool((self.masks[self.weight == r] == mask.numpy()).all(axis=1).any())

    def reachable(self):
        return sorted(set(self.weight.tolist()))


def cases(count):
    rng = np.random.default_rng(7)
    for k in range(count):
        c = int(rng.integers(2, 11))
        S, u = gram(rng, c, rank=(None, 3)[k % 2])
        options = {}
        if k % 8 & 1:
            options["weights"] = rng.integers(1, 5, size=c)
        if k % 8 & 2:
            options["groups"] = rng.integers(0, c, size=c)
        if k % 8 & 4:
            options["protected"] = rng.random(c) < 0.3
        yield S, u, options


@pytest.mark.parametrize("method", ["auto", "branch_and_bound"])
def test_items_are_solved_to_the_optimum_at_every_reachable_weight(method):
    for S, u, options in cases(64):
        brute = BruteForce(S, u, **options)
        for r in brute.reachable():
            choice = select(S, u=u, r=r, method=method, time_limit=math.inf, **options)
            assert choice.status == "optimal"
            assert brute.allows(choice.removed, r)
            assert choice.objective == pytest.approx(brute.least(r), abs=10 * brute.rounding)
            assert choice.lower_bound <= brute.least(r) + (choice.method == "exact") * 1e-12


@pytest.mark.parametrize("limits", [dict(node_limit=0), dict(node_limit=2), dict(time_limit=0)])
def test_a_stopped_search_over_items_has_an_allowed_mask_and_a_bound(limits):
    for S, u, options in cases(64):
        brute = BruteForce(S, u, **options)
        for r in brute.reachable():
            choice = select(S, u=u, r=r, method="branch_and_bound", **limits, **options)
            assert brute.allows(choice.removed, r)
            assert choice.lower_bound <= brute.least(r) <= choice.objective + brute.rounding


def test_rounding_over_items_gives_an_allowed_mask():
    for S, u, options in cases(32):
        brute = BruteForce(S, u, **options)
        for r in brute.reachable():
            choice = select(S, u=u, r=r, method="round", **options)
            assert brute.allows(choice.removed, r)
            assert (choice.lower_bound, choice.status) == (-math.inf, "heuristic")


def test_an_unreachable_weight_names_its_neighbours():
    S, u = gram(np.random.default_rng(0), 5)
    with pytest.raises(InputError, match=r"exactly r=7; .* are 6 and 9"):
        select(S, u=u, r=7, weights=[3, 3, 3, 6, 9])
    with pytest.raises(InputError, match=r"exactly r=5; .* are 4 and 7"):
        select(S, u=u, r=5, weights=[4, 4, 7, 7, 7])
    with pytest.raises(InputError, match=r"exactly r=1; .* are 0 and 2"):
        select(S, u=u, r=1, groups=[0, 0, 1, 1, 1])
    with pytest.raises(InputError, match=r"exactly r=3; .* are 2 and 4"):
        select(S, u=u, r=3, groups=[0, 0, 1, 1, 2], protected=[4])


def test_equal_weights_give_the_choice_without_weights():
    S, u = gram(np.random.default_rng(3), 40)
    plain = select(S, u=u, r=15)
    weighted = select(S, u=u, r=45, weights=np.full(40, 3))
    assert torch.equal(plain.removed, weighted.removed)
    assert plain.objective == weighted.objective


def test_groups_are_the_problem_of_their_sums():
    rng = np.random.default_rng(5)
    Q = rng.normal(size=(90, 80))
    labels = rng.permutation(np.repeat(np.arange(40), 2))
    sums = np.stack([Q[:, labels == k].sum(axis=1) for k in range(40)], axis=1)
    grouped = select(Q=Q, u=Q.mean(axis=0), r=30, groups=labels)
    summed = select(Q=sums, u=sums.mean(axis=0), r=15)
    assert np.array_equal(grouped.removed.numpy(), summed.removed.numpy()[labels])
    assert grouped.objective == pytest.approx(summed.objective, abs=1e-10)


def test_a_protected_channel_keeps_its_group():
    S, u = gram(np.random.default_rng(1), 6)
    groups = [0, 1, 0, 2, 1, 2]
    choice = select(S, u=u - 100 * np.eye(6)[0], r=2, groups=groups, protected=[1])
    assert choice.removed.tolist() in ([1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1])
    assert not choice.removed[[1, 4]].any()


def test_indices_and_flags_protect_alike():
    S, u = gram(np.random.default_rng(2), 12)
    flags = torch.zeros(12, dtype=torch.bool)
    flags[[3, 11]] = True
    chosen = [select(S, u=u, r=5, protected=given) for given in (flags, [3, 11], [3, -1])]
    assert all(torch.equal(choice.removed, chosen[0].removed) for choice in chosen)
    assert not chosen[0].removed[flags].any()
    free = select(S, u=u, r=12)
    assert free.removed.all()


def test_unequal_weights_of_many_items_end_with_a_small_certified_gap():
    rng = np.random.default_rng(11)
    S, u = gram(rng, 60, rank=40)
    weights = rng.integers(1, 9, size=60)
    choice = select(
        S, u=u, r=int(weights.sum()) // 2, weights=weights, time_limit=math.inf, node_limit=300
    )
    assert int(weights[choice.removed.numpy()].sum()) == int(weights.sum()) // 2
    assert 0 <= choice.relative_gap < 0.05


BAD = {
    "zero weight": (dict(r=1, weights=[1, 0, 1]), "positive integers; got 0"),
    "fractional weights": (dict(r=1, weights=[0.5, 1, 1]), r"weights must be integers \[C\]"),
    "short weights": (dict(r=1, weights=[1, 1]), r"weights must be integers .* C = 3"),
    "short groups": (dict(r=1, groups=[0, 1]), r"groups must be integers .* C = 3"),
    "float groups": (dict(r=1, groups=[0.0, 1.0, 2.0]), "groups must be integers"),
    "protected out of range": (dict(r=1, protected=[3]), "protected must be bool"),
    "protected shape": (dict(r=1, protected=[True, False]), "protected must be bool"),
    "too many": (dict(r=3, protected=[0]), "between 0 and 2"),
    "weight out of range": (dict(r=7, weights=[1, 2, 3]), "between 0 and 6"),
    "method": (dict(r=3, weights=[1, 2, 3], method="greedy"), "items of equal weight"),
    "progress": (dict(r=1, progress="yes", method="branch_and_bound"), "progress must be a bool"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_items_are_named(arguments, message):
    with pytest.raises(InputError, match=f"select: .*{message}"):
        select(np.eye(3), u=np.zeros(3), **arguments)
