"""From statistics and a budget to a plan: allocation, then one selection a group."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ccp_ext.allocation import Allocation, allocate, allowed_counts
from ccp_ext.allocation.latency import LatencyTable
from ccp_ext.cost import Cost
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph
from ccp_ext.joint import JointCost, Refinement, lower_bound, refine
from ccp_ext.plan import PruningPlan
from ccp_ext.progress import tqdm
from ccp_ext.selection import Curve
from ccp_ext.statistics import Statistics

ALLOCATIONS = ("auto", "uniform", "optimal", "joint")

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
    allocation: str = "auto",
    joint: JointCost | None = None,
    multiple: int | Mapping[str, int] = 1,
    minimum: int = 1,
    floors: Mapping[str, int] | None = None,
    ceilings: Mapping[str, int] | None = None,
    protected: Iterable[str] = (),
    method: str = "auto",
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PruningPlan:
    """Decide which channels of every group of the graph go.

    Args:
        graph: groups that may be pruned, from :func:`ccp_ext.trace`; ``graph.inner`` for those
            inside blocks only.
        stats: collected statistics (then S alone is the cost, without the first-order term), or
            the cost of every group by name, from a criterion.
        macs, params, activations, latency, ratio, per_group, latency_table: the budget; see
            :func:`ccp_ext.allocation.allocate`.
        allocation: "auto" is "optimal" for statistics, whose costs are all in one unit, and
            "uniform" for costs by name, of which nothing says that they can be added: pass
            ``allocation=criterion.allocation`` for those of a criterion. The plan's record says
            which was taken; with ``ratio`` or ``per_group`` it is these shares in any case.
            "uniform" gives all groups one common fraction; "optimal" computes each group's
            cost for every count (for evenly spaced ones, if there are more than ``CURVE_COUNTS``)
            and minimises their sum within the budget; "joint" goes on from there on the cost of the
            whole network, exchanging channels within and between groups
            (:func:`ccp_ext.refine`).
        joint: that cost. By default it is made of statistics collected with ``keep_rows=True``.
        multiple, minimum, floors, ceilings, protected: rules on the counts; see
            :func:`ccp_ext.allocation.allocate`.
        method: of :func:`ccp_ext.select`.
        record: what to note in the plan beside the budget. Added to it are "budget", "multiple",
            "objective" (of each group) and "allocation" (of the whole; where there is a bound,
            with "lower_bound" and "gap").
        progress: show bars of what lasts longer than a second.

    Raises:
        InputError: a bad budget, a group without cost, a cost of the wrong size, an unknown
            allocation.
    """
    if allocation not in ALLOCATIONS:
        raise InputError(
            f"make_plan: allocation must be one of {', '.join(ALLOCATIONS)}; got {allocation!r}"
        )
    fixed = ratio is not None or per_group is not None
    if allocation == "auto":
        allocation = "optimal" if isinstance(stats, Statistics) else "uniform"
    if allocation == "optimal" and fixed:
        allocation = "uniform"
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
    if allocation != "uniform" and not fixed:
        curves = _curves(costs, allowed_counts(graph, **rules), progress)
    found = allocate(graph, curves=curves, **budget, latency_table=latency_table, **rules)
    masks, objectives = _choose_all(costs, found.keep, curves or {}, method, progress)
    summary = _summary(found, allocation, math.fsum(objectives.values()))
    if allocation == "joint":
        refined = _refine(
            graph, joint, masks, found, latency_table, allowed_counts(graph, **rules), progress
        )
        masks = refined.removed
        objectives = {name: costs[name].objective(mask) for name, mask in masks.items()}
        if fixed:
            within = {"per_group": found.keep}
        else:
            within = {**budget, "latency_table": latency_table, **rules}
        bound = lower_bound(graph, joint, masks, progress=progress, **within)
        summary = _joint_summary(summary, refined, bound)
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
    progress: bool,
) -> Refinement:
    if found.budget is None:
        return refine(graph, joint, masks, progress=progress)
    if found.kind == "latency":
        resource = latency_table.resource(graph)
    else:
        resource = graph.resource(found.kind)
    within = {"resource": resource, "budget": found.budget, "counts": counts}
    return refine(graph, joint, masks, **within, progress=progress)


def _joint_summary(summary: Mapping[str, Any], refined: Refinement, bound: float) -> dict[str, Any]:
    """What the plan says of the whole after the joint descent: the objective is the joint cost."""
    kept = ("kind", "budget")
    names = ("start", "exchanges", "transfers", "chains", "status")
    walk = {name: getattr(refined, name) for name in names}
    return {
        "method": "joint",
        **{name: summary[name] for name in kept},
        "objective": refined.objective,
        "lower_bound": min(bound, refined.objective),
        "gap": max(refined.objective - bound, 0.0),
        "joint": walk,
    }


def _curves(
    costs: Mapping[str, Cost], allowed: Mapping[str, list[int]], progress: bool
) -> dict[str, Curve]:
    """The curve of every group that may lose channels, at counts that it may lose."""
    return {
        name: costs[name].curve([costs[name].channels - k for k in reversed(_spaced(keep))])
        for name, keep in _bar(allowed.items(), "cost curves", progress)
        if keep != [costs[name].channels]
    }


def _spaced(counts: list[int]) -> list[int]:
    """At most ``CURVE_COUNTS`` of the counts, both ends among them."""
    last = len(counts) - 1
    if last < CURVE_COUNTS:
        return counts
    return [counts[k * last // (CURVE_COUNTS - 1)] for k in range(CURVE_COUNTS)]


def _bar(items: Collection[Any], title: str, progress: bool) -> tqdm:
    """The items, with a bar that appears after a second and also moves within an item."""
    return tqdm(items, title, delay=1.0, miniters=0, disable=not progress, leave=False)


def _choose_all(
    costs: Mapping[str, Cost],
    keep: Mapping[str, int],
    curves: Mapping[str, Curve],
    method: str,
    progress: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The masks of removed channels, and what they cost, by group."""
    masks, objectives = {}, {}
    bar = _bar(costs.items(), "choosing channels", progress)

    def show(objective: float, bound: float) -> None:
        bar.set_postfix_str(f"gap {objective - bound:.3g}", refresh=False)
        bar.update(0)

    options = {"method": method, "progress": show if progress else False}
    for name, cost in bar:
        removed = cost.channels - keep[name]
        masks[name], objectives[name] = _choose(cost, removed, curves.get(name), options)
    return masks, objectives


def _choose(
    cost: Cost, removed: int, known: Curve | None, options: Mapping[str, Any]
) -> tuple[torch.Tensor, float]:
    """The mask of removed channels and its cost: the cost's own choice, or the curve's if lower."""
    choice = cost.choose(removed, time_limit=math.inf, node_limit=NODE_LIMIT, **options)
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
