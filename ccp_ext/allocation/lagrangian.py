"""min over widths n of  sum_g f_g(n_g)  subject to  cost(n) <= budget, with a bound.

For every multiplier >= 0 the minimum of sum f + multiplier * (cost - budget) bounds the problem
from below (Lagrangian duality; H. Everett, 1963), and :mod:`~ccp_ext.allocation.elimination` finds
it exactly. The best multiplier gives the bound; the widths seen on the way, improved by exchanges
between two groups, give the solution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ccp_ext.allocation.elimination import TABLE_LIMIT, Elimination, Vectors
from ccp_ext.allocation.resource import Resource, Table

# The search for the multiplier ends when the bound cannot rise by more than this, beside the range
# of the objective; a poor multiplier costs tightness, never validity.
_TOLERANCE = 1e-8
_EVALUATIONS = 16
# Every so manieth width is enough to find the multiplier nearly.
_COARSE = 8
# Exchanges between two groups try so many widths on either side.
_REACH = 12
# Relaxed products are exact at a reference; it moves to the solution so many times.
_REFERENCES = 2


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


def _improved(program: Program, chosen: Mapping[str, int]) -> dict[str, int]:
    """Change one or two groups at a time while this lowers the objective within the budget."""
    moves = _Moves(program, chosen)
    groups = range(len(chosen))
    while True:
        changed = sum(moves.change(a) for a in groups)
        for a in groups:
            while moves.exchange(a):
                changed += 1
        if not changed:
            return moves.chosen


class _Moves:
    """Exact costs of changing the widths of one or two groups of a solution.

    Groups go by number. Around its width each has a window of W widths; beyond the ends of its
    range the last one is repeated, so that the windows of all groups make one array.
    """

    def __init__(self, program: Program, chosen: Mapping[str, int]) -> None:
        self._program = program
        self._names = list(chosen)
        self._at = np.array(list(chosen.values()))
        sizes = np.array([len(program.widths[name]) for name in self._names])
        self._last = sizes - 1
        self._widths, self._values = np.zeros((2, len(sizes), sizes.max()))
        for g, name in enumerate(self._names):
            self._widths[g, : sizes[g]] = program.widths[name]
            self._values[g, : sizes[g]] = program.values[name]
        self._read(program.resource)
        self._slack = program.budget - program.cost(chosen)
        self._table_cost: dict[int, np.ndarray] = {}
        self._update(range(len(sizes)))

    def _read(self, resource: Resource) -> None:
        """The cost's coefficients, and which tables and which groups meet which."""
        number = {name: g for g, name in enumerate(self._names)}
        self._linear = np.array([float(resource.linear.get(name, 0)) for name in self._names])
        self._products = np.zeros((len(number), len(number)))
        for (a, b), coefficient in resource.products.items():
            self._products[number[a], number[b]] = coefficient
            self._products[number[b], number[a]] = coefficient
        self._squares = self._products.diagonal().copy()
        np.fill_diagonal(self._products, 0)
        self._tables = [[t for t in resource.tables if name in t.groups] for name in self._names]
        self._beside = [
            sorted({number[name] for table in tables for name in table.groups} - {g})
            for g, tables in enumerate(self._tables)
        ]

    @property
    def chosen(self) -> dict[str, int]:
        return dict(zip(self._names, self._at.tolist(), strict=True))

    def change(self, a: int) -> bool:
        """Give the group the best width that fits."""
        n = self._widths[a, : self._last[a] + 1]
        cost = (n - self._keep[a]) * (self._slope[a] + self._squares[a] * (n + self._keep[a]))
        cost = cost + self._of_tables(self._tables[a], {a: n})
        gain = self._value[a] - self._values[a, : len(n)]
        best = int(np.where(cost <= self._slack, gain, -np.inf).argmax())
        return self._apply({a: best}, gain[best])

    def exchange(self, a: int) -> bool:
        """Narrow the group for widening that other with which most can be gained.

        To widen both, or to narrow both, gains nothing that one alone does not.
        """
        less, more = slice(None, _REACH), slice(_REACH + 1, None)
        cost = self._cost[a, less, None] + self._cost[:, None, more]
        slopes = self._products[a, :, None] * self._step[:, more]
        cost += self._step[a, less, None] * slopes[:, None, :]
        for b in self._beside[a]:
            cost[b] += self._of_shared_tables(a, less, b, more)
        gain = self._gain[a, less, None] + self._gain[:, None, more]
        gain[a] = -np.inf
        best = int(np.where(cost <= self._slack, gain, -np.inf).argmax())
        b, i, j = np.unravel_index(best, gain.shape)
        moved = {a: self._window[a, less][i], int(b): self._window[b, more][j]}
        return self._apply(moved, gain[b, i, j])

    def _of_tables(self, tables: Sequence[Table], changed: Mapping[int, np.ndarray]) -> Any:
        """What the tables change by if groups get other widths."""
        if not tables:
            return 0.0
        now = dict(zip(self._names, self._keep.astype(np.int64), strict=True))
        then = now | {self._names[g]: n.astype(np.int64) for g, n in changed.items()}
        return sum(table(then) - table(now) for table in tables)

    def _of_shared_tables(self, a: int, first: slice, b: int, second: slice) -> np.ndarray:
        """What tables of both groups change by beyond the changes for each group alone."""
        shared = [table for table in self._tables[a] if self._names[b] in table.groups]
        n = self._widths[a, self._window[a, first], None]
        m = self._widths[b, self._window[b, second]]
        both = self._of_tables(shared, {a: n, b: m})
        return both - self._of_tables(shared, {a: n}) - self._of_tables(shared, {b: m})

    def _apply(self, moved: Mapping[int, int], gain: float) -> bool:
        """Move groups to these positions, if that gains and fits."""
        # A gain that is only rounding could go to and fro.
        if not gain > 1e-12 * max(abs(self._value[g]) for g in moved):
            return False
        chosen = self.chosen | {self._names[g]: int(at) for g, at in moved.items()}
        slack = self._program.budget - self._program.cost(chosen)
        # The change of a cost in floating point is not exact to the last bit.
        if slack < 0:
            return False
        for g, at in moved.items():
            self._at[g] = at
        self._slack = slack
        self._update({*moved, *(b for g in moved for b in self._beside[g])})
        return True

    def _update(self, groups: Iterable[int]) -> None:
        """All that depends on the widths; ``groups``: those whose tables see other ones."""
        every, at = np.arange(len(self._at))[:, None], self._at[:, None]
        self._window = np.clip(at + np.arange(-_REACH, _REACH + 1), 0, self._last[:, None])
        self._keep = self._widths[every, at][:, 0]
        self._value = self._values[every, at][:, 0]
        self._slope = self._linear + self._products @ self._keep
        n, now = self._widths[every, self._window], self._keep[:, None]
        self._step = n - now
        self._gain = self._value[:, None] - self._values[every, self._window]
        self._cost = self._step * (self._slope[:, None] + self._squares[:, None] * (n + now))
        for g in groups:
            self._table_cost[g] = self._of_tables(self._tables[g], {g: n[g]})
        for g, cost in self._table_cost.items():
            self._cost[g] += cost


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
