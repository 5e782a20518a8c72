"""The channels of all groups chosen together, with the curvature between the groups.

With the rows Q_g [M, C_g] of every group side by side, Q = [Q_1 ... Q_G], the whole network has the
matrix F = Q'Q / N. Its diagonal blocks are the groups' S; the others say what a removal here costs
more, or less, because of those there. For the mask m of the removed channels of all groups

    cost(m) = ||Qm||^2 / (2N) - u'm.

F is never stored: the descent needs Qm [M], the gradient F m - u [C], and the rows of F that belong
to one group at a time.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ccp_ext.allocation import allocate
from ccp_ext.errors import InputError

if TYPE_CHECKING:
    from ccp_ext.statistics import Statistics

# Budgets of :func:`ccp_ext.allocation.allocate` that can be shared out among groups.
RESOURCES = ("macs", "params", "activations", "latency")

# Moves that gain less than this many roundings of the largest terms are none.
_ROUNDINGS = 64


_POWER_ITERATIONS = 30
_BISECTIONS = 40

# What a channel is taken to use that uses nothing, so that the rates stay finite.
_LEAST_USE = 1e-9


class _Group(Protocol):
    name: str
    channels: int


class _Graph(Protocol):
    """What :func:`refine` needs of a graph."""

    groups: Sequence[_Group]


@dataclass(frozen=True, eq=False)
class JointCost:
    """``cost(m) = ||Qm||^2 / (2N) - u'm`` of removing channels anywhere in the network.

    Attributes:
        rows: by group Q_g [M, C_g], float32 or float64; row k is the same sample's in all groups.
        count: N, the number of samples.
        u: by group the linear term [C_g]; None is zero.
    """

    rows: Mapping[str, Tensor]
    count: int
    u: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, stats: Statistics, first_order: bool = False) -> JointCost:
        """The cost that statistics collected with ``keep_rows=True`` give.

        Args:
            first_order: with the linear term u.
        """
        u = {name: stats[name].u for name in stats} if first_order else None
        return cls(stats.rows(), stats[next(iter(stats))].count, u)

    def objective(self, removed: Mapping[str, Tensor]) -> float:
        """The cost, in float64, of the bool masks ``removed`` {group: [C_g]}."""
        total = sum(self._product(name, mask) for name, mask in removed.items())
        return 0.5 * torch.as_tensor(total).square().sum().item() / self.count - self._linear(
            removed
        )

    def within_groups(self, removed: Mapping[str, Tensor]) -> float:
        """The cost without the curvature between groups: the sum of what each group sees alone."""
        squares = (self._product(name, m).square().sum().item() for name, m in removed.items())
        return 0.5 * sum(squares) / self.count - self._linear(removed)

    def _product(self, name: str, mask: Tensor) -> Tensor:
        rows = self.rows[name]
        return rows[:, mask.to(rows.device)].double().sum(1)

    def _linear(self, removed: Mapping[str, Tensor]) -> float:
        if self.u is None:
            return 0.0
        terms = (self.u[name][mask.to(self.u[name].device)] for name, mask in removed.items())
        return sum(term.double().sum().item() for term in terms)


@dataclass(frozen=True, eq=False)
class Refinement:
    """The outcome of :func:`refine`.

    Attributes:
        removed: by group bool [C_g] on the CPU, true for the channels that go.
        start, objective: the cost before and after, computed in float64 from the definition.
        exchanges, transfers, chains: moves made of each kind.
        status: "local minimum" if no single move improves (up to rounding), else "move limit" or
            "time limit".
    """

    removed: dict[str, Tensor]
    start: float
    objective: float
    exchanges: int
    transfers: int
    chains: int
    status: str

    @property
    def keep(self) -> dict[str, int]:
        """Channels that stay, by group."""
        return {name: int((~mask).sum()) for name, mask in self.removed.items()}


def refine(
    graph: _Graph,
    cost: JointCost,
    removed: Mapping[str, Tensor],
    *,
    resource: Callable[[Mapping[str, int]], float] | None = None,
    budget: float | None = None,
    counts: Mapping[str, Sequence[int]] | None = None,
    max_moves: int | None = None,
    time_limit: float = math.inf,
    progress: bool = False,
) -> Refinement:
    """Walk downhill in the joint cost from a choice of channels, within a budget.

    The moves, each taken only if the cost that it leaves, computed in float64, is lower:

    - exchange: a channel goes, and one of the same group comes back;
    - transfer: the same between two groups, where the budget allows it;
    - chain: a group goes to its next lower or next higher count; others then lose the cheapest
      channels until the budget holds, and regain the best that still fit.

    The walk ends where no exchange, transfer, or chain improves: a local minimum, not the least
    cost of all. Equal input gives equal results unless the time limit stops it.

    Args:
        graph: ``groups``, each with ``name`` and ``channels``.
        cost: rows of every group of the graph; the walk runs on their device.
        removed: where to start, by group bool [C_g], true for the channels that go.
        resource, budget: what keep counts {group: channels that stay} use, such as ``graph.macs``,
            and the most of it allowed, such as :attr:`Allocation.budget`. It must not decrease in
            any count. With none of both, every group keeps its number of channels.
        counts: by group the keep counts allowed; by default and without entry 1 to C_g.
        max_moves: stop after so many moves.
        time_limit: seconds after which no further move is begun.
        progress: show a bar of the moves if it lasts longer than a second.

    Raises:
        InputError: rows or masks that do not fit the graph, a resource without a budget, or a start
            beyond the budget.
    """
    _check(graph, cost, removed)
    if (resource is None) != (budget is None):
        raise InputError("refine: resource and budget must be given together")
    names = [group.name for group in graph.groups]
    allowed = {
        g.name: sorted((counts or {}).get(g.name, range(1, g.channels + 1))) for g in graph.groups
    }
    limits = _Budget(resource, budget, allowed)
    bar = tqdm(desc="joint descent", unit="move", delay=1.0, disable=not progress, leave=False)
    with bar:
        walk = _Walk(_Problem(cost, names), limits, removed, max_moves, time_limit, bar)
        if resource is not None and not limits.fits(walk.point.keep):
            raise InputError(
                f"refine: the start uses {resource(walk.point.keep)}, more than the budget of "
                f"{budget}"
            )
        status = walk.run()
    masks = walk.masks()
    return Refinement(
        masks, cost.objective(removed), cost.objective(masks), **walk.moves, status=status
    )


def lower_bound(
    graph: _Graph,
    cost: JointCost,
    near: Mapping[str, Tensor],
    *,
    iterations: int = 500,
    progress: bool = False,
    **budget: Any,
) -> float:
    """A value that no choice of channels within the budget costs less than, up to rounding.

    The cost is convex, so for every x in [0, 1]^C and every mask m

        cost(m) >= cost(x) + grad(x)'(m - x) = -||Qx||^2 / (2N) + grad(x)'m,

    a sum over the groups of linear costs, which :func:`ccp_ext.allocation.allocate` bounds from
    below over all masks within the budget (M. Frank and P. Wolfe, 1956). Any x is valid; a good one
    is the minimum over the box at the budget's marginal prices at ``near``, approached by
    accelerated projected gradients (A. Beck and M. Teboulle, 2009).

    Args:
        graph, cost: as for :func:`refine`; the graph with ``resource(kind)`` as from
            :func:`ccp_ext.trace`.
        near: masks {group: bool [C_g]} within the budget, such as :attr:`Refinement.removed`.
        iterations: of the search for x.
        progress: show a bar of them if they last longer than a second.
        budget: the budget and the rules on the counts, as keywords of ``allocate``, such as
            ``macs=0.5``; with ``ratio`` or ``per_group`` every group keeps its number of channels.

    Raises:
        InputError: as :func:`refine` and ``allocate``.
    """
    _check(graph, cost, near)
    problem = _Problem(cost, [group.name for group in graph.groups])
    mask = torch.cat([near[name].cpu() for name in problem.names]).to(problem.u.device)
    saving = _Saving.of(problem, graph, near, mask, budget)
    steps = tqdm(range(iterations), "joint bound", delay=1.0, disable=not progress, leave=False)
    x = _relaxed_minimum(problem, mask, saving, steps)
    product = x @ problem.columns.double()
    curves = {
        name: _LinearCurve.of(part)
        for name, part in zip(
            problem.names, problem.gradient(product).split(problem.widths), strict=True
        )
    }
    linear = allocate(graph, curves=curves, **budget).lower_bound
    return linear - 0.5 * product.square().sum().item() / problem.count


@dataclass(frozen=True)
class _LinearCurve:
    """The least sum of r of the given values, for every r but all of them."""

    counts: range
    objective: np.ndarray
    lower_bound: np.ndarray

    @classmethod
    def of(cls, values: Tensor) -> _LinearCurve:
        sums = torch.cumsum(torch.sort(values).values, 0)[:-1].cpu().numpy()
        sums = np.concatenate([np.zeros(1), sums])
        return cls(range(len(sums)), sums, sums)


@dataclass(frozen=True)
class _Saving:
    """What x has to save: ``prices @ x >= target``, in each part of the channels.

    Attributes:
        prices: by channel [C], float64.
        part: by channel its part, int64 [C]: all in one for a budget, else each group.
        target: by part.
    """

    prices: Tensor
    part: Tensor
    target: Tensor

    @classmethod
    def of(
        cls,
        problem: _Problem,
        graph: Any,
        near: Mapping[str, Tensor],
        mask: Tensor,
        budget: Mapping[str, Any],
    ) -> _Saving:
        """As much as ``mask`` saves, at the prices of the channels kept last in ``near``."""
        kind = next((name for name in RESOURCES if budget.get(name) is not None), None)
        if kind is None:
            prices, part = torch.ones_like(problem.u), problem.group
        else:
            table = budget.get("latency_table")
            resource = graph.resource(kind) if table is None else table.resource(graph)
            prices, part = _prices(problem, resource, near), torch.zeros_like(problem.group)
        target = prices.new_zeros(int(part.max()) + 1).index_add(0, part, prices * mask)
        return cls(prices, part, target)

    def short(self, x: Tensor) -> Tensor:
        """bool: the parts that save too little."""
        return torch.zeros_like(self.target).index_add(0, self.part, self.prices * x) < self.target

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the box that saves enough."""
        inside = x.clamp(0, 1)
        if not self.short(inside).any():
            return inside
        low = torch.zeros_like(self.target)
        # With this multiplier every channel that has a price is wholly removed.
        high = low + ((1 - x) / self.prices.clamp_min(_LEAST_USE)).max().clamp_min(0)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            short = self.short(self._moved(x, middle))
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return self._moved(x, high)

    def _moved(self, x: Tensor, multiplier: Tensor) -> Tensor:
        return (x + multiplier[self.part] * self.prices).clamp(0, 1)


