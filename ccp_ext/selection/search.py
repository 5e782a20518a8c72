"""One mask of least cost, with a certificate."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccp_ext import _solver
from ccp_ext.errors import InputError
from ccp_ext.selection.arguments import Limits, to_count, to_limits, to_seed
from ccp_ext.selection.convex import FREE, convexified, lowered_where_free, semidefinite_bound
from ccp_ext.selection.items import to_items
from ccp_ext.selection.progress import Progress
from ccp_ext.selection.quadratic import QuadraticCost, in_range, mean_of_random, quadratic_cost

METHODS = ("auto", "exact", "branch_and_bound", "round", "greedy", "swap")
WEIGHTED_METHODS = ("auto", "branch_and_bound", "round")

# Enumerating this many subsets takes some milliseconds.
_MAX_ENUMERATED = 200_000
_SEMIDEFINITE = 0.5  # of the time that the root leaves


@dataclass(frozen=True, eq=False)
class Choice:
    """The outcome of :func:`select`.

    Attributes:
        removed: bool [C] on the CPU, true for the channels that go; they weigh exactly r.
        objective: the cost of ``removed``, computed in float64 from the definition.
        lower_bound: no allowed mask costs less. Rounding is accounted for, so that the bound
            stays below the true optimum by some units of rounding even where ``removed`` is proven
            optimal; only "exact" gives ``objective`` itself, and "round", which proves nothing,
            gives -infinity.
        status: "optimal" if ``removed`` is proven to be a minimum up to rounding; else "gap" if it
            is proven to be within the ``gap`` asked for; else "heuristic".
        method: the method that was used: "exact", "branch_and_bound", "round", "greedy" or "swap".
        random: the mean cost of a uniformly random allowed mask (of all masks with as many ones,
            where weights differ: of independent draws with the same mean weight).
        nodes: of the search tree that were expanded.
    """

    removed: Tensor
    objective: float
    lower_bound: float
    status: str
    method: str
    random: float = math.nan
    nodes: int = 0

    @property
    def gap(self) -> float:
        """``objective - lower_bound``: at most so much could be gained, in units of the cost."""
        return self.objective - self.lower_bound

    @property
    def relative_gap(self) -> float:
        """The gap as a fraction of what separates random masks from the bound.

        ``(objective - lower_bound) / (random - lower_bound)``: 0 is a proven optimum, 1 no better
        than chance. Costs cross zero, so that no fraction of the cost itself would do.
        """
        if self.gap == 0:
            return 0.0
        spread = self.random - self.lower_bound
        return 1.0 if math.isinf(spread) else self.gap / spread if spread > 0 else math.inf


def select(
    F: Any = None,
    *,
    Q: Any = None,
    u: Any = None,
    r: int,
    weights: Any = None,
    groups: Any = None,
    protected: Any = None,
    method: str = "auto",
    time_limit: float = 1.0,
    gap: float = 0.0,
    node_limit: int | None = None,
    seed: int = 0,
    progress: bool | Callable[[float, float], None] = False,
) -> Choice:
    """Choose the ``r`` channels whose removal costs least: min 1/2 m'Fm - u'm over 1'm = r.

    Args:
        F: pairwise term [C, C], symmetric, not necessarily positive semidefinite; None (with ``Q``
            also None) for a purely linear cost. Torch tensor on any device or array, any real
            dtype; the computation is in float64 on the CPU.
        Q: samples [N, C] instead of ``F``, which is then Q'Q / N.
        u: linear term [C]; None is zero.
        r: the number of channels to remove, 0 <= r <= C; with ``weights`` what they weigh together.
        weights: positive integers [C]: the channels removed weigh exactly ``r``.
        groups: integer labels [C]: channels of one label go or stay together. Their weights add up;
            without ``weights`` each channel weighs 1.
        protected: bool [C] or indices of channels that stay, with all of their group.
        method:
            - "exact" sorts if F is diagonal and otherwise enumerates all subsets, of which there
              may be at most 200,000.
            - "branch_and_bound" bounds the cost by its convex relaxation over the box, and searches
              until the best mask is proven optimal or a limit is reached. On binary masks
              m_i^2 = m_i, so the least eigenvalue of F is moved into u first: any F will do, but
              one far from positive semidefinite has a weak bound. Where hundreds of channels stay
              undecided, up to half of the time goes into a semidefinite bound, and above a thousand
              the rest into annealing: a gap of about 1% stays on strongly coupled costs.
            - "round" rounds the relaxation and exchanges pairs from there and from both greedy
              starts: the fastest good answer; it proves nothing.
            - "greedy" adds the cheapest channel r times, or gives channels back from the full set,
              whichever ends better.
            - "swap" exchanges pairs from both of these starts until no exchange improves.
            - "auto" is "exact" where that is possible and otherwise "branch_and_bound".
            Where items (channels or groups) differ in weight, "auto", "branch_and_bound" and
            "round" remain.
        time_limit: seconds for "branch_and_bound", from the call on. Under a finite one, how much
            goes into the bound and how much of the tree is seen depend on the machine, and unless
            the mask is proven optimal it may differ from run to run, as the bound may.
            ``time_limit=math.inf`` with a ``node_limit`` is reproducible. One factorisation of F
            and the first rounding are made in any case.
        gap: the search may stop once ``removed`` is proven to be within this much of the minimum
            (absolute, in units of the cost).
        node_limit: nodes of the tree to branch at, at most; 0 leaves the relaxation of the whole
            problem, and None is no limit.
        seed: of the simulated annealing within "branch_and_bound"; the other methods do not draw.
        progress: True shows a bar with gap and seconds on a search that lasts longer than a second;
            a function is called now and then with the least cost and the lower bound.

    Among equal minima (up to rounding, where it enumerates) "exact" returns the one whose sorted
    indices come first in lexicographic order.

    Raises:
        InputError: NaN or infinity, a wrong shape, an asymmetric F, r out of range or not the
            weight of any set of items, both F and Q, none of F, Q and u, an unknown method, a
            negative limit or gap, or "exact" with too many subsets.
    """
    begin = time.monotonic()
    cost = quadratic_cost(F, Q, u)
    channels = len(cost.linear)
    if method not in METHODS:
        raise InputError(f"select: method must be one of {', '.join(METHODS)}; got {method!r}")
    limits = to_limits(begin, time_limit, gap, node_limit)
    seed = to_seed("select", seed)
    if weights is None and groups is None and protected is None:
        task = _Task(cost, to_count(r, channels), None, limits, seed, progress)
        return _choose(task, method)
    items = to_items(channels, weights, groups, protected)
    count, unequal = items.count(r)
    if unequal is not None and method not in WEIGHTED_METHODS:
        raise InputError(
            f"select: method={method!r} needs items of equal weight; use one of "
            f"{', '.join(WEIGHTED_METHODS)}"
        )
    choice = _choose(_Task(items.merge(cost), count, unequal, limits, seed, progress), method)
    removed = torch.from_numpy(items.expand(choice.removed.numpy()))
    return dataclasses.replace(choice, removed=removed)


@dataclass(frozen=True)
class _Task:
    """``count`` items of equal weight, or ``count`` in units of unequal ``weights``."""

    cost: QuadraticCost
    count: int
    weights: np.ndarray | None
    limits: Limits
    seed: int
    progress: bool | Callable[[float, float], None]

    @property
    def separable(self) -> bool:
        diagonal = np.diagonal(self.cost.quadratic)
        return np.count_nonzero(self.cost.quadratic) == np.count_nonzero(diagonal)

    @property
    def subsets(self) -> int:
        return math.comb(len(self.cost.linear), self.count)

    def choice(self, mask: np.ndarray, lower_bound: float | None, *outcome: str) -> Choice:
        """``lower_bound=None`` is the objective; ``outcome`` status and method."""
        objective = _solver.objective(self.cost.quadratic, self.cost.linear, mask)
        bound = objective if lower_bound is None else min(objective, lower_bound)
        random = mean_of_random(self.cost, self.count, self.weights)
        return Choice(torch.from_numpy(mask), objective, bound, *outcome, random)


def _choose(task: _Task, method: str) -> Choice:
    if method == "auto":
        equal = task.weights is None
        exact = equal and (task.subsets <= _MAX_ENUMERATED or task.separable)
        method = "exact" if exact else "branch_and_bound"
    if method == "exact":
        return _exact(task)
    if method == "branch_and_bound":
        return _branch_and_bound(task)
    if method == "round":
        return _rounded(task)
    return _from_greedy(task, method)


def _exact(task: _Task) -> Choice:
    quadratic, linear, count = task.cost.quadratic, task.cost.linear, task.count
    if task.separable:
        mask = _cheapest(0.5 * np.diagonal(quadratic) - linear, count)
    elif task.subsets <= _MAX_ENUMERATED:
        mask = _solver.enumerate(quadratic, linear, count)
    else:
        raise InputError(
            f"select: method='exact' enumerates at most {_MAX_ENUMERATED} subsets, and there "
            f"are about 10^{math.log10(task.subsets):.1f} of r={count} out of {len(linear)} "
            "channels; use method='auto' or 'branch_and_bound'"
        )
    return task.choice(mask, None, "optimal", "exact")


def _from_greedy(task: _Task, method: str) -> Choice:
    quadratic, linear = task.cost.quadratic, task.cost.linear
    masks = _solver.greedy(quadratic, linear, task.count)
    if method == "swap":
        masks = [_solver.swap_descent(quadratic, linear, mask) for mask in masks]
    mask = min(masks, key=lambda m: _solver.objective(quadratic, linear, m))
    bound = _solver.lower_bound(quadratic, linear, task.count)
    return task.choice(mask, bound, "heuristic", method)


def _rounded(task: _Task) -> Choice:
    scaled, _ = in_range(task.cost)
    mask = _solver.round_relaxation(
        scaled.quadratic,
        scaled.linear,
        task.count,
        time_limit=task.limits.left(),
        weight=task.weights,
    )
    return task.choice(mask, -math.inf, "heuristic", "round")


def _branch_and_bound(task: _Task) -> Choice:
    scaled, exponent = in_range(task.cost)

    def unscaled(value: float) -> float:
        return float(np.ldexp(value, exponent))

    with Progress(task.progress, unscaled) as report:
        found = _certified(task, scaled, float(np.ldexp(task.limits.gap, -exponent)), report)
    objective = _solver.objective(scaled.quadratic, scaled.linear, found.mask)
    bound = found.lower_bound
    if not found.complete and task.weights is None:
        bound = max(bound, _solver.lower_bound(scaled.quadratic, scaled.linear, task.count))
    status = "gap" if found.complete else "heuristic"
    if objective - min(objective, bound) <= 2 * found.tolerance:
        status = "optimal"
    choice = task.choice(found.mask, unscaled(bound), status, "branch_and_bound")
    return dataclasses.replace(choice, nodes=found.nodes)


class _Certified(NamedTuple):
    """What a search returns and the next one starts from."""

    mask: np.ndarray
    lower_bound: float
    complete: bool
    tolerance: float
    nodes: int
    state: np.ndarray  # int8 [C]: 0, 1 or 2, which is free


def _certified(
    task: _Task, cost: QuadraticCost, gap: float, report: Callable[[float, float], None] | None
) -> _Certified:
    """The relaxation of the whole problem first; on the channels that it leaves free the
    semidefinite bound, if they are many, and the search in a cost with a better relaxation."""

    def search(convex: QuadraticCost, nodes: int, **known: Any) -> _Certified:
        found = _solver.branch_and_bound(
            convex.quadratic,
            convex.linear,
            task.count,
            defect=convex.defect,
            time_limit=task.limits.left(),
            node_limit=nodes,
            gap=gap,
            seed=task.seed,
            weight=task.weights,
            progress=report,
            **known,
        )
        return _Certified(*found)

    mask = _solver.round_relaxation(
        cost.quadratic, cost.linear, task.count, task.limits.left(), task.weights
    )
    convex = convexified(cost)
    found = search(convex, 0, mask=mask)
    seconds = task.limits.left()
    if found.complete or seconds == 0:
        return found
    bound = found.lower_bound
    free = found.state == FREE
    # The bound below is of masks that agree with the best one where the state is decided.
    agree = np.array_equal(found.mask[~free] != 0, found.state[~free] == 1)
    if task.weights is None and task.limits.nodes > 0 and agree:
        cutoff = _solver.objective(convex.quadratic, convex.linear, found.mask)
        cutoff -= max(gap, found.tolerance)
        semidefinite = semidefinite_bound(
            convex, task.count, found.mask, free, _SEMIDEFINITE * seconds, task.seed
        )
        bound = max(bound, min(cutoff, semidefinite))  # other masks than those of the state
    seconds = task.limits.left()
    lowered = lowered_where_free(convex, task.count, task.weights, found.mask, free, seconds)
    return search(
        lowered,
        task.limits.nodes,
        mask=found.mask,
        state=found.state,
        lower_bound=bound,
        tolerance=found.tolerance,
    )


def _cheapest(cost: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(cost), dtype=bool)
    mask[np.argsort(cost, kind="stable")[:count]] = True
    return mask
