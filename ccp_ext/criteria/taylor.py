"""Criteria that score channels one by one from the gradients of the loss at their gates."""

from __future__ import annotations

from typing import Any

from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register


class _LossGradient(Criterion):
    def statistics(self) -> dict[str, Any]:
        return {"site": self.options.site or "gate", "curvature": "empirical"}


@register
class Taylor(_LossGradient):
    """|a_n| averaged over the samples; the published normalisation is by layer, so moot here."""

    name = "taylor"
    source = "Molchanov et al., ICLR 2017"
    summary = "mean absolute first-order change of each sample's loss"

    def costs(self, model, graph, stats) -> dict[str, Cost]:
        return {name: Cost(u=-stats[name].absolute) for name in stats}


@register
class Fisher(_LossGradient):
    """The diagonal of the pairwise empirical matrix."""

    name = "fisher"
    source = "Theis et al. 2018; Liu et al., ICML 2021 (Group Fisher), without cost normalisation"
    summary = "diagonal empirical Fisher: mean squared first-order change of each sample's loss"

    def costs(self, model, graph, stats) -> dict[str, Cost]:
        return {name: Cost(u=-0.5 * stats[name].S.diagonal()) for name in stats}
