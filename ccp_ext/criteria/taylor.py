"""Criteria that score channels one by one from the gradients of the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register
from ccp_ext.criteria.gradients import HessianProduct, MiniBatchGram, WeightFisher
from ccp_ext.criteria.magnitude import filters
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph, Group

# Samples in one row of criteria that are published on the gradients of mini-batches.
MINI_BATCH = 32


class _LossGradient(Criterion):
    uses = ("site",)

    def statistics(self) -> dict[str, Any]:
        return {"site": self.options.site or "gate", "curvature": "empirical"}


@register
class Taylor(_LossGradient):
    """|a_n| averaged over the samples, with a_n the derivative along the gate."""

    name = "taylor"
    source = "Molchanov et al., ICLR 2017"
    summary = "mean absolute first-order change of each sample's loss"
    note = (
        "summed over a map's positions, where the source takes their mean, and not divided by the "
        "layer's norm: within a layer the choice is the same, and the sums are changes of the "
        "loss, by which groups are compared; one shot instead of pruning while training"
    )
    allocation = "optimal"

    def costs(self, model, graph, data) -> dict[str, Cost]:
        return {name: Cost(u=-data[name].absolute) for name in data}


@register
class Fisher(_LossGradient):
    """The diagonal of the pairwise empirical matrix."""

    name = "fisher"
    source = "Theis et al. 2018; Liu et al., ICML 2021 (Group Fisher), without cost normalisation"
    summary = "diagonal empirical Fisher: mean squared first-order change of each sample's loss"
    note = "masks act at the gates; one shot instead of pruning while training"
    allocation = "optimal"

    def costs(self, model, graph, data) -> dict[str, Cost]:
        return {name: Cost(u=-0.5 * data[name].S.diagonal()) for name in data}


@register
class GroupFisher(Fisher):
    name = "group-fisher"
    source = "Liu et al., ICML 2021 (Group Fisher Pruning)"
    summary = "diagonal empirical Fisher of coupled channels, for what a channel costs"
    note = (
        "masks act at the gates instead of the inputs of all convolutions; the division by memory "
        "(normalise='memory': values in the feature maps of convolutions; or 'macs', 'none') "
        "compares groups and changes nothing within one; the source ranks all channels by it, here "
        "the sum over those removed is least; one shot instead of pruning while training"
    )
    uses = ("site", "normalise")

    def __init__(self, options=None) -> None:
        super().__init__(options)
        accepted = ("memory", "macs", "none")
        if self.options.normalise not in (None, *accepted):
            raise InputError(
                f"normalise must be one of {', '.join(accepted)}; got {self.options.normalise!r}"
            )

    def costs(self, model, graph, data) -> dict[str, Cost]:
        scores = super().costs(model, graph, data)
        return {g.name: Cost(u=scores[g.name].u / self._price(graph, g)) for g in graph.groups}

    def _price(self, graph: ChannelGraph, group: Group) -> float:
        """What one channel of the group costs."""
        kind = self.options.normalise or "memory"
        if kind == "none":
            return 1.0
        if kind == "memory":
            return float(_map_values(graph, group))
        without = graph.macs({group.name: group.channels - 1}) if group.channels > 1 else 0
        return float(max(1, graph.macs() - without))


def _map_values(graph: ChannelGraph, group: Group) -> int:
    """Values in the outputs of the layers that make or carry one channel of the group."""
    layers = {layer.module: layer for layer in graph.layers}
    total = 0
    for part in group.producers + group.channelwise:
        layer = layers[part.module]
        if layer.pair_parameters:  # a normalisation works in place
            total += len(part.index[0]) * layer.pair_macs // layer.pair_parameters
    return total


@register
class Taylor2019(Criterion):
    name = "taylor-2019"
    source = "Molchanov et al., CVPR 2019 (importance estimation, gates behind BatchNorm)"
    summary = "squared first-order change of a mini-batch's mean loss"
    note = (
        f"mini-batches of {MINI_BATCH} samples, and their plain mean instead of a moving average: "
        "the network does not change meanwhile; gates lie behind the activation, where the first-"
        "order change is the same for ReLU; one shot"
    )
    allocation = "optimal"

    def observation(self, model, graph) -> MiniBatchGram:
        return MiniBatchGram(model, graph, MINI_BATCH)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        return {group.name: Cost(u=-data.mean(group.name).diagonal()) for group in graph.groups}


@register
class OBDC(Criterion):
    """1/2 sum over the filter of w^2 F_w, with F the diagonal true Fisher."""

    name = "obd-c"
    source = "Wang et al., ICML 2019 (EigenDamage), their C-OBD"
    summary = "filter weights squared, weighted by the diagonal Fisher of each weight"
    note = "labels are drawn from the network's softmax, one for each sample"
    allocation = "optimal"

    def observation(self, model, graph) -> WeightFisher:
        return WeightFisher(model, graph, self.options.seed)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        def score(group: Group) -> Tensor:
            parts = (
                filters(model, p).square() * filters(model, p, data.mean) for p in group.producers
            )
            return 0.5 * sum(part.sum(1) for part in parts)

        return {group.name: Cost(u=-score(group)) for group in graph.groups}


@register
class SOSPH(Criterion):
    """|w_s'g| + 1/2 |w_s'H w|, with w_s the weights of structure s and w those of all."""

    name = "sosp-h"
    source = "Nonnenmacher et al., ICLR 2022 (SOSP-H)"
    summary = "first order plus the channel's Hessian with all channels of all layers together"
    note = (
        "structures are the filters of the groups' producers, without biases and normalisations, "
        "and w is all of them; H is the exact Hessian of the cross-entropy"
    )
    allocation = "optimal"

    def observation(self, model, graph) -> HessianProduct:
        return HessianProduct(model, graph)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        def along(group: Group, which: int) -> Tensor:
            parts = (
                filters(model, p) * filters(model, p, lambda w: data.means(w)[which])
                for p in group.producers
            )
            return sum(part.sum(1) for part in parts).abs()

        return {g.name: Cost(u=-(along(g, 0) + 0.5 * along(g, 1))) for g in graph.groups}
