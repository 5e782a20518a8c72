"""Which channels of one group go: the binary quadratic program with a fixed number of ones.

For the mask ``m`` in {0,1}^C of the REMOVED channels,

    cost(m) = 1/2 m'Sm - u'm        subject to 1'm = r, or to w'm = r for weights w.

The solvers are C++ (``ccp_ext._solver``), run in float64 on one thread, can be interrupted, and
give equal results for equal input unless a time limit stops them.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ccp_ext import _solver
from ccp_ext.errors import InputError

METHODS = ("auto", "exact", "branch_and_bound", "round", "greedy", "swap")
WEIGHTED_METHODS = ("auto", "branch_and_bound", "round")

# Enumerating this many subsets takes some milliseconds.
_MAX_ENUMERATED = 200_000

# Lowering a definite F takes about this many times the time of one factorisation, of which a
# search with a time limit grants it a part.
_LOWERING = 16
_GRANTED = 0.1
_LARGEST_LOWERED = 512  # for a curve, of which nobody expects the best bounds
_BISECTIONS = 7
_SMALLEST_SCALE = 1e-100  # beside entries of about 1: F may be zero

_LARGEST_SUM = 1e300
_LARGEST_TABLE = 2**31  # entries of the knapsack that rounds masks of unequal weights
_NO_LIMIT = 2**63 - 1
_BAR_AFTER = 1.0  # seconds


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
              one far from positive semidefinite has a weak bound.
            - "round" rounds the relaxation and exchanges pairs from there and from both greedy
              starts: the fastest good answer; it proves nothing.
            - "greedy" adds the cheapest channel r times, or gives channels back from the full set,
              whichever ends better.
            - "swap" exchanges pairs from both of these starts until no exchange improves.
            - "auto" is "exact" where that is possible and otherwise "branch_and_bound".
            Where items (channels or groups) differ in weight, "auto", "branch_and_bound" and
            "round" remain.
        time_limit: seconds for "branch_and_bound", from the call on. A search that ends before is
            deterministic; one that the clock stops has seen a part of the tree that depends on the
            machine, and its mask and bound may differ from run to run. ``time_limit=math.inf`` with
            a ``node_limit`` is reproducible. One factorisation of F and the first rounding are made
            in any case.
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
    cost = _cost(F, Q, u)
    channels = len(cost.linear)
    if method not in METHODS:
        raise InputError(f"select: method must be one of {', '.join(METHODS)}; got {method!r}")
    limits = _limits(begin, time_limit, gap, node_limit)
    seed = _check_seed("select", seed)
    if weights is None and groups is None and protected is None:
        return _select(cost, _count(r, channels), None, method, limits, seed, progress)
    items = _items(channels, weights, groups, protected)
    count, unequal = items.count(r)
    if unequal is not None and method not in WEIGHTED_METHODS:
        raise InputError(
            f"select: method={method!r} needs items of equal weight; use one of "
            f"{', '.join(WEIGHTED_METHODS)}"
        )
    choice = _select(cost.merged(items), count, unequal, method, limits, seed, progress)
    removed = torch.from_numpy(items.expand(choice.removed.numpy()))
    return dataclasses.replace(choice, removed=removed)


def _select(
    cost: _Cost,
    count: int,
    weights: np.ndarray | None,
    method: str,
    limits: _Limits,
    seed: int,
    progress: bool | Callable[[float, float], None],
) -> Choice:
    quadratic, linear = cost.quadratic, cost.linear
    channels = len(linear)
    random = _mean_of_random(cost, count, weights)
    if weights is not None:
        if method == "round":
            return _rounded(cost, count, weights, limits, random)
        return _branch_and_bound(cost, count, weights, limits, seed, progress, random)
    diagonal = np.diagonal(quadratic)
    subsets = math.comb(channels, count)
    separable = False
    if method in ("auto", "exact"):
        separable = np.count_nonzero(quadratic) == np.count_nonzero(diagonal)
        if method == "auto":
            possible = separable or subsets <= _MAX_ENUMERATED
            method = "exact" if possible else "branch_and_bound"
    if method == "exact":
        if separable:
            mask = _cheapest(0.5 * diagonal - linear, count)
        elif subsets <= _MAX_ENUMERATED:
            mask = _solver.enumerate(quadratic, linear, count)
        else:
            raise InputError(
                f"select: method='exact' enumerates at most {_MAX_ENUMERATED} subsets, and there "
                f"are about 10^{math.log10(subsets):.1f} of r={count} out of {channels} channels; "
                "use method='auto' or 'branch_and_bound'"
            )
        objective = _solver.objective(quadratic, linear, mask)
        return Choice(torch.from_numpy(mask), objective, objective, "optimal", method, random)
    if method == "branch_and_bound":
        return _branch_and_bound(cost, count, None, limits, seed, progress, random)
    if method == "round":
        return _rounded(cost, count, None, limits, random)
    masks = _solver.greedy(quadratic, linear, count)
    if method == "swap":
        masks = [_solver.swap_descent(quadratic, linear, mask) for mask in masks]
    mask = min(masks, key=lambda m: _solver.objective(quadratic, linear, m))
    objective = _solver.objective(quadratic, linear, mask)
    lower_bound = min(objective, _solver.lower_bound(quadratic, linear, count))
    return Choice(torch.from_numpy(mask), objective, lower_bound, "heuristic", method, random)


@dataclass(frozen=True)
class _Cost:
    """S [C, C], exactly symmetric, and u [C]: finite, C-contiguous, float64.

    ``defect`` is such that no eigenvalue of S is below its negative, where that is known.
    """

    quadratic: np.ndarray
    linear: np.ndarray
    defect: float | None = None

    def merged(self, items: _Items) -> _Cost:
        """The cost of masks over the items: sums over their channels, the protected left out."""
        quadratic = items.sum_rows(items.sum_rows(self.quadratic).T)
        return _Cost(0.5 * (quadratic + quadratic.T), items.sum_rows(self.linear))


@dataclass(frozen=True)
class _Items:
    """What goes or stays as one: ``of_channel`` [C] numbers the items, -1 is protected."""

    of_channel: np.ndarray
    weights: np.ndarray

    def sum_rows(self, values: np.ndarray) -> np.ndarray:
        open_ = self.of_channel >= 0
        sums = np.zeros((len(self.weights), *values.shape[1:]))
        np.add.at(sums, self.of_channel[open_], values[open_])
        return sums

    def expand(self, mask: np.ndarray) -> np.ndarray:
        return np.append(mask, False)[self.of_channel]

    def count(self, r: Any) -> tuple[int, np.ndarray | None]:
        """The number of items to remove where all weigh the same, and None; else in units of the
        weights' greatest common divisor what they weigh, and the weights in this unit."""
        total = int(self.weights.sum())
        asked = _integer(r)
        if asked is None or not 0 <= asked <= total:
            raise InputError(
                f"select: r must be an integer between 0 and {total}, the weight of all channels "
                f"that are not protected; got {r!r}"
            )
        unit = math.gcd(*self.weights.tolist()) or 1
        scaled = self.weights // unit
        if (scaled > 1).any():
            if len(scaled) * (total // unit + 1) > _LARGEST_TABLE:
                raise InputError(
                    f"select: {len(scaled)} items that weigh {total // unit} together are more "
                    f"than are supported (a product of {_LARGEST_TABLE}); use coarser weights"
                )
            reachable = _reachable(scaled)
        else:
            reachable = (1 << len(scaled) + 1) - 1
        if asked % unit or not reachable >> asked // unit & 1:
            below, above = _neighbours(reachable, asked // unit, asked % unit > 0)
            raise InputError(
                f"select: no set of channels, groups whole, weighs exactly r={asked}; the nearest "
                f"that can be reached are {below * unit} and {above * unit}"
            )
        return asked // unit, scaled.astype(np.float64) if (scaled > 1).any() else None


def _items(channels: int, weights: Any, groups: Any, protected: Any) -> _Items:
    weight = _integers("weights", weights, channels)
    if weight is None:
        weight = np.ones(channels, np.int64)
    elif (weight < 1).any():
        raise InputError(f"select: weights must be positive integers; got {weight.min()}")
    labels = _integers("groups", groups, channels)
    stays = _protected("select", protected, channels)
    if labels is None:
        labels = np.arange(channels)
    stays = np.isin(labels, labels[stays])
    of_channel = np.full(channels, -1)
    _, first, inverse = np.unique(labels[~stays], return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))  # items in the order of their first channels
    of_channel[~stays] = order[inverse]
    sums = np.zeros(len(first), np.int64)
    np.add.at(sums, of_channel[~stays], weight[~stays])
    return _Items(of_channel, sums)


def _integers(name: str, values: Any, channels: int) -> np.ndarray | None:
    if values is None:
        return None
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (channels,) or array.dtype.kind not in "iu":
        raise InputError(
            f"select: {name} must be integers [C] with C = {channels}; got {array.dtype} "
            f"{list(array.shape)}"
        )
    return array.astype(np.int64)


def _protected(op: str, protected: Any, channels: int) -> np.ndarray:
    stays = np.zeros(channels, bool)
    if protected is None:
        return stays
    given = protected.cpu().numpy() if isinstance(protected, Tensor) else np.asarray(protected)
    indices = given.dtype.kind in "iu" and given.ndim == 1
    valid = indices and bool(((given >= -channels) & (given < channels)).all())
    if not (valid or given.size == 0 or (given.dtype == bool and given.shape == (channels,))):
        raise InputError(
            f"{op}: protected must be bool [C] or indices of C = {channels} channels; got "
            f"{protected!r}"
        )
    stays[given if given.size else []] = True
    return stays


def _reachable(weights: np.ndarray) -> int:
    """Bit t is set if some set of the weights adds up to t."""
    reachable = 1
    for weight in weights.tolist():
        reachable |= reachable << weight
    return reachable


def _neighbours(reachable: int, asked: int, between: bool) -> tuple[int, int]:
    """The nearest reachable totals below and above: ``asked`` itself if ``between`` it and the
    next lies what was asked for."""
    below = (reachable & ((1 << asked + between) - 1)).bit_length() - 1
    higher = reachable >> asked + 1
    return below, asked + 1 + (higher & -higher).bit_length() - 1


def _mean_of_random(cost: _Cost, count: int, weights: np.ndarray | None) -> float:
    """The mean cost over all masks with ``count`` ones; for unequal weights over masks that draw
    every item independently, with ``count`` as the mean weight."""
    channels = len(cost.linear)
    if channels == 0:
        return 0.0
    if weights is None:
        one = count / channels
        two = one * (count - 1) / max(1, channels - 1)
    else:
        one = count / float(weights.sum())
        two = one * one
    trace = float(np.trace(cost.quadratic))
    off_diagonal = float(cost.quadratic.sum()) - trace
    return 0.5 * (one * trace + two * off_diagonal) - one * float(cost.linear.sum())


def _rounded(
    cost: _Cost, count: int, weights: np.ndarray | None, limits: _Limits, random: float
) -> Choice:
    scaled, _ = _in_range(cost)
    mask = _solver.round_relaxation(
        scaled.quadratic, scaled.linear, count, time_limit=limits.left(), weight=weights
    )
    objective = _solver.objective(cost.quadratic, cost.linear, mask)
    return Choice(torch.from_numpy(mask), objective, -math.inf, "heuristic", "round", random)


@dataclass(frozen=True)
class _Limits:
    deadline: float  # of time.monotonic()
    gap: float
    nodes: int

    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.deadline - time.monotonic())


