from __future__ import annotations

import pytest
import torch
from small_networks import output

from ccp_ext import measure, models
from ccp_ext.errors import InputError


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet20", 0.27e6),
        ("resnet32", 0.46e6),
        ("resnet44", 0.66e6),
        ("resnet56", 0.85e6),
        ("resnet110", 1.7e6),
    ],
)
def test_resnets_have_the_parameter_counts_of_the_paper(name, published):
    assert measure.parameters(models.create(name)) == pytest.approx(published, rel=0.02)


def test_resnet_tensors_have_the_names_that_public_checkpoints_use():
    names = models.create("resnet20").state_dict().keys()
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer2.2.bn2.bias",
        "layer3.0.conv2.weight",
        "linear.weight",
        "linear.bias",
    } <= names
    assert not any("shortcut" in name for name in names)


@pytest.mark.parametrize(
    ("name", "in_channels"),
    [("resnet8", 1), ("resnet8", 3), ("resnet20", 3), ("vgg16_bn", 1), ("mobilenetv2", 1)],
)
def test_models_give_logits_for_images_with_any_number_of_channels(name, in_channels):
    model = models.create(name, num_classes=7, in_channels=in_channels).eval()
    assert output(model, torch.randn(1, in_channels, 32, 32)).shape == (1, 7)


def test_shortcut_subsamples_and_pads_with_zero_channels():
    shortcut = models.IdentityPadShortcut(1, 2)
    x = torch.arange(32.0).reshape(1, 2, 4, 4) + 1
    y = shortcut(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert y.shape == (1, 5, 2, 2)
    assert not y[:, [0, 3, 4]].any()
    shortcut.channel_padding = (0, 1)
    assert shortcut(x).shape == (1, 3, 2, 2)


def test_mobilenet_width_scales_all_stages():
    narrow = models.create("mobilenetv2", width_mult=0.5)
    wide = models.create("mobilenetv2")
    # Widths halve, those below 16 are rounded up, and the last layer keeps its 1280 channels.
    assert 0.25 < measure.parameters(narrow) / measure.parameters(wide) < 0.35
    with pytest.raises(InputError, match="width_mult.*0"):
        models.create("mobilenetv2", width_mult=0)


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(InputError, match="resnet56.*vgg16_bn.*mobilenetv2.*'alexnet'"):
        models.create("alexnet")


def test_unknown_option_names_the_accepted_ones():
    with pytest.raises(InputError, match="'resnet8' has no option width_mult.*in_channels"):
        models.create("resnet8", width_mult=2)
