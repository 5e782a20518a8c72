"""Repair without training: BatchNorm statistics, folded means, least-squares refits."""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from small_networks import SMALL_NETWORKS, lively, random_plan
from torch import nn

import ccp_ext
from ccp_ext import repair
from ccp_ext.compensation import (
    Refitted,
    fold_means,
    holding,
    reestimate_batchnorm,
    refit,
    refitting,
)
from ccp_ext.compensation.batches import Batch, two_models
from ccp_ext.compensation.holding import Ledger, bytes_of_one
from ccp_ext.compensation.layers import find_layers
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.patches import Grid
from ccp_ext.plan import PruningPlan


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(count, 3, 6, 6, generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(80, 4),
        nn.BatchNorm1d(4, momentum=None),
    )
    model[0].running_mean.fill_(9.0)
    model[2].running_var.fill_(7.0)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_pooled_moments_over_ragged_batches_are_exact():
    data = images(29)
    # Batches that differ much in their mean: averaging the batches' variances would be far off.
    data[:16] += 50
    layer = nn.BatchNorm2d(3)
    assert reestimate_batchnorm(layer, data.split([16, 2, 11]), progress=False) == 1
    exact = data.double()
    torch.testing.assert_close(layer.running_mean, exact.mean((0, 2, 3)).float())
    torch.testing.assert_close(layer.running_var, exact.var((0, 2, 3)).float())


def test_a_large_offset_costs_no_accuracy():
    data = images(40) + 10_000
    layer = nn.BatchNorm2d(3)
    reestimate_batchnorm(layer, data.split(8), progress=False)
    torch.testing.assert_close(
        layer.running_var, data.double().var((0, 2, 3)).float(), rtol=1e-4, atol=0
    )


def test_every_layer_sees_inputs_normalised_by_batch_statistics():
    model, data = network(), images(24)
    oracle = copy.deepcopy(model).eval()
    oracle[0].train()
    inputs = torch.cat([oracle[1](oracle[0](part)) for part in data.split(10)]).detach().double()
    assert reestimate_batchnorm(model, data.split(10), progress=False) == 3
    torch.testing.assert_close(model[2].running_mean, inputs.mean((0, 2, 3)).float())
    torch.testing.assert_close(model[2].running_var, inputs.var((0, 2, 3)).float())


def test_one_batch_gives_eval_outputs_equal_to_training_outputs():
    model, data = network(), images(64)
    reestimate_batchnorm(model, [data], progress=False)
    model.eval()
    for layer in (0, 2, 7):
        x = model[:layer](data)
        torch.testing.assert_close(
            model[layer](x),
            nn.functional.batch_norm(
                x, None, None, model[layer].weight, model[layer].bias, training=True
            ),
            rtol=0.01,
            atol=0.03,
        )


def test_only_running_statistics_change():
    model = network().train()
    model[2].eval()
    before = state(model)
    flags = [module.training for module in model.modules()]
    reestimate_batchnorm(model, [(images(12), torch.zeros(12))], progress=False)
    for name, value in model.state_dict().items():
        changed = name.endswith(("running_mean", "running_var"))
        assert torch.equal(value, before[name]) != changed, name
    assert [module.training for module in model.modules()] == flags
    assert [model[k].momentum for k in (0, 2, 7)] == [0.1, 0.3, None]
    assert all(model[k].track_running_stats for k in (0, 2, 7))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dropout_stays_off_and_repeats_are_equal_to_the_bit():
    first, second = network(), network()
    for model in (first, second):
        reestimate_batchnorm(model, images(24).split(8), progress=False)
    assert_same_state(first, state(second))


def test_a_layer_used_twice_pools_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) + self.norm(x + 4)

    model, data = Twice(), images(10)
    assert reestimate_batchnorm(model, data.split(4), progress=False) == 1
    both = torch.cat([data, data + 4]).double()
    torch.testing.assert_close(model.norm.running_var, both.var((0, 2, 3)).float())


def test_a_model_without_batchnorm_counts_none_and_reads_nothing():
    def unread():
        raise AssertionError("the data was read")
        yield

    assert reestimate_batchnorm(nn.Conv2d(3, 4, 3), unread(), progress=False) == 0
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    assert reestimate_batchnorm(untracked, unread(), progress=False) == 0


