"""Pruning in several rounds: which budget each round has, on the model that the last one left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ccp_ext.allocation import allocate
from ccp_ext.allocation.latency import LatencyTable
from ccp_ext.graph import ChannelGraph, Group
from ccp_ext.plan import PruningPlan


@dataclass(frozen=True)
class Schedule:
    """Budgets that fall by the same factor from round to round; the last is the one asked for.

    Attributes:
        graph: of the plain model.
        rounds: how many, 1 or more.
        budget: the one budget, as a keyword of :func:`ccp_ext.allocation.allocate`: macs, params,
            activations, latency, or ratio as a number.
        rules: ``multiple`` and ``minimum`` for ``allocate``.
        latency_table: for a budget of latency.
    """

    graph: ChannelGraph
    rounds: int
    budget: Mapping[str, Any]
    rules: Mapping[str, Any]
    latency_table: LatencyTable | None = None

    def check(self) -> None:
        """Raise InputError for a budget that the plain model cannot be brought to."""
        allocate(self.graph, **self._with_table(self.budget), **self.rules)

    def at(self, number: int, graph: ChannelGraph, done: PruningPlan | None) -> dict[str, Any]:
        """The budget of round ``number``, from 1, as keywords of ``allocate`` and ``make_plan``.

        Args:
            graph: of the model as it is, with the groups that may be pruned.
            done: what the rounds before did to the plain model; None for the first.
        """
        if self.rounds == 1:
            return self._with_table(self.budget)
        ((kind, asked),) = self.budget.items()
        share = number / self.rounds
        if kind == "ratio":
            ratio = asked if number == self.rounds else 1 - (1 - asked) ** share
            keep = allocate(self.graph, ratio=ratio, **self.rules).keep
            names = {group.name: _origin(group, self.graph, done) for group in graph.groups}
            counts = {g.name: min(g.channels, keep[names[g.name]]) for g in graph.groups}
            return {"per_group": counts}
        final = allocate(self.graph, **self._with_table(self.budget), **self.rules).budget
        target = math.exp((1 - share) * math.log(self._cost(kind, self.graph))) * final**share
        target = min(final if number == self.rounds else target, self._cost(kind, graph))
        return self._with_table({kind: f"{target!r}ms" if kind == "latency" else int(target)})

    def _with_table(self, budget: Mapping[str, Any]) -> dict[str, Any]:
        return dict(budget) | ({"latency_table": self.latency_table} if "latency" in budget else {})

    def _cost(self, kind: str, graph: ChannelGraph) -> float:
        if kind == "latency":
            return self.latency_table.predict(graph)
        return graph.resource(kind)(graph.counts())


def _origin(group: Group, plain: ChannelGraph, done: PruningPlan | None) -> str:
    """The group of the plain model whose channels these are."""
    part = group.producers[0]
    position = part.index[0][0]
    cut = None if done is None else done.modules.get(part.module)
    if cut is not None and cut.out is not None:
        position = cut.out[position]
    return next(
        candidate.name
        for candidate in plain.groups
        for other in candidate.producers
        if other.module == part.module and any(position in owned for owned in other.index)
    )
