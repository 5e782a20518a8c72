"""QSFM: keep feature maps that are unlike each other."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ccp_ext.activations import Activations
from ccp_ext.cost import Cost, SearchedCost
from ccp_ext.criteria.activation import MapAccumulator
from ccp_ext.criteria.base import Criterion, register

# Of equal maps the error is zero; the ratio of peak to noise ends here, in decibels.
_LARGEST_PSNR = 100.0


class _Similarity(MapAccumulator):
    """The mean over images and tensors of the similarity of each pair of maps."""

    def __init__(self, kind: str, model, group) -> None:
        super().__init__(model, group)
        self.kind = kind
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, view, maps) -> None:
        self.total = self.total + similarity(maps, self.kind).sum(0)
        self.count += len(maps)

    def matrix(self) -> Tensor:
        return self.total / self.count


class _QSFM(Criterion):
    """Min b'Sim b over kept masks b; with b = 1 - m and Sim's diagonal left out,

    1/2 b'Sim b = 1/2 1'Sim1 + 1/2 m'Sim m - (Sim 1)'m,

    so S = Sim and u = Sim 1, up to a constant.
    """

    kind: ClassVar[str]
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
    left = similarity.detach().cpu().double()
    left.fill_diagonal_(-torch.inf)
    removed = torch.zeros(len(left), dtype=torch.bool)
    for _ in range(r):
        kept = ~removed
        pair = divmod(int(left.argmax()), len(left))
        sums = left.nan_to_num(neginf=0.0).sum(1)
        # A last channel has no partner; there is nothing to compare.
        gone = max(pair, key=lambda i: float(sums[i])) if kept.sum() > 1 else int(kept.int().argmax())
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


def similarity(maps: Tensor, kind: str) -> Tensor:
    """The similarity of each pair of a sample's maps.

    With L the range (largest minus least value) of the sample's maps, over whole maps,

    - "ssim": (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2)) with
      C1 = (0.01 L)^2, C2 = (0.03 L)^2 (Wang et al., 2004, with one window); 1 where L is 0;
    - "psnr": 10 log10(L^2 / mean squared error) in decibels, at most 100.

    Args:
        maps: ``[N, C, ...]``.

    Returns:
        float64 ``[N, C, C]``.
    """
    x = maps.double().reshape(*maps.shape[:2], -1)
    span = (x.amax((1, 2)) - x.amin((1, 2))).view(-1, 1, 1)
    square = torch.where(span > 0, span, 1.0) ** 2
    mean = x.mean(2, keepdim=True)
    x = x - mean
    covariance = x @ x.mT / x.shape[2]
    variance = covariance.diagonal(dim1=1, dim2=2)
    variances = variance.unsqueeze(1) + variance.unsqueeze(2)
    if kind == "psnr":
        error = variances - 2 * covariance + (mean - mean.mT) ** 2
        floor = 10 ** (-_LARGEST_PSNR / 10)
        return -10 * torch.log10((error / square).clamp(min=floor))
    c1, c2 = 0.01**2 * square, 0.03**2 * square
    luminance = (2 * mean * mean.mT + c1) / (mean**2 + mean.mT**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)