def test_a_layer_that_the_pass_does_not_reach_keeps_its_statistics():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.used(x)

    model = Aside()
    assert reestimate_batchnorm(model, [images(6)], progress=False) == 1
    assert torch.equal(model.unused.running_mean, torch.zeros(3))


def test_no_batches_are_refused():
    model = network()
    before = state(model)
    with pytest.raises(InputError, match="batches is empty"):
        reestimate_batchnorm(model, [], progress=False)
    assert_same_state(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_leave_the_old_statistics(bad):
    model, data = network().train(), images(20)
    data[13, 1, 2, 2] = bad
    before = state(model)
    with pytest.raises(InputError, match="layer 0 is not finite"):
        reestimate_batchnorm(model, data.split(5), progress=False)
    assert_same_state(model, before)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_leaves_the_old_statistics(exception):
    model = network().eval()
    before = state(model)

    def batches():
        yield images(8)
        raise exception

    with pytest.raises(exception):
        reestimate_batchnorm(model, batches(), progress=False)
    assert_same_state(model, before)
    assert not any(module.training for module in model.modules())
    assert all(model[k].track_running_stats for k in (0, 2, 7))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_batch_of_one_value_a_channel_is_refused_by_the_layers_name():
    model = network()
    before = state(model)
    with pytest.raises(InputError, match="layer 7 gets one value a channel"):
        reestimate_batchnorm(model, images(9).split(8), progress=False)
    assert_same_state(model, before)


def test_channels_last_gives_the_same_statistics():
    plain, model = network(), network().to(memory_format=torch.channels_last)
    data = images(24)
    reestimate_batchnorm(plain, data.split(10), progress=False)
    parts = data.contiguous(memory_format=torch.channels_last).split(10)
    reestimate_batchnorm(model, parts, progress=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])


def test_bfloat16_autocast_keeps_float32_statistics():
    plain, model, data = network(), network(), images(64)
    reestimate_batchnorm(plain, data.split(16), progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        reestimate_batchnorm(model, data.split(16), progress=False)
    assert model[2].running_var.dtype == torch.float32
    # bfloat16 carries 8 bits; its rounding errors average out over the positions.
    torch.testing.assert_close(model[2].running_mean, plain[2].running_mean, rtol=0.02, atol=0.01)
    torch.testing.assert_close(model[2].running_var, plain[2].running_var, rtol=0.02, atol=0)


# --- folding and refitting -----------------------------------------------------------------------


def image_set(count: int = 48, size: int = 8) -> ImageSet:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator).to(torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    return ImageSet(pixels, labels, (0.5,) * 3, (0.25,) * 3, 10, "noise")


def convolutions(*, bias: bool, norm: bool, padding: int = 0) -> nn.Module:
    torch.manual_seed(0)
    behind = [nn.BatchNorm2d(5)] if norm else []
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=padding, bias=bias),
        *behind,
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(5 * (4 + 2 * padding) ** 2, 7),
    )
    return lively(model).double().eval()


def pruned(model: nn.Module, kept: dict[str, list[int]], size: int = 8) -> nn.Module:
    example = torch.zeros(1, 3, size, size, dtype=next(model.parameters()).dtype)
    graph = ccp_ext.trace(model, example)
    return ccp_ext.prune(copy.deepcopy(model), PruningPlan.from_kept(graph, kept))


def outputs(model: nn.Module, data: ImageSet) -> torch.Tensor:
    with torch.no_grad():
        return model(data.normalise(data.images).to(next(model.parameters()).dtype))


def distance(model: nn.Module, slim: nn.Module, data: ImageSet) -> float:
    expected = outputs(model, data)
    return float((outputs(slim, data) - expected).norm() / expected.norm())


BEHIND = [
    {"bias": True, "norm": False},
    {"bias": False, "norm": True},
    {"bias": True, "norm": True},
]


@pytest.mark.parametrize("behind", BEHIND)
def test_folding_is_exact_for_constant_channels(behind):
    model, data = convolutions(**behind), image_set()
    for channel, value in ((1, 0.7), (4, 2.0)):
        model[0].weight.data[channel] = 0
        model[0].bias.data[channel] = value
    slim = pruned(model, {"0": [0, 2, 3, 5]})
    assert distance(model, slim, data) > 1e-3
    assert fold_means(model, slim, data, batch_size=20, progress=False) == 1
    assert distance(model, slim, data) < 1e-12
    fold_means(model, slim, data, progress=False)
    assert distance(model, slim, data) < 1e-12


