"""Which channels of one group go: the binary quadratic program with a fixed number of ones.

For the mask ``m`` in {0,1}^C of the REMOVED channels,

    cost(m) = 1/2 m'Sm - u'm        subject to 1'm = r.

The solvers are C++ (``ccp_ext._solver``), run in float64 on one thread, can be interrupted, and
give equal results for equal input unless a time limit stops them.
"""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccp_ext import _solver
from ccp_ext.errors import InputError

METHODS = ("auto", "exact", "branch_and_bound", "greedy", "swap")

# Enumerating this many subsets takes some milliseconds.
_MAX_ENUMERATED = 200_000

# Up to this size some factorisations cost little beside the search.
_MAX_INVERTED = 512
_BISECTIONS = 7
_SMALLEST_SCALE = 1e-100  # beside entries of about 1: F may be zero

_LARGEST_SUM = 1e300
_NO_LIMIT = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Choice:
    """The outcome of :func:`select`.

    Attributes:
        removed: bool [C] on the CPU, true for the channels that go; exactly r are true.
        objective: the cost of ``removed``, computed in float64 from the definition.
        lower_bound: no mask with r ones costs less. Rounding is accounted for, so that the bound
            stays below the true optimum by some units of rounding even where ``removed`` is proven
            optimal; only "exact" gives ``objective`` itself.
        status: "optimal" if ``removed`` is proven to be a minimum up to rounding; else "gap" if it
            is proven to be within the ``gap`` asked for; else "heuristic".
        method: the method that was used: "exact", "branch_and_bound", "greedy" or "swap".
    """

    removed: Tensor
    objective: float
    lower_bound: float
    status: str
    method: str

    @property
    def gap(self) -> float:
        """``objective - lower_bound``: at most so much could be gained, in units of the cost."""
        return self.objective - self.lower_bound


