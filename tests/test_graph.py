from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    SMALL_NETWORKS,
    Concat,
    Depthwise,
    Shared,
    SqueezeExcite,
    Tokens,
    gates_closed,
    lively,
    output,
    random_plan,
)
from torch import nn

from ccp_ext import measure, models, surgery
from ccp_ext.errors import InputError
from ccp_ext.graph import Tap, trace

IMAGES = (2, 3, 8, 8)


def graph_of(model, shape=IMAGES):
    return trace(model, torch.randn(shape))


def reasons(graph):
    return {channels: reason for channels, reason in graph.fixed}


# --- groups ------------------------------------------------------------------------------------


def test_resnet56_has_27_inner_groups_and_three_streams():
    graph = trace(models.create("resnet56"), torch.randn(1, 3, 32, 32))
    inner = [g.name for g in graph.inner.groups]
    assert inner == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(9)]
    streams = {g.name: g.channels for g in graph.select_groups("coupled").groups}
    assert streams == {"conv1": 16, "layer2.0.conv2": 16, "layer3.0.conv2": 32}
    assert reasons(graph) == {"linear[0:10]": "output of the model"}


def test_padded_shortcuts_tie_the_middle_channels_of_a_wider_stage():
    graph = graph_of(models.create("resnet8"), (1, 3, 16, 16))
    first = {s.module: s.index for s in graph["conv1"].producers}
    assert first["conv1"] == tuple((i,) for i in range(16))
    assert first["layer2.0.conv2"] == tuple((i,) for i in range(8, 24))
    assert first["layer3.0.conv2"] == tuple((i,) for i in range(24, 40))
    second = graph["layer2.0.conv2"]
    outer = [*range(8), *range(24, 32)]
    assert second.producers[0].index == tuple((i,) for i in outer)
    assert second.paddings[0].index == tuple((i,) for i in outer)
    assert second.weight_taps[0] == Tap("layer2.0.conv2", "output", 1, tuple(outer))
    assert graph["layer3.0.conv2"].coupled


def test_groups_name_producers_norms_and_consumers():
    group = graph_of(models.create("resnet8"), (1, 3, 16, 16))["layer1.0.conv1"]
    whole = tuple((i,) for i in range(16))
    assert [(s.module, s.axis, s.index) for s in group.slices] == [
        ("layer1.0.conv1", "out", whole),
        ("layer1.0.bn1", "out", whole),
        ("layer1.0.conv2", "in", whole),
    ]
    assert group.weight_taps == (Tap("layer1.0.conv1"),)
    assert group.gate_taps == (Tap("layer1.0.relu"),)
    assert not group.coupled


def test_concatenated_channels_own_their_features_behind_a_flatten():
    graph = graph_of(Concat())
    assert [g.name for g in graph.groups] == ["left", "right"]
    right = graph["right"]
    assert right.channelwise[0].index == tuple((i,) for i in range(6, 16))
    assert right.consumers[0].index[1] == tuple(range(7 * 16, 8 * 16))


def test_groups_that_share_a_producer_are_told_apart_by_their_positions():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
            self.extra = nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.last(self.wide(x) + torch.cat([self.narrow(x), self.extra(x)], 1)).sum(3)

    graph = graph_of(Fork())
    assert [g.name for g in graph.groups] == ["narrow", "extra"] or [
        g.name for g in graph.groups
    ] == ["wide[0:4]", "wide[4:8]"]


def test_squeeze_excite_scales_and_scaled_channels_are_one_group():
    graph = graph_of(SqueezeExcite())
    assert [s.module for s in graph["conv"].producers] == ["conv", "excite"]
    assert [s.module for s in graph["conv"].consumers] == ["squeeze", "last"]
    # The scale needs no gate of its own: it is the factor of channels that have one.
    assert [tap.module for tap in graph["conv"].gate_taps] == ["bn"]
    assert [g.name for g in graph.inner.groups] == ["squeeze"]


def test_shared_modules_tie_the_channels_of_all_their_calls():
    graph = graph_of(Shared())
    (group,) = graph.groups
    assert [s.module for s in group.producers] == ["first", "again"]
    assert [s.module for s in group.consumers] == ["again", "last"]
    # The ReLU module is called twice, so the gate is found elsewhere.
    assert "relu" not in [tap.module for tap in group.gate_taps]


