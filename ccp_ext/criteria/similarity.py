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
    """The mean over images and tensors of the similarity of each pair of maps."""

    def __init__(self, kind: str, model, group) -> None:
        super().__init__(model, group)
        self.kind = kind
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, view, maps) -> None:
        mean = ops.map_similarity(in_unit_range(maps), self.kind).double()
        self.total = self.total + mean * len(maps)
        self.count += len(maps)

    def matrix(self) -> Tensor:
        return self.total / self.count


class _QSFM(Criterion):
    """Min b'Sim b over kept masks b; with b = 1 - m and Sim's diagonal left out,

    1/2 b'Sim b = 1/2 1'Sim1 + 1/2 m'Sim m - (Sim 1)'m,

    so S = Sim and u = Sim 1, up to a constant.
    """

    kind: ClassVar[str]
    uses = ("greedy",)
    note = (
        "the abstract says neither which map of a similar pair goes nor over which dynamic range "
        "the formulas work: the kept maps' summed similarity is minimised, or with greedy=True the "
        "map of the closest pair goes that is more similar to the others; the range is that of a "
        "sample's maps in the layer; depthwise-separable channels are compared behind the "
        "depthwise convolution"
    )

    def observation(self, model, graph) -> Activations:
        seen = {group.name: _Similarity(self.kind, model, group) for group in graph.groups}
        return Activations(model, seen)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        return {name: self._cost(data[name].matrix()) for name in data}

    def _cost(self, matrix: Tensor) -> Cost:
        S = matrix.clone().fill_diagonal_(0)
        if self.options.greedy:
            return SearchedCost(S, S.sum(1), partial(_drop_from_closest_pairs, S))
        return Cost(S, S.sum(1))


def _drop_from_closest_pairs(similarity: Tensor, r: int) -> Tensor:
    """``r`` times, of the closest pair left, the map whose similarities to all left sum to more."""
    left = similarity.detach().cpu().double().clone()
    left.fill_diagonal_(-torch.inf)
    removed = torch.zeros(len(left), dtype=torch.bool)
    for _ in range(r):
        kept = ~removed
        pair = divmod(int(left.argmax()), len(left))
        sums = left.nan_to_num(neginf=0.0).sum(1)
        # A last channel has no partner; there is nothing to compare.
        gone = (
            max(pair, key=lambda i: float(sums[i])) if kept.sum() > 1 else int(kept.int().argmax())
        )
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
