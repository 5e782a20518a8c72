"""Minimising over all widths, against enumeration; bounds where terms are relaxed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ccp_ext import _solver
from ccp_ext.allocation.elimination import Elimination
from ccp_ext.allocation.resource import Affine, Resource, Table


@pytest.mark.parametrize("rows, repeat", [(1, 1), (1, 4), (3, 1), (3, 5)])
def test_the_conjugate_is_the_least_line(rows, repeat):
    rng = np.random.default_rng(rows + 10 * repeat)
    points = np.cumsum(rng.integers(1, 4, 17)).astype(float)
    values = rng.normal(size=(rows, 17)) * 5
    offset, step = rng.normal(size=rows * repeat), np.sort(rng.normal(size=23))
    slopes = offset[:, None] + step
    lines = np.repeat(values, repeat, 0)[:, None, :] + slopes[:, :, None] * points
    np.testing.assert_allclose(
        _solver.conjugate(values, points, offset, step), lines.min(-1), rtol=0, atol=1e-13 * 60
    )


@pytest.mark.parametrize(
    ("values", "points", "offset", "step"),
    [
        ((1, 3), [0, 1, 1], [0], [0]),
        ((1, 3), [0, 1, 2], [0], [1, 0]),
        ((1, 3), [0, 1], [0], [0]),
        ((2, 3), [0, 1, 2], [0], [0]),
        ((1, 0), [], [0], [0]),
    ],
)
def test_the_conjugate_refuses_what_it_cannot_walk(values, points, offset, step):
    with pytest.raises(ValueError, match="expected"):
        _solver.conjugate(np.zeros(values), np.array(points, float), offset, step)


def random_program(seed, groups=5, tables=0):
    """Some widths, values, and a cost in which most pairs of groups meet."""
    rng = np.random.default_rng(seed)
    names = [f"g{k}" for k in range(groups)]
    widths = {
        n: np.sort(rng.choice(np.arange(1, 12), rng.integers(2, 6), replace=False)) for n in names
    }
    values = {n: rng.normal(size=len(w)) * 20 for n, w in widths.items()}
    pairs = [p for p in itertools.combinations_with_replacement(names, 2) if rng.random() < 0.7]
    made = []
    for _ in range(tables):
        grid = rng.integers(0, 30, (12, 12)).astype(float)
        least = np.minimum.accumulate(np.minimum.accumulate(grid[::-1, ::-1], 0), 1)[::-1, ::-1]
        out, first, second = rng.choice(names, 3, replace=False)
        sides = Affine(0, {out: 1}), Affine(-1, {first: 1}), Affine(0, {first: 1, second: 1})
        made.append(
            Table(
                sides[0],
                sides[1 + (rng.random() < 0.5)],
                lambda o, i, grid=grid: grid[o, np.minimum(i, 11)],
                lambda o, i, least=least: least[o, np.minimum(i, 11)],
                (lambda w: w, lambda w: w),
            )
        )
    resource = Resource(
        float(rng.integers(0, 9)),
        {n: int(rng.integers(0, 5)) for n in names},
        {pair: int(rng.integers(1, 4)) for pair in pairs},
        tuple(made),
    )
    return widths, values, resource


def enumerated(widths, values, resource, multiplier):
    return min(
        sum(values[n][k] for n, k in zip(widths, at, strict=True))
        + multiplier * resource({n: int(widths[n][k]) for n, k in zip(widths, at, strict=True)})
        for at in itertools.product(*(range(len(w)) for w in widths.values()))
    )


def lagrangian(widths, values, resource, multiplier, chosen):
    total = sum(values[n][k] for n, k in chosen.items())
    return total + multiplier * resource({n: int(widths[n][k]) for n, k in chosen.items()})


@pytest.mark.parametrize("tables", [0, 2])
@pytest.mark.parametrize("seed", range(8))
def test_the_minimum_is_that_of_all_widths(seed, tables):
    program = random_program(seed, tables=tables)
    reference = {n: int(w[0]) for n, w in program[0].items()}
    elimination = Elimination.of(program[0], program[2], reference)
    assert elimination.exact
    for multiplier in (0.0, 0.05, 0.3, 2.0):
        expected = enumerated(*program, multiplier)
        least, chosen = elimination.minimise(program[1], multiplier)
        magnitude = 1e3 * (1 + multiplier)
        assert 0 <= expected - least <= 1e-10 * magnitude
        assert abs(lagrangian(*program, multiplier, chosen) - expected) <= 1e-10 * magnitude


@pytest.mark.parametrize("tables", [0, 2])
@pytest.mark.parametrize("limit", [1, 3, 8])
@pytest.mark.parametrize("seed", range(6))
def test_relaxed_terms_leave_a_bound(seed, limit, tables):
    program = random_program(seed, tables=tables)
    reference = {n: int(w[len(w) // 2]) for n, w in program[0].items()}
    elimination = Elimination(program[0], program[2], reference, limit)
    assert elimination.relaxed > 0
    for multiplier in (0.05, 0.3, 2.0):
        expected = enumerated(*program, multiplier)
        least, chosen = elimination.minimise(program[1], multiplier)
        assert least <= expected <= lagrangian(*program, multiplier, chosen) + 1e-9


def test_relaxed_products_are_exact_at_the_reference():
    """With one width each, the reference, nothing is lost."""
    widths = {n: np.array([w]) for n, w in {"a": 3, "b": 5, "c": 7}.items()}
    values = {n: np.array([1.0]) for n in widths}
    resource = Resource(1.0, {}, {("a", "b"): 2, ("b", "c"): 3, ("a", "c"): 1})
    reference = {n: int(w[0]) for n, w in widths.items()}
    elimination = Elimination(widths, resource, reference, limit=0)
    assert elimination.relaxed == 3
    assert elimination.minimise(values, 0.5)[0] == pytest.approx(3 + 0.5 * (1 + 30 + 105 + 21))


@pytest.mark.parametrize("limit", [4, 8, 12, 27])
def test_the_bound_holds_where_a_group_is_eliminated_in_several_parts(limit):
    rng = np.random.default_rng(limit)
    several = 0
    for _ in range(40):
        names = [f"g{k}" for k in range(int(rng.integers(6, 9)))]
        widths = {
            n: np.sort(rng.choice(np.arange(1, 20), int(rng.integers(2, 4)), replace=False))
            for n in names
        }
        pairs = [p for p in itertools.combinations(names, 2) if rng.random() < 0.8]
        products = {pair: float(rng.integers(1, 10)) for pair in pairs}
        resource = Resource(1.0, {n: float(rng.integers(0, 5)) for n in names}, products)
        values = {n: -rng.random(len(w)) * rng.integers(1, 2000) for n, w in widths.items()}
        reference = {n: int(w[rng.integers(len(w))]) for n, w in widths.items()}
        multiplier = float(3 * rng.random())
        elimination = Elimination(widths, resource, reference, limit)
        bound, _ = elimination.minimise(values, multiplier)
        grids = dict(zip(names, np.meshgrid(*widths.values(), indexing="ij"), strict=True))
        own = np.meshgrid(*values.values(), indexing="ij")
        least = (sum(own) + multiplier * resource(grids)).min()
        assert bound <= least + 1e-9 * abs(least)
        several += any(len(buckets) > 1 for _, buckets in elimination._steps)
    assert several
