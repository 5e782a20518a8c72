"""map_similarity (SSIM) beside batched matrix products that store the similarities [N, C, C]."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import triton_kernels
from benchmarks.operation import Candidate, Case, Operation, Work
from ccp_ext import ops, reference

C1, C2 = 0.01**2, 0.03**2
SAMPLES_A_CHUNK = 8  # the reference holds [samples, C, C] in float64
# The least a pair of maps costs after their product: eight multiply-adds, additions or products,
# and a reciprocal, which takes its own unit as long as these.
OPERATIONS_A_PAIR = 2 * 8


class MapSimilarity(Operation):
    name = "map_similarity"

    def inputs(self, case: Case) -> tuple[Tensor]:
        return (case.activations(),)

    def candidates(self, case: Case) -> dict[str, Candidate]:
        return {
            "ours": ops.map_similarity,
            "eager": _products,
            "einsum": _einsum,
            "triton": triton_kernels.map_similarity,
        }

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chunks = x.split(SAMPLES_A_CHUNK)
        total = sum(len(chunk) * reference.map_similarity(chunk) for chunk in chunks)
        return total / len(x), torch.ones_like(total)  # a similarity is at most 1

    def work(self, case: Case) -> Work:
        n, c, h, w = case.shape
        read = case.elements * case.dtype.itemsize
        pairs = n * c * (c + 1) // 2
        products, scalar = 2 * pairs * h * w, OPERATIONS_A_PAIR * pairs
        return Work(read + 4 * c * c, products, scalar, rate=case.rate)


def _products(x: Tensor) -> Tensor:
    maps = x.flatten(2)
    return _ssim(maps, maps @ maps.mT)


def _einsum(x: Tensor) -> Tensor:
    maps = x.flatten(2)
    return _ssim(maps, torch.einsum("nip,njp->nij", maps, maps))


def _ssim(maps: Tensor, products: Tensor) -> Tensor:
    """The mean SSIM from maps [N, C, P] and their products [N, C, C]."""
    mean = maps.mean(2, dtype=torch.float32)
    square = mean.square()
    variance = maps.float().square().mean(2) - square
    pair = mean[:, :, None] * mean[:, None, :]
    covariance = products.float() / maps.shape[2] - pair
    luminance = (2 * pair + C1) / (square[:, :, None] + square[:, None, :] + C1)
    structure = (2 * covariance + C2) / (variance[:, :, None] + variance[:, None, :] + C2)
    return (luminance * structure).mean(0)