def _prices(problem: _Problem, resource: Any, near: Mapping[str, Tensor]) -> Tensor:
    """By channel what its group's last kept channel uses [C], float64."""
    keep = {name: int((~near[name]).sum()) for name in problem.names}
    used = resource(keep)
    prices = []
    for name, width in zip(problem.names, problem.widths, strict=True):
        step = 1 if keep[name] < width else -1
        price = abs(float(resource({**keep, name: keep[name] + step}) - used))
        prices += [price] * width
    return torch.tensor(prices, dtype=torch.float64, device=problem.u.device)


def _relaxed_minimum(
    problem: _Problem, mask: Tensor, saving: _Saving, steps: Iterable[int]
) -> Tensor:
    """Nearly the least cost over [0, 1]^C among x that save as much as ``mask``."""
    columns = problem.columns.double()
    x = mask.double()
    # The trace over the largest eigenvalue can be large, so that power iteration pays.
    direction = torch.ones_like(x)
    for _ in range(_POWER_ITERATIONS):
        direction = columns @ (direction @ columns) / problem.count
        largest = direction.norm()
        direction = direction / largest.clamp_min(torch.finfo(torch.float64).tiny)
    step = 1 / (1.1 * largest).clamp_min(torch.finfo(torch.float64).tiny)
    ahead, momentum = x, 1.0
    for _ in steps:
        gradient = columns @ (ahead @ columns) / problem.count - problem.u
        new = saving.project(ahead - step * gradient)
        if (ahead - new) @ (new - x) > 0:  # uphill: begin anew (O'Donoghue and Candes, 2015)
            momentum = 1.0
        following = 0.5 * (1 + math.sqrt(1 + 4 * momentum**2))
        ahead = new + (momentum - 1) / following * (new - x)
        x, momentum = new, following
    return x


