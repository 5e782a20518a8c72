"""The two convolutions of a branch as one function, and what a step writes back."""

from __future__ import annotations

import pytest
import torch
from small_networks import lively
from torch import nn

from ccp_ext.compensation.branches import Branch, norm_factor
from ccp_ext.graph import Feeder


def network(**first) -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = {
        "first": nn.Conv2d(4, 4, 3, padding=1, **first),
        "norm": nn.BatchNorm2d(4),
        "second": nn.Conv2d(4, 3, 3, bias=False),
        "behind": nn.BatchNorm2d(3),
    }
    return lively(nn.ModuleDict(parts)).double().eval()


def branch(model: nn.ModuleDict, norm: str | None = "norm") -> Branch | None:
    factor = norm_factor(model["behind"])
    return Branch.of(model, Feeder("first", norm), model["second"], factor)


def run(model: nn.ModuleDict, x: torch.Tensor, norm: str | None = "norm") -> torch.Tensor:
    hidden = model["first"](x)
    return model["second"]((hidden if norm is None else model[norm](hidden)).relu())


@pytest.mark.parametrize(("norm", "bias"), [("norm", False), ("norm", True), (None, True)])
def test_a_step_toward_another_network_writes_what_it_found(norm, bias):
    model, x = network(bias=bias), torch.randn(16, 4, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        teacher = network(bias=bias)
        for p in teacher.parameters():
            p.add_(0.002 * torch.randn(p.shape, dtype=torch.float64))
        wanted = run(teacher, x, norm) + 5.0  # a constant is not the branch's affair
        scale = norm_factor(model["behind"]).view(-1, 1, 1)

        def left() -> float:
            error = run(model, x, norm) - wanted
            return ((error - error.mean((0, 2, 3), keepdim=True)) * scale).norm().item()

        before = left()
        branch(model, norm).improve([(x, wanted)], 0.0, 8)
        assert left() < 0.05 * before


def test_the_factor_of_the_norm_behind_is_the_unit_of_errors():
    """A channel whose factor is near zero takes no part in what the first convolution learns."""
    moved = []
    for size in (1.0, 1e-6):
        model, x = network(), torch.randn(8, 4, 7, 7, generator=torch.Generator().manual_seed(1))
        x = x.double()
        model["behind"].weight.data[0] = size
        old = model["first"].weight.clone()
        with torch.no_grad():
            wanted = run(model, x)
            wanted[:, 0] += x[:, 0, 1:-1, 1:-1] ** 2
            branch(model).improve([(x, wanted)], 0.0, 4)
        moved.append((model["first"].weight - old).norm().item())
    assert moved[1] < 1e-3 * moved[0]


def test_layers_that_cannot_take_part_are_left_out():
    assert branch(network()) is not None
    assert branch(network(groups=2)) is None
    assert branch(network(bias=False), norm=None) is None
    for change in ({"affine": False}, {"track_running_stats": False}):
        model = network()
        model["norm"] = nn.BatchNorm2d(4, **change).double()
        assert branch(model) is None
