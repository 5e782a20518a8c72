"""Patches of layers, grids of output positions, and sums of products, against the layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ccp_ext.patches import (
    Grid,
    as_maps,
    output_sizes,
    patch_cross,
    patch_gram,
    patch_sum,
    patches,
)

# Layers with the shape of an input.
LAYERS = [
    (nn.Conv2d(4, 6, (3, 5)), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 5), stride=2, padding=1), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 5), stride=(1, 2), dilation=2, padding=(0, 3)), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 2)), (3, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 5), padding=1, padding_mode="reflect"), (3, 4, 9, 8)),
    (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    (nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 1), dilation=(2, 1, 1)), (2, 4, 3, 4, 3)),
    (nn.Linear(4, 6), (2, 6, 4)),
    (nn.Linear(4, 6), (2, 2, 3, 4)),
    (nn.Linear(4, 6), (5, 4)),
]


@pytest.fixture(params=LAYERS, ids=lambda case: f"{type(case[0]).__name__}{case[1]}")
def case(request) -> tuple[nn.Module, Tensor]:
    layer, shape = request.param
    return layer.double(), torch.randn(shape).double()


def grids(layer: nn.Module, x: Tensor) -> list[Grid | None]:
    dims = len(output_sizes(layer, x))
    generator = torch.Generator().manual_seed(1)
    return [None, *(Grid.draw(output_sizes(layer, x), n, generator) for n in (6, 3, 1)[:dims])]


def test_patches_times_weight_is_the_layers_output(case):
    layer, x = case
    y = patches(layer, x) @ layer.weight.flatten(1).T + layer.bias
    expected = as_maps(layer, layer(x))
    assert output_sizes(layer, x) == expected.shape[2:]
    torch.testing.assert_close(y, expected.flatten(2).mT)


def test_patches_on_a_grid_are_those_of_its_positions(case):
    layer, x = case
    sizes = output_sizes(layer, x)
    index = torch.arange(patches(layer, x).shape[1]).view(sizes)
    for at in grids(layer, x)[1:]:
        assert torch.equal(patches(layer, x, at), patches(layer, x)[:, at.of(index).flatten()])


def test_products_are_those_of_the_patches(case):
    layer, x = case
    for at in grids(layer, x):
        y = torch.randn(len(x), 3, *output_sizes(layer, x)).double()
        y = y if at is None else at.of(y)
        rows = patches(layer, x, at).flatten(0, 1)
        torch.testing.assert_close(patch_sum(layer, x, at), rows.sum(0))
        torch.testing.assert_close(patch_gram(layer, x, at), rows.T @ rows)
        wanted = y.movedim(1, -1).reshape(-1, 3)
        torch.testing.assert_close(patch_cross(layer, x, y, at), rows.T @ wanted)


def test_products_of_some_channels():
    layer, x = nn.Conv2d(5, 3, 3, padding=1), torch.randn(7, 5, 6, 6)
    rows = patches(layer, x[:, [4, 1]].double()).flatten(0, 1)
    gram = patch_gram(layer, x[:, [4, 1]])
    assert gram.dtype == torch.float64
    bound = 1e-6 * (rows.abs().T @ rows.abs())
    assert ((gram - rows.T @ rows).abs() <= bound).all()


@pytest.mark.parametrize("sizes", [(7,), (32, 32), (9, 4), (3, 5, 8)])
@pytest.mark.parametrize("count", [1, 5, 100])
def test_a_drawn_grid_has_at_most_so_many_positions_and_not_much_fewer(sizes, count):
    generator = torch.Generator().manual_seed(0)
    index = torch.zeros(sizes)
    for _ in range(20):
        found = Grid.draw(sizes, count, generator).of(index).numel()
        assert min(count, index.numel()) / 4 <= found <= count


def test_all_positions_are_taken_where_they_are_few_enough():
    generator = torch.Generator().manual_seed(0)
    for count in (None, 12, 13):
        assert Grid.draw((3, 4), count, generator) == Grid((1, 1), (0, 0))


def test_every_position_is_drawn_as_often_by_a_seed():
    generator, again = (torch.Generator().manual_seed(3) for _ in range(2))
    seen = torch.zeros(8, 5)
    for _ in range(600):
        at = Grid.draw((8, 5), 8, generator)
        assert at == Grid.draw((8, 5), 8, again)
        at.of(seen).add_(1)
    expected = 600 / (at.step[0] * at.step[1])
    assert ((seen - expected).abs() < 4 * expected**0.5).all()
