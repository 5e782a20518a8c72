"""Accuracy and loss of a classifier."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ccp_ext import datasets, models
from ccp_ext.checkpoints import load_model
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import evaluate


def random_set(count: int = 23, num_classes: int = 4) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 2, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (count,), generator=generator)
    labels[0] = num_classes - 1
    return ImageSet(images, labels, (0.5,) * 2, (0.25,) * 2, num_classes, "random", "test")


def classifier(num_classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Dropout(0.9),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_figures_are_those_of_one_whole_batch_in_eval_mode(batch_size):
    image_set, model = random_set(), classifier()
    [(x, y)] = image_set.batches(100)
    with torch.no_grad():
        logits = model.eval()(x).double()
    result = evaluate(model, image_set, batch_size=batch_size, progress=False)
    assert result.count == 23
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
    expected = -logits.log_softmax(1)[torch.arange(23), y].mean().item()
    assert result.loss == pytest.approx(expected, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess():
    model = classifier()
    nn.init.zeros_(model[4].weight)
    nn.init.zeros_(model[4].bias)
    result = evaluate(model, random_set(), progress=False)
    assert result.loss == pytest.approx(math.log(4))


def test_training_flags_and_statistics_are_left_as_they_were():
    model = classifier().train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, random_set(), progress=False)
    assert [module.training for module in model] == [True, True, False, True, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_outputs_that_are_not_finite_are_refused_and_flags_restored():
    model = classifier().train()
    with torch.no_grad():
        model[4].bias[1] = math.nan
    with pytest.raises(InputError, match="outputs are not finite"):
        evaluate(model, random_set(), progress=False)
    assert all(module.training for module in model.modules())


def test_a_label_beyond_the_logits_is_refused():
    with pytest.raises(InputError, match="returns 3 logits, but random has the label 3"):
        evaluate(classifier(3), random_set(), progress=False)


@pytest.mark.parametrize("last", [nn.Identity(), nn.Flatten(0)])
def test_outputs_of_another_shape_are_refused(last):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), last)
    with pytest.raises(InputError, match=r"must return logits of shape \(23, K\)"):
        evaluate(model, random_set(), progress=False)


def test_an_unusable_device_is_refused():
    with pytest.raises(InputError, match="device 'abacus' cannot be used"):
        evaluate(classifier(), random_set(), device="abacus", progress=False)


@pytest.mark.skipif("CCP_DATA" not in os.environ, reason="CCP_DATA does not name a data folder")
def test_a_published_network_reaches_its_known_accuracy_on_real_images():
    """ResNet-56 of akamaster/pytorch_resnet_cifar10: 93.39 on all test images."""
    weights = Path(os.environ["CCP_DATA"]) / "cifar10_weights" / "resnet56-4bfd9763.th"
    model = load_model(lambda: models.create("resnet56"), weights)
    images = datasets.load("cifar10", "test").subset(range(2000))
    assert evaluate(model, images, progress=False).accuracy == pytest.approx(92.95, abs=0.06)
