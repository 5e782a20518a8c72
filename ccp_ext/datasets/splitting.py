"""A fixed train/test split for data that comes without one."""

from __future__ import annotations

import numpy as np

TEST_FRACTION = 0.2
SPLIT_SEED = 0


def stratified_indices(labels: np.ndarray, split: str) -> np.ndarray:
    """Indices (int64, ascending) of the "train" or "test" part of data with these labels ``[N]``.

    Every class gives a fifth of its images, rounded, to the test part. The choice depends on the
    labels alone, so that all runs agree on it.
    """
    # RandomState, not default_rng: NumPy promises that its stream never changes.
    random = np.random.RandomState(SPLIT_SEED)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        in_test[members[: round(TEST_FRACTION * len(members))]] = True
    return np.flatnonzero(in_test == (split == "test"))


def pixel_moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 ``[N, C, H, W]`` scaled to 0..1."""
    counts = np.stack(
        [np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])]
    )
    values = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ values
    variance = share @ values**2 - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    # A constant channel carries nothing; dividing by 1 leaves it at 0.
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())
