"""Re-estimation of BatchNorm statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ccp_ext.compensation import reestimate_batchnorm
from ccp_ext.errors import InputError


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
