"""Which convolutions feed others through a BatchNorm and a ReLU alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccp_ext import models
from ccp_ext.graph import Feeder, feeders


class Pair(nn.Module):
    """Two convolutions; ``middle`` makes the second one's input of the first one's output."""

    def __init__(self, middle, tail=None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.middle, self.tail = middle, tail

    def forward(self, x):
        first = self.first(x)
        second = self.second(self.middle(self, first))
        return second if self.tail is None else self.tail(self, first, second)


def found(middle, tail=None) -> dict[str, Feeder]:
    return feeders(Pair(middle, tail), torch.zeros(2, 3, 5, 5))


def test_the_branches_of_a_resnet_are_found():
    blocks = [f"layer{k}.0." for k in (1, 2, 3)]
    assert feeders(models.create("resnet8"), torch.zeros(1, 3, 16, 16)) == {
        f"{block}conv2": Feeder(f"{block}conv1", f"{block}bn1") for block in blocks
    }


def test_a_batchnorm_is_not_needed_and_dropout_does_nothing():
    assert found(lambda m, x: F.relu(x)) == {"second": Feeder("first", None)}
    middle = lambda m, x: F.dropout(m.relu(m.norm(x)), training=m.training)  # noqa: E731
    assert found(middle) == {"second": Feeder("first", "norm")}


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, x: m.norm(x),
        lambda m, x: m.norm(F.relu(x)),
        lambda m, x: F.gelu(x),
        lambda m, x: F.relu(x + 1),
        lambda m, x: F.max_pool2d(F.relu(x), 2),
    ],
)
def test_anything_else_between_two_convolutions_parts_them(middle):
    assert found(middle) == {}


@pytest.mark.parametrize(
    "tail", [lambda m, first, second: first + second, lambda m, first, second: m.second(second)]
)
def test_outputs_read_twice_and_layers_that_run_twice_are_left_out(tail):
    assert found(lambda m, x: F.relu(x), tail) == {}
