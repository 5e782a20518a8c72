"""weighted_grams_: the Gram updates of all inner groups of a network in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.operation import Candidate, Case, Operation, Work
from ccp_ext import ops, reference

Tensors = list[Tensor]


class WeightedGrams(Operation):
    """All S [C_l, C_l] and a [N, C_l] of a network; ``shape`` is [N, sum of C_l]."""

    name = "weighted_grams_"
    layouts = ("NCHW",)
    of_maps = False
    cold = False

    def sizes(self, network: str, batch: int) -> Iterator[dict]:
        widths = networks.group_widths(network)
        yield {"shape": (batch, sum(widths)), "widths": widths}

    def inputs(self, case: Case) -> tuple[Tensors, Tensors, Tensor]:
        n = case.shape[0]
        S = [torch.zeros(c, c, device=case.device) for c in case.widths]
        return S, [case.random(n, c) for c in case.widths], torch.rand(n, device=case.device)

    def candidates(self, case: Case) -> dict[str, Candidate]:
        return {"ours": ops.weighted_grams_, "eager": _addmm, "one by one": _one_by_one}

    def reference(self, S: Tensors, a: Tensors, sigma: Tensor) -> tuple[Tensors, Tensors]:
        start = [matrix.double() for matrix in S]
        total = [m + reference.weighted_gram(r, sigma) for m, r in zip(start, a, strict=True)]
        size = [
            m.abs() + reference.weighted_gram(r.abs(), sigma) for m, r in zip(start, a, strict=True)
        ]
        return total, size

    def work(self, case: Case) -> Work:
        n = case.shape[0]
        triangles = sum(c * (c + 1) // 2 for c in case.widths)
        written = sum(c * c for c in case.widths)
        read = case.elements * case.dtype.itemsize + 4 * n + 4 * triangles
        return Work(read + 4 * written, 2 * n * triangles)


def _addmm(S: Tensors, a: Tensors, sigma: Tensor) -> Tensors:
    weights = sigma[:, None]
    for matrix, rows in zip(S, a, strict=True):
        rows = rows.float()
        matrix.addmm_((rows * weights).T, rows)
    return S


def _one_by_one(S: Tensors, a: Tensors, sigma: Tensor) -> Tensors:
    return [ops.weighted_gram_(matrix, rows, sigma) for matrix, rows in zip(S, a, strict=True)]
