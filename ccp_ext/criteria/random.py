"""The control that every comparison needs."""

from __future__ import annotations

import torch

from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register


@register
class Random(Criterion):
    name = "random"
    source = "control"
    summary = "channels drawn at random by the seed"

    def costs(self, model, graph, data) -> dict[str, Cost]:
        generator = torch.Generator().manual_seed(self.options.seed)
        return {g.name: Cost(u=torch.rand(g.channels, generator=generator)) for g in graph.groups}
