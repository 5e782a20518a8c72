"""Criteria that read the weights alone: no data needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register
from ccp_ext.errors import InputError
from ccp_ext.graph import Group, Slice

_COUPLED = "of coupled channels the norm is that of all their layers' filters together"


class _WeightScore(Criterion):
    def costs(self, model: nn.Module, graph, data) -> dict[str, Cost]:
        return {group.name: Cost(u=-self._score(model, group)) for group in graph.groups}

    def _score(self, model: nn.Module, group: Group) -> Tensor:
        raise TypeError(f"criterion {self.name!r} does not define its scores")


class _FilterNorm(_WeightScore):
    order: int

    def _score(self, model: nn.Module, group: Group) -> Tensor:
        """The norm of all producers' weights that make the channel, taken together."""
        powers = (filters(model, p).abs().pow(self.order).sum(1) for p in group.producers)
        return sum(powers).pow(1 / self.order)


@register
class L1(_FilterNorm):
    name = "l1"
    source = "Li et al., ICLR 2017"
    summary = "sum of the absolute weights of the filter"
    note = (
        "one share for all groups instead of shares set by hand from each layer's sensitivity; "
        f"{_COUPLED}"
    )
    order = 1


@register
class L2(_FilterNorm):
    name = "l2"
    source = "He et al., IJCAI 2018"
    summary = "Euclidean norm of the filter"
    note = (
        f"removed at once instead of set to zero while training goes on (soft pruning); {_COUPLED}"
    )
    order = 2


@register
class GeometricMedian(_WeightScore):
    name = "fpgm"
    source = "He et al., CVPR 2019 (FPGM)"
    summary = "sum of the Euclidean distances to all filters of the layer"
    note = "for coupled channels, which are not treated there, the layers' sums are added"

    def _score(self, model: nn.Module, group: Group) -> Tensor:
        # Directly, since the faster way by a Gram matrix cancels where filters are alike.
        exactly = "donot_use_mm_for_euclid_dist"
        parts = (filters(model, producer) for producer in group.producers)
        return sum(torch.cdist(w, w, compute_mode=exactly).sum(1) for w in parts)


@register
class BatchNormScale(_WeightScore):
    name = "bn-scale"
    source = "Liu et al., ICCV 2017 (network slimming)"
    summary = "absolute scale of the BatchNorm behind the filter"
    note = (
        "published for networks trained with an L1 penalty on the scales, which is up to the user; "
        "where a channel has several BatchNorms their scales are added"
    )

    def _score(self, model: nn.Module, group: Group) -> Tensor:
        scales = [
            _owned(module.weight.abs(), part).sum(1)
            for part in group.channelwise
            if isinstance(module := model.get_submodule(part.module), _BatchNorm) and module.affine
        ]
        if not scales:
            raise InputError(
                f"criterion 'bn-scale' needs a BatchNorm with scales in every group; "
                f"{group.name!r} has none"
            )
        return sum(scales)


def filters(
    model: nn.Module, producer: Slice, of: Callable[[nn.Parameter], Tensor] | None = None
) -> Tensor:
    """The weights that make each channel in one producer, float64 ``[C, F]``.

    Args:
        of: what to read instead of the weight's values, as a tensor of the weight's shape.
    """
    weight = model.get_submodule(producer.module).weight
    return _owned(weight if of is None else of(weight), producer).flatten(1)


def _owned(tensor: Tensor, part: Slice) -> Tensor:
    """Of the tensor's rows those of each channel: float64 ``[C, owned, ...]``."""
    return tensor.detach().double()[torch.tensor(part.index, device=tensor.device)]
