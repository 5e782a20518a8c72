"""Groups, weights and protected channels: what goes or stays as one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ccp_ext.errors import InputError
from ccp_ext.selection.arguments import to_integer
from ccp_ext.selection.quadratic import QuadraticCost

_LARGEST_TABLE = 2**31  # entries of the knapsack that rounds masks of unequal weights


@dataclass(frozen=True)
class Items:
    """What goes or stays as one: ``of_channel`` [C] numbers the items, -1 is protected."""

    of_channel: np.ndarray
    weights: np.ndarray

    def merge(self, cost: QuadraticCost) -> QuadraticCost:
        """The cost of masks over the items: sums over their channels, the protected left out."""
        quadratic = self._sum_rows(self._sum_rows(cost.quadratic).T)
        return QuadraticCost(0.5 * (quadratic + quadratic.T), self._sum_rows(cost.linear))

    def _sum_rows(self, values: np.ndarray) -> np.ndarray:
        open_ = self.of_channel >= 0
        sums = np.zeros((len(self.weights), *values.shape[1:]))
        np.add.at(sums, self.of_channel[open_], values[open_])
        return sums

    def expand(self, mask: np.ndarray) -> np.ndarray:
        return np.append(mask, False)[self.of_channel]

    def count(self, r: Any) -> tuple[int, np.ndarray | None]:
        """The number of items to remove where all weigh the same, and None; else in units of the
        weights' greatest common divisor what they weigh, and the weights in this unit."""
        total = int(self.weights.sum())
        asked = to_integer(r)
        if asked is None or not 0 <= asked <= total:
            raise InputError(
                f"select: r must be an integer between 0 and {total}, the weight of all channels "
                f"that are not protected; got {r!r}"
            )
        unit = math.gcd(*self.weights.tolist()) or 1
        scaled = self.weights // unit
        unequal = bool((scaled > 1).any())
        reachable = _reachable(scaled) if unequal else (1 << len(scaled) + 1) - 1
        if asked % unit or not reachable >> asked // unit & 1:
            below, above = _neighbours(reachable, asked // unit, asked % unit > 0)
            raise InputError(
                f"select: no set of channels, groups whole, weighs exactly r={asked}; the nearest "
                f"that can be reached are {below * unit} and {above * unit}"
            )
        return asked // unit, scaled.astype(np.float64) if unequal else None


def to_items(channels: int, weights: Any, groups: Any, protected: Any) -> Items:
    weight = _integers("weights", weights, channels)
    if weight is None:
        weight = np.ones(channels, np.int64)
    elif (weight < 1).any():
        raise InputError(f"select: weights must be positive integers; got {weight.min()}")
    labels = _integers("groups", groups, channels)
    stays = to_protected("select", protected, channels)
    if labels is None:
        labels = np.arange(channels)
    stays = np.isin(labels, labels[stays])
    of_channel = np.full(channels, -1)
    _, first, inverse = np.unique(labels[~stays], return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))  # items in the order of their first channels
    of_channel[~stays] = order[inverse]
    sums = np.zeros(len(first), np.int64)
    np.add.at(sums, of_channel[~stays], weight[~stays])
    return Items(of_channel, sums)


def _integers(name: str, values: Any, channels: int) -> np.ndarray | None:
    if values is None:
        return None
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (channels,) or array.dtype.kind not in "iu":
        raise InputError(
            f"select: {name} must be integers [C] with C = {channels}; got {array.dtype} "
            f"{list(array.shape)}"
        )
    return array.astype(np.int64)


def to_protected(op: str, protected: Any, channels: int) -> np.ndarray:
    stays = np.zeros(channels, bool)
    if protected is None:
        return stays
    given = protected.cpu().numpy() if isinstance(protected, Tensor) else np.asarray(protected)
    indices = given.dtype.kind in "iu" and given.ndim == 1
    valid = indices and bool(((given >= -channels) & (given < channels)).all())
    if not (valid or given.size == 0 or (given.dtype == bool and given.shape == (channels,))):
        raise InputError(
            f"{op}: protected must be bool [C] or indices of C = {channels} channels; got "
            f"{protected!r}"
        )
    stays[given if given.size else []] = True
    return stays


def _reachable(weights: np.ndarray) -> int:
    """Bit t is set if some set of the weights adds up to t."""
    total = int(weights.sum())
    if len(weights) * (total + 1) > _LARGEST_TABLE:
        raise InputError(
            f"select: {len(weights)} items that weigh {total} together are more than are supported "
            f"(a product of {_LARGEST_TABLE}); use coarser weights"
        )
    reachable = 1
    for weight in weights.tolist():
        reachable |= reachable << weight
    return reachable


def _neighbours(reachable: int, asked: int, between: bool) -> tuple[int, int]:
    """The nearest reachable totals below and above: ``asked`` itself if ``between`` it and the
    next lies what was asked for."""
    below = (reachable & ((1 << asked + between) - 1)).bit_length() - 1
    higher = reachable >> asked + 1
    return below, asked + 1 + (higher & -higher).bit_length() - 1