class _Problem:
    """The cost over all channels in one numbering, group after group.

    Attributes:
        columns: Q' [C, M], contiguous.
        widths, spans: how many channels each group has, and which.
        group: of each channel its group's position [C].
        u, diagonal: linear term and diagonal of F [C], float64.
        tolerance: gains up to this size are rounding.
    """

    def __init__(self, cost: JointCost, names: Sequence[str]) -> None:
        self.names = list(names)
        self.count = cost.count
        self.columns = torch.cat([cost.rows[name].T for name in names])
        if self.columns.shape[1] > self.columns.shape[0]:
            # With Q = UR, U'U = I, R has fewer rows, and R'R = Q'Q.
            self.columns = torch.linalg.qr(self.columns.double().T, mode="r").R.T.contiguous()
        device = self.columns.device
        self.widths = [cost.rows[name].shape[1] for name in names]
        ends = list(itertools.accumulate(self.widths))
        self.spans = [slice(e - w, e) for e, w in zip(ends, self.widths, strict=True)]
        self.group = torch.arange(len(names)).repeat_interleave(torch.tensor(self.widths))
        self.group = self.group.to(device)
        self.u = torch.zeros(ends[-1], dtype=torch.float64, device=device)
        if cost.u is not None:
            self.u = torch.cat([cost.u[name].to(device, torch.float64) for name in names])
        self.diagonal = torch.cat(
            [self.columns[span].double().square().sum(1) / self.count for span in self.spans]
        )
        largest = (0.5 * self.diagonal + self.u.abs()).max().item()
        self.tolerance = _ROUNDINGS * torch.finfo(self.columns.dtype).eps * largest

    def times(self, vector: Tensor) -> Tensor:
        """Q'v / N [C] in float64, of v [M]; the products in the rows' own precision."""
        return (self.columns @ vector.to(self.columns.dtype)).double() / self.count

    def gradient(self, product: Tensor) -> Tensor:
        """Q'(Qm) / N - u, all in float64; a group at a time, so that no copy of Q is made."""
        parts = [self.columns[span].double() @ product for span in self.spans]
        return torch.cat(parts) / self.count - self.u


