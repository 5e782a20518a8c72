"""The cost 1/2 m'Sm - u'm in float64, from whatever holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccp_ext import _solver
from ccp_ext.errors import InputError

_LARGEST_SUM = 1e300


@dataclass(frozen=True)
class QuadraticCost:
    """S [C, C], exactly symmetric, and u [C]: finite, C-contiguous, float64.

    ``defect`` is such that no eigenvalue of S is below its negative, where that is known.
    """

    quadratic: np.ndarray
    linear: np.ndarray
    defect: float | None = None


@np.errstate(over="ignore", invalid="ignore")
def quadratic_cost(F: Any, Q: Any, u: Any, op: str = "select") -> QuadraticCost:
    if F is not None and Q is not None:
        raise InputError(f"{op}: both F and Q are given; give F, or Q for F = Q'Q / N")
    linear = None if u is None else _array("u", u, 1, op)[0]
    total = 0.0
    if F is not None:
        quadratic, total = _symmetric(*_array("F", F, 2, op), op)
    elif Q is not None:
        samples = _array("Q", Q, 2, op)[0]
        if len(samples) == 0:
            raise InputError(f"{op}: Q needs at least one sample; got shape {samples.shape}")
        products = samples.T @ samples
        products /= len(samples)
        quadratic, total = _symmetric(products, np.finfo(np.float64).eps, op)
    elif linear is not None:
        quadratic = np.zeros((len(linear), len(linear)))
    else:
        raise InputError(f"{op}: none of F, Q and u is given; give F, Q or a linear term u")
    if linear is None:
        linear = np.zeros(len(quadratic))
    if len(linear) != len(quadratic):
        raise InputError(
            f"{op}: u must have shape [C] with C = {len(quadratic)}; got [{len(linear)}]"
        )
    total += np.abs(linear).sum()
    if not total < _LARGEST_SUM:
        raise InputError(
            f"{op}: the absolute values must add up to less than {_LARGEST_SUM:g}, so that no "
            f"cost overflows; they add up to {total:.3g}"
        )
    return QuadraticCost(quadratic, linear)


def _array(name: str, value: Any, ndim: int, op: str) -> tuple[np.ndarray, float]:
    """The value as float64 and the machine epsilon of the dtype it came in."""
    if isinstance(value, Tensor):
        real, floating = not value.is_complex(), value.is_floating_point()
    else:
        value = np.asarray(value)
        real, floating = value.dtype.kind in "fiub", value.dtype.kind == "f"
    if not real:
        raise InputError(f"{op}: {name} must hold real numbers; got {value.dtype}")
    finfo = torch.finfo if isinstance(value, Tensor) else np.finfo
    eps = float(finfo(value.dtype).eps) if floating else 0.0
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    array = np.ascontiguousarray(value, np.float64) if value.ndim else value.astype(np.float64)
    if array.ndim != ndim:
        expected = {1: "[C]", 2: "[C, C]" if name == "F" else "[N, C]"}[ndim]
        raise InputError(f"{op}: {name} must have shape {expected}; got {list(array.shape)}")
    if not np.isfinite(array.sum()) and not (finite := np.isfinite(array)).all():
        where = [int(k) for k in np.argwhere(~finite)[0]]
        raise InputError(f"{op}: {name} must be finite; {name}{where} is {array[tuple(where)]}")
    return array, max(eps, float(np.finfo(np.float64).eps))


def _symmetric(matrix: np.ndarray, eps: float, op: str) -> tuple[np.ndarray, float]:
    """The mean of the matrix and its transpose, if these differ by no more than rounding, and the
    sum of the absolute values."""
    if matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"{op}: F must have shape [C, C]; got {list(matrix.shape)}")
    mean, asymmetry, largest, total = _solver.symmetrise(matrix)
    allowed = math.sqrt(eps) * largest
    if asymmetry > allowed:
        raise InputError(
            f"{op}: F must be symmetric; max |F - F'| is {asymmetry:.3g}, and {allowed:.3g} is "
            "accepted as rounding"
        )
    return mean, total


def mean_of_random(cost: QuadraticCost, count: int, weights: np.ndarray | None) -> float:
    """The mean cost over all masks with ``count`` ones; for unequal weights over masks that draw
    every item independently, with ``count`` as the mean weight."""
    channels = len(cost.linear)
    if channels == 0:
        return 0.0
    if weights is None:
        one = count / channels
        two = one * (count - 1) / max(1, channels - 1)
    else:
        one = count / float(weights.sum())
        two = one * one
    trace = float(np.trace(cost.quadratic))
    off_diagonal = float(cost.quadratic.sum()) - trace
    return 0.5 * (one * trace + two * off_diagonal) - one * float(cost.linear.sum())


def in_range(cost: QuadraticCost) -> tuple[QuadraticCost, int]:
    """The cost times 2^-exponent, which is exact and keeps squares of the entries in range."""
    largest = max(_largest(cost.quadratic), _largest(cost.linear))
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= 64:
        return cost, 0
    defect = None if cost.defect is None else float(np.ldexp(cost.defect, -exponent))
    scaled = [np.ldexp(values, -exponent) for values in (cost.quadratic, cost.linear)]
    return QuadraticCost(*scaled, defect), exponent


def _largest(values: np.ndarray) -> float:
    return max(values.max(initial=0.0), -values.min(initial=0.0))
