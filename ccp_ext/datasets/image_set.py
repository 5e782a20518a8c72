"""Labelled images, and batches of them without per-image Python."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ccp_ext.errors import InputError

CROP_PADDING = 4
AUGMENTATIONS = ("crop_flip", "resized_crop_flip")
_NAMES = " or ".join(AUGMENTATIONS)
_NOT_FOR_TRAINING = (
    "the test split is for evaluation only and is neither shuffled nor augmented; use the training "
    "split"
)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with one class each.

    images: uint8 ``[N, C, H, W]``, values 0..255, in memory or as
    :class:`ccp_ext.datasets.folder.Photos` on disk; labels: int64 ``[N]``, values
    0..num_classes-1.
    mean, std: per channel, for pixels scaled to 0..1; a batch holds ``(pixel / 255 - mean) / std``.
    split: "train", "test" or "all"; the order of a test split is never changed.

    Raises InputError when the parts do not fit together.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    name: str
    split: str = "train"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        self._check_images()
        self._check_labels()
        self._check_normalisation()

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set with its tensors on ``device``; batches are then cut there."""
        images, labels = self.images.to(device), self.labels.to(device)
        return dataclasses.replace(self, images=images, labels=labels)

    def subset(self, indices: Sequence[int] | range | Tensor) -> ImageSet:
        """The images at ``indices`` (0..N-1, any order, repeats allowed), copied if in memory."""
        index = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices))
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise InputError(
                f"subset: indices must be a one-dimensional list of integers, got "
                f"{index.dtype} of shape {tuple(index.shape)}"
            )
        outside = index[(index < 0) | (index >= len(self))]
        if len(outside):
            raise InputError(
                f"subset: index {outside[0].item()} is outside 0..{len(self) - 1} of {self.name}"
            )
        index = index.to(self.images.device, torch.int64)
        images = self.images.index_select(0, index)
        return dataclasses.replace(self, images=images, labels=self.labels[index])

    def identity(self) -> tuple[Tensor, Tensor]:
        """By what the set is known: pixels, or a fingerprint of those on disk, and labels."""
        return self.images if self._in_memory else self.images.fingerprint(), self.labels

    def num_batches(self, batch_size: int) -> int:
        """How many batches ``batches`` yields; the last may be smaller than the others."""
        return math.ceil(len(self) / batch_size)

    def batches(
        self,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        augment: str | None = None,
        device: torch.device | str | None = None,
        start: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(x, y)``: normalised float32 ``[B, C, H, W]`` and int64 labels ``[B]``.

        The order and the augmentation are functions of ``seed`` alone, the same on every device.
        augment: None, "crop_flip" (see crop_flip), or for photos on disk "resized_crop_flip" (see
        ccp_ext.datasets.folder.read_crop). device: where batches go, by default where the images
        lie. start: the first batch to yield; the batches from there on are those of a pass from 0.
        Photos of the next batch are decoded while one is in use.

        Raises InputError for an option out of range, and for a shuffled or augmented test split.
        """
        self._check_batch_options(batch_size, shuffle, start)
        self.check_augmentation(augment)
        batches = self._stored(batch_size, shuffle, seed, augment, start)
        target = self.images.device if device is None else torch.device(device)
        return self._finished(batches if self._in_memory else _ahead(batches), augment, target)

    def check_augmentation(self, augment: str | None) -> None:
        """Raises InputError for one that is unknown or that these images cannot have."""
        if augment is None:
            return
        if augment not in AUGMENTATIONS:
            raise InputError(f"augment must be None or {_NAMES}, got {augment!r}")
        if self.split == "test":
            raise InputError(f"{self.name}: {_NOT_FOR_TRAINING}")
        if augment == "resized_crop_flip" and self._in_memory:
            raise InputError(
                f"augment 'resized_crop_flip' is for photos in folders, which are cut when they "
                f"are decoded; {self.name} lies in memory at one size and takes crop_flip"
            )

    def _stored(
        self, batch_size: int, shuffle: bool, seed: int, augment: str | None, start: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Images as bytes and labels where they lie, and random numbers to be applied to them."""
        # All random numbers of the pass are drawn first, on the CPU: a pass that begins at a later
        # batch, or feeds another device, sees the same ones.
        generator = torch.Generator().manual_seed(seed)
        count, home = len(self), self.images.device
        order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
        draws = _DRAWS[augment](count, generator) if augment else None
        for first in range(start * batch_size, count, batch_size):
            rows = slice(first, first + batch_size)
            index = order[rows].to(home)
            if augment == "resized_crop_flip":
                images = self.images.resized_crops(index, draws[rows])
            else:
                images = self.images[index]
            yield images, self.labels[index], None if draws is None else draws[rows]

    def _finished(
        self,
        batches: Iterator[tuple[Tensor, Tensor, Tensor | None]],
        augment: str | None,
        target: torch.device,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        with contextlib.closing(batches):
            for images, labels, draws in batches:
                # Transferred as bytes, a quarter of the floats they become on the device.
                images, labels = images.to(target), labels.to(target)
                if augment == "crop_flip":
                    images = crop_flip(images, draws.to(target))
                yield self.normalise(images), labels

    @property
    def _in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[B, C, H, W]`` to float32 ``(pixel / 255 - mean) / std``."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)

    def _check_images(self) -> None:
        images = self.images
        if images.dtype != torch.uint8:
            raise InputError(f"{self.name}: images must be uint8 (0..255), got {images.dtype}")
        if images.ndim != 4 or 0 in images.shape:
            raise InputError(
                f"{self.name}: images must be [N, C, H, W] with no empty dimension, "
                f"got shape {tuple(images.shape)}"
            )

    def _check_labels(self) -> None:
        labels, count = self.labels, len(self.images)
        if labels.dtype != torch.int64 or labels.shape != (count,):
            raise InputError(
                f"{self.name}: labels must be int64 of shape ({count},), one for each image, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.device != self.images.device:
            raise InputError(
                f"{self.name}: labels lie on {labels.device} but images on {self.images.device}"
            )
        outside = ((labels < 0) | (labels >= self.num_classes)).nonzero()
        if len(outside):
            first = int(outside[0])
            raise InputError(
                f"{self.name}: label {int(labels[first])} of image {first} is outside "
                f"0..{self.num_classes - 1} (num_classes={self.num_classes})"
            )

    def _check_normalisation(self) -> None:
        channels = self.images.shape[1]
        for option, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels or not all(map(math.isfinite, values)):
                raise InputError(
                    f"{self.name}: {option} must be {channels} finite numbers, one for each "
                    f"channel, got {values}"
                )
        if min(self.std) <= 0:
            raise InputError(f"{self.name}: std must be above 0, got {self.std}")

    def _check_batch_options(self, batch_size: int, shuffle: bool, start: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if self.split == "test" and shuffle:
            raise InputError(f"{self.name}: {_NOT_FOR_TRAINING}")
        if not 0 <= start <= self.num_batches(batch_size):
            raise InputError(
                f"start must be within 0..{self.num_batches(batch_size)} batches, got {start}"
            )


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same, the next one made by another thread while one is in use."""
    thread = ThreadPoolExecutor(1)
    try:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
    finally:
        # Whoever gives up does not wait: it may be a thread that the other one waits for.
        thread.shutdown(wait=False, cancel_futures=True)


def draw_crop_flips(count: int, generator: torch.Generator) -> Tensor:
    """Random rows for crop_flip: int64 ``[count, 3]`` of (top, left, flip)."""
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (count, 2), generator=generator)
    flips = torch.randint(0, 2, (count, 1), generator=generator)
    return torch.cat([offsets, flips], dim=1)


def crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Pad by 4 black pixels a side, cut out a window of the old size, mirror half of the images.

    images: ``[B, C, H, W]``; draws: int64 ``[B, 3]``, each row (top, left, flip) with offsets
    0..8 (4 is the centre) and flip 0 or 1. The augmentation of He et al. 2016, section 4.2.
    """
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (CROP_PADDING,) * 4)
    rows = draws[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = draws[:, 1:2] + torch.where(draws[:, 2:] == 1, columns.flip(0), columns)
    sample = torch.arange(len(images), device=images.device)
    channel = torch.arange(images.shape[1], device=images.device)
    return padded[
        sample[:, None, None, None],
        channel[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


# The random numbers of each image, by augmentation.
_DRAWS = {
    "crop_flip": draw_crop_flips,
    "resized_crop_flip": lambda count, generator: torch.rand(count, 5, generator=generator),
}