@dataclass
class _Point:
    """A mask, and what the descent knows of it.

    Attributes:
        removed: bool [C].
        keep: channels that stay, by group.
        product: Qm [M], float64, exact but for rounding.
        gradient: Q'Qm / N - u [C], float64, of the precision of the rows.
        value: the cost relative to the start.
    """

    problem: _Problem
    removed: Tensor
    keep: dict[str, int]
    product: Tensor
    gradient: Tensor
    value: float = 0.0

    @classmethod
    def at(cls, problem: _Problem, removed: Tensor) -> _Point:
        keep = {
            name: int((~removed[span]).sum())
            for name, span in zip(problem.names, problem.spans, strict=True)
        }
        parts = (problem.columns[s][removed[s]].double().sum(0) for s in problem.spans)
        product = sum(parts, problem.columns.new_zeros(problem.columns.shape[1]).double())
        return cls(problem, removed, keep, product, problem.gradient(product))

    def copy(self) -> _Point:
        return replace(self, removed=self.removed.clone(), keep=dict(self.keep))

    def flip_costs(self) -> Tensor:
        """[C]: what removing each kept channel, or giving back each removed one, alone costs."""
        return (
            torch.where(self.removed, -self.gradient, self.gradient) + 0.5 * self.problem.diagonal
        )

    def change(self, flips: Sequence[int]) -> tuple[float, Tensor]:
        """What flipping these channels costs, exact but for rounding, and how Qm changes [M]."""
        index = torch.tensor(flips, device=self.removed.device)
        signs = 1 - 2 * self.removed[index].double()
        difference = signs @ self.problem.columns[index].double()
        quadratic = difference @ (self.product + 0.5 * difference) / self.problem.count
        return (quadratic - signs @ self.problem.u[index]).item(), difference

    def flip(self, flips: Sequence[int]) -> None:
        gain, difference = self.change(flips)
        self.value += gain
        self.product = self.product + difference
        self.gradient = self.gradient + self.problem.times(difference)
        for channel in flips:
            name = self.problem.names[int(self.problem.group[channel])]
            self.keep[name] += 1 if self.removed[channel] else -1
            self.removed[channel] = ~self.removed[channel]

    def refresh(self) -> None:
        """Take the rounding of many steps out of the gradient."""
        self.gradient = self.problem.gradient(self.product)


