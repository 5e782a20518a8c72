"""weighted_grams_: the Gram updates of many layers in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import networks, triton_kernels
from benchmarks.operation import Candidate, Case, Operation, Work
from benchmarks.weighted_gram import updated
from ccp_ext import ops

Tensors = list[Tensor]


class WeightedGrams(Operation):
    """All S [C_l, C_l] and a [N, C_l] of a network; ``shape`` is [N, sum of C_l].

    Without weights, as the pass that collects S calls it, so that one call of cuBLAS is enough for
    a layer.
    """

    name = "weighted_grams_"
    layouts = ("NCHW",)
    of_maps = False
    cold = False

    def sizes(self, network: str, batch: int) -> Iterator[dict]:
        for widths in (networks.convolution_widths(network), networks.group_widths(network)):
            yield {"shape": (batch, sum(widths)), "widths": widths}

    def inputs(self, case: Case) -> tuple[Tensors, Tensors]:
        n = case.shape[0]
        S = [torch.zeros(c, c, device=case.device) for c in case.widths]
        return S, [case.random(n, c) for c in case.widths]

    def candidates(self, case: Case) -> dict[str, Candidate]:
        return {
            "ours": ops.weighted_grams_,
            "eager": _addmm,
            "einsum": _einsum,
            "one by one": _one_by_one,
            "triton": triton_kernels.weighted_grams_,
        }

    def reference(self, S: Tensors, a: Tensors) -> tuple[Tensors, Tensors]:
        return tuple(zip(*map(updated, S, a), strict=True))

    def work(self, case: Case) -> Work:
        triangles = sum(c * (c + 1) // 2 for c in case.widths)
        written = sum(c * c for c in case.widths)
        read = case.elements * case.dtype.itemsize + 4 * triangles
        return Work(read + 4 * written, 2 * case.shape[0] * triangles, rate=case.rate)


def _addmm(S: Tensors, a: Tensors) -> Tensors:
    for matrix, rows in zip(S, a, strict=True):
        rows = rows.float()
        matrix.addmm_(rows.T, rows)
    return S


def _einsum(S: Tensors, a: Tensors) -> Tensors:
    for matrix, rows in zip(S, a, strict=True):
        rows = rows.float()
        matrix += torch.einsum("nc,nd->cd", rows, rows)
    return S


def _one_by_one(S: Tensors, a: Tensors) -> Tensors:
    return [ops.weighted_gram_(matrix, rows) for matrix, rows in zip(S, a, strict=True)]
