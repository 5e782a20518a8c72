"""min over widths n of  sum_g f_g(n_g)  subject to  cost(n) <= budget, with a bound.

For every multiplier >= 0 the minimum of sum f + multiplier * (cost - budget) bounds the problem
from below (Lagrangian duality; H. Everett, 1963), and :mod:`~ccp_ext.allocation.elimination` finds
it exactly. The best multiplier gives the bound; the widths seen on the way, improved by exchanges
between two groups, give the solution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ccp_ext.allocation.elimination import TABLE_LIMIT, Elimination, Vectors
from ccp_ext.allocation.resource import Resource

# The search for the multiplier ends when the bound cannot rise by more than this, beside the range
# of the objective; a poor multiplier costs tightness, never validity.
_TOLERANCE = 1e-8
_EVALUATIONS = 16
# Every so manieth width is enough to find the multiplier nearly.
_COARSE = 8
# Exchanges between two groups try so many widths on either side.
_REACH = 12
# Relaxed products are exact at a reference; it moves to the solution so many times.
_REFERENCES = 3


@dataclass(frozen=True)
class Optimum:
    """Widths within the budget, and how good they can be.

    Attributes:
        keep: the keep count of each group.
        objective: the sum of f.
        lower_bound: no widths within the budget have a lower sum of the lower curves.
        multiplier: what the bound was found with: by how much the objective falls for a unit of
            the budget.
        relaxed: how many terms of the cost were relaxed for the bound; 0: the dual is exact.
    """

    keep: dict[str, int]
    objective: float
    lower_bound: float
    multiplier: float
    relaxed: int


@dataclass(frozen=True)
class Program:
    """The problem: the allowed keep counts of each group, f at each of them, cost and budget."""

    widths: Vectors
    values: Vectors
    resource: Resource
    budget: float

    def keep(self, chosen: Mapping[str, int]) -> dict[str, int]:
        """From positions among the widths to keep counts."""
        return {name: int(n[chosen[name]]) for name, n in self.widths.items()}

    def objective(self, chosen: Mapping[str, int]) -> float:
        return math.fsum(self.values[name][at] for name, at in chosen.items())

    def cost(self, chosen: Mapping[str, int]) -> float:
        return self.resource(self.keep(chosen))

    def subset(self, positions: Mapping[str, np.ndarray]) -> Program:
        """The problem with fewer widths."""
        widths = {name: self.widths[name][at] for name, at in positions.items()}
        values = {name: self.values[name][at] for name, at in positions.items()}
        return Program(widths, values, self.resource, self.budget)


def cheapest(program: Program, limit: int = TABLE_LIMIT) -> dict[str, int]:
    """The positions of the widths that cost least (if a table had to be relaxed: nearly)."""
    narrowest = dict.fromkeys(program.widths, 0)
    if not program.resource.tables:
        return narrowest
    elimination = Elimination.of(program.widths, program.resource, program.keep(narrowest), limit)
    nothing = {name: np.zeros(len(n)) for name, n in program.widths.items()}
    return min(narrowest, elimination.minimise(nothing, 1.0)[1], key=program.cost)


def solve(program: Program, lower_values: Vectors, limit: int = TABLE_LIMIT) -> Optimum:
    """Solve the problem for the values, and bound it for the lower values.

    The cost of :func:`cheapest` must be within the budget.

    Args:
        lower_values: at most the values, at every width.
        limit: see :meth:`ccp_ext.allocation.elimination.Elimination.of`.
    """
    upper = _without_equals(program)
    below = Program(program.widths, lower_values, program.resource, program.budget)
    lower = _without_equals(below)
    least = cheapest(upper, limit)

    def improved(chosen: Mapping[str, int]) -> dict[str, int]:
        return _improved(upper, _fitted(upper, chosen, least))

    best = improved({name: len(n) - 1 for name, n in upper.widths.items()})
    bound, multiplier, relaxed = -math.inf, 0.0, 0
    for _ in range(_REFERENCES):
        reference = upper.keep(best)
        dual = _Dual(upper, reference, limit)
        dual.maximise()
        found = [best, *(improved(point.chosen) for point in dual.nearest())]
        best = min(found, key=lambda chosen: (upper.objective(chosen), upper.cost(chosen)))
        if not _same(upper, lower):
            dual = _Dual(lower, reference, limit, near=dual.best.multiplier or None)
            dual.maximise()
        if dual.best.bound > bound:
            bound, multiplier, relaxed = dual.best.bound, dual.best.multiplier, dual.relaxed
        if dual.relaxed == 0 or upper.keep(best) == reference:
            break
    objective = upper.objective(best)
    return Optimum(upper.keep(best), objective, min(bound, objective), multiplier, relaxed)


# --- the dual ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """The dual at one multiplier: a lower bound, its minimiser, and cost - budget there."""

    multiplier: float
    bound: float
    chosen: dict[str, int]
    excess: float


class _Dual:
    """The dual function of a program: concave, piecewise linear with slopes ``excess``."""

    def __init__(
        self, program: Program, reference: Mapping[str, int], limit: int, near: float | None = None
    ) -> None:
        """``near``: a multiplier near the best one, if known."""
        self._program = program
        self._elimination = Elimination.of(program.widths, program.resource, reference, limit)
        self._reference, self._limit, self._near = reference, limit, near
        self.relaxed = self._elimination.relaxed
        self._points: list[_Point] = []
        values = program.values.values()
        self._range = math.fsum(v.max() - v.min() for v in values)

    @property
    def best(self) -> _Point:
        return max(self._points, key=lambda p: p.bound)

    def nearest(self) -> list[_Point]:
        """The points on either side of the best multiplier."""
        within = [p for p in self._points if p.excess <= 0]
        beyond = [p for p in self._points if p.excess > 0]
        chosen = [min(within, key=lambda p: p.multiplier)] if within else []
        return chosen + ([max(beyond, key=lambda p: p.multiplier)] if beyond else [])

    def maximise(self) -> None:
        unlimited = self._unlimited()
        self._points.append(unlimited)
        if unlimited.excess <= 0 or self._range == 0:
            return
        near = self._guess() if self._near is None else self._near
        low, high = self._bracket(unlimited, near)
        for _ in range(_EVALUATIONS):
            if high.excess == 0 or self._can_gain(low, high) <= _TOLERANCE * self._range:
                return
            point = self._evaluate(_between(low, high))
            low, high = (point, high) if point.excess > 0 else (low, point)

    def _unlimited(self) -> _Point:
        """At the multiplier 0 each group is alone."""
        chosen = {name: int(v.argmin()) for name, v in self._program.values.items()}
        bound = self._program.objective(chosen)
        return _Point(0.0, bound, chosen, self._program.cost(chosen) - self._program.budget)

    def _guess(self) -> float:
        """The best multiplier for fewer widths, or one of the right order."""
        sizes = [len(n) for n in self._program.widths.values()]
        if max(sizes) <= 2 * _COARSE:
            return self._range / self._program.budget
        positions = {
            name: np.unique(np.r_[0 : len(n) : _COARSE, len(n) - 1])
            for name, n in self._program.widths.items()
        }
        scale = self._range / self._program.budget
        coarse = _Dual(self._program.subset(positions), self._reference, self._limit, scale)
        coarse.maximise()
        return coarse.best.multiplier or scale

    def _bracket(self, unlimited: _Point, near: float) -> tuple[_Point, _Point]:
        """Two points with an excess above and at most 0, from steps that grow away from ``near``.

        A relaxed cost may stay below the budget everywhere; then the second point is the last.
        """
        first = self._evaluate(near)
        point, factor = first, 1.02
        while (point.excess > 0) == (first.excess > 0) and 1e-30 < factor < 1e30:
            last = point
            scale = factor if first.excess > 0 else 1 / factor
            point = self._evaluate(last.multiplier * scale)
            factor *= factor
        if first.excess > 0:
            return last, point
        return (point, last) if point.excess > 0 else (unlimited, last)

    def _evaluate(self, multiplier: float) -> _Point:
        program = self._program
        least, chosen = self._elimination.minimise(program.values, multiplier)
        # The slope of the dual, which for relaxed terms is not the true cost.
        excess = (least - program.objective(chosen)) / multiplier - program.budget
        if self.relaxed == 0:
            excess = program.cost(chosen) - program.budget
        point = _Point(multiplier, least - multiplier * program.budget, chosen, excess)
        self._points.append(point)
        return point

    def _can_gain(self, low: _Point, high: _Point) -> float:
        """How much the dual may rise between two points, where their tangents meet."""
        step = (high.bound - low.bound + high.excess * (low.multiplier - high.multiplier)) / (
            low.excess - high.excess
        )
        return low.bound + low.excess * step - self.best.bound


def _between(low: _Point, high: _Point) -> float:
    """Where the excess would be 0 if it were linear, but not near the ends."""
    share = low.excess / (low.excess - high.excess)
    return low.multiplier + min(max(share, 0.1), 0.9) * (high.multiplier - low.multiplier)


# --- solutions ---------------------------------------------------------------------------------


def _fitted(
    program: Program, chosen: Mapping[str, int], least: Mapping[str, int]
) -> dict[str, int]:
    """The widths themselves if they are within the budget, else as near on the way to ``least``."""
    if program.cost(chosen) <= program.budget:
        return dict(chosen)
    steps = max(abs(at - least[name]) for name, at in chosen.items())

    def moved(step: int) -> dict[str, int]:
        return {
            name: least[name] + (at - least[name]) * step // steps for name, at in chosen.items()
        }

    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        if program.cost(moved(middle)) <= program.budget:
            low = middle
        else:
            high = middle
    return moved(low)


def _improved(program: Program, chosen: dict[str, int]) -> dict[str, int]:
    """Change one or two groups at a time while this lowers the objective within the budget."""
    moves = _Moves(program, chosen)
    names = list(chosen)
    while True:
        changed = [moves.change_one(name) for name in names]
        changed += [moves.change_two(a, b) for a, b in itertools.combinations(names, 2)]
        if not any(changed):
            return moves.chosen


class _Moves:
    """Exact costs of changing the widths of one or two groups of a solution."""

    def __init__(self, program: Program, chosen: Mapping[str, int]) -> None:
        self._program = program
        self.chosen = dict(chosen)
        self._keep = program.keep(chosen)
        resource = program.resource
        self._neighbours: dict[str, dict[str, float]] = {name: {} for name in chosen}
        for (a, b), coefficient in resource.products.items():
            self._neighbours[a][b] = self._neighbours[b][a] = coefficient
        self._tables = {name: [t for t in resource.tables if name in t.groups] for name in chosen}
        self._set_slack()

    def change_one(self, name: str) -> bool:
        n = self._program.widths[name]
        cost = self._polynomial(name, n) + self._of_tables(self._tables[name], {name: n})
        gain = self._value(name) - self._program.values[name]
        return self._apply(np.where(cost <= self._slack, gain, -np.inf), (name,), (0,))

    def change_two(self, a: str, b: str) -> bool:
        (first, n), (second, m) = self._window(a), self._window(b)
        cost = self._polynomial(a, n)[:, None] + self._polynomial(b, m)
        if b in self._neighbours[a]:
            both = (n - self._keep[a])[:, None] * (m - self._keep[b])
            cost = cost + self._neighbours[a][b] * both
        tables = {id(t): t for t in (*self._tables[a], *self._tables[b])}.values()
        cost = cost + self._of_tables(tables, {a: n[:, None], b: m})
        values = self._program.values
        gain = (self._value(a) - values[a][first : first + len(n)])[:, None]
        gain = gain + (self._value(b) - values[b][second : second + len(m)])
        return self._apply(np.where(cost <= self._slack, gain, -np.inf), (a, b), (first, second))

    def _window(self, name: str) -> tuple[int, np.ndarray]:
        start = max(0, self.chosen[name] - _REACH)
        return start, self._program.widths[name][start : self.chosen[name] + _REACH + 1]

    def _value(self, name: str) -> float:
        return self._program.values[name][self.chosen[name]]

    def _polynomial(self, name: str, n: np.ndarray) -> np.ndarray:
        """What the products, the square and the linear term change by."""
        slope = self._program.resource.linear.get(name, 0)
        square = 0
        for other, coefficient in self._neighbours[name].items():
            if other == name:
                square = coefficient
            else:
                slope = slope + coefficient * self._keep[other]
        now = self._keep[name]
        return (n - now) * (slope + square * (n + now))

    def _of_tables(self, tables, changed: Mapping[str, np.ndarray]) -> np.ndarray | float:
        return sum(table({**self._keep, **changed}) - table(self._keep) for table in tables)

    def _apply(self, gain: np.ndarray, names: tuple[str, ...], start: tuple[int, ...]) -> bool:
        best = int(gain.argmax())
        # A gain that is only rounding could go to and fro.
        if not gain.flat[best] > 1e-12 * max(abs(self._value(name)) for name in names):
            return False
        positions = np.unravel_index(best, gain.shape)
        moved = {n: f + int(p) for n, f, p in zip(names, start, positions, strict=True)}
        keep = {name: int(self._program.widths[name][k]) for name, k in moved.items()}
        # The change of a cost in floating point is not exact to the last bit.
        if self._program.resource({**self._keep, **keep}) > self._program.budget:
            return False
        self.chosen |= moved
        self._keep |= keep
        self._set_slack()
        return True

    def _set_slack(self) -> None:
        self._slack = self._program.budget - self._program.resource(self._keep)


# --- fewer widths ------------------------------------------------------------------------------


def _without_equals(program: Program) -> Program:
    """Of the widths that a staircase cannot tell apart, only the one with the least value."""
    resource = program.resource
    in_form = set(resource.linear) | {name for pair in resource.products for name in pair}
    positions = {}
    for name, n in program.widths.items():
        levels = None if name in in_form else _levels(name, n, resource)
        if levels is None:
            positions[name] = np.arange(len(n))
            continue
        order = np.lexsort((np.arange(len(n)), program.values[name]))
        _, first = np.unique(levels[order], axis=0, return_index=True)
        positions[name] = np.sort(order[first])
    return program.subset(positions)


def _levels(name: str, n: np.ndarray, resource: Resource) -> np.ndarray | None:
    """[widths, sides] what all tables see of the group; None if some see every width."""
    levels = []
    for table in resource.tables:
        for side, step in zip((table.out, table.inputs), table.steps, strict=True):
            if name in side.weights:
                if len(side.weights) > 1:
                    return None
                levels.append(step(side({name: n})))
    return np.stack(levels, axis=1) if levels else np.zeros((len(n), 1))


def _same(first: Program, second: Program) -> bool:
    return all(
        np.array_equal(first.widths[name], second.widths[name])
        and np.array_equal(first.values[name], second.values[name])
        for name in first.widths
    )