@dataclass(frozen=True)
class _Budget:
    """What keep counts are allowed; without a resource no count changes."""

    resource: Callable[[Mapping[str, int]], float] | None
    limit: float | None
    counts: Mapping[str, Sequence[int]]

    def fits(self, keep: Mapping[str, int]) -> bool:
        return self.resource is not None and self.resource(keep) <= self.limit

    def fewer(self, name: str, count: int) -> int | None:
        """The next allowed count below."""
        position = bisect.bisect_left(self.counts[name], count)
        return self.counts[name][position - 1] if position else None

    def more(self, name: str, count: int) -> int | None:
        """The next allowed count above."""
        position = bisect.bisect_right(self.counts[name], count)
        return self.counts[name][position] if position < len(self.counts[name]) else None


class _Walk:
    """The descent: sweeps of exchanges and transfers, then chains, until neither improves."""

    def __init__(
        self,
        problem: _Problem,
        budget: _Budget,
        removed: Mapping[str, Tensor],
        max_moves: int | None,
        time_limit: float,
        bar: tqdm,
    ) -> None:
        self.problem = problem
        self.budget = budget
        mask = torch.cat([removed[name].cpu() for name in problem.names])
        self.point = _Point.at(problem, mask.to(problem.columns.device))
        self.moves = {"exchanges": 0, "transfers": 0, "chains": 0}
        self._max_moves = math.inf if max_moves is None else max_moves
        self._end = time.monotonic() + time_limit
        self._bar = bar

    def run(self) -> str:
        while self._stopped() is None:
            before = sum(self.moves.values())
            for k in range(len(self.problem.names)):
                self._pairs(k)
            self.point.refresh()
            if sum(self.moves.values()) > before:
                continue
            if self.budget.resource is not None:
                self._chains()
            if sum(self.moves.values()) == before and self._stopped() is None:
                return "local minimum"
        return self._stopped() or "local minimum"

    def masks(self) -> dict[str, Tensor]:
        removed = self.point.removed.cpu()
        return {
            name: removed[span].clone()
            for name, span in zip(self.problem.names, self.problem.spans, strict=True)
        }

    def _count(self, kind: str) -> None:
        self.moves[kind] += 1
        self._bar.update()

    def _stopped(self) -> str | None:
        if sum(self.moves.values()) >= self._max_moves:
            return "move limit"
        return "time limit" if time.monotonic() >= self._end else None

    # --- exchanges and transfers ---------------------------------------------------------------

    def _pairs(self, k: int) -> None:
        """Remove channels of group ``k`` for others, the best pair first, while that improves."""
        problem, point, span = self.problem, self.point, self.problem.spans[k]
        out = torch.nonzero(~point.removed[span]).flatten() + span.start
        curvature = problem.columns[out] @ problem.columns.T / problem.count  # rows of F
        receivers = self._receivers(k)
        while self._stopped() is None:
            back = torch.nonzero(point.removed & receivers[problem.group]).flatten()
            if not len(out) or not len(back):
                return
            alone = point.flip_costs().to(curvature.dtype)
            # A row whose channel went to another group has no channel left to remove.
            losses = alone[out].masked_fill(point.removed[out], math.inf)
            costs = losses.unsqueeze(1) + alone[back] - curvature[:, back]
            row, column = divmod(int(costs.argmin()), len(back))
            i, j = int(out[row]), int(back[column])
            if costs[row, column] >= -problem.tolerance or not self._improves([i, j]):
                return
            point.flip([i, j])
            if span.start <= j < span.stop:
                self._count("exchanges")
                out[row] = j
                curvature[row] = problem.times(problem.columns[j])
            else:
                self._count("transfers")
                receivers = self._receivers(k)

    def _improves(self, flips: Sequence[int]) -> bool:
        return self.point.change(flips)[0] < -self.problem.tolerance

    def _receivers(self, k: int) -> Tensor:
        """bool [groups]: where one channel may come back if one of group ``k`` goes."""
        names, keep = self.problem.names, self.point.keep
        allowed = [name == names[k] for name in names]
        left = keep[names[k]] - 1
        if self.budget.fewer(names[k], left + 1) == left:
            for position, name in enumerate(names):
                grown = keep[name] + 1
                if not allowed[position] and self.budget.more(name, grown - 1) == grown:
                    changed = {**keep, names[k]: left, name: grown}
                    allowed[position] = self.budget.fits(changed)
        return torch.tensor(allowed, device=self.problem.columns.device)

    # --- chains --------------------------------------------------------------------------------

    def _chains(self) -> None:
        for name in self.problem.names:
            for step in (self.budget.fewer, self.budget.more):
                if self._stopped() is not None:
                    return
                trial = self._chain(name, step)
                if trial is not None and trial.value < self.point.value - self.problem.tolerance:
                    self.point = trial
                    self.point.refresh()
                    self._count("chains")

    def _chain(self, first: str, step: Callable[[str, int], int | None]) -> _Point | None:
        """Change ``first`` by one step, and others so that the budget holds and is used up."""
        count = step(first, self.point.keep[first])
        if count is None:
            return None
        trial = self.point.copy()
        _resize(trial, first, count)
        others = [name for name in self.problem.names if name != first]
        while not self.budget.fits(trial.keep):
            shrunk = self._best(trial, others, self.budget.fewer)
            if shrunk is None:
                return None
            _resize(trial, *shrunk)
        while (grown := self._best(trial, others, self.budget.more)) is not None:
            _resize(trial, *grown)
        return trial

    def _best(
        self, point: _Point, names: Sequence[str], step: Callable[[str, int], int | None]
    ) -> tuple[str, int] | None:
        """The step that costs least for what it saves, or gains most for what it takes.

        The latter must fit the budget and improve. Of several channels the sum is looked at.
        """
        now, alone = self.budget.resource(point.keep), point.flip_costs()
        best, best_rate = None, math.inf
        for name in names:
            count = step(name, point.keep[name])
            if count is None:
                continue
            growing = count > point.keep[name]
            then = self.budget.resource({**point.keep, name: count})
            change = alone[_cheapest(point, alone, name, count)].sum().item()
            if growing and (then > self.budget.limit or change >= -self.problem.tolerance):
                continue
            rate = change / max(abs(then - now), _LEAST_USE)
            if rate < best_rate:
                best, best_rate = (name, count), rate
        return best