def _branch_and_bound(
    cost: _Cost,
    count: int,
    weights: np.ndarray | None,
    limits: _Limits,
    seed: int,
    progress: bool | Callable[[float, float], None],
    random: float,
) -> Choice:
    scaled, exponent = _in_range(cost)
    quadratic, linear = scaled.quadratic, scaled.linear
    convex = _convexified(scaled, limits.left())

    def unscaled(value: float) -> float:
        return float(np.ldexp(value, exponent))

    with _Progress(progress, unscaled) as report:
        mask, bound, complete, rounding, nodes = _solver.branch_and_bound(
            convex.quadratic,
            convex.linear,
            count,
            defect=convex.defect,
            time_limit=limits.left(),
            node_limit=limits.nodes,
            gap=float(np.ldexp(limits.gap, -exponent)),
            seed=seed,
            weight=weights,
            progress=report,
        )
    objective = _solver.objective(quadratic, linear, mask)
    bound = min(bound, objective)
    if not complete and weights is None:
        bound = max(bound, min(objective, _solver.lower_bound(quadratic, linear, count)))
    status = "gap" if complete else "heuristic"
    if objective - bound <= 2 * rounding:
        status = "optimal"
    removed = torch.from_numpy(mask)
    objective, bound = unscaled(objective), unscaled(bound)
    return Choice(removed, objective, bound, status, "branch_and_bound", random, nodes)


