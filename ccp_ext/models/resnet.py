"""Residual networks for 32x32 images (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class IdentityPadShortcut(nn.Module):
    """The parameter-free shortcut of the paper's option A, ``[N, C, H, W]`` to a wider stage.

    Takes every second row and column and adds channels of zeros.

    Attributes:
        channel_padding: zero channels before and after the input's; surgery edits it.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.channel_padding = (before, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.channel_padding))

    def extra_repr(self) -> str:
        return f"channel_padding={self.channel_padding}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ``[N, inputs, H, W]`` to ``[N, planes, H', W']``."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        # Without a stride the shortcut is the identity.
        self.shortcut = IdentityPadShortcut(planes // 4, planes // 4) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """ResNet-(6n+2): three stages of n blocks with 16, 32 and 64 planes.

    Args:
        n: blocks in each stage.
        num_classes: number of logits K.
        in_channels: channels of the images.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, K]``.
    """

    def __init__(self, n: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(n, 16, 16, stride=1)
        self.layer2 = _stage(n, 16, 32, stride=2)
        self.layer3 = _stage(n, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(n: int, inputs: int, planes: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(n - 1)))
