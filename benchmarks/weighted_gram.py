"""weighted_gram_ beside matrix products in float32 (cuBLAS on a GPU), without TF32."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from benchmarks import networks, triton_kernels
from benchmarks.operation import Candidate, Case, Operation, Work
from ccp_ext import ops, reference


class WeightedGram(Operation):
    """One group's update: S [C, C] and a [N, C], just written and so in the cache."""

    name = "weighted_gram_"
    layouts = ("NCHW",)
    of_maps = False
    cold = False

    def sizes(self, network: str, batch: int) -> Iterator[dict]:
        for width in dict.fromkeys(c for c, _, _ in networks.feature_maps(network)):
            yield {"shape": (batch, width)}

    def inputs(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        n, c = case.shape
        S = torch.zeros(c, c, device=case.device)
        return S, case.random(), torch.rand(n, device=case.device)

    def candidates(self, case: Case) -> dict[str, Candidate]:
        return {
            "ours": ops.weighted_gram_,
            "eager": _addition,
            "addmm": _addmm,
            "einsum": _einsum,
            "triton": triton_kernels.weighted_gram_,
            **({"syrk": _syrk} if case.device != "cpu" and _cublas() else {}),
        }

    def reference(self, S: Tensor, a: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return updated(S, a, sigma)

    def work(self, case: Case) -> Work:
        n, c = case.shape
        triangle = c * (c + 1) // 2
        size = case.elements * case.dtype.itemsize + 4 * n
        return Work(size + 4 * (triangle + c * c), 2 * n * triangle, rate=case.rate)


def updated(S: Tensor, a: Tensor, sigma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S after the update and the sum of |terms|, float64; the weights are not negative."""
    total, magnitude = reference.weighted_gram(a, sigma), reference.weighted_gram(a.abs(), sigma)
    return S.double() + total, S.double().abs() + magnitude


def _addition(S: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    a = a.float()
    S += (a * sigma[:, None]).T @ a
    return S


def _addmm(S: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    a = a.float()
    return S.addmm_((a * sigma[:, None]).T, a)


def _einsum(S: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    a = a.float()
    S += torch.einsum("n,nc,nd->cd", sigma, a, a)
    return S


@cache
def _cublas() -> ctypes.CDLL | None:
    """The library that this torch itself has loaded; None where it has none of this name."""
    try:
        return ctypes.CDLL(f"libcublas.so.{(torch.version.cuda or '').partition('.')[0]}")
    except OSError:
        return None


def _syrk(S: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """cuBLAS's own symmetric update of half the matrix, mirrored; the weights are not negative."""
    n, c = a.shape
    a = a.float() * sigma.sqrt()[:, None]
    one, number, pointer = ctypes.c_float(1), ctypes.c_int, ctypes.c_void_p
    status = _cublas().cublasSsyrk_v2(
        pointer(torch.cuda.current_blas_handle()),
        number(0),  # the lower half by columns, which is the upper half by rows
        number(0),  # not transposed: a [N, C] by rows is a' by columns
        number(c),
        number(n),
        ctypes.byref(one),
        pointer(a.data_ptr()),
        number(c),
        ctypes.byref(one),
        pointer(S.data_ptr()),
        number(c),
    )
    if status != 0:
        raise RuntimeError(f"cublasSsyrk: status {status}")
    return S.copy_(S.triu() + S.triu(1).T)