class _Progress:
    """What the solver calls: a bar that appears after a while, the caller's function, or None."""

    def __init__(self, wanted: bool | Callable[..., None], unscaled: Callable[[float], float]):
        self.wanted, self.unscaled = wanted, unscaled
        self.bar: tqdm | None = None

    def __enter__(self) -> Callable[[float, float], None] | None:
        if self.wanted is False:
            return None
        if self.wanted is True:
            self.bar = tqdm(desc="select", unit="report", delay=_BAR_AFTER, leave=False)
        elif not callable(self.wanted):
            raise InputError(f"select: progress must be a bool or a function; got {self.wanted!r}")
        return self.report

    def report(self, objective: float, bound: float) -> None:
        objective, bound = self.unscaled(objective), self.unscaled(bound)
        if self.bar is None:
            self.wanted(objective, bound)
        else:
            self.bar.set_postfix_str(f"gap {objective - bound:.3g}", refresh=False)
            self.bar.update()

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def _in_range(cost: _Cost) -> tuple[_Cost, int]:
    """The cost times 2^-exponent, which is exact and keeps squares of the entries in range."""
    exponent = max(_exponent(cost.quadratic), _exponent(cost.linear))
    if abs(exponent) <= 64:
        return cost, 0
    defect = None if cost.defect is None else float(np.ldexp(cost.defect, -exponent))
    scaled = [np.ldexp(values, -exponent) for values in (cost.quadratic, cost.linear)]
    return _Cost(*scaled, defect), exponent