def select(
    F: Any = None,
    *,
    Q: Any = None,
    u: Any = None,
    r: int,
    method: str = "auto",
    time_limit: float = 1.0,
    gap: float = 0.0,
    node_limit: int | None = None,
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
        method:
            - "exact" sorts if F is diagonal and otherwise enumerates all subsets, of which there
              may be at most 200,000.
            - "branch_and_bound" bounds the cost by its convex relaxation over the box, and searches
              until the best mask is proven optimal or a limit is reached. On binary masks
              m_i^2 = m_i, so the least eigenvalue of F is moved into u first: any F will do, but
              one far from positive semidefinite has a weak bound.
            - "greedy" adds the cheapest channel r times, or gives channels back from the full set,
              whichever ends better.
            - "swap" exchanges pairs from both of these starts until no exchange improves (best
              improvement).
            - "auto" is "exact" where that is possible and otherwise "branch_and_bound".
        time_limit: seconds of search for "branch_and_bound", from its start after the
            factorisation of F. A search that ends before is deterministic; one that the clock stops
            has seen a part of the tree that depends on the machine, and its mask and bound may
            differ from run to run. ``time_limit=math.inf`` with a ``node_limit`` is reproducible.
        gap: the search may stop once ``removed`` is proven to be within this much of the minimum
            (absolute, in units of the cost).
        node_limit: nodes of the tree to branch at, at most; 0 leaves the relaxation of the whole
            problem, and None is no limit.
        seed: of the simulated annealing within "branch_and_bound"; the other methods do not draw.

    Among equal minima (up to rounding, where it enumerates) "exact" returns the one whose sorted
    indices come first in lexicographic order.

    Raises:
        InputError: NaN or infinity, a wrong shape, an asymmetric F, r out of range, both F and Q,
            none of F, Q and u, an unknown method, a negative limit or gap, or "exact" with too many
            subsets.
    """
    quadratic, linear = _cost(F, Q, u)
    channels = len(linear)
    count = _count(r, channels)
    if method not in METHODS:
        raise InputError(f"select: method must be one of {', '.join(METHODS)}; got {method!r}")
    limits = _limits(time_limit, gap, node_limit)
    seed = _check_seed("select", seed)

    diagonal = np.diagonal(quadratic)
    separable = np.count_nonzero(quadratic) == np.count_nonzero(diagonal)
    subsets = math.comb(channels, count)
    if method == "auto":
        possible = separable or subsets <= _MAX_ENUMERATED
        method = "exact" if possible else "branch_and_bound"
    if method == "exact":
        if separable:
            mask = _cheapest(0.5 * diagonal - linear, count)
        elif subsets <= _MAX_ENUMERATED:
            mask = _solver.enumerate(quadratic, linear, count)
        else:
            raise InputError(
                f"select: method='exact' enumerates at most {_MAX_ENUMERATED} subsets, and there "
                f"are about 10^{math.log10(subsets):.1f} of r={count} out of {channels} channels; "
                "use method='auto' or 'branch_and_bound'"
            )
        objective = _solver.objective(quadratic, linear, mask)
        return Choice(torch.from_numpy(mask), objective, objective, "optimal", method)
    if method == "branch_and_bound":
        return _branch_and_bound(quadratic, linear, count, limits, seed)
    masks = _solver.greedy(quadratic, linear, count)
    if method == "swap":
        masks = [_solver.swap_descent(quadratic, linear, mask) for mask in masks]
    mask = min(masks, key=lambda m: _solver.objective(quadratic, linear, m))
    objective = _solver.objective(quadratic, linear, mask)
    lower_bound = min(objective, _solver.lower_bound(quadratic, linear, count))
    return Choice(torch.from_numpy(mask), objective, lower_bound, "heuristic", method)


@dataclass(frozen=True)
class _Limits:
    seconds: float
    gap: float
    nodes: int


def _branch_and_bound(
    quadratic: np.ndarray, linear: np.ndarray, count: int, limits: _Limits, seed: int
) -> Choice:
    # Scaling by a power of two is exact and keeps squares of the entries in range.
    exponent = max(_exponent(quadratic), _exponent(linear))
    quadratic, linear = np.ldexp(quadratic, -exponent), np.ldexp(linear, -exponent)
    convex, shifted, defect = _convexified(quadratic, linear)
    mask, bound, complete, rounding, _ = _solver.branch_and_bound(
        convex,
        shifted,
        count,
        defect=defect,
        time_limit=limits.seconds,
        node_limit=limits.nodes,
        gap=float(np.ldexp(limits.gap, -exponent)),
        seed=seed,
    )
    objective = _solver.objective(quadratic, linear, mask)
    bound = min(bound, objective)
    if not complete:
        bound = max(bound, min(objective, _solver.lower_bound(quadratic, linear, count)))
    status = "gap" if complete else "heuristic"
    if objective - bound <= 2 * rounding:
        status = "optimal"
    objective, bound = (float(np.ldexp(value, exponent)) for value in (objective, bound))
    return Choice(torch.from_numpy(mask), objective, bound, status, "branch_and_bound")


def _exponent(values: np.ndarray) -> int:
    return math.frexp(np.abs(values).max(initial=0.0))[1]


def _convexified(quadratic: np.ndarray, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A cost that is equal on masks and convex but for rounding: S + diag(d) and u + d/2, with a
    ``defect`` such that no eigenvalue of the new S is below ``-defect``.

    The less is added, the better the relaxation (A. Billionnet and S. Elloumi, "Using a mixed
    integer quadratic programming solver for the unconstrained quadratic 0-1 problem", 2007). S is
    lowered where it is definite: -d = t / diag(S^-1), with the largest t of a few bisections. A
    Cholesky factorisation that runs to its end proves the defect (S. M. Rump, "Verification of
    positive definiteness", 2006).
    """
    channels = len(linear)
    scale = np.trace(np.abs(quadratic)) + _SMALLEST_SCALE
    rounding = 2 * (channels + 2) * np.finfo(np.float64).eps

    def shifted(shift: np.ndarray | float) -> np.ndarray:
        return quadratic + np.diag(np.broadcast_to(shift, channels))

    def factorises(shift: np.ndarray | float) -> bool:
        try:
            np.linalg.cholesky(shifted(shift))
        except np.linalg.LinAlgError:
            return False
        return True

    ridge = 2 * rounding * scale
    shift = np.full(channels, ridge)
    if not factorises(ridge):
        least = np.linalg.eigvalsh(quadratic)[0]
        while not factorises(ridge - least):
            ridge *= 2
        shift[:] = ridge - least
    elif channels <= _MAX_INVERTED:
        alone = 1 / np.abs(np.diagonal(np.linalg.inv(shifted(ridge))))
        proven, failed = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = 0.5 * (proven + failed)
            if factorises(ridge - middle * alone):
                proven = middle
            else:
                failed = middle
        shift = ridge - proven * alone
    convex = shifted(shift)
    return convex, linear + 0.5 * shift, rounding * np.trace(np.abs(convex))


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


def _limits(time_limit: Any, gap: Any, node_limit: Any) -> _Limits:
    for name, value in (("time_limit", time_limit), ("gap", gap)):
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and value >= 0):
            raise InputError(f"select: {name} must be a number >= 0; got {value!r}")
    try:
        nodes = _NO_LIMIT if node_limit is None else operator.index(node_limit)
    except TypeError:
        nodes = -1
    if isinstance(node_limit, bool) or not 0 <= nodes <= _NO_LIMIT:
        raise InputError(f"select: node_limit must be an integer >= 0 or None; got {node_limit!r}")
    return _Limits(float(time_limit), float(gap), nodes)


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
