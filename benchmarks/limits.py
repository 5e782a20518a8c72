"""What the machine can do, measured in the same run: memory bandwidth and matrix rates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import triton_kernels
from benchmarks.common import interleaved
from benchmarks.operation import Work

ROUNDS = 15


@dataclass(frozen=True)
class Limits:
    """Bytes and operations a second; a multiply-add is two operations.

    Attributes:
        copy: bytes read plus bytes written by a copy.
        read: bytes read by torch's sum of one array.
        read_two: bytes read from two arrays at once, the fastest of torch's ways to do it.
        rates: of square matrix products: "fp32" without TF32, "tf32" (GPU only), "bf16"; and
            "fma", of float32 multiply-adds outside the matrix units.
    """

    copy: float
    read: float
    read_two: float
    rates: dict[str, float]

    def floor(self, work: Work) -> tuple[float, str]:
        """The least seconds for the work, and what sets them: memory, products or scalar work."""
        memory = work.bytes / (self.read if work.streams == 1 else self.read_two)
        products = work.products / self.rate(work.rate)
        scalar = work.scalar / self.rate("fma")
        return max((memory, "memory"), (products, "matrix products"), (scalar, "scalar arithmetic"))

    def rate(self, name: str) -> float:
        """The fastest way to a precision: three TF32 products of split numbers make one of fp32."""
        split = self.rates.get("tf32", 0) / 3 if name == "fp32" else 0
        return max(self.rates[name], split)

    def lines(self) -> str:
        """The limits in words, for the terminal."""
        rates = ", ".join(f"{name} {1e-12 * rate:.2f}" for name, rate in self.rates.items())
        return (
            f"measured here: copy {1e-9 * self.copy:.1f} GB/s, read {1e-9 * self.read:.1f} GB/s, "
            f"two streams {1e-9 * self.read_two:.1f} GB/s; TFLOP/s: {rates}"
        )


def measure(device: str, quick: bool = False) -> Limits:
    """Measure the limits of a device; ``quick`` takes small arrays, for a trial run."""
    cuda = torch.device(device).type == "cuda"
    elements, n = (1 << 28, 8192) if cuda else (1 << 26, 2048)
    if quick:
        elements, n = 1 << 16, 64
    return Limits(*_bandwidths(elements, device), _rates(n, device))


def _bandwidths(elements: int, device: str) -> tuple[float, float, float]:
    """Copy, read and two-stream read in bytes a second."""
    x, g = torch.randn(2, elements, device=device)
    target = torch.empty_like(x)
    size = x.nbytes
    copy = _rate(lambda: target.copy_(x), 2 * size, device)
    read = _rate(x.sum, size, device)
    ways = (lambda: torch.dot(x, g), lambda: (x.sum(), g.sum()))
    return copy, read, max(_rate(way, 2 * size, device) for way in ways)


def _rates(n: int, device: str) -> dict[str, float]:
    a, b = torch.randn(2, n, n, device=device)
    operations = 2 * n**3
    with float32_precision("highest"):
        rates = {"fp32": _rate(lambda: a @ b, operations, device)}
    # A product of float32 matrices is made of such multiply-adds, and comes close to their rate.
    rates["fma"] = rates["fp32"]
    if torch.device(device).type == "cuda":
        with float32_precision("high"):
            rates["tf32"] = _rate(lambda: a @ b, operations, device)
        if triton_kernels.triton is not None:
            x = torch.rand(n * 256, device=device)
            count = triton_kernels.MULTIPLY_ADDS * x.numel()
            alone = _rate(lambda: triton_kernels.multiply_adds(x), 2 * count, device)
            rates["fma"] = max(rates["fma"], alone)
    a, b = a.bfloat16(), b.bfloat16()
    return rates | {"bf16": _rate(lambda: a @ b, operations, device)}


def _rate(function: Callable[[], Tensor], amount: int, device: str) -> float:
    """The best of several rounds: a limit is what the machine can do when it is not disturbed."""
    return amount / min(interleaved({"it": function}, ROUNDS, device=device)["it"])


@contextlib.contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """Float32 matrix products and convolutions with TF32 ("high") or without ("highest")."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(name)
    torch.backends.cudnn.allow_tf32 = name != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