def _exponent(values: np.ndarray) -> int:
    return math.frexp(max(values.max(initial=0.0), -values.min(initial=0.0)))[1]


def _convexified(cost: _Cost, seconds: float) -> _Cost:
    """A cost that is equal on masks and convex but for rounding: S + diag(d) and u + d/2, with a
    ``defect`` such that no eigenvalue of the new S is below ``-defect``.

    The less is added, the better the relaxation (A. Billionnet and S. Elloumi, "Using a mixed
    integer quadratic programming solver for the unconstrained quadratic 0-1 problem", 2007). S is
    lowered where it is definite: -d = t / diag(S^-1), with the largest t of a few bisections. A
    Cholesky factorisation that runs to its end proves the defect (S. M. Rump, "Verification of
    positive definiteness", 2006). ``seconds`` are what the search may take in all.
    """
    quadratic, linear = cost.quadratic, cost.linear
    channels = len(linear)
    begin = time.monotonic()
    scale = np.abs(np.diagonal(quadratic)).sum() + _SMALLEST_SCALE
    rounding = 2 * (channels + 2) * np.finfo(np.float64).eps

    def shifted(shift: np.ndarray | float) -> np.ndarray:
        matrix = quadratic.copy()
        matrix[np.diag_indices(channels)] += shift
        return matrix

    def factorises(shift: np.ndarray | float) -> bool:
        try:
            np.linalg.cholesky(shifted(shift))
        except np.linalg.LinAlgError:
            return False
        return True

    ridge = 2 * rounding * scale
    shift = np.full(channels, ridge)
    if not factorises(ridge):
        least = np.linalg.eigvalsh(quadratic)[0]
        while not factorises(ridge - least):
            ridge *= 2
        shift[:] = ridge - least
    elif _LOWERING * (time.monotonic() - begin) < _GRANTED * seconds:
        alone = 1 / np.abs(np.diagonal(np.linalg.inv(shifted(ridge))))
        proven, failed = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = 0.5 * (proven + failed)
            if factorises(ridge - middle * alone):
                proven = middle
            else:
                failed = middle
        shift = ridge - proven * alone
    convex = shifted(shift)
    return _Cost(convex, linear + 0.5 * shift, rounding * float(np.abs(np.diagonal(convex)).sum()))


