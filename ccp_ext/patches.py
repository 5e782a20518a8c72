"""What a layer reads at each of its output positions, and sums of products of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccp_ext import ops
from ccp_ext.cutting import CONVOLUTIONS

# Output positions of an image that count by default; neighbours tell almost the same.
POSITIONS = 128


@dataclass(frozen=True)
class Grid:
    """Some of a layer's output positions: every step-th along each dimension.

    Attributes:
        step: at least 1, for each dimension of the maps.
        offset: of the first position, below the step.
    """

    step: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def draw(cls, sizes: Sequence[int], count: int | None, generator: torch.Generator) -> Grid:
        """A grid on maps of these sizes, of at most ``count`` positions; None for all of them.

        The steps are the least that do it; the offset is drawn, so that every position is equally
        likely to be among them.
        """
        step = [1] * len(sizes)
        while count is not None and math.prod(left := _ceil_div(sizes, step)) > count:
            step[left.index(max(left))] += 1
        offset = (int(torch.randint(s, (), generator=generator)) for s in step)
        return cls(tuple(step), tuple(offset))

    def of(self, maps: Tensor) -> Tensor:
        """The maps ``[..., *sizes]`` at these positions; a view."""
        places = zip(self.offset, self.step, strict=True)
        return maps[(..., *(slice(first, None, step) for first, step in places))]


def as_maps(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Input or output of a convolution or linear layer as ``[N, channels, *positions]``.

    That of a linear layer, ``[N, ..., channels]``, has positions in one dimension.
    """
    if isinstance(layer, CONVOLUTIONS):
        return tensor
    return tensor.reshape(len(tensor), -1, tensor.shape[-1]).mT


def output_sizes(layer: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The positions of the output for the input x, along each dimension of the maps."""
    return _windows(layer, x, None).counts()


def patches(layer: nn.Module, x: Tensor, at: Grid | None = None) -> Tensor:
    """What each output position of a layer reads of its input.

    Args:
        layer: convolution (not grouped) or linear layer, with weight ``[O, I, *kernel]``.
        x: its input, ``[N, I, *positions]``, or ``[N, ..., I]`` of a linear layer; or some of the
            input's channels.
        at: output positions; all by default.

    Returns:
        ``[N, P, F]`` with F = I * (size of the kernel), in the order of ``weight.flatten(1)``: the
        output at a position is the product of a row with the weight, plus the bias.
    """
    windows = _windows(layer, x, at)
    dims = len(windows.kernel_size)
    x = windows.x
    for dim in range(dims):
        x = windows.unfolded(x, dim)
    return x.movedim(1, 1 + dims).flatten(1, dims).flatten(2)


def patch_sum(layer: nn.Module, x: Tensor, at: Grid | None = None) -> Tensor:
    """The sum over samples and output positions of the :func:`patches`: float64 ``[F]``."""
    return patches(layer, at_least_float32(x).sum(0, keepdim=True).double(), at).sum((0, 1))


def patch_gram(layer: nn.Module, x: Tensor, at: Grid | None = None) -> Tensor:
    """The sum over samples and output positions of p p', with p the :func:`patches`.

    Returns:
        float64 ``[F, F]``. Products are summed in float32, or float64 for float64 inputs.
    """
    images, window = _images(_windows(layer, at_least_float32(x), at))
    features = images.shape[1] * math.prod(window["kernel_size"])
    return ops.patch_gram_(images.new_zeros(features, features), images, **window).double()


def patch_cross(layer: nn.Module, x: Tensor, y: Tensor, at: Grid | None = None) -> Tensor:
    """The sum over samples and output positions of p y', with p the :func:`patches`.

    Args:
        y: ``[N, K, *positions]``, maps over the output positions, only those of ``at`` if given.

    Returns:
        float64 ``[F, K]``. Products are summed in float32, or float64 for float64 inputs.
    """
    windows = _windows(layer, at_least_float32(x), at)
    images, window = _images(windows)
    y = y.to(images.dtype)
    if y.dim() == 3:
        y = y.unsqueeze(2)
    elif y.dim() == 5:
        y = y.movedim(2, 1).flatten(0, 1)
    features = images.shape[1] * math.prod(window["kernel_size"])
    return ops.patch_cross_(images.new_zeros(features, y.shape[1]), images, y, **window).double()


class _Windows(NamedTuple):
    """A layer's windows on its input; none reaches beyond it.

    Attributes:
        x: the input, padded, ``[N, I, *sizes]``.
    """

    x: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def extent(self, dim: int) -> int:
        return self.dilation[dim] * (self.kernel_size[dim] - 1) + 1

    def counts(self) -> tuple[int, ...]:
        sizes = self.x.shape[2:]
        return tuple((n - self.extent(k)) // self.stride[k] + 1 for k, n in enumerate(sizes))

    def unfolded(self, x: Tensor, dim: int) -> Tensor:
        """x with that dimension of windows only, and a last dimension of the places in each."""
        return x.unfold(2 + dim, self.extent(dim), self.stride[dim])[..., :: self.dilation[dim]]


def _windows(layer: nn.Module, x: Tensor, at: Grid | None) -> _Windows:
    x = as_maps(layer, x)
    if not isinstance(layer, CONVOLUTIONS):
        windows = _Windows(x, (1,), (1,), (1,))
    else:
        padding = layer._reversed_padding_repeated_twice
        if any(padding):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, padding, mode=mode)
        windows = _Windows(x, layer.kernel_size, layer.stride, layer.dilation)
    if at is None:
        return windows
    stride = windows.stride
    first = (slice(o * s, None) for o, s in zip(at.offset, stride, strict=True))
    return windows._replace(
        x=x[(..., *first)], stride=tuple(s * t for s, t in zip(stride, at.step, strict=True))
    )


def _images(windows: _Windows) -> tuple[Tensor, dict[str, Sequence[int]]]:
    """Windows on maps of one or three dimensions as windows on images ``[N, C, H, W]``."""
    x, *window = windows
    if x.dim() == 3:
        x, window = x.unsqueeze(2), [(1, *values) for values in window]
    elif x.dim() == 5:
        # A slice of the volume is an image, a place along the kernel's depth a channel.
        x = windows.unfolded(x, 0).permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)
        window = [values[1:] for values in window]
    return x, dict(zip(("kernel_size", "stride", "dilation"), window, strict=True))


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _ceil_div(sizes: Sequence[int], by: Sequence[int]) -> list[int]:
    return [-(-n // k) for n, k in zip(sizes, by, strict=True)]
