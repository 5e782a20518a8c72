"""The convolutions of a pruned branch as one function, and steps that move both of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ccp_ext.compensation.gauss_newton import (
    Parameters,
    TwoConvolutions,
    channels_last,
    improve,
    solve_second,
)
from ccp_ext.graph import Feeder


@dataclass(frozen=True)
class Branch:
    """A convolution of the slim model and the one that feeds it.

    The parameters of the two are with the BatchNorm between them and the factor of the one behind
    them in the weights, so that errors have the unit in which the branch's output is added.

    Attributes:
        path: of the first.
        norm: behind the first; None if there is none.
        factor: of the BatchNorm behind the second ``[O]``.
    """

    path: str
    layers: TwoConvolutions
    norm: _BatchNorm | None
    factor: Tensor

    @classmethod
    def of(
        cls, model: nn.Module, feeder: Feeder, second: nn.Module, factor: Tensor
    ) -> Branch | None:
        """None if the first convolution is grouped, has no place for a constant, or if the
        BatchNorm behind it has no statistics of its own.
        """
        first = model.get_submodule(feeder.path)
        norm = None if feeder.norm is None else model.get_submodule(feeder.norm)
        if first.groups != 1 or (first if norm is None else norm).bias is None:
            return None
        if norm is not None and norm.running_mean is None:
            return None
        return cls(feeder.path, TwoConvolutions(first, second), norm, factor)

    @property
    def features(self) -> int:
        """Values that a position of the first convolution's output reads."""
        return self.layers.first.weight[0].numel()

    def improve(
        self, samples: Iterable[tuple[Tensor, Tensor]], ridge: float, iterations: int
    ) -> None:
        """Take a Gauss-Newton step from where the second convolution is solved by least squares.

        Args:
            samples: inputs of the first convolution, and what the second should give but for a
                constant; :func:`ccp_ext.compensation.gauss_newton.improve` has the shapes.
            ridge: of the least squares.
            iterations: of the conjugate gradients.
        """
        wanted = [
            (channels_last(x), channels_last(y * self.factor.view(-1, *[1] * (y.dim() - 2))))
            for x, y in samples
        ]
        start = solve_second(self.layers, self._get(), wanted, ridge)
        self._put(improve(self.layers, start, wanted, iterations))

    def _get(self) -> Parameters:
        second = self.layers.second
        return (
            *self._first.get(),
            second.weight.detach() * _along_rows(self.factor, second.weight),
            torch.zeros_like(self.factor),
        )

    def _put(self, parameters: Parameters) -> None:
        """The last constant is not needed: the second layer is solved anew."""
        weight, shift, out, _ = parameters
        self._first.put(weight, shift)
        _put_weight(self.layers.second, out, self.factor)

    @property
    def _first(self) -> Folded:
        return Folded(self.layers.first, self.norm)


@dataclass(frozen=True)
class Folded:
    """A layer and the BatchNorm that reads it, if there is one, as one affine map.

    One of them has a bias, the BatchNorm if there is one.
    """

    layer: nn.Module
    norm: _BatchNorm | None

    def get(self) -> tuple[Tensor, Tensor]:
        """The map's weight ``[H, ...]`` and constant ``[H]``."""
        weight = self.layer.weight.detach()
        scale, constant = self._scale_and_constant()
        return weight * _along_rows(scale, weight), constant

    def put(self, weight: Tensor, constant: Tensor) -> None:
        """Make it the map; rows that the BatchNorm multiplies by zero stay as they are."""
        scale, old = self._scale_and_constant()
        _put_weight(self.layer, weight, scale)
        bias = self.layer.bias if self.norm is None else self.norm.bias
        bias.data.add_(constant - old)

    def _scale_and_constant(self) -> tuple[Tensor, Tensor]:
        layer, norm = self.layer, self.norm
        bias = 0.0 if layer.bias is None else layer.bias.detach()
        if norm is None:
            return torch.ones_like(bias), bias.clone()
        scale = norm_factor(norm)
        return scale, norm.bias.detach() + scale * (bias - norm.running_mean)


def norm_factor(norm: _BatchNorm) -> Tensor:
    """What the BatchNorm multiplies each channel by ``[C]``."""
    factor = (norm.running_var + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.detach()


def _along_rows(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


def _put_weight(layer: nn.Module, weight: Tensor, by: Tensor) -> None:
    """Give the layer the weight without the rows' factors; rows of factor zero stay."""
    by = _along_rows(by, weight)
    layer.weight.data.copy_(torch.where(by == 0, layer.weight, weight / by))