@dataclass(frozen=True, eq=False)
class Curve:
    """The outcome of :func:`curve`: the least cost by the number of removed channels.

    Attributes:
        counts: K different numbers of removed channels, ascending.
        objective: float64 [K], the cost of each row of ``removed``.
        lower_bound: float64 [K]; no mask with ``counts[k]`` ones costs less than
            ``lower_bound[k]``, rounding accounted for.
        removed: bool [K, C]; row k has ``counts[k]`` ones.
    """

    counts: tuple[int, ...]
    objective: np.ndarray
    lower_bound: np.ndarray
    removed: np.ndarray


def curve(
    F: Any = None,
    *,
    Q: Any = None,
    u: Any = None,
    counts: Sequence[int] | None = None,
    protected: Any = None,
    seed: int = 0,
    time_limit: float = math.inf,
) -> Curve:
    """Bound the least cost of removing r channels, for many r at once, with masks near it.

    One convex relaxation moves along the counts, each solution starting from the last; masks come
    from rounding it and from the masks of both neighbours, each improved by exchanges.

    Args:
        F, Q, u: the cost, as for :func:`select`.
        counts: numbers of channels to remove; None is 0, 1, ... up to all that are not protected.
        protected: bool [C] or indices of channels that stay.
        seed: nothing is drawn; checked, so that callers can pass theirs.
        time_limit: seconds. Counts that are not reached in time get weaker bounds and masks, valid
            all the same; without a limit the result is deterministic.

    Raises:
        InputError: as :func:`select`, and a count out of range.
    """
    limits = _limits(time.monotonic(), time_limit, 0.0, None, op="curve")
    _check_seed("curve", seed)
    cost = _cost(F, Q, u, op="curve")
    channels = len(cost.linear)
    open_ = np.flatnonzero(~_protected("curve", protected, channels))
    asked = range(len(open_) + 1) if counts is None else counts
    asked = sorted({_count(r, len(open_), op="curve") for r in asked})
    if len(open_) < channels:
        cost = _Cost(np.ascontiguousarray(cost.quadratic[np.ix_(open_, open_)]), cost.linear[open_])
    scaled, exponent = _in_range(cost)
    lower = len(open_) <= _LARGEST_LOWERED
    convex = _convexified(scaled, math.inf if lower else 0)
    objective, bound, masks = _solver.curve(
        convex.quadratic, convex.linear, asked, convex.defect, limits.left()
    )
    objective = np.array(
        [_solver.objective(scaled.quadratic, scaled.linear, mask) for mask in masks]
    ).reshape(len(asked))
    removed = np.zeros((len(asked), channels), bool)
    removed[:, open_] = masks
    bound = np.minimum(bound, objective)
    return Curve(tuple(asked), np.ldexp(objective, exponent), np.ldexp(bound, exponent), removed)


def random_subset(channels: int, r: int, seed: int = 0) -> Tensor:
    """A uniformly random mask with ``r`` of ``channels`` set: the control of an experiment.

    The generator is the package's own: no global state, and the same mask for a seed everywhere.

    Args:
        seed: 0 <= seed < 2^64.

    Returns:
        bool [channels] on the CPU.

    Raises:
        InputError: an argument out of range.
    """
    try:
        size = operator.index(channels)
    except TypeError:
        size = -1
    if size < 0:
        raise InputError(f"random_subset: channels must be an integer >= 0; got {channels!r}")
    count = _count(r, size, op="random_subset")
    return torch.from_numpy(_solver.random_subset(size, count, _check_seed("random_subset", seed)))


