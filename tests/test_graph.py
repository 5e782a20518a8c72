from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    SMALL_NETWORKS,
    Concat,
    Depthwise,
    InPlace,
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
RESNET8 = partial(models.create, "resnet8")
NARROW_MOBILENET = partial(models.create, "mobilenetv2", width_mult=0.25)


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


RESOURCE_NETWORKS = {
    **{make.__name__: (make, IMAGES) for make in SMALL_NETWORKS},
    "resnet8": (RESNET8, (1, 3, 16, 16)),
    "mobilenetv2": (NARROW_MOBILENET, (1, 3, 16, 16)),
}


def elements_put_out(model, x):
    """Elements of the outputs of all convolutions and linear layers, in one forward pass."""
    total = 0

    def count(module, args, out):
        nonlocal total
        total += out.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    output(model, x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", RESOURCE_NETWORKS)
def test_the_forms_are_the_costs_of_the_pruned_model(name):
    make, shape = RESOURCE_NETWORKS[name]
    model, x = make(), torch.randn(shape)
    graph = graph_of(model, shape)
    for seed, share in enumerate((0.3, 0.6, 1.0)):
        plan = random_plan(graph, share, seed)
        keep = {name: len(group.kept) for name, group in plan.groups.items()}
        slim = surgery.prune(copy.deepcopy(model), plan)
        assert graph.resource("macs")(keep) == measure.macs(slim, x)
        assert graph.resource("params")(keep) == measure.parameters(slim)
        assert graph.resource("activations")(keep) == elements_put_out(slim, x)
        inner = {g.name: keep[g.name] for g in graph.inner.groups}
        assert graph.inner.resource("macs")(inner) == graph.macs(inner)


def test_forms_have_products_squares_and_no_negative_coefficient():
    graph = graph_of(InPlace())
    form = graph.resource("macs")
    stream, wide = (g.name for g in graph.groups)
    assert form.products == {(stream, stream): 2 * 64 * 9, (wide, stream): 2 * 64}
    assert form.linear == {stream: 2 * 64 * 27, wide: 2 * 64 * 5}
    # The image and the classes stay.
    assert form.constant == 0
    with pytest.raises(InputError, match="resource must be one of macs.*got 'flops'"):
        graph.resource("flops")


def test_groups_name_producers_norms_and_consumers():
    group = graph_of(models.create("resnet8"), (1, 3, 16, 16))["layer1.0.conv1"]
    whole = tuple((i,) for i in range(16))
    assert [(s.module, s.axis, s.index) for s in group.members] == [
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
    # Behind the concatenation the normalisation moves zeros, so the gate is behind that too.
    assert right.gate_taps == (Tap("norm", "output", 1, tuple(range(6, 16))),)


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
    assert [g.name for g in graph.groups] == ["wide[0:4]", "wide[4:8]"]
    assert [s.module for s in graph["wide[4:8]"].producers] == ["wide", "extra"]


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
    graph = trace(NARROW_MOBILENET(), torch.randn(1, 3, 32, 32))
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
            self.conv, self.bn, self.last = (
                nn.Conv2d(3, 8, 1),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 5, 1),
            )

        def forward(self, x):
            return self.last(F.relu(self.bn(self.conv(x)))).mean((2, 3))

    assert graph_of(Functional())["conv"].gate_taps == (Tap("last", "input"),)


# Not Depthwise: its normalisation comes after each channel has become two.
@pytest.mark.parametrize(
    "network",
    [Concat, SqueezeExcite, Shared, InPlace, Tokens, RESNET8, NARROW_MOBILENET],
)
def test_closing_all_gates_is_the_same_as_removing_the_channels(network):
    torch.manual_seed(0)
    model = lively(network())
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
        (lambda x: x.clone().copy_(x), "copy_"),
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


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        (lambda x: x / x.shape[1], "div computes with 8, with fewer channels 7"),
        (lambda x: x * x.shape[1] ** -0.5, "mul computes with 0.35355"),
        (lambda x: torch.add(x, 1.0, alpha=x.shape[1]), "add computes with 8, "),
        (lambda x: x / 2 if x.shape[1] == 8 else x, "it computes with other numbers"),
    ],
)
def test_code_that_computes_with_the_number_of_channels_fixes_them(function, detail):
    graph = graph_of(Between(function))
    assert graph.groups == ()
    assert f"relies on their number: {detail}" in reasons(graph)["first[0:8]"]


@pytest.mark.parametrize("function", [lambda x: x / x.shape[0], lambda x: x.nan_to_num(torch.nan)])
def test_code_that_computes_with_other_numbers_leaves_the_channels_free(function):
    assert [g.name for g in graph_of(Between(function)).groups] == ["first"]


def test_code_that_relies_on_one_number_of_channels_leaves_the_other_groups_free():
    class WrittenOut(nn.Module):
        def __init__(self):
            super().__init__()
            self.free, self.counted = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
            self.head = nn.Linear(4 * 64, 5)

        def forward(self, x):
            return self.head(self.counted(self.free(x)).view(-1, 4 * 64))

    graph = graph_of(WrittenOut())
    assert [g.name for g in graph.groups] == ["free"]
    assert "relies on their number" in reasons(graph)["counted[0:4]"]


