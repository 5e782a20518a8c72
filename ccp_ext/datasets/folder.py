"""Photos in folders, one for each class."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.datasets.splitting import stratified_indices
from ccp_ext.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# ImageNet's customary statistics, and the window that its networks are evaluated on.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SHORTER_SIDE, WINDOW = 256, 224
BILINEAR, MIRROR = 2, 0  # of Pillow's Resampling and Transpose; Pillow is optional
# Of the crops for training: the least share of a photo's area, and the most its sides differ by.
LEAST_AREA, MOST_ASPECT = 0.08, 4 / 3
# By split the folders that it may lie in.
PARTS = {"train": ("train",), "test": ("val", "test")}


class Photos:
    """Files in place of a uint8 tensor ``[N, 3, 224, 224]``, decoded when they are asked for.

    The shorter side is scaled to 256 pixels (bilinear, antialiased) and the central window of
    224 x 224 cut out: the customary evaluation of ImageNet networks.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(self, files: Sequence[Path], device: torch.device | str = "cpu") -> None:
        self.files = list(files)
        self.device = torch.empty(0, device=device).device  # with its number

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.files), 3, WINDOW, WINDOW))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """The photos at an index, as a tensor has them; those of many by as many threads as CPUs.

        Raises InputError for a file that is damaged or no picture.
        """
        if isinstance(index, int):
            return self[torch.tensor([index])][0]
        chosen = self.files[index] if isinstance(index, slice) else self._at(index)
        return self._decoded(read_window, chosen)

    def resized_crops(self, index: Tensor, draws: Tensor) -> Tensor:
        """As ``self[index]``, but of each photo a random part, scaled to 224 x 224.

        index: int64 ``[B]``; draws: float32 ``[B, 5]``, see :func:`read_crop`.
        """
        return self._decoded(read_crop, self._at(index), draws.tolist())

    def index_select(self, dim: int, index: Tensor) -> Photos:
        """The same for fewer files, which are not decoded yet; ``dim`` is 0, as with a tensor."""
        return Photos(self._at(index), self.device)

    def to(self, device: torch.device | str) -> Photos:
        return Photos(self.files, device)

    def fingerprint(self) -> Tensor:
        """Of the names and sizes, by which files that changed are known without being read."""
        lines = (f"{file.parent.name}/{file.name} {file.stat().st_size}" for file in self.files)
        digest = hashlib.sha256("\n".join(lines).encode()).digest()
        return torch.tensor(list(digest), dtype=torch.uint8)

    def _decoded(self, read: Callable[..., np.ndarray], *arguments: Sequence) -> Tensor:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            windows = list(pool.map(read, *arguments))
        stack = np.stack(windows) if windows else np.empty((0, WINDOW, WINDOW, 3), np.uint8)
        return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous().to(self.device)

    def _at(self, index: Tensor) -> list[Path]:
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        return [self.files[i] for i in index.tolist()]


def holds_photos(folder: Path) -> bool:
    """Whether the folder holds folders of photos."""
    return bool(_classes(_part(folder, "train") or folder))


def read(folder: Path, split: str) -> ImageSet:
    """The "train" or "test" part of the photos in ``folder``; classes are in their names' order.

    Either ``train/CLASS/*.jpg`` beside ``val/CLASS/*.jpg`` (or ``test``), or ``CLASS/*.jpg`` alone,
    which is then split by class, four fifths for training. jpg, jpeg, png, webp and bmp are read.

    Raises InputError when a part is missing, a class in it is empty, there are fewer than two
    classes, or the parts' classes differ.
    """
    parts = {name: _part(folder, name) for name in PARTS}
    if parts["train"] is None:
        classes = _classes(folder)
        files, labels = _files(folder, classes)
        chosen = stratified_indices(labels, split)
        files, labels = [files[i] for i in chosen], labels[chosen]
    else:
        classes = _classes(parts["train"])
        for part in filter(None, parts.values()):
            empty = {entry.name for entry in part.iterdir() if entry.is_dir()} - {*_classes(part)}
            if empty:
                raise InputError(f"{part / min(empty)} holds no photos ({', '.join(EXTENSIONS)})")
        if parts["test"] is None:
            raise InputError(f"{folder} holds train, but neither {' nor '.join(PARTS['test'])}")
        differing = sorted(set(classes) ^ set(_classes(parts["test"])))
        if differing:
            raise InputError(
                f"{folder}: {parts['test'].name} and train must hold the same classes; "
                f"{differing[0]!r} is only in one of them"
            )
        files, labels = _files(parts[split], classes)
    if len(classes) < 2:
        raise InputError(f"{folder} holds photos of one class, {classes[0]!r}; it takes two")
    return ImageSet(
        Photos(files), torch.from_numpy(labels), MEAN, STD, len(classes), folder.name, split
    )


def read_window(file: Path) -> np.ndarray:
    """uint8 ``[224, 224, 3]``; InputError if the file cannot be decoded."""
    return _read(file, _central_window)


def read_crop(file: Path, draw: Sequence[float]) -> np.ndarray:
    """uint8 ``[224, 224, 3]``: a random part of a photo (Szegedy et al. 2015, section 6).

    draw: five numbers in [0, 1): area (from 8% of the photo's on), ratio of the sides (3/4 to 4/3,
    uniform in its logarithm), place from left to right and from top to bottom, and whether it is
    mirrored. A side that is longer than the photo is cut to it.

    Raises InputError if the file cannot be decoded.
    """
    return _read(file, lambda photo: _resized_crop(photo, draw))


def _central_window(photo: Image) -> Image:
    width, height = (side * SHORTER_SIDE // min(photo.size) for side in photo.size)
    left, top = round((width - WINDOW) / 2), round((height - WINDOW) / 2)
    photo = photo.resize((width, height), BILINEAR)
    return photo.crop((left, top, left + WINDOW, top + WINDOW))


def _resized_crop(photo: Image, draw: Sequence[float]) -> Image:
    share, aspect, across, down, mirrored = draw
    area = photo.width * photo.height * (LEAST_AREA + (1 - LEAST_AREA) * share)
    ratio = MOST_ASPECT ** (2 * aspect - 1)
    width = max(1, min(photo.width, round(math.sqrt(area * ratio))))
    height = max(1, min(photo.height, round(math.sqrt(area / ratio))))
    left = int(across * (photo.width - width + 1))
    top = int(down * (photo.height - height + 1))
    crop = photo.crop((left, top, left + width, top + height)).resize((WINDOW, WINDOW), BILINEAR)
    return crop.transpose(MIRROR) if mirrored >= 0.5 else crop


def _read(file: Path, cut: Callable[[Image], Image]) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise InputError(f"{file} needs Pillow to be decoded: pip install pillow") from None
    try:
        with Image.open(file) as photo:
            return np.asarray(cut(photo.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} is not a readable picture: {error}") from error


def _part(folder: Path, split: str) -> Path | None:
    """The folder of a split; one with photos of its own is that of a class."""
    candidates = (folder / name for name in PARTS[split])
    return next((part for part in candidates if part.is_dir() and _classes(part)), None)


def _classes(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and any(_photos(entry))
    )


def _files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    by_class = [sorted(_photos(folder / name)) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in by_class])
    return [file for files in by_class for file in files], labels


def _photos(folder: Path) -> Iterator[Path]:
    return (file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS)
