"""Random masks, the control of an experiment."""

from __future__ import annotations

import torch
from torch import Tensor

from ccp_ext import _solver
from ccp_ext.errors import InputError
from ccp_ext.selection.arguments import to_count, to_integer, to_seed


def random_subset(channels: int, r: int, seed: int = 0) -> Tensor:
    """A uniformly random mask with ``r`` of ``channels`` set: the control of an experiment.

    The generator is the package's own: no global state, and the same mask for a seed everywhere.

    Args:
        seed: 0 <= seed < 2^64.

    Returns:
        bool [channels] on the CPU.

    Raises:
        InputError: an argument out of range.
    """
    size = to_integer(channels)
    if size is None or size < 0:
        raise InputError(f"random_subset: channels must be an integer >= 0; got {channels!r}")
    count = to_count(r, size, op="random_subset")
    return torch.from_numpy(_solver.random_subset(size, count, to_seed("random_subset", seed)))