def test_folding_leaves_the_mean_over_images_and_positions_as_it_was():
    model, data = convolutions(bias=True, norm=False, padding=1), image_set()
    slim = pruned(model, {"0": [0, 3]})
    fold_means(model, slim, data, progress=False)
    means = [outputs(m[:3], data).mean((0, 2, 3)) for m in (model, slim)]
    torch.testing.assert_close(*means)


def test_folding_into_a_batchnorm_starts_from_the_plain_models_statistics():
    model, data = convolutions(bias=False, norm=True), image_set()
    model[0].weight.data[1], model[0].bias.data[1] = 0, 0.8
    slim = pruned(model, {"0": [0, 2, 3, 4, 5]})
    batches = data.normalise(data.images).double().split(16)
    reestimate_batchnorm(slim, batches, progress=False)
    assert distance(model, slim, data) > 1e-3
    fold_means(model, slim, data, progress=False)
    assert distance(model, slim, data) < 1e-12


def test_every_batchnorm_behind_a_layer_gets_its_constant():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.second = nn.Conv2d(4, 5, 1, bias=False)
            self.left, self.right = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

        def forward(self, x):
            x = self.second(torch.relu(self.first(x)))
            return self.left(x).tanh() - self.right(x).sigmoid()

    torch.manual_seed(0)
    model, data = lively(Two()).double().eval(), image_set()
    model.first.weight.data[1], model.first.bias.data[1] = 0, 0.8
    slim = pruned(model, {"first": [0, 2, 3]})
    fold_means(model, slim, data, progress=False)
    assert distance(model, slim, data) < 1e-12


def test_folding_skips_a_layer_without_bias_and_batchnorm():
    model, data = convolutions(bias=False, norm=False), image_set()
    slim = pruned(model, {"0": [0, 3]})
    before = state(slim)
    assert fold_means(model, slim, data, progress=False) == 0
    assert_same_state(slim, before)


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
@pytest.mark.parametrize("behind", [*BEHIND, {"bias": False, "norm": False}])
def test_a_refit_replaces_dependent_channels_exactly(behind, ridge):
    model, data = convolutions(**behind), image_set()
    model[1] = nn.Identity()  # sums of channels stay sums
    first = model[0]
    for tensor in (first.weight.data, first.bias.data):
        tensor[1] = tensor[0] - 2 * tensor[5]
        tensor[4] = 0.5 * tensor[2] + tensor[3]
    slim = pruned(model, {"0": [0, 2, 3, 5]})
    if behind["norm"]:
        slim[3].running_var *= 1.3  # as a re-estimation would; the targets are the plain model's
    assert distance(model, slim, data) > 1e-2
    left = refit(
        model, slim, data, layers="cut", ridge=ridge, batch_size=20, progress=False
    ).unexplained
    assert list(left) == ["2"] and left["2"] < 1e-12
    assert distance(model, slim, data) < 1e-6


def test_a_refit_solves_the_ridge_regression_on_the_slim_inputs():
    model, data = convolutions(bias=True, norm=True, padding=1), image_set()
    slim = pruned(model, {"0": [0, 2, 3], "2": [1, 2, 4]})
    old = slim[2].weight.detach().flatten(1).clone()
    with torch.no_grad():
        x = slim[:2](data.normalise(data.images).double())
        target = outputs(model[:3], data)[:, [1, 2, 4]].movedim(1, -1).reshape(-1, 3)
    rows = nn.functional.unfold(x, 3, padding=1).mT.flatten(0, 1)
    centred = rows - rows.mean(0)
    level = 0.05 * centred.square().sum(0).mean()
    left = refit(model, slim, data, ridge=0.05, joint=0, batch_size=20, progress=False).unexplained
    # The ridge as further samples, which want the old weights.
    system = torch.cat([centred, level.sqrt() * torch.eye(27).double()])
    wanted = torch.cat([target - target.mean(0), level.sqrt() * old.T])
    weight = torch.linalg.lstsq(system, wanted).solution.T
    torch.testing.assert_close(slim[2].weight.detach().flatten(1), weight)
    torch.testing.assert_close(slim[2].bias.detach(), target.mean(0) - weight @ rows.mean(0))
    fitted = rows @ weight.T + slim[2].bias.detach()
    share = (fitted - target).square().sum() / (target - target.mean(0)).square().sum()
    assert left["2"] == pytest.approx(float(share))
    assert list(left) == ["2", "6"]


