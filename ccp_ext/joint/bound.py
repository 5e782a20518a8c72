"""A lower bound of the cost over all choices of channels within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccp_ext.allocation import allocate
from ccp_ext.joint.problem import LEAST_USE, Graph, JointCost, Problem, check
from ccp_ext.progress import tqdm

# Budgets of :func:`ccp_ext.allocation.allocate` that can be shared out among groups.
_RESOURCES = ("macs", "params", "activations", "latency")

_POWER_ITERATIONS = 30
_BISECTIONS = 40


def lower_bound(
    graph: Graph,
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
    check("lower_bound", graph, cost, near)
    problem = Problem(cost, [group.name for group in graph.groups])
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
        problem: Problem,
        graph: Any,
        near: Mapping[str, Tensor],
        mask: Tensor,
        budget: Mapping[str, Any],
    ) -> _Saving:
        """As much as ``mask`` saves, at the prices of the channels kept last in ``near``."""
        kind = next((name for name in _RESOURCES if budget.get(name) is not None), None)
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
        high = low + ((1 - x) / self.prices.clamp_min(LEAST_USE)).max().clamp_min(0)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            short = self.short(self._moved(x, middle))
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return self._moved(x, high)

    def _moved(self, x: Tensor, multiplier: Tensor) -> Tensor:
        return (x + multiplier[self.part] * self.prices).clamp(0, 1)


def _prices(problem: Problem, resource: Any, near: Mapping[str, Tensor]) -> Tensor:
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
    problem: Problem, mask: Tensor, saving: _Saving, steps: Iterable[int]
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
