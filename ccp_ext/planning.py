"""From statistics and a budget to a plan: allocation, then one selection a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ccp_ext.allocation import allocate
from ccp_ext.cost import Cost
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph
from ccp_ext.plan import PruningPlan
from ccp_ext.statistics import Statistics

# Enough to prove most groups of up to 128 channels optimal. A limit by the clock would make the
# plan depend on the machine's speed.
NODE_LIMIT = 1000


def make_plan(
    graph: ChannelGraph,
    stats: Statistics | Mapping[str, Cost],
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    ratio: float | Mapping[str, float] | None = None,
    per_group: Mapping[str, float | int] | None = None,
    multiple: int = 1,
    method: str = "auto",
    record: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Decide which channels of every group of the graph go.

    Args:
        graph: groups that may be pruned, from :func:`ccp_ext.trace`; ``graph.inner`` for those
            inside blocks only.
        stats: collected statistics (then S alone is the cost, without the first-order term), or
            the cost of every group by name, from a criterion.
        macs, params, ratio, per_group, multiple: the budget; see
            :func:`ccp_ext.allocation.allocate`.
        method: of :func:`ccp_ext.select`.
        record: what to note in the plan beside the budget.

    Raises:
        InputError: a bad budget, a group without cost, a cost of the wrong size.
    """
    costs = stats.costs() if isinstance(stats, Statistics) else stats
    budget = {"macs": macs, "params": params, "ratio": ratio, "per_group": per_group}
    allocation = allocate(graph, **budget, multiple=multiple)
    kept, objectives = {}, {}
    for group in graph.groups:
        cost = _cost_of(group, costs)
        removed = group.channels - allocation.keep[group.name]
        choice = cost.choose(removed, method=method, time_limit=math.inf, node_limit=NODE_LIMIT)
        kept[group.name] = torch.nonzero(~choice.removed).flatten().tolist()
        objectives[group.name] = choice.objective
    given = {name: value for name, value in budget.items() if value is not None}
    note = {**(record or {}), "budget": given, "multiple": multiple, "objective": objectives}
    return PruningPlan.from_kept(graph, kept, record=note)


def _cost_of(group: Any, costs: Mapping[str, Cost]) -> Cost:
    cost = costs.get(group.name)
    if cost is None:
        raise InputError(f"make_plan: group {group.name!r} has no cost among {len(costs)} given")
    if cost.channels != group.channels:
        raise InputError(
            f"make_plan: the cost of group {group.name!r} is for {cost.channels} channels, the "
            f"group has {group.channels}"
        )
    return cost
