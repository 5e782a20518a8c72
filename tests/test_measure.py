from __future__ import annotations

import pytest
import torch
from torch import nn

from ccp_ext import measure
from ccp_ext.errors import InputError


def test_macs_are_those_of_the_textbook():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )
    one = 16 * 8 * 3 * 9 + 16 * 8 * 9 + 8 * 16 * 5
    assert measure.macs(model, torch.randn(1, 3, 8, 8)) == one
    assert measure.macs(model, [torch.randn(4, 3, 8, 8)]) == 4 * one


def test_parameters_count_a_shared_one_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert measure.parameters(model) == 40
    model[1].weight = model[0].weight
    assert measure.parameters(model) == 24


def test_measuring_keeps_training_flags_and_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    measure.macs(model, torch.randn(2, 3, 4, 4))
    measure.latency(model, torch.randn(2, 3, 4, 4), repeats=2, warmup=1)
    assert [m.training for m in model] == [True, True, False]
    assert model[1].num_batches_tracked == 0


def test_latency_sums_up_the_repeats_without_gradients():
    calls = []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(torch.is_grad_enabled() or self.training)
            return x

    result = measure.latency(Counted(), torch.zeros(1), repeats=7, warmup=2)
    assert calls == [False] * 9
    assert result.repeats == 7
    assert 0 < result.low <= result.median <= result.high


@pytest.mark.gpu
def test_latency_on_a_gpu_waits_for_the_kernels(cuda):
    x = torch.randn(4096, 4096, device=cuda)
    result = measure.latency(nn.Linear(4096, 4096, device=cuda), x, repeats=10)
    # 69 GMACs take longer than a launch on any GPU.
    assert result.low > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [({"repeats": 1}, "repeats must be 2 or more, got 1"), ({"warmup": -1}, "warmup .* got -1")],
)
def test_bad_latency_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        measure.latency(nn.Identity(), torch.zeros(1), **options)
