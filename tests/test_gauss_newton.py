"""Gauss-Newton steps of two convolutions with a ReLU between them."""

from __future__ import annotations

import pytest
import torch
from gauss_newton_reference import changes_of_outputs
from torch import nn

from ccp_ext.compensation import gauss_newton
from ccp_ext.compensation.gauss_newton import (
    Network,
    TwoConvolutions,
    conjugate_gradients,
    improve,
    solve_second,
)


def network(stride: int = 1) -> TwoConvolutions:
    torch.manual_seed(0)
    first = nn.Conv2d(2, 3, 3, stride=stride, padding=1)
    return TwoConvolutions(first, nn.Conv2d(3, 2, 3, padding=1))


def parameters(layers: TwoConvolutions, dtype=torch.float64):
    tensors = (t for layer in (layers.first, layers.second) for t in (layer.weight, layer.bias))
    return tuple(t.detach().to(dtype) for t in tensors)


def samples(layers: TwoConvolutions, count: int = 2, noise: float = 0.02, dtype=torch.float64):
    """What the network with other weights gives, so that there is a step worth taking."""
    generator = torch.Generator().manual_seed(1)
    teacher = tuple(
        p + noise * torch.randn(p.shape, generator=generator, dtype=dtype)
        for p in parameters(layers, dtype)
    )
    inputs = [torch.randn(6, 2, 7, 7, generator=generator, dtype=dtype) for _ in range(count)]
    return [(x, layers(teacher, x)) for x in inputs]


def flat(values) -> torch.Tensor:
    return torch.cat([value.flatten() for value in values])


@pytest.mark.parametrize("stride", [1, 2])
def test_enough_iterations_give_the_gauss_newton_step(stride):
    layers = network(stride)
    start, data = parameters(layers), samples(layers)
    moved = improve(layers, start, data, 400)
    taken, expected = changes_of_outputs(layers, start, moved, data)
    torch.testing.assert_close(taken, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"stride": 2, "padding": 1},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d])
def test_the_normal_equations_are_those_of_automatic_differentiation(convolution, geometry):
    torch.manual_seed(0)
    layers = TwoConvolutions(convolution(2, 3, 3, **geometry), convolution(3, 2, 3, **geometry))
    start = parameters(layers)
    x = torch.randn(4, 2, *[9] * (start[0].dim() - 2), dtype=torch.float64)
    target = torch.randn_like(layers(start, x))
    direction = tuple(map(torch.randn_like, start))
    (right, product), (expected, automatic) = (
        kind.normal_equations(layers, start, x, target) for kind in (TwoConvolutions, Network)
    )
    torch.testing.assert_close(right, expected)
    torch.testing.assert_close(product(direction), automatic(direction))
    torch.testing.assert_close(product(direction), automatic(direction))  # not used up


def test_samples_beyond_the_memory_compute_again_what_others_keep(monkeypatch):
    layers = network()
    start, data = parameters(layers), samples(layers, count=3)
    expected = improve(layers, start, data, 3)
    again, generic = [], Network.normal_equations
    monkeypatch.setattr(Network, "normal_equations", lambda *a: again.append(a[2]) or generic(*a))
    monkeypatch.setattr(gauss_newton, "_KEPT", 2 * layers.kept(*data[0]))
    moved = improve(layers, start, data, 3)
    assert len(again) == 1 and again[0] is data[2][0]
    torch.testing.assert_close(flat(moved), flat(expected))


def test_few_iterations_lower_the_loss_and_more_lower_it_further():
    layers = network()
    start, data = parameters(layers), samples(layers)
    losses = [layers.loss(improve(layers, start, data, n), data) for n in (1, 2, 4)]
    assert losses[2] < losses[1] < losses[0] < layers.loss(start, data)
    assert losses[2] < 0.1 * layers.loss(start, data)


def test_the_preconditioner_saves_iterations(monkeypatch):
    layers = network()
    start, data = parameters(layers), samples(layers)
    # Inputs of very different size, as behind a BatchNorm with such factors.
    size = torch.tensor([30.0, 0.1], dtype=torch.float64).view(-1, 1, 1)
    data = [(x * size, y) for x, y in data]
    start = (start[0] / size, *start[1:])
    with_it = layers.loss(improve(layers, start, data, 4), data)
    monkeypatch.setattr(gauss_newton, "_preconditioner", lambda *_: lambda p: p)
    assert with_it < 0.5 * layers.loss(improve(layers, start, data, 4), data)


def test_a_perfect_start_stays_as_it_is():
    layers = network()
    start = parameters(layers)
    data = [(x, layers(start, x)) for x, _ in samples(layers)]
    assert improve(layers, start, data, 4) is start


def test_a_step_that_overshoots_is_shortened_or_not_taken(monkeypatch):
    layers = network()
    start, data = parameters(layers), samples(layers)
    good = improve(layers, start, data, 4)
    step = conjugate_gradients

    def with_length(length):
        def taken(*arguments):
            return tuple(length * s for s in step(*arguments))

        monkeypatch.setattr(gauss_newton, "conjugate_gradients", taken)
        return improve(layers, start, data, 4)

    wanted = tuple(a + 1.5 * (b - a) for a, b in zip(start, good, strict=True))
    torch.testing.assert_close(with_length(3.0), wanted)  # half of it
    assert with_length(-1.0) is start


def test_conjugate_gradients_solve_a_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    matrix = root.T @ root
    right = (torch.randn(4, generator=generator).double(), torch.ones(2).double())

    def split(vector):
        return vector[:4], vector[4:]

    solution = conjugate_gradients(
        lambda p: split(matrix @ flat(p)), right, lambda p: tuple(2 * x for x in p), 6
    )
    torch.testing.assert_close(matrix @ flat(solution), flat(right))


def test_the_second_layer_is_solved_for_the_first_as_it_is():
    layers = network()
    start, data = parameters(layers), samples(layers)
    solved = solve_second(layers, start, data, ridge=0.0)
    assert solved[0] is start[0] and solved[1] is start[1]
    for k in (2, 3):
        for sign in (-1, 1):
            nearby = list(solved)
            nearby[k] = solved[k] + sign * 1e-3 * torch.randn_like(solved[k])
            assert layers.loss(tuple(nearby), data) > layers.loss(solved, data)
