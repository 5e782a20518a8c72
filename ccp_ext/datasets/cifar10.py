"""CIFAR-10 (Krizhevsky 2009): six sprite images, or the official Python pickles."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NUM_CLASSES = 10

TILE = 32
TILES_A_ROW = 50
SPRITES = {"train": [f"cifar10_train{k}.webp" for k in range(1, 6)], "test": ["cifar10_test.webp"]}
PICKLES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
PICKLE_FOLDER = "cifar-10-batches-py"

# (images [N, 3, 32, 32], labels [N]) of one file
Part = tuple[np.ndarray, np.ndarray]


def read(folder: Path, split: str) -> ImageSet:
    """Read "train" (five files) or "test" (one) from ``folder``, in the official order.

    Two layouts are known. Sprites: ``cifar10_train1.webp`` .. ``cifar10_train5.webp``,
    ``cifar10_test.webp``, each 50 columns of 32x32 tiles with the same number of tiles, and
    ``labels.txt``, one digit an image, training images first. Pickles: the official
    ``data_batch_1`` .. ``data_batch_5`` and ``test_batch``, in ``folder`` or in its
    ``cifar-10-batches-py``.

    Raises InputError when a file is missing, damaged or of another shape.
    """
    if (folder / SPRITES[split][0]).is_file():
        parts = _read_sprites(folder, split)
    else:
        parts = _read_pickles(_pickle_folder(folder, split), split)
    images = torch.from_numpy(np.concatenate([part[0] for part in parts]))
    labels = torch.from_numpy(np.concatenate([part[1] for part in parts]))
    return ImageSet(images, labels, MEAN, STD, NUM_CLASSES, "cifar10", split)


def _read_sprites(folder: Path, split: str) -> list[Part]:
    labels = _read_labels(folder / "labels.txt").reshape(6, -1)
    labels = labels[:5] if split == "train" else labels[5:]
    paths = [folder / name for name in SPRITES[split]]
    with ThreadPoolExecutor(len(paths)) as pool:
        tiles = list(pool.map(_read_sprite, paths))
    for path, images in zip(paths, tiles, strict=True):
        if len(images) != labels.shape[1]:
            raise InputError(
                f"{path} holds {len(images)} tiles, but labels.txt has {labels.shape[1]} labels "
                f"for each of the six sprites"
            )
    return list(zip(tiles, labels, strict=True))


def _read_labels(path: Path) -> np.ndarray:
    digits = "".join(_read_bytes(path).decode("ascii", "replace").split())
    wrong = next((c for c in digits if c not in "0123456789"), None)
    if wrong is not None:
        raise InputError(f"{path}: label {wrong!r} is not a digit 0..9")
    if not digits or len(digits) % 6:
        raise InputError(f"{path} holds {len(digits)} labels, which is not six equal parts")
    return np.frombuffer(digits.encode(), np.uint8).astype(np.int64) - ord("0")


def _read_sprite(path: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise InputError(f"{path} needs Pillow to be decoded: pip install pillow") from None
    data = io.BytesIO(_read_bytes(path))
    try:
        with Image.open(data) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} is not a whole image: {error}") from error
    height, width, _ = pixels.shape
    if width != TILES_A_ROW * TILE or height % TILE:
        raise InputError(
            f"{path} is {width} x {height} pixels; a sprite is {TILES_A_ROW * TILE} wide and a "
            f"multiple of {TILE} high"
        )
    tiles = pixels.reshape(height // TILE, TILE, TILES_A_ROW, TILE, 3)
    return tiles.transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)


def _pickle_folder(folder: Path, split: str) -> Path:
    for candidate in (folder, folder / PICKLE_FOLDER):
        if (candidate / PICKLES[split][0]).is_file():
            return candidate
    raise InputError(
        f"{folder} holds no CIFAR-10 {split} part: neither {SPRITES[split][0]} nor "
        f"{PICKLES[split][0]} (directly or in {PICKLE_FOLDER}) is there"
    )


def _read_pickles(folder: Path, split: str) -> list[Part]:
    return [_read_pickle(folder / name) for name in PICKLES[split]]


def _read_pickle(path: Path) -> Part:
    try:
        content = _ArrayUnpickler(io.BytesIO(_read_bytes(path)), encoding="bytes").load()
        images, labels = content[b"data"], np.array(content[b"labels"], ndmin=1)
    except InputError:
        raise
    # Damage can surface at any opcode, as nearly any exception.
    except Exception as error:
        raise InputError(f"{path} is not a CIFAR-10 batch: {error!r}") from error
    if labels.ndim != 1 or labels.dtype.kind != "i":
        raise InputError(f"{path}: labels must be a list of integers, got {labels.dtype}")
    expected = (len(labels), 3 * TILE * TILE)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != expected:
        found = getattr(images, "dtype", type(images).__name__), getattr(images, "shape", None)
        raise InputError(
            f"{path}: data must be a uint8 array of shape {expected}, got {found[0]} of shape "
            f"{found[1]}"
        )
    return images.reshape(-1, 3, TILE, TILE), labels.astype(np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numeric arrays and plain containers; a pickle could otherwise run any code."""

    _reconstruct = np.zeros(0).__reduce__()[0]
    _admitted = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    }

    def find_class(self, module: str, name: str) -> object:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted here") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
