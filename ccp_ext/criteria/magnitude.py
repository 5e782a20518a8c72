"""Norms of the filters: no data needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register


class _FilterNorm(Criterion):
    order: int

    def costs(self, model: nn.Module, graph, stats) -> dict[str, Cost]:
        return {group.name: Cost(u=-self._score(model, group)) for group in graph.groups}

    def _score(self, model: nn.Module, group) -> Tensor:
        """The norm of all producers' weights that make the channel, taken together."""
        total = 0.0
        for producer in group.producers:
            weight = model.get_submodule(producer.module).weight.detach().double()
            powers = weight.abs().pow(self.order).flatten(1).sum(1)
            total = total + powers[torch.tensor(producer.index)].sum(1)
        return total.pow(1 / self.order)


@register
class L1(_FilterNorm):
    name = "l1"
    source = "Li et al., ICLR 2017"
    summary = "sum of the absolute weights of the filter"
    order = 1


@register
class L2(_FilterNorm):
    name = "l2"
    source = "He et al., IJCAI 2018"
    summary = "Euclidean norm of the filter"
    order = 2