def test_linear_layers_along_the_last_dimension_are_followed():
    graph = graph_of(Tokens())
    assert [(g.name, g.channels) for g in graph.groups] == [("embed", 6), ("up", 12)]
    assert graph["up"].weight_taps == (Tap("up", "output", 2),)


def test_depthwise_outputs_belong_to_the_channel_that_they_are_made_of():
    (group,) = graph_of(Depthwise()).groups
    slices = {s.module: s.index[1] for s in group.channelwise}
    assert slices["depthwise"] == (2, 3)
    assert slices["flat_norm"] == tuple(range(18, 36))


def test_gate_of_an_inverted_residual_is_behind_the_depthwise_convolution():
    graph = trace(models.create("mobilenetv2"), torch.randn(1, 3, 32, 32))
    group = graph["features.2.layers.0.0"]
    assert group.gate_taps == (Tap("features.2.layers.1.2"),)
    assert [s.module for s in group.channelwise] == [
        "features.2.layers.0.1",
        "features.2.layers.1.0",
        "features.2.layers.1.1",
    ]


def test_gate_behind_a_functional_activation_is_the_input_of_the_next_layer():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.last(F.relu(self.bn(self.conv(x)))).mean((2, 3))

    assert graph_of(Functional())["conv"].gate_taps == (Tap("last", "input"),)


@pytest.mark.parametrize("network", [*SMALL_NETWORKS, "resnet8", "mobilenetv2"])
def test_closing_all_gates_is_the_same_as_removing_the_channels(network):
    torch.manual_seed(0)
    model = lively(network() if isinstance(network, type) else models.create(network))
    x = torch.randn(IMAGES)
    graph = trace(model, x)
    plan = random_plan(graph)
    slim = surgery.prune(copy.deepcopy(model), plan, verify=False)
    with gates_closed(model, graph, plan):
        closed = output(model, x)
    torch.testing.assert_close(closed, output(slim, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(closed, output(model, x), rtol=1e-2)


# --- what stays --------------------------------------------------------------------------------


class Between(nn.Module):
    """Two convolutions with any function between them."""

    def __init__(self, function, channels=8, inputs=None):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.function = function
        self.last = nn.Conv2d(inputs or channels, 5, 1)

    def forward(self, x):
        return self.last(self.function(self.first(x))).mean((2, 3))


def shuffle(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def spatial_attention(x):
    return x * torch.sigmoid(x.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (shuffle, "view"),
        (spatial_attention, "mean"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "layer_norm"),
        (lambda x: F.group_norm(x, 2), "group_norm"),
        (lambda x: torch.fft.fft2(x).real, "fft_fft2"),
        (lambda x: torch.roll(x, 1, 1), "roll"),
        (lambda x: x[:, :8], "slice"),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: torch.zeros_like(x).copy_(x), "copy_"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, 1:], "pad"),
        (lambda x: x * torch.linspace(1, 2, x.shape[1])[:, None, None], "mul"),
        (lambda x: x.transpose(1, 2) + x, "add"),
    ],
)
def test_what_cannot_be_followed_is_fixed_and_named(function, operator):
    channels = 9 if operator == "slice" else 8
    graph = graph_of(Between(function, channels, inputs=8))
    assert graph.groups == ()
    assert operator in reasons(graph)[f"first[0:{channels}]"]
    assert graph.parameters() == measure.parameters(Between(function, channels, inputs=8))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(-1, 8, 8, 8),
        lambda x: x.reshape(2, 8, 64).view(2, 8, 8, 8),
        lambda x: F.batch_norm(x, None, None, torch.ones(8), None, True),
        lambda x: x if x.shape[1] == 8 else x[:, :1],
    ],
)
def test_code_that_relies_on_the_number_of_channels_fixes_them(function):
    graph = graph_of(Between(function))
    assert graph.groups == ()
    assert "first[0:8]" in reasons(graph)


def test_code_that_relies_on_one_number_of_channels_leaves_the_other_groups_free():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Concat_with_view())
    graph = graph_of(model)
    assert [g.name for g in graph.groups] == ["0"] or [g.name for g in graph.groups] == []


class Concat_with_view(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x):
        return self.head(self.conv(x).view(-1, 4 * 64))
