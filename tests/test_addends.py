"""What the outputs of layers are added to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccp_ext import models
from ccp_ext.errors import InputError
from ccp_ext.graph import Tap, addends


class Block(nn.Module):
    """A residual block with one convolution; ``tail`` makes the sum."""

    def __init__(self, tail) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.tail = tail

    def forward(self, x):
        return self.tail(self, F.relu(self.stem(x)))


def found(tail) -> dict[str, Tap]:
    return addends(Block(tail), torch.zeros(2, 3, 5, 5))


def test_the_shortcuts_of_a_resnet_are_found():
    taps = addends(models.create("resnet8"), torch.zeros(1, 3, 16, 16))
    assert taps == {
        "layer1.0.conv2": Tap("layer1.0.conv1", "input"),
        "layer2.0.conv2": Tap("layer2.0.shortcut"),
        "layer3.0.conv2": Tap("layer3.0.shortcut"),
    }


@pytest.mark.parametrize(
    "tail",
    [
        lambda m, x: x + m.conv(x),
        lambda m, x: m.norm(m.conv(x)) + x,
        lambda m, x: m.drop(m.norm(m.conv(x))).add_(x),
    ],
)
def test_a_layer_may_be_followed_by_a_batchnorm_and_dropout(tail):
    assert found(tail) == {"conv": Tap("conv", "input")}


@pytest.mark.parametrize(
    "tail",
    [
        lambda m, x: m.conv(x) - x,
        lambda m, x: torch.add(m.conv(x), x, alpha=2),
        lambda m, x: F.relu(m.conv(x)) + x,
        lambda m, x: m.conv(x) + 1,
        lambda m, x: m.conv(x) + x.mean((2, 3), keepdim=True),
        lambda m, x: m.conv(m.conv(x)) + x,
    ],
    ids=["difference", "factor", "activation", "number", "broadcast", "twice"],
)
def test_other_uses_have_no_addend(tail):
    assert found(tail) == {}


def test_an_output_that_is_also_read_elsewhere_has_no_addend():
    def tail(m, x):
        y = m.conv(x)
        return y + x, y.sigmoid()

    assert found(tail) == {}


def test_what_was_changed_in_place_is_read_after_the_change():
    def tail(m, x):
        y = m.conv(x)
        x = x.mul_(2)
        return m.norm(x + y)

    assert found(tail) == {}  # the product is no module's input or output


def test_two_layers_that_are_added_are_each_others_addend():
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    assert addends(Once(), torch.zeros(2, 5, 3)) == {
        "a": Tap("b", "output", -1),
        "b": Tap("a", "output", -1),
    }


def test_a_model_that_cannot_be_exported_is_refused():
    with pytest.raises(InputError, match=r"cannot be traced by torch\.export"):
        found(lambda m, x: m.conv(x) if x.sum() > 0 else x)
