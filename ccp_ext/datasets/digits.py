"""The 1,797 handwritten digits of 8x8 pixels that scikit-learn carries."""

from __future__ import annotations

import numpy as np
import torch

from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.datasets.splitting import pixel_moments, stratified_indices
from ccp_ext.errors import InputError

BRIGHTEST = 16


def read(split: str) -> ImageSet:
    """Read "train" (four fifths of each digit) or "test"; images ``[N, 1, 8, 8]``, 10 classes.

    Raises InputError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "the digits data set needs scikit-learn: pip install scikit-learn"
        ) from None
    values, labels = load_digits(return_X_y=True)
    images = np.rint(values * (255 / BRIGHTEST)).astype(np.uint8).reshape(-1, 1, 8, 8)
    mean, std = pixel_moments(images[stratified_indices(labels, "train")])
    index = stratified_indices(labels, split)
    return ImageSet(
        torch.from_numpy(images[index]),
        torch.from_numpy(labels[index].astype(np.int64)),
        mean,
        std,
        num_classes=10,
        name="digits",
        split=split,
    )