def test_a_refit_goes_through_a_residual_network_in_order():
    model = lively(ccp_ext.models.create("resnet8")).eval()
    data = image_set(24, 16)
    graph = ccp_ext.trace(model, torch.zeros(1, 3, 16, 16))
    plan = random_plan(graph)
    slim = ccp_ext.prune(copy.deepcopy(model), plan)
    folded = copy.deepcopy(slim)
    before = distance(model, slim, data)
    assert fold_means(model, folded, data, progress=False) == 7
    left = refit(model, slim, data, progress=False).unexplained
    assert list(left) == [f"layer{k}.0.conv{i}" for k in (1, 2, 3) for i in (1, 2)] + ["linear"]
    assert all(0 <= share < 1 for share in left.values())
    assert distance(model, slim, data) < distance(model, folded, data) < before
    again = ccp_ext.prune(copy.deepcopy(model), plan)
    refit(model, again, data, progress=False)
    assert_same_state(again, state(slim))


class Sum(nn.Module):
    """Two linear branches that are added, the second behind a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.u = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.q, self.v = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1, bias=False)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        return self.u(self.p(x)) + self.norm(self.v(self.q(x)))


def test_a_residual_refit_makes_up_for_the_error_of_what_is_added():
    torch.manual_seed(0)
    model, data = lively(Sum()).double().eval(), image_set()
    # One channel of p cannot carry what u reads; the four of q still span the image.
    plan = {"p": [2], "q": [0, 1, 2, 4]}
    slim, blind = pruned(model, plan), pruned(model, plan)
    refit(model, blind, data, residual=False, ridge=0.0, batch_size=20, progress=False)
    assert distance(model, blind, data) > 0.05
    left = refit(model, slim, data, ridge=0.0, batch_size=20, progress=False).unexplained
    assert left["u"] > 0.01 and left["v"] < 1e-12
    assert distance(model, slim, data) < 1e-6


def test_a_residual_refit_of_coupled_channels_compares_those_that_stay():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.head(self.before_head(x))

        def before_head(self, x):
            x = self.stem(x)
            return x + self.b(self.a(x))

    torch.manual_seed(0)
    model, data = Blocks().double().eval(), image_set()
    # Whatever the linear layers lose, three channels of the stem carry the whole image.
    slim = pruned(model, {"stem": [0, 2, 5], "a": [1, 2, 3, 4, 6]})
    refit(model, slim, data, layers="cut", ridge=0.0, progress=False)
    slim.stem.weight.data += 0.1  # an error in the shortcut, which b can take back
    left = refit(model, slim, data, layers="cut", ridge=0.0, progress=False).unexplained
    assert left["b"] < 1e-12
    with torch.no_grad():
        x = data.normalise(data.images).double()
        torch.testing.assert_close(
            slim.before_head(x), model.before_head(x)[:, [0, 2, 5]], rtol=0, atol=1e-6
        )


def test_the_classifier_is_refitted_on_the_plain_models_logits():
    model, data = lively(ccp_ext.models.create("resnet8")).eval(), image_set(200, 16)
    graph = ccp_ext.trace(model, torch.zeros(1, 3, 16, 16)).inner
    slim = ccp_ext.prune(copy.deepcopy(model), random_plan(graph))
    cut = copy.deepcopy(slim)
    assert "linear" not in refit(model, cut, data, layers="cut", progress=False).unexplained
    left = refit(model, slim, data, progress=False).unexplained
    assert list(left)[-1] == "linear"
    seen = []
    hook = slim.linear.register_forward_pre_hook(lambda layer, args: seen.append(args[0].double()))
    outputs(slim, data)
    hook.remove()
    system = torch.cat([seen[0], torch.ones(200, 1)], 1)
    target = outputs(model, data).double()
    residual = target - system @ torch.linalg.lstsq(system, target).solution
    # The ridge is small, so the error is nearly that of least squares without one.
    assert (outputs(slim, data) - target).norm() < 1.02 * residual.norm()
    assert distance(model, slim, data) < 0.95 * distance(model, cut, data)


def test_all_layers_from_the_first_cut_on_can_be_refitted():
    model, data = lively(ccp_ext.models.create("resnet8")).eval(), image_set(100, 16)
    graph = ccp_ext.trace(model, torch.zeros(1, 3, 16, 16)).inner
    plan = random_plan(graph.select_groups(["layer2.0.conv1"]))
    slim = ccp_ext.prune(copy.deepcopy(model), plan)
    left = refit(model, slim, data, layers="all", progress=False).unexplained
    assert list(left) == ["layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2", "linear"]


def test_a_refit_runs_the_models_over_each_image_once():
    model, data = convolutions(bias=True, norm=True), image_set(48)
    slim = pruned(model, {"0": [0, 2, 3], "2": [1, 2, 4]})
    seen = {"plain": 0, "slim": 0}

    def count(name, layer, args, output):
        seen[name] += len(output)

    for name, network in (("plain", model), ("slim", slim)):
        network[0].register_forward_hook(partial(count, name))
    refit(model, slim, data, residual=False, batch_size=20, progress=False)
    # One image shows what feeds what in the plain model, two the order of the slim one's layers,
    # and one of both what an image takes in memory.
    assert seen == {"plain": 48 + 2, "slim": 48 + 3}


@pytest.mark.parametrize("norm", [False, True])
def test_moving_the_layer_before_too_comes_nearer(norm):
    model, data = convolutions(bias=True, norm=norm), image_set(100)
    distances = []
    for joint in (0, 1, 8):
        slim = pruned(model, {"0": [0, 2, 3]})
        before = state(slim[0])
        refit(model, slim, data, layers="cut", joint=joint, batch_size=30, progress=False)
        assert torch.equal(slim[0].weight, before["weight"]) == (joint == 0)
        assert torch.equal(slim[0].bias, before["bias"]) == (joint == 0)
        distances.append(distance(model[:3], slim[:3], data))
    assert distances[2] < distances[1] < distances[0]
    assert distances[2] < 0.95 * distances[0]


def test_both_convolutions_of_residual_branches_move():
    model, data = lively(ccp_ext.models.create("resnet8")).eval(), image_set(64, 16)
    graph = ccp_ext.trace(model, torch.zeros(1, 3, 16, 16))
    plan = random_plan(graph.select_groups("inner"))
    distances = []
    for joint in (0, 4):
        slim = ccp_ext.prune(copy.deepcopy(model), plan)
        first, shift = slim.layer2[0].conv1.weight.clone(), slim.layer2[0].bn1.bias.clone()
        refit(model, slim, data, joint=joint, batch_size=30, progress=False)
        assert torch.equal(slim.layer2[0].conv1.weight, first) == (joint == 0)
        assert torch.equal(slim.layer2[0].bn1.bias, shift) == (joint == 0)
        distances.append(distance(model, slim, data))
    assert distances[1] < 0.9 * distances[0]


def test_a_channel_that_its_batchnorm_silences_stays_as_it_is():
    model, data = lively(ccp_ext.models.create("resnet8")).eval(), image_set(16, 16)
    graph = ccp_ext.trace(model, torch.zeros(1, 3, 16, 16))
    slim = ccp_ext.prune(copy.deepcopy(model), random_plan(graph.select_groups("inner")))
    slim.layer1[0].bn1.weight.data[0] = 0
    first = slim.layer1[0].conv1.weight[0].clone()
    refit(model, slim, data, progress=False)
    assert torch.equal(slim.layer1[0].conv1.weight[0], first)
    assert all(torch.isfinite(p).all() for p in slim.parameters())


class SumOfMean(Sum):
    def forward(self, x, y):
        return super().forward((x + y) / 2)


class Nested(nn.Module):
    """A sum of two branches behind a stem, in a block that takes one tensor or two."""

    def __init__(self, arguments: int) -> None:
        super().__init__()
        self.stem, self.arguments = nn.Conv2d(3, 3, 1), arguments
        self.block = Sum() if arguments == 1 else SumOfMean()

    def forward(self, x):
        return self.block(*[self.stem(x)] * self.arguments)


@pytest.mark.parametrize(("arguments", "stem_runs"), [(1, 1), (2, 2)])
def test_what_is_added_after_a_layer_has_run_takes_one_more_pass_through_their_block(
    arguments, stem_runs
):
    torch.manual_seed(0)
    model, data = lively(Nested(arguments)).double().eval(), image_set()
    slim = pruned(model, {"block.p": [2], "block.q": [0, 1, 2, 4]})
    seen = {"stem": 0, "block.p": 0}

    def count(name, layer, args, output):
        seen[name] += len(output)

    for name in seen:
        slim.get_submodule(name).register_forward_hook(partial(count, name))
    left = refit(model, slim, data, ridge=0.0, batch_size=20, progress=False).unexplained
    # Two single images show the order of the layers and which are late; one goes ahead of all.
    assert seen == {"stem": 2 + stem_runs * (1 + 48), "block.p": 2 + 2 * (1 + 48)}
    assert left["block.u"] > 0.01 and left["block.v"] < 1e-12
    assert distance(model, slim, data) < 1e-6


class Narrowing(nn.Module):
    """Maps of 8 x 8, then of 4 x 4 and 2 x 2, behind layers that are cut."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.third = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.last = nn.Linear(16, 5)

    def maps(self, x):
        return self.third(self.second(self.first(x).relu()).tanh())

    def forward(self, x):
        return self.last(self.maps(x).tanh().mean((2, 3)))