def test_channels_that_only_training_reads_are_fixed():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.second = nn.Conv2d(8, 6, 1)
            self.last, self.head = nn.Conv2d(6, 5, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            x = self.bn(self.first(x))
            y = self.last(self.second(x))
            return (y, self.head(x)) if self.training else y

    model = lively(Auxiliary())
    state = copy.deepcopy(model.state_dict())
    graph = graph_of(model)
    assert [g.name for g in graph.groups] == ["second"]
    assert "relies on their number" in reasons(graph)["first[0:8]"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_grouped_convolutions_are_fixed_and_counted():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 5, 1))
    x = torch.randn(2, 4, 8, 8)
    graph = trace(model, x)
    assert graph.groups == ()
    assert "grouped convolution with 2 groups" in reasons(graph)["0[0:8]"]
    assert "grouped convolution with 2 groups" in reasons(graph)["1[0:8]"]
    assert graph.macs() == measure.macs(model, x)


def test_modules_that_share_a_parameter_are_fixed():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
    model[2].weight = model[0].weight
    graph = trace(model, torch.randn(2, 6))
    assert graph.groups == ()
    assert reasons(graph)["0[0:6]"] == "modules '0', '2' share a parameter"
    assert graph.parameters() == measure.parameters(model)


def test_computed_weights_are_fixed():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    graph = graph_of(model)
    assert graph.groups == ()
    assert "its weight is not the parameter of a plain Conv2d module" in reasons(graph)["0[0:8]"]


def test_layers_that_the_model_itself_calls_as_functions_are_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(7, 8))

        def forward(self, x):
            return F.linear(x, self.weight)

    reason = "linear in the model itself: its weight is not the parameter of a plain Linear module"
    graph = graph_of(Functional())
    assert reasons(graph) == {"the model itself: linear[0:7]": reason}


def test_a_weight_that_something_else_reads_is_fixed():
    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.last(self.first(x)).mean((2, 3)) + self.first.weight.abs().mean()

    graph = graph_of(Penalised())
    assert "reads a parameter" in reasons(graph)["first[0:8]"]


# --- the model stays as it was ------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_tracing_leaves_the_model_and_the_random_state_alone(grad):
    model = nn.Sequential(SqueezeExcite(), nn.BatchNorm1d(5), nn.Dropout())
    lively(model).train()
    model[1].eval()
    model[0].conv.requires_grad_(False)
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    grads = [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        graph = trace(model, torch.zeros(IMAGES))
    assert graph.groups
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_and_batches_of_one_do_not_change_the_graph():
    model = models.create("resnet8")
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert graph_of(model, (1, 3, 32, 32)).groups == graph_of(frozen, (4, 3, 32, 32)).groups


# --- forecasts and selection --------------------------------------------------------------------


@pytest.mark.parametrize("network", SMALL_NETWORKS)
def test_costs_of_the_plain_model_are_those_that_are_measured(network):
    model, x = network(), torch.randn(IMAGES)
    graph = trace(model, x)
    assert graph.macs() == measure.macs(model, x)
    assert graph.parameters() == measure.parameters(model)
    assert (graph.other_macs, graph.other_parameters) == (0, 0)


def test_restricted_graph_keeps_the_costs_of_the_channels_it_leaves_out():
    graph = graph_of(models.create("resnet8"), (1, 3, 16, 16))
    assert graph.inner.macs() == graph.macs()
    keep = {g.name: g.channels // 2 for g in graph.inner.groups}
    assert graph.inner.macs(keep) == graph.macs(keep)
    assert graph.select_groups("all") == graph
    assert [g.name for g in graph.select_groups(["conv1"]).groups] == ["conv1"]


@pytest.mark.parametrize("count", [0, 17])
def test_forecast_refuses_counts_that_a_group_cannot_keep(count):
    graph = graph_of(models.create("resnet8"), (1, 3, 16, 16))
    with pytest.raises(InputError, match=f"'conv1' can keep 1 to 16 channels; got {count}"):
        graph.macs({"conv1": count})


def test_unknown_groups_and_scopes_are_named():
    graph = graph_of(models.create("resnet8"), (1, 3, 16, 16))
    with pytest.raises(InputError, match="no group 'conv9'.*'conv1'"):
        graph.parameters({"conv9": 1})
    with pytest.raises(InputError, match="scope must be one of inner, coupled, all; got 'outer'"):
        graph.select_groups("outer")


# --- bad input ---------------------------------------------------------------------------------


def test_models_that_cannot_be_exported_are_refused_in_one_sentence():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match="^Branching cannot be traced by torch.export: ") as caught:
        graph_of(Branching())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("image", "got str"),
        ((), "got tuple"),
        ([torch.zeros(1), None], r"example_inputs\[1\] must be a tensor, got NoneType"),
        (torch.zeros(0, 3, 8, 8), r"no elements, its shape is \(0, 3, 8, 8\)"),
    ],
)
def test_inputs_that_are_no_tensors_are_refused(inputs, message):
    with pytest.raises(InputError, match=message):
        trace(Concat(), inputs)
