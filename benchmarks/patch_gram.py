"""patch_gram_ beside the same through the im2col tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import networks, triton_kernels
from benchmarks.networks import Window
from benchmarks.operation import Candidate, Case, Operation, Work
from ccp_ext import ops, reference

SAMPLES_A_CHUNK = 8  # the reference holds their patches in float64


class PatchGram(Operation):
    """A [C k k, C k k] += sum over samples and output positions of patch patch'."""

    name = "patch_gram_"

    def sizes(self, network: str, batch: int) -> Iterator[dict]:
        for shape, window in networks.convolution_inputs(network):
            yield {"shape": (batch, *shape), "window": window}

    def inputs(self, case: Case) -> tuple[Tensor, Tensor, Window]:
        rows = case.shape[1] * case.window.kernel_size**2
        A = torch.zeros(rows, rows, device=case.device)
        return A, case.activations(), case.window

    def candidates(self, case: Case) -> dict[str, Candidate]:
        return {
            "ours": lambda A, x, window: ops.patch_gram_(A, x, *window),
            "eager": _im2col,
            "einsum": _einsum,
            "triton": lambda A, x, window: triton_kernels.patch_gram_(A, x, *window),
        }

    def reference(self, A: Tensor, x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        chunks = x.split(SAMPLES_A_CHUNK)
        parts = [reference.patch_gram(chunk, **window._asdict())[0] for chunk in chunks]
        total = A.double() + sum(parts)
        return total, total.abs()  # activations are not negative, so |terms| are the terms

    def work(self, case: Case) -> Work:
        n, c, h, w = case.shape
        window = case.window
        rows = c * window.kernel_size**2
        triangle = rows * (rows + 1) // 2
        by_patches = 2 * n * window.outputs(h) * window.outputs(w) * triangle
        # A stride beyond the window skips rows; what it skips within a row is read all the same.
        share = min(1, window.outputs(h) * window.kernel_size / h)
        read = int(share * case.elements) * case.dtype.itemsize + 4 * triangle
        products = 2 * n * distinct_products(c, (h, w), window)
        return Work(read + 4 * rows * rows, products, rate=case.rate, by_patches=by_patches)


def distinct_products(channels: int, size: tuple[int, int], window: Window) -> int:
    """The pairs of a sample's elements, each with itself too, that some patch holds both of.

    Patches overlap, and A sums the same products again and again: computed by pieces
    (``csrc/patch_pieces.h``) each is performed once. The products of patches are never fewer.
    """
    rows, columns = (_pairs(length, window) for length in size)
    # Every ordered pair of positions is one of C x C elements; of unordered ones half are left, and
    # the elements paired with themselves.
    elements = channels * sum(a == b for a, b in rows) * sum(a == b for a, b in columns)
    return (channels**2 * len(rows) * len(columns) + elements) // 2


def _pairs(length: int, window: Window) -> set[tuple[int, int]]:
    """The ordered pairs of positions along an axis that some patch holds both of."""
    corners = (window.stride * k - window.padding for k in range(window.outputs(length)))
    patches = (range(max(at, 0), min(at + window.kernel_size, length)) for at in corners)
    return {pair for patch in patches for pair in itertools.product(patch, repeat=2)}


def _patches(x: Tensor, window: Window) -> Tensor:
    """[N, C k k, positions]; a window of one element needs no im2col."""
    if window.kernel_size == 1:
        return x[:, :, :: window.stride, :: window.stride].flatten(2)
    return F.unfold(x, window.kernel_size, padding=window.padding, stride=window.stride)


def _im2col(A: Tensor, x: Tensor, window: Window) -> Tensor:
    patches = _patches(x, window).transpose(0, 1).flatten(1)
    A += patches @ patches.T
    return A


def _einsum(A: Tensor, x: Tensor, window: Window) -> Tensor:
    patches = _patches(x, window)
    A += torch.einsum("nip,njp->ij", patches, patches)
    return A
