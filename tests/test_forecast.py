"""The effect of a choice as measured, and that the forecast tells it for small changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ccp_ext import JointCost, PruningPlan, collect, masked, trace
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.forecast import Effect, logits, removed_masks


class TwoLayers(nn.Module):
    """Two hidden layers of which the second is linear: exact for changes of it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


def images(count: int = 40) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(4, (count,), generator=generator)
    return ImageSet(pixels, labels, (0.5,) * 3, (0.5,) * 3, 4, "noise")


def test_the_joint_forecast_is_the_measured_change_where_the_model_is_linear():
    """All classes' rows, so that nothing is drawn; the second layer's channels act linearly."""
    torch.manual_seed(0)
    net, data = TwoLayers().eval(), images()
    graph = trace(net, data.normalise(data.images[:1]))
    options = {"curvature": "exact", "loss": "least_squares", "keep_rows": True}
    with collect(net, graph, **options) as stats:
        for x, y in data.batches(16):
            stats.backward(net(x), nn.functional.one_hot(y, 4).float())
    plan = PruningPlan.from_kept(graph, {"first": range(6), "second": [1, 4, 5, 6]})
    before = logits(net, data, batch_size=16, progress=False)
    with masked(net, plan):
        after = logits(net, data, batch_size=16, progress=False)
    effect = Effect.between(before, after, data.labels)
    masks = removed_masks(plan)
    assert masks["second"].tolist() == [True, False, True, True, False, False, False, True]
    assert JointCost.of(stats).objective(masks) == pytest.approx(effect.logits, rel=1e-4)


def test_the_effect_is_the_change_of_the_mean_loss():
    before, after = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    effect = Effect.between(before, after, torch.tensor([1, 0]))
    second = torch.log(torch.exp(torch.tensor(2.0)) + 2) - 2
    assert effect.loss == pytest.approx((second - torch.log(torch.tensor(3.0))).item() / 2)
    assert effect.logits == pytest.approx(1.0)


def test_logits_leave_the_training_flags_and_see_every_image():
    net, data = TwoLayers().train(), images(7)
    assert logits(net, data, batch_size=3, progress=False).shape == (7, 4) and net.training


def test_logits_of_different_shapes_are_an_error():
    with pytest.raises(InputError, match=r"\[2, 3\] and \[2, 4\]"):
        Effect.between(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