NARROWING = {"first": [0, 2, 3, 8, 9, 12], "second": [1, 2, 5, 6, 10, 15]}


def test_with_less_memory_a_layer_has_fewer_images_and_the_narrow_ones_more():
    torch.manual_seed(0)
    model, data = Narrowing().double().eval(), image_set(200)
    whole, slim = pruned(model, NARROWING), pruned(model, NARROWING)
    everything = refit(model, whole, data, batch_size=8, progress=False)
    assert set(everything.images.values()) == {200}
    assert str(everything) == "all 200 images for every layer"
    found = refit(model, slim, data, batch_size=8, memory=0.0018, progress=False)
    used = list(found.images.values())
    assert used[0] <= used[1] < used[2] == 200 and used[0] % 8 == used[1] % 8 == 0
    expected = f"{used[0]} to 200 of 200 images for a layer, as fit into 0.0018 GiB"
    assert str(found) == expected
    assert found.batch_size == 8
    # Those that join later are at the depth of the others: the last layer is fitted to them all.
    x = data.normalise(data.images).double()
    with torch.no_grad():
        features = slim.maps(x).tanh().mean((2, 3))
        system = torch.cat([features, torch.ones(200, 1)], 1)
        target = model(x)
        best = (target - system @ torch.linalg.lstsq(system, target).solution).norm()
        assert (slim(x) - target).norm() < 1.01 * best


