"""Criteria on the pairwise statistics at the gates that search in their own ways."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ccp_ext.cost import Cost, SearchedCost
from ccp_ext.criteria.base import Criterion, register
from ccp_ext.criteria.gradients import MiniBatchGram
from ccp_ext.criteria.reconstruction import refitted_cost
from ccp_ext.criteria.refitting import RefitProblem
from ccp_ext.criteria.taylor import MINI_BATCH


@register
class Kwon(Criterion):
    """min m'Sm by the rearrangement of the mask that the diagonal of S suggests."""

    name = "kwon"
    source = "Kwon et al., NeurIPS 2022 (a fast post-training pruning framework)"
    summary = "pairwise Fisher of the gates, by rearranging the diagonal's mask greedily"
    note = (
        f"published for heads and filters of transformers; rows of {MINI_BATCH} samples; the "
        "budget is the plan's; the tuning of the masks' values is left to the compensation"
    )
    allocation = "optimal"

    def observation(self, model, graph) -> MiniBatchGram:
        return MiniBatchGram(model, graph, MINI_BATCH)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        grams = {group.name: data.mean(group.name).cpu() for group in graph.groups}
        return {
            name: SearchedCost(gram, None, partial(rearranged, gram))
            for name, gram in grams.items()
        }


def rearranged(gram: Tensor, r: int) -> Tensor:
    """The ``r`` least of the diagonal, after each kept channel was offered for removal once.

    They are offered from the least of the diagonal on. With one in the removed set, the channel
    goes back without which m'Sm is least.
    """
    order = gram.diagonal().argsort(stable=True)
    removed = torch.zeros(len(gram), dtype=torch.bool)
    removed[order[:r]] = True
    if r == 0:
        return removed
    total = gram @ removed.to(gram.dtype)
    for offered in order[r:].tolist():
        removed[offered] = True
        total = total + gram[offered]
        change = torch.where(removed, gram.diagonal() - 2 * total, torch.inf)
        kept = int(change.argmin())
        removed[kept] = False
        total = total - gram[kept]
    return removed


@register
class GateRefit(Criterion):
    """1/2 m'S m after the kept gates moved to the best values: 1/2 1'((S^-1)_RR)^-1 1.

    This is OBS with the gates (all one) as the weights: the part of Q m, the removed columns' sum,
    that the kept columns of Q cannot replace, for S = Q'Q.
    """

    name = "gate-refit"
    source = "this package; OBS (Hassibi and Stork, NeurIPS 1993) on the gates"
    summary = "pairwise curvature left after the kept channels were rescaled"
    note = "the rescaling itself is part of what ccp_ext.compensation.refit does"
    uses = ("site", "curvature", "rows", "temperature", "ridge")
    allocation = "optimal"

    def statistics(self) -> dict[str, Any]:
        options = self.options
        return {
            "site": options.site or "gate",
            "curvature": options.curvature or "logits",
            "rows": 1 if options.rows is None else options.rows,
            "temperature": 1.0 if options.temperature is None else options.temperature,
            "first_order": False,
            "seed": options.seed,
        }

    def costs(self, model, graph, data) -> dict[str, Cost]:
        ridge = 1e-2 if self.options.ridge is None else self.options.ridge
        costs = {}
        for name in data:
            S = data[name].S.double()
            problem = RefitProblem(S, S.new_ones(1, len(S)), len(S), ridge)
            costs[name] = refitted_cost([problem], Cost(S))
        return costs