def _cheapest(point: _Point, alone: Tensor, name: str, count: int) -> Tensor:
    """The channels whose flips bring the group to ``count`` kept ones for the least sum [n]."""
    span = point.problem.spans[point.problem.names.index(name)]
    growing = count > point.keep[name]
    costs = alone[span].masked_fill(point.removed[span] != growing, math.inf)
    order = torch.argsort(costs, stable=True)
    return order[: abs(count - point.keep[name])] + span.start


def _resize(point: _Point, name: str, count: int) -> None:
    """Flip channels of the group, each time the cheapest, until ``count`` stay."""
    while point.keep[name] != count:
        step = 1 if count > point.keep[name] else -1
        nearer = point.keep[name] + step
        point.flip(_cheapest(point, point.flip_costs(), name, nearer).tolist())


def _check(graph: _Graph, cost: JointCost, removed: Mapping[str, Tensor]) -> None:
    lengths = set()
    for group in graph.groups:
        rows, mask = cost.rows.get(group.name), removed.get(group.name)
        if rows is None or mask is None:
            missing = "rows" if rows is None else "mask"
            raise InputError(f"refine: group {group.name!r} has no {missing}")
        if rows.ndim != 2 or rows.shape[1] != group.channels:
            raise InputError(
                f"refine: the rows of group {group.name!r} must be [M, {group.channels}], got "
                f"{list(rows.shape)}"
            )
        if mask.dtype != torch.bool or list(mask.shape) != [group.channels]:
            raise InputError(
                f"refine: the mask of group {group.name!r} must be bool [{group.channels}], got "
                f"{mask.dtype} {list(mask.shape)}"
            )
        if mask.all():
            raise InputError(f"refine: the mask of group {group.name!r} removes all its channels")
        if not torch.isfinite(rows).all():
            raise InputError(f"refine: the rows of group {group.name!r} must be finite")
        lengths.add(len(rows))
    if len(lengths) > 1:
        raise InputError(f"refine: all groups must have equally many rows, got {sorted(lengths)}")
    if not lengths:
        raise InputError("refine: the graph has no groups")
