"""Which channels of one group go: the binary quadratic program with a fixed number of ones.

For the mask ``m`` in {0,1}^C of the REMOVED channels,

    cost(m) = 1/2 m'Sm - u'm        subject to 1'm = r.

The solvers are C++ (``ccp_ext._solver``), run in float64 on one thread, can be interrupted, and
give equal results for equal input.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccp_ext import _solver
from ccp_ext.errors import InputError

METHODS = ("auto", "exact", "greedy", "swap")

# Enumerating this many subsets takes some milliseconds.
_MAX_ENUMERATED = 200_000

_LARGEST_SUM = 1e300


@dataclass(frozen=True, eq=False)
class Choice:
    """The outcome of :func:`select`.

    Attributes:
        removed: bool [C] on the CPU, true for the channels that go; exactly r are true.
        objective: the cost of ``removed``, computed in float64 from the definition.
        lower_bound: no mask with r ones costs less, up to the rounding of ``objective``.
        status: "optimal" if ``removed`` is proven to be a minimum, else "heuristic".
        method: the method that was used: "exact", "greedy" or "swap".
    """

    removed: Tensor
    objective: float
    lower_bound: float
    status: str
    method: str


def select(
    F: Any = None,
    *,
    Q: Any = None,
    u: Any = None,
    r: int,
    method: str = "auto",
    seed: int = 0,
) -> Choice:
    """Choose the ``r`` channels whose removal costs least: min 1/2 m'Fm - u'm over 1'm = r.

    Args:
        F: pairwise term [C, C], symmetric, not necessarily positive semidefinite; None (with ``Q``
            also None) for a purely linear cost. Torch tensor on any device or array, any real
            dtype; the computation is in float64 on the CPU.
        Q: samples [N, C] instead of ``F``, which is then Q'Q / N.
        u: linear term [C]; None is zero.
        r: the number of channels to remove, 0 <= r <= C.
        method: "exact" sorts if F is diagonal and otherwise enumerates all subsets, of which there
            may be at most 200,000; "greedy" adds the cheapest channel r times, or gives channels
            back from the full set, whichever ends better; "swap" exchanges pairs from both of these
            starts until no exchange improves (best improvement); "auto" is "exact" where that is
            possible and otherwise "swap".
        seed: for randomised methods; the present ones are deterministic and give the same result
            for every seed.

    Among equal minima (up to rounding, where it enumerates) "exact" returns the one whose sorted
    indices come first in lexicographic order.

    Raises:
        InputError: NaN or infinity, a wrong shape, an asymmetric F, r out of range, both F and Q,
            none of F, Q and u, an unknown method, or "exact" with too many subsets.
    """
    quadratic, linear = _cost(F, Q, u)
    channels = len(linear)
    count = _count(r, channels)
    if method not in METHODS:
        raise InputError(f"select: method must be one of {', '.join(METHODS)}; got {method!r}")
    _check_seed("select", seed)

    diagonal = np.diagonal(quadratic)
    separable = np.count_nonzero(quadratic) == np.count_nonzero(diagonal)
    subsets = math.comb(channels, count)
    if method == "auto":
        method = "exact" if separable or subsets <= _MAX_ENUMERATED else "swap"
    if method == "exact":
        if separable:
            mask = _cheapest(0.5 * diagonal - linear, count)
        elif subsets <= _MAX_ENUMERATED:
            mask = _solver.enumerate(quadratic, linear, count)
        else:
            raise InputError(
                f"select: method='exact' enumerates at most {_MAX_ENUMERATED} subsets, and there "
                f"are about 10^{math.log10(subsets):.1f} of r={count} out of {channels} channels; "
                "use method='auto' or 'swap'"
            )
        objective = lower_bound = _solver.objective(quadratic, linear, mask)
    else:
        masks = _solver.greedy(quadratic, linear, count)
        if method == "swap":
            masks = [_solver.swap_descent(quadratic, linear, mask) for mask in masks]
        mask = min(masks, key=lambda m: _solver.objective(quadratic, linear, m))
        objective = _solver.objective(quadratic, linear, mask)
        lower_bound = min(objective, _solver.lower_bound(quadratic, linear, count))
    status = "optimal" if method == "exact" else "heuristic"
    return Choice(torch.from_numpy(mask), objective, lower_bound, status, method)


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
    try:
        size = operator.index(channels)
    except TypeError:
        size = -1
    if size < 0:
        raise InputError(f"random_subset: channels must be an integer >= 0; got {channels!r}")
    count = _count(r, size, op="random_subset")
    return torch.from_numpy(_solver.random_subset(size, count, _check_seed("random_subset", seed)))


@np.errstate(over="ignore", invalid="ignore")
def _cost(F: Any, Q: Any, u: Any) -> tuple[np.ndarray, np.ndarray]:
    """S [C, C], exactly symmetric, and u [C]: finite, C-contiguous, float64."""
    if F is not None and Q is not None:
        raise InputError("select: both F and Q are given; give F, or Q for F = Q'Q / N")
    linear = None if u is None else _array("u", u, ndim=1)[0]
    if F is not None:
        quadratic = _symmetric(*_array("F", F, ndim=2))
    elif Q is not None:
        samples = _array("Q", Q, ndim=2)[0]
        if len(samples) == 0:
            raise InputError(f"select: Q needs at least one sample; got shape {samples.shape}")
        quadratic = _symmetric(samples.T @ samples / len(samples), np.finfo(np.float64).eps)
    elif linear is not None:
        quadratic = np.zeros((len(linear), len(linear)))
    else:
        raise InputError("select: none of F, Q and u is given; give F, Q or a linear term u")
    if linear is None:
        linear = np.zeros(len(quadratic))
    if len(linear) != len(quadratic):
        raise InputError(
            f"select: u must have shape [C] with C = {len(quadratic)}; got [{len(linear)}]"
        )
    total = np.abs(quadratic).sum() + np.abs(linear).sum()
    if not total < _LARGEST_SUM:
        raise InputError(
            f"select: the absolute values must add up to less than {_LARGEST_SUM:g}, so that no "
            f"cost overflows; they add up to {total:.3g}"
        )
    return np.ascontiguousarray(quadratic), np.ascontiguousarray(linear)


def _array(name: str, value: Any, ndim: int) -> tuple[np.ndarray, float]:
    """The value as float64 and the machine epsilon of the dtype it came in."""
    if isinstance(value, Tensor):
        real, floating = not value.is_complex(), value.is_floating_point()
    else:
        value = np.asarray(value)
        real, floating = value.dtype.kind in "fiub", value.dtype.kind == "f"
    if not real:
        raise InputError(f"select: {name} must hold real numbers; got {value.dtype}")
    finfo = torch.finfo if isinstance(value, Tensor) else np.finfo
    eps = float(finfo(value.dtype).eps) if floating else 0.0
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    array = value.astype(np.float64)
    if array.ndim != ndim:
        expected = {1: "[C]", 2: "[C, C]" if name == "F" else "[N, C]"}[ndim]
        raise InputError(f"select: {name} must have shape {expected}; got {list(array.shape)}")
    finite = np.isfinite(array)
    if not finite.all():
        where = [int(k) for k in np.argwhere(~finite)[0]]
        raise InputError(f"select: {name} must be finite; {name}{where} is {array[tuple(where)]}")
    return array, max(eps, float(np.finfo(np.float64).eps))


def _symmetric(matrix: np.ndarray, eps: float) -> np.ndarray:
    """The mean of the matrix and its transpose, if these differ by no more than rounding."""
    if matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"select: F must have shape [C, C]; got {list(matrix.shape)}")
    half = 0.5 * matrix
    asymmetry = 2 * np.abs(half - half.T).max(initial=0.0)
    allowed = math.sqrt(eps) * np.abs(matrix).max(initial=0.0)
    if asymmetry > allowed:
        raise InputError(
            f"select: F must be symmetric; max |F - F'| is {asymmetry:.3g}, and {allowed:.3g} is "
            "accepted as rounding"
        )
    return half + half.T


def _count(r: Any, channels: int, op: str = "select") -> int:
    try:
        count = operator.index(r)
    except TypeError:
        count = -1
    if isinstance(r, bool) or not 0 <= count <= channels:
        raise InputError(f"{op}: r must be an integer with 0 <= r <= C = {channels}; got {r!r}")
    return count


def _check_seed(op: str, seed: Any) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**64:
        raise InputError(f"{op}: seed must be an integer with 0 <= seed < 2^64; got {seed!r}")
    return value


def _cheapest(cost: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(len(cost), dtype=bool)
    mask[np.argsort(cost, kind="stable")[:count]] = True
    return mask