def test_the_number_of_batches_is_told_where_it_kept_images_out(monkeypatch):
    for module in (holding, refitting):
        monkeypatch.setattr(module, "MOST_BATCHES", 3)
    torch.manual_seed(0)
    model, data = Narrowing().double().eval(), image_set(20)
    found = refit(model, pruned(model, NARROWING), data, batch_size=4, joint=0, progress=False)
    assert str(found) == "12 of 20 images for a layer, as fit into 3 batches of 4"


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ((512, 512), "512 of 600 images for a layer, as fit into 256 batches of 2"),
        ((32, 512), "32 to 512 of 600 images for a layer, as fit into 4 GiB and 256 batches of 2"),
        ((32, 510), "32 to 510 of 600 images for a layer, as fit into 4 GiB"),
        ((32, 32), "32 of 600 images for a layer, as fit into 4 GiB"),
    ],
)
def test_what_kept_images_out_is_told(images, told):
    found = Refitted({}, dict(zip("ab", images, strict=True)), [], 600, 4.0, batch_size=2)
    assert str(found) == told


def test_waiting_images_take_the_memory_that_was_foreseen():
    torch.manual_seed(0)
    model, data = Narrowing().double().eval(), image_set(64)
    slim = pruned(model, NARROWING)
    layers = find_layers(model, slim, data)[1:]
    positions = dict.fromkeys((layer.path for layer in layers), 1)
    with two_models(model, slim, layers) as models:
        one, _ = bytes_of_one(models, layers, data, None)
        ledger = Ledger()
        draw = partial(Grid.draw, count=None, generator=torch.Generator())
        with ledger.keep():
            x = data.normalise(data.images)
            many = Batch(*models, layers, x, draw, positions, within=ledger.keep)
            for layer in layers:
                before = ledger.now
                assert len(list(many.samples(layer))) == 1
                assert max(before, ledger.now) == 64 * one[layer.path]
            many.close()
            del many, x
    assert ledger.now == 0 < ledger.most


