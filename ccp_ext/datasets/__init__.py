"""Image sets: CIFAR-10, the digits of scikit-learn, and a user's own arrays and photos."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ccp_ext.datasets import cifar10, digits, folder, npz
from ccp_ext.datasets.image_set import ImageSet, crop_flip
from ccp_ext.errors import InputError

__all__ = ["ImageSet", "crop_flip", "load"]

SPLITS = ("train", "test", "all")
DATA_FOLDER_VARIABLE = "CCP_DATA"


def load(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    root: str | os.PathLike[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
) -> ImageSet:
    """Load a data set into memory.

    source: "digits" (scikit-learn); "cifar10", the folder ``cifar10`` in ``root``, by default in
    the folder that the environment variable CCP_DATA names; a folder with CIFAR-10 in it; a folder
    with photos by class (see ccp_ext.datasets.folder), which stay on disk until they are needed; or
    an .npz file with ``images`` and ``labels`` (see ccp_ext.datasets.npz).
    split: "train", "test", or "all" (train, then test).
    mean, std, num_classes: in place of the set's own. CIFAR-10's are the customary .485 .456 .406
    and .229 .224 .225, and so are those of photos; the others' are measured on their training part.

    Raises InputError for anything missing, damaged or out of range.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    given = {"mean": mean, "std": std, "num_classes": num_classes}
    given = {option: value for option, value in given.items() if value is not None}
    if split == "all":
        image_set = _join(_read(source, "train", root), _read(source, "test", root))
    else:
        image_set = _read(source, split, root)
    return dataclasses.replace(image_set, **given)


def _read(
    source: str | os.PathLike[str], split: str, root: str | os.PathLike[str] | None
) -> ImageSet:
    if source == "digits":
        return digits.read(split)
    if source == "cifar10":
        return cifar10.read(_data_folder(root) / "cifar10", split)
    path = Path(source)
    if path.is_dir():
        return (folder if folder.holds_photos(path) else cifar10).read(path, split)
    if path.suffix == ".npz" and path.is_file():
        return npz.read(path, split)
    raise InputError(
        f"data set {os.fspath(source)!r} is unknown: give digits, cifar10, an existing folder "
        f"with CIFAR-10 or with photos by class, or an existing .npz file"
    )


def _data_folder(root: str | os.PathLike[str] | None) -> Path:
    folder = root or os.environ.get(DATA_FOLDER_VARIABLE)
    if not folder:
        raise InputError(
            f"cifar10 is looked for in the folder that root or the environment variable "
            f"{DATA_FOLDER_VARIABLE} names, and neither is given"
        )
    return Path(folder)


def _join(train: ImageSet, test: ImageSet) -> ImageSet:
    if isinstance(train.images, folder.Photos):
        images = folder.Photos(train.images.files + test.images.files)
    else:
        images = torch.cat([train.images, test.images])
    labels = torch.cat([train.labels, test.labels])
    return dataclasses.replace(train, images=images, labels=labels, split="all")
