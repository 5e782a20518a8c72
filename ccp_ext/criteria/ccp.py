"""Collaborative Channel Pruning: channels chosen by their joint effect on the loss."""

from __future__ import annotations

from typing import Any

from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register


class SecondOrder(Criterion):
    """Defaults of a member of the family; every one of them is an option."""

    uses = ("site", "curvature", "rows", "temperature", "first_order", "diagonal")
    site: str
    curvature: str
    first_order: bool

    def _uses_first_order(self) -> bool:
        chosen = self.options.first_order
        return self.first_order if chosen is None else chosen

    def statistics(self) -> dict[str, Any]:
        options = self.options
        return {
            "site": options.site or self.site,
            "curvature": options.curvature or self.curvature,
            "rows": 1 if options.rows is None else options.rows,
            "temperature": 1.0 if options.temperature is None else options.temperature,
            "first_order": self._uses_first_order(),
            "seed": options.seed,
        }

    def costs(self, model, graph, data) -> dict[str, Cost]:
        costs = data.costs(self._uses_first_order())
        if self.options.diagonal:
            return {name: cost.diagonal() for name, cost in costs.items()}
        return costs


@register
class CCP(SecondOrder):
    """Pairwise curvature of the logits at the gates, without the first-order term.

    On a well-trained network the training loss is near zero, so a few hard samples make u and the
    empirical Fisher; the logits' curvature does not depend on the labels.
    """

    name = "ccp"
    source = "Peng et al., ICML 2019, with the curvature and site that measured best here"
    summary = "pairwise second-order cost: logits' curvature at the gates, no first-order term"
    note = (
        "the source's objective is ccp-paper; the published share of each layer is not known, so "
        "groups share the budget by the least sum of costs"
    )
    site, curvature, first_order = "gate", "logits", False
    allocation = "optimal"


@register
class CCPPaper(SecondOrder):
    """The published objective to the letter."""

    name = "ccp-paper"
    source = "Peng et al., ICML 2019, Algorithm 1 and min b'S_hat b"
    summary = "the paper's objective: empirical J'Sigma J of the filter weights, with u"
    note = (
        "the layers, their shares, the number of images and the solver are not known: all groups "
        "give the same share, and the choice is proven optimal or has a gap"
    )
    site, curvature, first_order = "weight", "empirical", True