def test_a_layer_too_wide_to_be_solved_gets_a_constant():
    torch.manual_seed(0)
    model, data = Narrowing().double().eval(), image_set(64)
    slim = pruned(model, NARROWING)
    before = state(slim)
    # 54 x 54 values of 40 bytes are more than half of it, 16 x 16 are not.
    found = refit(model, slim, data, memory=2e-4, batch_size=1, progress=False)
    changed = {path for path, value in slim.state_dict().items() if (value != before[path]).any()}
    assert changed == {"second.bias", "third.bias", "last.weight", "last.bias"}
    assert found.too_wide == ["second", "third"]
    assert str(found).endswith("; too wide for 0.0002 GiB, a constant only: second, third")
    fitted = data.subset(range(found.images["third"]))
    x = data.normalise(fitted.images).double()
    with torch.no_grad():
        wanted, got = model.maps(x), slim.maps(x)
        error = (wanted - got).transpose(0, 1).flatten(1)
        left = error.var(1).sum() / wanted.transpose(0, 1).flatten(1).var(1).sum()
    assert error.mean(1).abs().max() < 1e-12
    assert found.unexplained["third"] == pytest.approx(float(left))


@pytest.mark.parametrize(
    "make",
    [*SMALL_NETWORKS, partial(ccp_ext.models.create, "mobilenetv2", width_mult=0.25)],
    ids=lambda make: getattr(make, "__name__", "mobilenetv2"),
)
def test_the_default_repair_suits_networks_of_all_kinds(make):
    """Branches, depthwise and shared convolutions, tokens, networks without BatchNorm."""
    torch.manual_seed(0)
    model, data = lively(make()).eval(), image_set(64)
    batches = data.normalise(data.images).split(32)
    reestimate_batchnorm(model, batches, progress=False)
    graph = ccp_ext.trace(model, batches[0][:1])
    slim = ccp_ext.prune(copy.deepcopy(model), random_plan(graph, 0.6))
    before = distance(model, slim.eval(), data)
    done = repair.apply("refit", model, slim, data, progress=False)
    assert done.images and set(done.images.values()) == {64}
    assert distance(model, slim, data) < 0.8 * before


def test_positions_are_drawn_by_the_seed_and_nearly_enough():
    model, data = convolutions(bias=True, norm=False, padding=1), image_set(100)
    fitted = {}
    for positions, seed in ((None, 0), (12, 0), (12, 0), (12, 1)):
        slim = pruned(model, {"0": [0, 2, 3]})
        refit(model, slim, data, ridge=0.0, positions=positions, seed=seed, progress=False)
        fitted.setdefault((positions, seed), []).append(slim)
    first, again = fitted[12, 0]
    assert_same_state(again, state(first))
    assert not torch.equal(fitted[12, 1][0][2].weight, first[2].weight)
    left = {k: distance(model[:3], slims[0][:3], data) for k, slims in fitted.items()}
    assert all(left[None, 0] < left[12, seed] < 1.05 * left[None, 0] for seed in (0, 1))


def test_an_error_inside_a_model_ends_a_refit_and_its_threads():
    model, data = convolutions(bias=True, norm=False), image_set()
    slim = pruned(model, {"0": [0, 2, 3]})
    threads = threading.active_count()

    def fail(layer, args, output):
        if len(output) > 1:
            raise ZeroDivisionError("of the model")

    slim[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="of the model"):
        refit(model, slim, data, batch_size=20, progress=False)
    assert threading.active_count() == threads


def test_compensation_leaves_the_plain_model_and_all_flags_alone():
    model = lively(ccp_ext.models.create("resnet8")).train()
    data = image_set(8, 16)
    graph = ccp_ext.trace(model, torch.zeros(1, 3, 16, 16))
    slim = ccp_ext.prune(copy.deepcopy(model), random_plan(graph))
    slim.layer1.eval()
    flags = [module.training for module in slim.modules()]
    shapes = {name: value.shape for name, value in slim.state_dict().items()}
    before = state(model)
    fold_means(model, slim, data, progress=False)
    refit(model, slim, data, progress=False)
    assert_same_state(model, before)
    assert model.training and [module.training for module in slim.modules()] == flags
    assert {name: value.shape for name, value in slim.state_dict().items()} == shapes
    for network in (model, slim):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        assert all(p.requires_grad for p in network.parameters())


