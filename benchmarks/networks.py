"""The two networks whose sizes the benchmarks take, and the shapes that occur in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.resnet50 import ResNet50
from ccp_ext import models, trace


class Window(NamedTuple):
    """How a convolution looks at its input."""

    kernel_size: int
    stride: int
    padding: int

    def outputs(self, size: int) -> int:
        """Output positions along one side of an input of this size."""
        return (size + 2 * self.padding - self.kernel_size) // self.stride + 1


@dataclass(frozen=True)
class Network:
    """A model with the size of its images, and the batch on a GPU and on a CPU."""

    create: Callable[[], nn.Module]
    image_size: int
    classes: int
    batch: int
    cpu_batch: int

    def batch_on(self, device: str) -> int:
        return self.cpu_batch if torch.device(device).type == "cpu" else self.batch


NETWORKS = {
    "resnet50": Network(ResNet50, 224, 1000, batch=256, cpu_batch=4),
    "resnet56": Network(lambda: models.create("resnet56"), 32, 10, batch=128, cpu_batch=128),
}


def feature_maps(name: str) -> list[tuple[int, int, int]]:
    """The distinct shapes [C, H, W] of the convolutions' outputs, in the order of the pass."""
    return list(dict.fromkeys(output for _, _, output in _convolutions(name)))


def convolution_inputs(name: str) -> list[tuple[tuple[int, int, int], Window]]:
    """The distinct pairs of a convolution's input shape [C, H, W] and its window."""
    return list(dict.fromkeys((shape, window) for shape, window, _ in _convolutions(name)))


def convolution_widths(name: str) -> tuple[int, ...]:
    """The output channels of every convolution, in the order of the pass."""
    return tuple(output[0] for _, _, output in _convolutions(name))


@cache
def group_widths(name: str) -> tuple[int, ...]:
    """The channels of every inner group, in the order of the pass."""
    network = NETWORKS[name]
    image = torch.randn(1, 3, network.image_size, network.image_size)
    return tuple(g.channels for g in trace(network.create().eval(), image).inner.groups)


@cache
def _convolutions(name: str) -> list[tuple[tuple[int, ...], Window, tuple[int, ...]]]:
    """Input shape, window and output shape of every convolution, from one pass without data."""
    found = []

    def record(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        window = Window(module.kernel_size[0], module.stride[0], module.padding[0])
        found.append((tuple(inputs[0].shape[1:]), window, tuple(output.shape[1:])))

    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.create().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(record)
        model(torch.empty(1, 3, network.image_size, network.image_size))
    return found
