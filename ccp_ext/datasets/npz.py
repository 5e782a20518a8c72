"""A user's own images in a NumPy .npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.datasets.splitting import pixel_moments, stratified_indices
from ccp_ext.errors import InputError

# What NumPy and the zip and deflate readers below it raise for a damaged file.
_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def read(path: Path, split: str) -> ImageSet:
    """Read "train" or "test" from the arrays of ``path``.

    images: uint8 ``[N, C, H, W]`` or ``[N, H, W]``; labels: integers ``[N]``, from 0.
    The file holds ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``, or only
    ``images`` and ``labels``, which are then split by class, four fifths for training. The mean
    and std are those of the training part.

    Raises InputError when an array is missing, damaged or of another shape or type.
    """
    arrays = _read_arrays(path)
    if "train_images" in arrays or "test_images" in arrays:
        parts = {part: _pair(path, arrays, f"{part}_") for part in ("train", "test")}
        sizes = [images.shape[1:] for images, _ in parts.values()]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{path}: train_images are {sizes[0]} each but test_images {sizes[1]}; one "
                f"[C, H, W] is needed"
            )
    else:
        images, labels = _pair(path, arrays, "")
        indices = {part: stratified_indices(labels, part) for part in ("train", "test")}
        parts = {part: (images[index], labels[index]) for part, index in indices.items()}
    mean, std = pixel_moments(parts["train"][0])
    num_classes = 1 + max(int(labels.max(initial=-1)) for _, labels in parts.values())
    images, labels = (torch.from_numpy(array) for array in parts[split])
    return ImageSet(images, labels, mean, std, num_classes, path.name, split)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        # A lone .npy array under this name would load too, as something else.
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no zip archive")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _DAMAGED as error:
        raise InputError(f"{path} is not a readable .npz file: {error}") from error


def _pair(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    for name in (f"{prefix}images", f"{prefix}labels"):
        if name not in arrays:
            held = ", ".join(sorted(arrays)) or "nothing"
            raise InputError(f"{path} has no array {name!r}; it holds {held}")
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    return _check_images(path, prefix, images), _check_labels(path, prefix, labels, len(images))


def _check_images(path: Path, prefix: str, images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise InputError(
            f"{path}: {prefix}images must be uint8 of shape [N, C, H, W] or [N, H, W], got "
            f"{images.dtype} of shape {images.shape}"
        )
    if images.ndim == 3:
        return images[:, None]
    if images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        raise InputError(
            f"{path}: {prefix}images of shape {images.shape} have their channels last; "
            f"[N, C, H, W] is accepted, so store images.transpose(0, 3, 1, 2)"
        )
    return images


def _check_labels(path: Path, prefix: str, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"{path}: {prefix}labels must be integers of shape ({count},), one for each image, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0:
        raise InputError(f"{path}: {prefix}labels hold {labels.min()}; labels begin at 0")
    return labels.astype(np.int64)
