"""The joint descent: exchanges and transfers of channels, and chains of them."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ccp_ext.errors import InputError
from ccp_ext.joint.problem import LEAST_USE, Graph, JointCost, Problem, check
from ccp_ext.progress import tqdm


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
    graph: Graph,
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
    check("refine", graph, cost, removed)
    if (resource is None) != (budget is None):
        raise InputError("refine: resource and budget must be given together")
    names = [group.name for group in graph.groups]
    allowed = {
        g.name: sorted((counts or {}).get(g.name, range(1, g.channels + 1))) for g in graph.groups
    }
    limits = _Budget(resource, budget, allowed)
    bar = tqdm(desc="joint descent", unit="move", delay=1.0, disable=not progress, leave=False)
    with bar:
        walk = _Walk(Problem(cost, names), limits, removed, max_moves, time_limit, bar)
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

    problem: Problem
    removed: Tensor
    keep: dict[str, int]
    product: Tensor
    gradient: Tensor
    value: float = 0.0

    @classmethod
    def at(cls, problem: Problem, removed: Tensor) -> _Point:
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
        problem: Problem,
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
            rate = change / max(abs(then - now), LEAST_USE)
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