def test_a_layer_that_runs_twice_is_fitted_on_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 6, 1)
            self.other = nn.Conv2d(3, 6, 1)
            self.shared = nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return self.shared(self.first(x)) - 2 * self.shared(self.other(x).tanh_())

    torch.manual_seed(0)
    model, data = Twice().double().eval(), image_set()
    graph = ccp_ext.trace(model, torch.zeros(1, 3, 8, 8).double())
    (group,) = graph.groups
    slim = pruned(model, {group.name: [0, 1, 2, 4]})
    x = data.normalise(data.images).double()
    with torch.no_grad():
        rows = torch.cat([slim.first(x), slim.other(x).tanh()]).movedim(1, -1).flatten(0, 2)
        plain = torch.cat([model.first(x), model.other(x).tanh()])
        target = model.shared(plain).movedim(1, -1).flatten(0, 2)
    refit(model, slim, data, ridge=0.0, progress=False)
    system = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    solution = torch.linalg.lstsq(system, target).solution
    torch.testing.assert_close(slim.shared.weight.detach().flatten(1), solution[:-1].T)
    torch.testing.assert_close(slim.shared.bias.detach(), solution[-1])


@pytest.mark.parametrize("method", [fold_means, refit])
def test_compensation_wants_the_model_and_its_pruned_copy(method):
    model, data = convolutions(bias=True, norm=True), image_set()
    slim = pruned(model, {"0": [0, 3]})
    for plain, other in ((model, model), (slim, slim), (network(), slim)):
        with pytest.raises(InputError, match="slim must be the given model after ccp_ext.prune"):
            method(plain, other, data, progress=False)
    with pytest.raises(InputError, match="ridge must be a number of 0 or more, got -1"):
        refit(model, slim, data, ridge=-1)
    with pytest.raises(InputError, match="positions must be 1 or more, or None, got 0"):
        refit(model, slim, data, positions=0)
    with pytest.raises(InputError, match="joint must be a number of iterations, 0 or more, got -1"):
        refit(model, slim, data, joint=-1)
    with pytest.raises(InputError, match="memory must be a positive number of GiB, got 0"):
        refit(model, slim, data, memory=0)
    with pytest.raises(InputError, match=r"memory must be at least .* GiB for images of .*, got"):
        refit(model, slim, data, memory=1e-6)
    with pytest.raises(InputError, match="layers must be one of cut, .*; got 'some'"):
        refit(model, slim, data, layers="some")


class Interleaved(nn.Module):
    """Two branches whose first convolutions both run before their second ones."""

    def __init__(self):
        super().__init__()
        self.a1, self.a2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        p, q = self.a1(x).relu(), self.b1(x).relu()
        return self.last(torch.cat([self.a2(p), self.b2(q)], 1).relu().mean((2, 3)))


def test_every_layer_is_fitted_to_the_inputs_that_it_has_in_the_end(monkeypatch):
    torch.manual_seed(0)
    model, data = Interleaved().eval(), image_set(40)
    slim = pruned(model, {"a1": [0, 2, 3, 5], "b1": [1, 2, 6, 7]})
    first = slim.a1.weight.clone()
    fitted, seen = {}, {}
    original = Batch.samples

    def recorded(batch, layer):
        for x, target, at in original(batch, layer):
            if len(x) > 1:  # not of the one image that shows what fits into memory
                fitted.setdefault(layer.path, []).append(x.clone())
            yield x, target, at

    monkeypatch.setattr(Batch, "samples", recorded)
    refit(model, slim, data, batch_size=20, progress=False)
    for path in fitted:
        layer = slim.get_submodule(path)
        layer.register_forward_pre_hook(lambda _, x, path=path: seen.update({path: x[0]}))
    with torch.no_grad():
        slim(data.normalise(data.images))
    assert set(fitted) == {"a2", "b2", "last"} and not torch.equal(slim.a1.weight, first)
    for path, inputs in fitted.items():
        torch.testing.assert_close(torch.cat(inputs), seen[path])
