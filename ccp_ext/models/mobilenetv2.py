"""MobileNetV2 for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from ccp_ext.errors import InputError

# Expansion, planes, blocks, stride of the first block (table 2 of the paper). The first two
# strides of 2 are 1 here: a 32x32 image has no more than three halvings to give.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Inverted residuals with linear bottlenecks (Sandler et al., CVPR 2018).

    Args:
        num_classes: number of logits K.
        in_channels: channels of the images.
        width_mult: factor on all widths, which are then multiples of 8; above 0.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, K]``.

    Raises:
        InputError: ``width_mult`` is not above 0.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, width_mult: float = 1.0
    ) -> None:
        super().__init__()
        if width_mult <= 0:
            raise InputError(f"width_mult must be above 0, got {width_mult!r}")
        inputs = _multiple_of_8(32 * width_mult)
        layers: list[nn.Module] = [_convolution(in_channels, inputs, 3)]
        for expansion, planes, blocks, stride in _STAGES:
            outputs = _multiple_of_8(planes * width_mult)
            for block in range(blocks):
                layers.append(
                    InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion)
                )
                inputs = outputs
        outputs = _multiple_of_8(1280 * max(1.0, width_mult))
        layers.append(_convolution(inputs, outputs, 1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(outputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x)).flatten(1)
        return self.classifier(self.dropout(x))


class InvertedResidual(nn.Module):
    """Expansion, depthwise and linear projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.has_shortcut = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *([_convolution(inputs, hidden, 1)] if expansion > 1 else []),
            _convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.has_shortcut else self.layers(x)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


def _multiple_of_8(width: float) -> int:
    """The nearest multiple of 8 that is at least 8 and not below 90% of ``width``."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
