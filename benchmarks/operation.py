"""What the sweep needs to know about an operator; each has one in a file of its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import networks
from benchmarks.networks import Window

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)

Candidate = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """One size, type and layout of an operator's main input.

    Attributes:
        network: where the size occurs.
        shape: [N, C, H, W], or [N, C].
        layout: a key of ``LAYOUTS``.
        window: of the convolution that reads the input, where the operator asks.
        widths: of all layers, where the operator serves them together.
    """

    network: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    device: str
    window: Window | None = None
    widths: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """The size in words, such as ``128x16x32x32 k3 s1``."""
        text = "x".join(map(str, self.shape))
        if self.window:
            text += f" k{self.window.kernel_size} s{self.window.stride}"
        return text + (f" {len(self.widths)} layers" if self.widths else "")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def description(self, operator: str) -> dict[str, str]:
        """What tells the results of this case of an operator from others."""
        return {
            "operator": operator,
            "network": self.network,
            "size": self.label,
            "layout": self.layout,
            "dtype": self.dtype_name,
        }

    @property
    def rate(self) -> str:
        """Which of ``Limits.rates`` bounds matrix products of this type."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    def random(self, *shape: int) -> Tensor:
        """Normal numbers, by default of the case's shape, in its type and layout."""
        x = torch.randn(shape or self.shape, device=self.device).to(self.dtype)
        return x.contiguous(memory_format=LAYOUTS[self.layout]) if x.dim() == 4 else x

    def activations(self) -> Tensor:
        """Random numbers after a ReLU, half of them zero, in the case's shape and layout."""
        return self.random().relu_()


@dataclass(frozen=True)
class Work:
    """The least an operator must do: each input read once, each output written once.

    Attributes:
        bytes: moved.
        products: operations of matrix products; a multiply-add counts two, a symmetric result its
            triangle once, a product of the same two elements once.
        scalar: operations outside the matrix units, counted alike.
        streams: arrays read side by side: which bandwidth the bytes are held against.
        rate: what bounds the products, a key of ``Limits.rates``.
        by_patches: the products as the rivals perform them, on patches that repeat elements; 0
            for operators without patches.
    """

    bytes: int
    products: int = 0
    scalar: int = 0
    streams: int = 1
    rate: str = "fp32"
    by_patches: int = 0

    @property
    def operations(self) -> int:
        """Those that a rate in FLOP/s is quoted of."""
        return self.products or self.scalar


class Operation(ABC):
    """An operator, its rivals, its oracle and the work it must do."""

    name: str
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    of_maps = True  # of feature maps [N, C, H, W]; else of one row a sample, [N, C]
    # Whether the inputs come from memory in use; else from the cache, just written.
    cold = True

    def sizes(self, network: str, batch: int) -> Iterator[dict]:
        """What of a Case is this operator's: by default one size for each feature map."""
        for shape in networks.feature_maps(network):
            yield {"shape": (batch, *shape)}

    @abstractmethod
    def inputs(self, case: Case) -> tuple:
        """Fresh random arguments, the same for every candidate."""

    @abstractmethod
    def candidates(self, case: Case) -> dict[str, Candidate]:
        """ "ours", "eager" and the other rivals by name; an in-place one returns its result."""

    @abstractmethod
    def reference(self, *inputs) -> tuple:
        """The result in float64, and the sum of |terms| that scales the error bound.

        Each a tensor or a sequence of tensors, like the candidates' results.
        """

    @abstractmethod
    def work(self, case: Case) -> Work: ...

    def tolerance(self, case: Case, candidate: str) -> float:
        """The largest error over the sum of |terms| that passes.

        Ours accumulates in float32 or better. A rival may round a product or a result to the
        input's type.
        """
        ours = candidate == "ours" or case.dtype == torch.float32
        return 64 * torch.finfo(torch.float32).eps if ours else 2 * torch.finfo(case.dtype).eps
