"""VGG-16 with batch normalisation for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Configuration D of Simonyan and Zisserman (ICLR 2015), batch-normalised, with one classifier.

    Args:
        num_classes: number of logits K.
        in_channels: channels of the images.

    Shape:
        ``[N, in_channels, H, W]``, H and W at least 32, to ``[N, K]``.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for stage in _STAGES:
            for planes in stage:
                convolution = nn.Conv2d(inputs, planes, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]
                inputs = planes
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))
