"""From statistics and a budget to a plan: allocation, then one selection a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ccp_ext.allocation import Allocation, allocate, allowed_counts
from ccp_ext.allocation.latency import LatencyTable
from ccp_ext.cost import Cost
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph
from ccp_ext.joint import JointCost, Refinement, refine
from ccp_ext.plan import PruningPlan
from ccp_ext.selection import Curve
from ccp_ext.statistics import Statistics

ALLOCATIONS = ("uniform", "optimal", "joint")

# Enough to prove most groups of up to 128 channels optimal. A limit by the clock would make the
# plan depend on the machine's speed.
NODE_LIMIT = 1000

# More counts would cost minutes for groups of a thousand channels, and hardly change their sum.
CURVE_COUNTS = 256


def make_plan(
    graph: ChannelGraph,
    stats: Statistics | Mapping[str, Cost],
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    activations: float | int | None = None,
    latency: float | str | None = None,
    ratio: float | Mapping[str, float] | None = None,
    per_group: Mapping[str, float | int] | None = None,
    latency_table: LatencyTable | None = None,
    allocation: str = "uniform",
    joint: JointCost | None = None,
    multiple: int | Mapping[str, int] = 1,
    minimum: int = 1,
    floors: Mapping[str, int] | None = None,
    ceilings: Mapping[str, int] | None = None,
    protected: Iterable[str] = (),
    method: str = "auto",
    record: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Decide which channels of every group of the graph go.

    Args:
        graph: groups that may be pruned, from :func:`ccp_ext.trace`; ``graph.inner`` for those
            inside blocks only.
        stats: collected statistics (then S alone is the cost, without the first-order term), or
            the cost of every group by name, from a criterion.
        macs, params, activations, latency, ratio, per_group, latency_table: the budget; see
            :func:`ccp_ext.allocation.allocate`.
        allocation: "uniform" gives all groups one common fraction; "optimal" computes each group's
            cost for every count (for evenly spaced ones, if there are more than ``CURVE_COUNTS``)
            and minimises their sum within the budget; "joint" goes on from there on the cost of the
            whole network, exchanging channels within and between groups
            (:func:`ccp_ext.refine`).
        joint: that cost. By default it is made of statistics collected with ``keep_rows=True``.
        multiple, minimum, floors, ceilings, protected: rules on the counts; see
            :func:`ccp_ext.allocation.allocate`.
        method: of :func:`ccp_ext.select`.
        record: what to note in the plan beside the budget. Added to it are "budget", "multiple",
            "objective" (of each group) and "allocation" (of the whole).

    Raises:
        InputError: a bad budget, a group without cost, a cost of the wrong size, an unknown
            allocation.
    """
    if allocation not in ALLOCATIONS:
        raise InputError(
            f"make_plan: allocation must be one of {', '.join(ALLOCATIONS)}; got {allocation!r}"
        )
    if allocation == "joint" and joint is None:
        joint = _joint_cost(stats)
    given = stats.costs() if isinstance(stats, Statistics) else stats
    costs = {group.name: _cost_of(group, given) for group in graph.groups}
    budget = {
        "macs": macs,
        "params": params,
        "activations": activations,
        "latency": latency,
        "ratio": ratio,
        "per_group": per_group,
    }
    rules = {
        "multiple": multiple,
        "minimum": minimum,
        "floors": floors,
        "ceilings": ceilings,
        "protected": protected,
    }
    curves = None
    # A ratio or counts by group leave nothing to choose.
    if allocation != "uniform" and ratio is None and per_group is None:
        curves = _curves(costs, allowed_counts(graph, **rules))
    found = allocate(graph, curves=curves, **budget, latency_table=latency_table, **rules)
    masks, objectives = {}, {}
    for name, cost in costs.items():
        known = curves and curves.get(name)
        removed = cost.channels - found.keep[name]
        masks[name], objectives[name] = _choose(cost, removed, known, method)
    summary = _summary(found, allocation, math.fsum(objectives.values()))
    if allocation == "joint":
        refined = _refine(graph, joint, masks, found, latency_table, allowed_counts(graph, **rules))
        masks = refined.removed
        objectives = {name: costs[name].objective(mask) for name, mask in masks.items()}
        summary = _joint_summary(summary, refined)
    note = {
        **(record or {}),
        "budget": {name: value for name, value in budget.items() if value is not None},
        "multiple": multiple,
        "objective": objectives,
        "allocation": summary,
    }
    kept = {name: torch.nonzero(~mask.cpu()).flatten().tolist() for name, mask in masks.items()}
    return PruningPlan.from_kept(graph, kept, record=note)


def _joint_cost(stats: Any) -> JointCost:
    if isinstance(stats, Statistics) and stats.keep_rows:
        return JointCost.of(stats)
    raise InputError(
        "make_plan: allocation='joint' needs joint=, or statistics collected with keep_rows=True"
    )


def _refine(
    graph: ChannelGraph,
    joint: JointCost,
    masks: Mapping[str, torch.Tensor],
    found: Allocation,
    latency_table: LatencyTable | None,
    counts: Mapping[str, list[int]],
) -> Refinement:
    if found.budget is None:
        return refine(graph, joint, masks)
    if found.kind == "latency":
        resource = latency_table.resource(graph)
    else:
        resource = graph.resource(found.kind)
    return refine(graph, joint, masks, resource=resource, budget=found.budget, counts=counts)


def _joint_summary(summary: Mapping[str, Any], refined: Refinement) -> dict[str, Any]:
    """What the plan says of the whole after the joint descent: the objective is the joint cost."""
    kept = ("kind", "budget")
    names = ("start", "exchanges", "transfers", "chains", "status")
    walk = {name: getattr(refined, name) for name in names}
    return {
        "method": "joint",
        **{name: summary[name] for name in kept},
        "objective": refined.objective,
        "joint": walk,
    }


def _curves(costs: Mapping[str, Cost], allowed: Mapping[str, list[int]]) -> dict[str, Curve]:
    """The curve of every group that may lose channels, at counts that it may lose."""
    return {
        name: costs[name].curve([costs[name].channels - k for k in reversed(_spaced(keep))])
        for name, keep in allowed.items()
        if keep != [costs[name].channels]
    }


def _spaced(counts: list[int]) -> list[int]:
    """At most ``CURVE_COUNTS`` of the counts, both ends among them."""
    last = len(counts) - 1
    if last < CURVE_COUNTS:
        return counts
    return [counts[k * last // (CURVE_COUNTS - 1)] for k in range(CURVE_COUNTS)]


def _choose(
    cost: Cost, removed: int, known: Curve | None, method: str
) -> tuple[torch.Tensor, float]:
    """The mask of removed channels and its cost: the cost's own choice, or the curve's if lower."""
    choice = cost.choose(removed, method=method, time_limit=math.inf, node_limit=NODE_LIMIT)
    if known is not None:
        at = known.counts.index(removed)
        if known.objective[at] < choice.objective:
            return torch.as_tensor(known.removed[at]), float(known.objective[at])
    return choice.removed, choice.objective


def _summary(found: Allocation, name: str, objective: float) -> dict[str, Any]:
    """What the plan says of the whole: with a bound where the allocation has one."""
    summary = {
        "method": name,
        "kind": found.kind,
        "budget": found.budget,
        "achieved": found.achieved,
        "objective": objective,
    }
    if found.lower_bound is not None:
        bound = min(found.lower_bound, objective)
        summary |= {
            "lower_bound": bound,
            "gap": objective - bound,
            "multiplier": found.multiplier,
            "relaxed": found.relaxed,
        }
    return summary


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
