"""The cost of a group for every number of removed channels, one selection at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccp_ext.selection import select


@dataclass(frozen=True, eq=False)
class Curve:
    """Costs by the number of removed channels.

    Attributes:
        counts: [K] numbers of removed channels, increasing.
        objective: [K] the cost of ``removed``.
        lower_bound: [K] no mask with so many ones costs less.
        removed: bool [K, C].
    """

    counts: np.ndarray
    objective: np.ndarray
    lower_bound: np.ndarray
    removed: Tensor


def curve(F: Any = None, *, u: Any = None, counts: Iterable[int]) -> Curve:
    """The curve at the counts; errors as of :func:`ccp_ext.select`."""
    asked = list(counts)
    choices = [select(F, u=u, r=r, method="swap") for r in asked]
    return Curve(
        np.array(asked),
        np.array([c.objective for c in choices]),
        np.array([c.lower_bound for c in choices]),
        torch.stack([c.removed for c in choices]),
    )
