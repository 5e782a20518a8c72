"""Nonlinear least squares of convolutions with what lies between them."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from ccp_ext.least_squares import Regression
from ccp_ext.patches import output_sizes, patch_gram, patch_sum

# Of a Kronecker factor's mean eigenvalue; added to all of them before it is inverted.
_DAMPING = 1e-3
# Bytes that the samples of a step keep between their two convolutions; others compute it anew.
_KEPT = 1 << 28
# Parts of the Gauss-Newton step that are tried, in this order.
_STEPS = (1.0, 0.5, 0.25)

# Weight and constant of each layer in turn.
Parameters = tuple[Tensor, ...]
Samples = Sequence[tuple[Tensor, Tensor]]
Precondition = Callable[[Parameters], Parameters]


class Network(abc.ABC):
    """A function of an input with the weights and constants of its layers as parameters."""

    @abc.abstractmethod
    def __call__(self, parameters: Parameters, x: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def preconditioner(self, parameters: Parameters, samples: Samples) -> Precondition:
        """Of the normal equations' matrix, the sum of J'J over the samples."""

    def normal_equations(
        self, parameters: Parameters, x: Tensor, target: Tensor
    ) -> tuple[Parameters, Callable[[Parameters], Parameters]]:
        """J'(target - y), and what multiplies by J'J; J and y = f(x) at the parameters."""

        def network(p: Parameters) -> Tensor:
            return self(p, x)

        def curvature(direction: Parameters) -> Parameters:
            # One pass forward serves both derivatives.
            _, pull_back, change = vjp(
                lambda p: jvp(network, (p,), (direction,)), parameters, has_aux=True
            )
            return pull_back(change)[0]

        y, pull_back = vjp(network, parameters)
        return pull_back(target - y)[0], curvature

    def kept(self, x: Tensor, target: Tensor) -> int:
        """Bytes that the normal equations of a sample keep."""
        return 0

    def loss(self, parameters: Parameters, samples: Samples) -> float:
        """sum of |y - target|^2 over the samples and positions."""
        errors = (self(parameters, x) - target for x, target in samples)
        return sum(error.square().sum(dtype=torch.float64).item() for error in errors)


@dataclass(frozen=True)
class TwoConvolutions(Network):
    """y = second(relu(first(x))), with weights and constants as parameters.

    Attributes:
        first, second: convolutions that are not grouped; their geometry counts, not their values.
    """

    first: nn.Module
    second: nn.Module

    def hidden(self, parameters: Parameters, x: Tensor) -> Tensor:
        weight, constant, _, _ = parameters
        return self.first._conv_forward(x, weight, constant).relu()

    def __call__(self, parameters: Parameters, x: Tensor) -> Tensor:
        _, _, weight, constant = parameters
        return self.second._conv_forward(self.hidden(parameters, x), weight, constant)

    def normal_equations(
        self, parameters: Parameters, x: Tensor, target: Tensor
    ) -> tuple[Parameters, Callable[[Parameters], Parameters]]:
        """The same by six convolutions for each product; what is between them is kept."""
        weight, constant, out, shift = (p.detach().requires_grad_() for p in parameters)
        with torch.enable_grad():
            # The ReLU overwrites what it reads: no derivative of a convolution needs its output.
            before = self.first._conv_forward(x, weight, constant)
            h = before.detach().relu_().requires_grad_()
            y = self.second._conv_forward(h, out, shift)

        def pull_back(change: Tensor) -> Parameters:
            above, *second = torch.autograd.grad(y, (h, out, shift), change, retain_graph=True)
            above = above * (h > 0)
            first = torch.autograd.grad(before, (weight, constant), above, retain_graph=True)
            return (*first, *second)

        @torch.no_grad()
        def curvature(direction: Parameters) -> Parameters:
            first, second = direction[:2], direction[2:]
            change = self.first._conv_forward(x, *first) * (h > 0)
            change = self.second._conv_forward(change, out, None)
            return pull_back(change.add_(self.second._conv_forward(h, *second)))

        return pull_back(target - y.detach()), curvature

    def kept(self, x: Tensor, target: Tensor) -> int:
        places = len(x) * math.prod(output_sizes(self.first, x))
        return places * len(self.first.weight) * x.element_size() + target.nbytes

    def preconditioner(self, parameters: Parameters, samples: Samples) -> Precondition:
        return _preconditioner(self, parameters, samples)


def improve(layers: Network, start: Parameters, samples: Samples, iterations: int) -> Parameters:
    """One Gauss-Newton step toward min sum |y - target|^2, by conjugate gradients.

    The normal equations J'J d = -J'e are solved approximately, so that directions which the
    samples hardly determine stay as they are; the preconditioner is a Kronecker product for each
    layer (K-FAC: Martens and Grosse, ICML 2015; Grosse and Martens, ICML 2016, for convolutions),
    with the derivatives of linearised least squares in place of a loss. Where the whole step would
    not lower the sum a half or a quarter is taken, or none.

    Args:
        layers: the network.
        start: its parameters.
        samples: inputs ``[N, I, ...]`` and targets ``[N, O, ...]``.
        iterations: of the conjugate gradients; each costs two to six passes over the samples.
    """
    precondition = layers.preconditioner(start, samples)
    equations, room = [], _KEPT
    for x, target in samples:
        room -= layers.kept(x, target)
        form = layers.normal_equations if room >= 0 else partial(Network.normal_equations, layers)
        equations.append(form(start, x, target))
    downhill = _sum(right for right, _ in equations)

    def curvature(direction: Parameters) -> Parameters:
        return _sum(product(direction) for _, product in equations)

    step = conjugate_gradients(curvature, downhill, precondition, iterations)
    before = layers.loss(start, samples)
    for part in _STEPS:
        moved = _combine(start, part, step)
        if layers.loss(moved, samples) < before:
            return moved
    return start


def conjugate_gradients(
    matrix: Callable[[Parameters], Parameters],
    right: Parameters,
    precondition: Precondition,
    iterations: int,
) -> Parameters:
    """``matrix^-1 right`` after so many iterations from zero; fewer where nothing is left."""
    solution = tuple(map(torch.zeros_like, right))
    residual, direction = right, precondition(right)
    product = _dot(residual, direction)
    negligible = torch.finfo(right[0].dtype).eps * product
    for _ in range(iterations):
        image = matrix(direction)
        curvature = _dot(direction, image)
        if product <= negligible or curvature <= 0:
            break
        solution = _combine(solution, product / curvature, direction)
        residual = _combine(residual, -product / curvature, image)
        fitted = precondition(residual)
        product, previous = _dot(residual, fitted), product
        direction = _combine(fitted, product / previous, direction)
    return solution


def solve_second(
    layers: TwoConvolutions, parameters: Parameters, samples: Samples, ridge: float
) -> Parameters:
    """The second convolution by linear least squares (:class:`Regression`), the first as it is."""
    sums = Regression()
    for x, target in samples:
        sums.add(layers.second, layers.hidden(parameters, x), target)
    first, shift, weight, constant = parameters
    solved, constant, _ = sums.solve(weight.flatten(1).double(), ridge, constant=True)
    return first, shift, solved.view_as(weight).to(weight), constant.to(weight)


def _preconditioner(
    layers: TwoConvolutions, parameters: Parameters, samples: Samples
) -> Precondition:
    """Inverses of Kronecker products near the two diagonal blocks of J'J.

    The left factor of the first layer assumes that the second one's windows overlap as inside of
    a map and that the ReLUs do not depend on the inputs' products.
    """
    first, second = layers.first, layers.second
    sums = [0.0, 0.0]
    active, count = 0.0, 0
    for x, _ in samples:
        h = layers.hidden(parameters, x)
        sums[0] = sums[0] + gram_with_ones(first, x)
        sums[1] = sums[1] + gram_with_ones(second, h)
        on = (h > 0).transpose(0, 1).flatten(1).float()  # float16 cannot count them
        active, count = active + on @ on.T, count + on.shape[1]
    weight = parameters[2].flatten(2)  # [O, H, places]
    pulled = torch.einsum("oip,ojp->ij", weight, weight) * (active / count).to(weight)
    lefts = pulled, torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return kronecker_inverse(list(zip(lefts, sums, strict=True)))


def channels_last(maps: Tensor) -> Tensor:
    """Convolutions of such a sample take a tenth to a fifth less time on a CPU."""
    return maps.contiguous(memory_format=torch.channels_last) if maps.dim() == 4 else maps


def kronecker_inverse(factors: Sequence[tuple[Tensor, Tensor]]) -> Precondition:
    """What multiplies each layer's weight and constant, ``[O, F + 1]``, by damped inverses.

    Args:
        factors: of each layer, from the left ``[O, O]`` and from the right ``[F + 1, F + 1]``.
    """
    inverses = [tuple(map(_damped_inverse, pair)) for pair in factors]

    def precondition(p: Parameters) -> Parameters:
        fitted = []
        for (left, right), w, constant in zip(inverses, p[::2], p[1::2], strict=True):
            rows = torch.cat([w.flatten(1), constant.unsqueeze(1)], 1)
            rows = left.to(w) @ rows @ right.to(w)
            fitted += [rows[:, :-1].view_as(w), rows[:, -1]]
        return tuple(fitted)

    return precondition


def gram_with_ones(layer: nn.Module, x: Tensor) -> Tensor:
    """Second moments ``[F + 1, F + 1]``, summed, of the layer's patches and a one."""
    total = patch_sum(layer, x)
    count = total.new_tensor([len(x) * math.prod(output_sizes(layer, x))])
    gram = torch.cat([patch_gram(layer, x), total.unsqueeze(0)])
    return torch.cat([gram, torch.cat([total, count]).unsqueeze(1)], 1)


def _damped_inverse(matrix: Tensor) -> Tensor:
    level = _DAMPING * matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    eye = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    return torch.linalg.inv(matrix.double() + level * eye)


def _sum(values: Iterable[Parameters]) -> Parameters:
    return functools.reduce(lambda a, b: _combine(a, 1.0, b), values)


def _combine(a: Parameters, factor: float, b: Parameters) -> Parameters:
    return tuple(x + factor * y for x, y in zip(a, b, strict=True))


def _dot(a: Parameters, b: Parameters) -> float:
    return sum((x * y).sum(dtype=torch.float64).item() for x, y in zip(a, b, strict=True))
