"""Criteria that score channels one by one from their feature maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ccp_ext import ops
from ccp_ext.activations import Activations, Reader, View, map_views
from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register
from ccp_ext.graph import Group

_COUPLED = "coupled channels are read where layers read them, and these tensors count alike"


class MapAccumulator(ABC):
    """Sums over the images of what is computed of a group's maps."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.views = map_views(model, group)

    def readers(self) -> Iterator[Reader]:
        for view in self.views:
            yield view.tap, partial(self._receive, view)

    def _receive(self, view: View, tensor: Tensor) -> None:
        self.add(view, view.maps(tensor))

    @abstractmethod
    def add(self, view: View, maps: Tensor) -> None:
        """maps: ``[N, C, ...]``, or ``[N, C]``."""


class MapCriterion(Criterion):
    """A criterion with one accumulator a group."""

    accumulator: ClassVar[type[MapAccumulator]]

    def observation(self, model, graph) -> Activations:
        seen = {group.name: self.accumulator(model, group) for group in graph.groups}
        return Activations(model, seen)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        return {name: Cost(u=-data[name].score()) for name in data}


class _Active(MapAccumulator):
    """The share of values that are not zero, as a mean over the tensors."""

    def __init__(self, model, group) -> None:
        super().__init__(model, group)
        self.counts: dict[View, tuple[Tensor, int]] = {}

    def add(self, view, maps) -> None:
        active, values = self.counts.get(view, (0, 0))
        moments = ops.channel_moments(maps)
        self.counts[view] = active + moments.count - moments.zeros, values + moments.count

    def score(self) -> Tensor:
        return sum(active.double() / n for active, n in self.counts.values()) / len(self.counts)


@register
class ApoZ(MapCriterion):
    name = "apoz"
    source = "Hu et al., 2016 (network trimming)"
    summary = "share of the activations that are not zero (1 - APoZ)"
    note = f"an activation without zeros (SiLU, GELU) leaves all channels equal; {_COUPLED}"
    accumulator = _Active


class _Pooled(MapAccumulator):
    """The mean of each map, kept for every image."""

    def __init__(self, model, group) -> None:
        super().__init__(model, group)
        self.means: dict[View, list[Tensor]] = {view: [] for view in self.views}

    def add(self, view, maps) -> None:
        self.means[view].append(maps.double().reshape(*maps.shape[:2], -1).mean(2))

    def score(self) -> Tensor:
        entropies = [_entropy(torch.cat(means)) for means in self.means.values()]
        return sum(entropies) / len(entropies)


_BINS = 100


def _entropy(values: Tensor) -> Tensor:
    """Entropy in nats of each column's histogram between its least and its largest value."""
    low, high = values.amin(0), values.amax(0)
    width = torch.where(high > low, high - low, 1.0)
    cells = ((values - low) / width * _BINS).long().clamp_(max=_BINS - 1)
    counts = values.new_zeros(_BINS, values.shape[1])
    counts.scatter_add_(0, cells, torch.ones_like(values))
    return torch.special.entr(counts / len(values)).sum(0)


@register
class Entropy(MapCriterion):
    name = "entropy"
    source = "Luo and Wu, 2017"
    summary = "entropy of the globally averaged map over the images"
    note = f"{_BINS} bins between a channel's least and largest value; {_COUPLED}"
    accumulator = _Pooled


class _Rank(MapAccumulator):
    def __init__(self, model, group) -> None:
        super().__init__(model, group)
        self.sums: dict[View, tuple[Tensor, int]] = {}

    def add(self, view, maps) -> None:
        total, images = self.sums.get(view, (0, 0))
        ranks = torch.linalg.matrix_rank(
            _as_matrices(maps if maps.dtype == torch.float64 else maps.float())
        )
        self.sums[view] = total + ranks.double().sum(0), images + len(maps)

    def score(self) -> Tensor:
        return sum(total / images for total, images in self.sums.values()) / len(self.sums)


def _as_matrices(maps: Tensor) -> Tensor:
    """``[N, C, rows, columns]`` of maps with any number of dimensions."""
    if maps.dim() < 4:
        return maps.reshape(*maps.shape[:2], -1, 1)
    return maps.flatten(2, -2)


@register
class HRank(MapCriterion):
    name = "hrank"
    source = "Lin et al., CVPR 2020 (HRank)"
    summary = "rank of the feature map, averaged over the images"
    note = f"a singular value counts above max(rows, columns) * eps * the largest; {_COUPLED}"
    accumulator = _Rank
