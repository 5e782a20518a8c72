"""Networks for small images, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ccp_ext.errors import InputError
from ccp_ext.models.mobilenetv2 import MobileNetV2
from ccp_ext.models.resnet import IdentityPadShortcut, ResNet
from ccp_ext.models.vgg import VGG16

__all__ = ["IdentityPadShortcut", "MobileNetV2", "ResNet", "VGG16", "create", "names"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{6 * n + 2}": partial(ResNet, n) for n in (1, 3, 5, 7, 9, 18)},
    "vgg16_bn": VGG16,
    "mobilenetv2": MobileNetV2,
}


def names() -> list[str]:
    """The names that :func:`create` knows."""
    return list(_MODELS)


def create(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build a network with random weights from the global generator.

    Args:
        name: one of :func:`names`.
        num_classes: number of logits.
        options: ``in_channels`` (default 3) for all; ``width_mult`` for ``mobilenetv2``.

    Raises:
        InputError: unknown name or option.
    """
    if name not in _MODELS:
        raise InputError(f"model must be one of {', '.join(names())}; got {name!r}")
    known = {"in_channels", "width_mult"} if name == "mobilenetv2" else {"in_channels"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise InputError(
            f"model {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    return _MODELS[name](num_classes=num_classes, **options)