@np.errstate(over="ignore", invalid="ignore")
def _cost(F: Any, Q: Any, u: Any, op: str = "select") -> _Cost:
    if F is not None and Q is not None:
        raise InputError(f"{op}: both F and Q are given; give F, or Q for F = Q'Q / N")
    linear = None if u is None else _array("u", u, 1, op)[0]
    total = 0.0
    if F is not None:
        quadratic, total = _symmetric(*_array("F", F, 2, op), op)
    elif Q is not None:
        samples = _array("Q", Q, 2, op)[0]
        if len(samples) == 0:
            raise InputError(f"{op}: Q needs at least one sample; got shape {samples.shape}")
        products = samples.T @ samples
        products /= len(samples)
        quadratic, total = _symmetric(products, np.finfo(np.float64).eps, op)
    elif linear is not None:
        quadratic = np.zeros((len(linear), len(linear)))
    else:
        raise InputError(f"{op}: none of F, Q and u is given; give F, Q or a linear term u")
    if linear is None:
        linear = np.zeros(len(quadratic))
    if len(linear) != len(quadratic):
        raise InputError(
            f"{op}: u must have shape [C] with C = {len(quadratic)}; got [{len(linear)}]"
        )
    total += np.abs(linear).sum()
    if not total < _LARGEST_SUM:
        raise InputError(
            f"{op}: the absolute values must add up to less than {_LARGEST_SUM:g}, so that no "
            f"cost overflows; they add up to {total:.3g}"
        )
    return _Cost(quadratic, linear)


def _array(name: str, value: Any, ndim: int, op: str) -> tuple[np.ndarray, float]:
    """The value as float64 and the machine epsilon of the dtype it came in."""
    if isinstance(value, Tensor):
        real, floating = not value.is_complex(), value.is_floating_point()
    else:
        value = np.asarray(value)
        real, floating = value.dtype.kind in "fiub", value.dtype.kind == "f"
    if not real:
        raise InputError(f"{op}: {name} must hold real numbers; got {value.dtype}")
    finfo = torch.finfo if isinstance(value, Tensor) else np.finfo
    eps = float(finfo(value.dtype).eps) if floating else 0.0
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    array = np.ascontiguousarray(value, np.float64) if value.ndim else value.astype(np.float64)
    if array.ndim != ndim:
        expected = {1: "[C]", 2: "[C, C]" if name == "F" else "[N, C]"}[ndim]
        raise InputError(f"{op}: {name} must have shape {expected}; got {list(array.shape)}")
    if not np.isfinite(array.sum()) and not (finite := np.isfinite(array)).all():
        where = [int(k) for k in np.argwhere(~finite)[0]]
        raise InputError(f"{op}: {name} must be finite; {name}{where} is {array[tuple(where)]}")
    return array, max(eps, float(np.finfo(np.float64).eps))


def _symmetric(matrix: np.ndarray, eps: float, op: str) -> tuple[np.ndarray, float]:
    """The mean of the matrix and its transpose, if these differ by no more than rounding, and the
    sum of the absolute values."""
    if matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"{op}: F must have shape [C, C]; got {list(matrix.shape)}")
    mean, asymmetry, largest, total = _solver.symmetrise(matrix)
    allowed = math.sqrt(eps) * largest
    if asymmetry > allowed:
        raise InputError(
            f"{op}: F must be symmetric; max |F - F'| is {asymmetry:.3g}, and {allowed:.3g} is "
            "accepted as rounding"
        )
    return mean, total


def _integer(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _count(r: Any, channels: int, op: str = "select") -> int:
    count = _integer(r)
    if count is None or not 0 <= count <= channels:
        raise InputError(f"{op}: r must be an integer with 0 <= r <= C = {channels}; got {r!r}")
    return count


def _limits(
    begin: float, time_limit: Any, gap: Any, node_limit: Any, op: str = "select"
) -> _Limits:
    for name, value in (("time_limit", time_limit), ("gap", gap)):
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and value >= 0):
            raise InputError(f"{op}: {name} must be a number >= 0; got {value!r}")
    try:
        nodes = _NO_LIMIT if node_limit is None else operator.index(node_limit)
    except TypeError:
        nodes = -1
    if isinstance(node_limit, bool) or not 0 <= nodes <= _NO_LIMIT:
        raise InputError(f"select: node_limit must be an integer >= 0 or None; got {node_limit!r}")
    return _Limits(begin + float(time_limit), float(gap), nodes)


def _check_seed(op: str, seed: Any) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**64:
        raise InputError(f"{op}: seed must be an integer with 0 <= seed < 2^64; got {seed!r}")
    return value


def _cheapest(cost: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(cost), dtype=bool)
    mask[np.argsort(cost, kind="stable")[:count]] = True
    return mask
