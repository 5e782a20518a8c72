"""min over widths n of  sum_g f_g(n_g) + multiplier * cost(n), by eliminating one group at a time.

Eliminating group v replaces all terms that hold n_v by their minimum over n_v, a table over the
widths of v's neighbours (non-serial dynamic programming: U. Bertele and F. Brioschi, 1972). Where
n_v meets its neighbours in products only, that minimum is the convex conjugate of f_v at a slope
that is linear in the neighbours' widths, and costs a constant time for each entry of the table.

Where tables would exceed ``TABLE_LIMIT`` entries, the minimum is bounded from below instead, with
tables of up to ``RELAXED_LIMIT`` entries:
 - a product by its tangent in logarithms, x y >= x0 y0 (1 + log(x / x0) + log(y / y0)), which is a
   sum of terms in one width each and exact at the reference (x0, y0);
 - terms that need a common table too large, by the sum of their separate minima (mini-buckets:
   R. Dechter and I. Rish, 2003).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ccp_ext import _solver
from ccp_ext.allocation.resource import Resource, Table

# 32 MiB of float64: two streams of 1024 and 2048 channels, every width of each, fit.
TABLE_LIMIT = 2**22
# Where that is not enough, tables this small give better bounds than larger ones: more products are
# relaxed by their tangents, which are tight near the reference, and fewer minima are separated.
RELAXED_LIMIT = 2**10

_EPS = np.finfo(np.float64).eps

Vectors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Bucket:
    """Factors that are minimised over one group together.

    Attributes:
        scope: the groups that the factors hold beside the one that is eliminated.
        factors: their positions in the list of factors.
        links: further groups that meet the eliminated one in a product.
    """

    scope: tuple[str, ...]
    factors: tuple[int, ...]
    links: tuple[str, ...] = ()


class Elimination:
    """The minimisation for given widths and one cost; f and the multiplier vary from call to call.

    Attributes:
        exact: no term is relaxed.
        relaxed: how many products and tables were relaxed.
    """

    def __init__(
        self,
        widths: Vectors,
        resource: Resource,
        reference: Mapping[str, int],
        limit: int,
    ) -> None:
        """
        Args:
            widths: the allowed keep counts of each group, increasing.
            reference: a keep count of each group, where relaxed products are exact.
            limit: entries of a table over two or more groups, at most.
        """
        self._widths = {name: np.asarray(n, dtype=np.float64) for name, n in widths.items()}
        self._limit = limit
        self._resource = resource
        self._constant = float(resource.constant)
        self._scopes: list[tuple[str, ...]] = []
        self._tables: list[np.ndarray] = []
        self._products: dict[str, dict[str, float]] = {name: {} for name in widths}
        self._single = {name: resource.linear.get(name, 0) * n for name, n in self._widths.items()}
        self.relaxed = 0
        for (a, b), coefficient in resource.products.items():
            if a == b:
                self._single[a] = self._single[a] + coefficient * self._widths[a] ** 2
            else:
                self._products[a][b] = self._products[b][a] = float(coefficient)
        for table in resource.tables:
            self._add_table(table)
        links = {name: set(others) for name, others in self._products.items()}
        self._steps = list(self._plan(links, reference))

    @classmethod
    def of(
        cls,
        widths: Vectors,
        resource: Resource,
        reference: Mapping[str, int],
        limit: int = TABLE_LIMIT,
    ) -> Elimination:
        """The exact elimination if ``limit`` allows it, else the relaxed one."""
        elimination = cls(widths, resource, reference, limit)
        if elimination.exact:
            return elimination
        return cls(widths, resource, reference, min(limit, RELAXED_LIMIT))

    @property
    def exact(self) -> bool:
        return self.relaxed == 0

    def minimise(self, values: Vectors, multiplier: float) -> tuple[float, dict[str, int]]:
        """The minimum and a minimiser (if relaxed: a lower bound, and some widths near it).

        Args:
            values: f_g at every allowed width of each group.
            multiplier: of the cost, at least 0.

        Returns:
            (the minimum, lowered by what rounding may have added; {group: position of its width}).
        """
        single = {name: values[name] + multiplier * cost for name, cost in self._single.items()}
        factors = [multiplier * table for table in self._tables]
        scopes = list(self._scopes)
        for name, buckets in self._steps:
            for bucket in buckets:
                first = bucket is buckets[0]
                own = single[name] if first else np.zeros_like(single[name])
                table = self._eliminate(name, bucket, own, factors, scopes, multiplier, first)
                factors.append(table)
                scopes.append(bucket.scope + bucket.links)
        minimum = multiplier * self._constant
        minimum += sum(float(f) for f, scope in zip(factors, scopes, strict=True) if not scope)
        chosen = self._trace_back(single, factors, scopes, multiplier)
        return minimum - self._rounding(values, multiplier), chosen

    # --- planning --------------------------------------------------------------------------

    def _size(self, names: Iterable[str]) -> int:
        return math.prod(len(self._widths[name]) for name in names)

    def _add_table(self, table: Table) -> None:
        groups = table.groups
        if self._size(groups) <= self._limit:
            grid = np.meshgrid(*(self._widths[g] for g in groups), indexing="ij", sparse=True)
            counts = {g: n.astype(np.int64) for g, n in zip(groups, grid, strict=True)}
            shape = tuple(len(self._widths[g]) for g in groups)
            self._scopes.append(groups)
            self._tables.append(np.ascontiguousarray(np.broadcast_to(table(counts), shape)))
            return
        # Never less than with the other groups at their least; the mean of these bounds is one.
        self.relaxed += 1
        least = {g: np.int64(self._widths[g][0]) for g in groups}
        for g in groups:
            counts = {**least, g: self._widths[g].astype(np.int64)}
            bound = table.at_least(table.out(counts), table.inputs(counts))
            self._single[g] = self._single[g] + bound / len(groups)

    def _plan(
        self, links: dict[str, set[str]], reference: Mapping[str, int]
    ) -> Iterable[tuple[str, tuple[_Bucket, ...]]]:
        """Eliminate what makes the smallest table first."""
        scopes = dict(enumerate(self._scopes))
        created = len(scopes)
        left = dict.fromkeys(self._widths)
        while left:
            name = min(left, key=lambda v: self._work(v, scopes, links[v]))
            del left[name]
            buckets = self._buckets(name, scopes)
            buckets[0] = self._with_links(name, buckets[0], links, reference)
            for other in links.pop(name):
                links[other].discard(name)
            for bucket in buckets:
                for factor in bucket.factors:
                    del scopes[factor]
                scopes[created] = bucket.scope + bucket.links
                created += 1
            yield name, tuple(buckets)

    def _work(self, name: str, scopes: Mapping[int, Sequence[str]], links: set[str]) -> int:
        held = {v for scope in scopes.values() if name in scope for v in scope} - {name}
        return max(self._size(held | links), self._size(held | {name}))

    def _buckets(self, name: str, scopes: Mapping[int, tuple[str, ...]]) -> list[_Bucket]:
        """The factors that hold the group, together as far as the limit allows."""
        buckets = [_Bucket((), ())]
        for factor, scope in scopes.items():
            if name not in scope:
                continue
            for k, bucket in enumerate(buckets):
                joint = tuple(dict.fromkeys(bucket.scope + scope))
                grows = len({*joint, name}) > max(len(scope), len(bucket.scope) + 1)
                if not grows or self._size({*joint, name}) <= self._limit:
                    others = tuple(v for v in joint if v != name)
                    buckets[k] = _Bucket(others, (*bucket.factors, factor))
                    break
            else:
                self.relaxed += 1
                buckets.append(_Bucket(tuple(v for v in scope if v != name), (factor,)))
        return buckets

    def _with_links(
        self,
        name: str,
        bucket: _Bucket,
        links: Mapping[str, set[str]],
        reference: Mapping[str, int],
    ) -> _Bucket:
        """The bucket with those products that fit in its table, the heaviest first."""
        products = self._products[name]
        heavy = sorted(links[name], key=lambda v: (-products[v] * self._widths[v][-1], v))
        taken: list[str] = []
        for other in heavy:
            if other in bucket.scope:
                continue
            if self._size((*bucket.scope, *taken, other)) <= self._limit:
                taken.append(other)
            else:
                self._relax_product(name, other, reference)
        taken.sort(key=lambda v: (len(self._widths[v]), v))
        return _Bucket(bucket.scope, bucket.factors, tuple(taken))

    def _relax_product(self, a: str, b: str, reference: Mapping[str, int]) -> None:
        self.relaxed += 1
        scale = self._products[a].pop(b) * reference[a] * reference[b]
        del self._products[b][a]
        for name in (a, b):
            logarithm = np.log(self._widths[name] / reference[name])
            self._single[name] = self._single[name] + scale * (0.5 + logarithm)

    # --- minimising ------------------------------------------------------------------------

    def _eliminate(
        self,
        name: str,
        bucket: _Bucket,
        own: np.ndarray,
        factors: Sequence[np.ndarray],
        scopes: Sequence[tuple[str, ...]],
        multiplier: float,
        first: bool,
    ) -> np.ndarray:
        """The minimum over the group's widths, a table over ``bucket.scope + bucket.links``.

        Each product counts once: in the group's ``first`` bucket.
        """
        points, products = self._widths[name], self._products[name]
        order = (*bucket.scope, name)
        total = _laid_out(own, (name,), order)
        for k in bucket.factors:
            total = total + _laid_out(factors[k], scopes[k], order)
        if first:
            for other in bucket.scope:
                if other in products:
                    pair = multiplier * products[other] * np.outer(self._widths[other], points)
                    total = total + _laid_out(pair, (other, name), order)
        if not bucket.links:
            return total.min(axis=-1)
        slopes = [multiplier * products[v] * self._widths[v] for v in bucket.links]
        offset = np.zeros(1)
        for slope in slopes[:-1]:
            offset = np.add.outer(offset, slope).ravel()
        rows = total.reshape(-1, len(points))
        table = _solver.conjugate(rows, points, np.tile(offset, len(rows)), slopes[-1])
        return table.reshape([len(self._widths[v]) for v in bucket.scope + bucket.links])

    def _trace_back(
        self,
        single: Vectors,
        factors: Sequence[np.ndarray],
        scopes: Sequence[tuple[str, ...]],
        multiplier: float,
    ) -> dict[str, int]:
        chosen: dict[str, int] = {}
        for name, buckets in reversed(self._steps):
            total = single[name].copy()
            for k in (k for bucket in buckets for k in bucket.factors):
                at = tuple(slice(None) if v == name else chosen[v] for v in scopes[k])
                total += factors[k][at]
            for other, coefficient in self._products[name].items():
                if other in chosen:
                    width = self._widths[other][chosen[other]]
                    total += multiplier * coefficient * width * self._widths[name]
            chosen[name] = int(total.argmin())
        return chosen

    def _rounding(self, values: Vectors, multiplier: float) -> float:
        """A bound of the error of the minimum: all terms at their largest, a few units each."""
        largest = sum(np.abs(v).max() for v in values.values())
        largest += multiplier * sum(np.abs(v).max() for v in self._single.values())
        largest += multiplier * sum(np.abs(t).max() for t in self._tables)
        largest += multiplier * sum(
            c * self._widths[a][-1] * self._widths[b][-1]
            for a, others in self._products.items()
            for b, c in others.items()
        )
        return float(_EPS * 8 * (len(self._steps) + len(self._tables)) * largest)


def _laid_out(array: np.ndarray, scope: Sequence[str], order: Sequence[str]) -> np.ndarray:
    """The array with one axis for each name of ``order``; axes that it lacks have length 1."""
    axes = sorted(range(len(scope)), key=lambda k: order.index(scope[k]))
    moved = array.transpose(axes)
    sizes = {scope[k]: array.shape[k] for k in axes}
    return moved.reshape([sizes.get(name, 1) for name in order])
