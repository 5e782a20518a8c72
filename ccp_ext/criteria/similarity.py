"""QSFM: keep feature maps that are unlike each other."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ccp_ext import ops
from ccp_ext.activations import Activations
from ccp_ext.cost import Cost, SearchedCost
from ccp_ext.criteria.activation import MapAccumulator
from ccp_ext.criteria.base import Criterion, register


class _Similarity(MapAccumulator):
    """The mean over images and tensors of the similarity of each pair of maps, and of the energy,
    the mean square, of each map."""

    def __init__(self, kind: str, model, group) -> None:
        super().__init__(model, group)
        self.kind = kind
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.count = 0

    def add(self, view, maps) -> None:
        maps = in_unit_range(maps)
        self.total = self.total + ops.map_similarity(maps, self.kind).double() * len(maps)
        moments = ops.channel_moments(maps)
        self.squares = self.squares + moments.square_sum / moments.count * len(maps)
        self.count += len(maps)

    def matrix(self) -> Tensor:
        return self.total / self.count

    def energy(self) -> Tensor:
        return self.squares / self.count


class _QSFM(Criterion):
    """Min b'Sim b over kept masks b; with b = 1 - m and Sim's diagonal left out,

    1/2 b'Sim b = 1/2 1'Sim1 + 1/2 m'Sim m - (Sim 1)'m,

    so S = Sim and u = Sim 1, up to a constant.
    """

    kind: ClassVar[str]
    uses = ("greedy",)
    note = (
        "the abstract says neither which map of a similar pair goes nor over which dynamic range "
        "the formulas work: the kept maps' summed similarity is minimised, or with greedy=True of "
        "the closest pair the map with the smaller mean square goes; the range is that of a "
        "sample's maps in the layer; depthwise-separable channels are compared behind the "
        "depthwise convolution"
    )

    def observation(self, model, graph) -> Activations:
        seen = {group.name: _Similarity(self.kind, model, group) for group in graph.groups}
        return Activations(model, seen)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        return {name: self._cost(data[name].matrix(), data[name].energy()) for name in data}

    def _cost(self, matrix: Tensor, energy: Tensor) -> Cost:
        S = matrix.clone().fill_diagonal_(0)
        if self.options.greedy:
            return SearchedCost(S, S.sum(1), partial(_drop_from_closest_pairs, S, energy))
        return Cost(S, S.sum(1))


def _drop_from_closest_pairs(similarity: Tensor, energy: Tensor, r: int) -> Tensor:
    """``r`` times, of the closest pair left, the map with less energy."""
    left = similarity.detach().cpu().double().clone()
    left.fill_diagonal_(-torch.inf)
    energy = energy.detach().cpu()
    removed = torch.zeros(len(left), dtype=torch.bool)
    for k in range(r):
        # A last channel has no partner; there is nothing to compare.
        last = k == len(left) - 1
        pair = (~removed).nonzero()[0] if last else divmod(int(left.argmax()), len(left))
        gone = min((int(i) for i in pair), key=lambda i: float(energy[i]))
        removed[gone] = True
        left[gone] = left[:, gone] = -torch.inf
    return removed


@register
class QSFMSSIM(_QSFM):
    name = "qsfm-ssim"
    source = "Wang et al., IEEE IoT Journal 2022 (QSFM), arXiv 2105.06052"
    summary = "pairwise structural similarity of the feature maps, least among those kept"
    kind = "ssim"


@register
class QSFMPSNR(_QSFM):
    name = "qsfm-psnr"
    source = "Wang et al., IEEE IoT Journal 2022 (QSFM), arXiv 2105.06052"
    summary = "pairwise peak signal-to-noise ratio of the feature maps, least among those kept"
    kind = "psnr"


def in_unit_range(maps: Tensor) -> Tensor:
    """Each sample's maps over the distance of its largest and least value (unless that is 0)."""
    values = maps.flatten(1)
    span = values.amax(1) - values.amin(1)
    span = torch.where(span > 0, span, 1.0)
    return maps / span.view(-1, *(1 for _ in maps.shape[1:]))
