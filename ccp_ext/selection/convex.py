"""Equal costs on masks, convex for the sake of their relaxation.

A. Billionnet and S. Elloumi, "Using a mixed integer quadratic programming solver for the
unconstrained quadratic 0-1 problem", 2007: on masks m_i^2 = m_i, so that the diagonal can be moved
into the linear term, and the relaxation is the better, the smaller the diagonal that is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from ccp_ext import _solver
from ccp_ext.selection.quadratic import QuadraticCost

FREE = 2  # in the state of a search, beside 0 and 1

_SMALLEST_SCALE = 1e-100  # beside entries of about 1: F may be zero
_SMALLEST_LOWERED = 48  # free channels, of which the search is done in milliseconds
_LARGEST_LOWERED = 1024  # of which no search gets beyond its root
_STEPS = 9
_FACTORISATIONS = 12  # that take as long as a step
_GRANTED = 0.25  # of the time that is left
_BACK = 0.9  # of the way to where S becomes singular
_SMALLEST_MIXED = 384  # free channels, of which the search alone gets further
_ROUNDS, _SWEEPS, _LAST = 1000, 2, 800
_LEAST_MIXING = 100 * 2e-11  # seconds of use, a product of two vectors' entries
_CERTIFYING = 4e-10  # seconds, a cubed channel
_RANK = 1.8  # times the square root of the channels; that of some solution is sqrt(2 n) at most
_COUPLING = 0.05  # of the mean diagonal
_LEAST_GAIN = 0.02  # of a channel that the relaxation decides, beside 1/8 of one at 1/2


def convexified(cost: QuadraticCost) -> QuadraticCost:
    """S + t and u + t/2 with the least t >= 0 that makes S positive semidefinite, and a ``defect``
    such that no eigenvalue of the new S is below ``-defect``.

    A Cholesky factorisation that runs to its end proves the defect (S. M. Rump, "Verification of
    positive definiteness", 2006).
    """
    ridge = 2 * _rounding(cost.quadratic)
    shift = ridge
    if not _factorises(cost.quadratic, ridge):
        least = np.linalg.eigvalsh(cost.quadratic)[0]
        while not _factorises(cost.quadratic, ridge - least):
            ridge *= 2
        shift = ridge - least
    return _shifted(cost, np.full(len(cost.linear), shift))


def lowered_where_free(
    cost: QuadraticCost,
    count: int,
    weights: np.ndarray | None,
    mask: np.ndarray,
    free: np.ndarray,
    seconds: float,
) -> QuadraticCost:
    """S - diag(d) and u - d/2, where S stays positive semidefinite on the ``free`` channels; d is
    zero on the others, which have their value in ``mask``.

    The relaxation at x gains d'(x - x^2) / 2. Affine scaling maximises that (I. I. Dikin, 1967; on
    semidefinite programs S. J. Benson, Y. Ye and X. Zhang, SIAM J. Optim. 10, 2000): a step along
    (M * M)^-1 y with M = (S - diag(d))^-1 and the gains y at the relaxation's present solution.

    Args:
        cost: convex.
        seconds: what the search may take in all; a part of it goes into the steps.
    """
    core = np.flatnonzero(free)
    if not _SMALLEST_LOWERED <= len(core) <= _LARGEST_LOWERED:
        return cost
    decided = mask & ~free
    inner = _restricted(cost, core, decided)
    own = None if weights is None else weights[core]
    total = count - int(np.count_nonzero(decided) if weights is None else weights[decided].sum())
    x = mask[core].astype(np.float64)

    def gain(present: QuadraticCost) -> np.ndarray:
        nonlocal x
        x = _solver.relaxed_minimum(present.quadratic, present.linear, total, x, own)
        return 0.5 * x * (1 - x) + _LEAST_GAIN

    shift = np.zeros(len(free))
    shift[core] = _lowering(inner, gain, _GRANTED * seconds)
    defect = _rounding(_with_diagonal(inner.quadratic, -shift[core]))
    return _shifted(cost, -shift, defect)


def semidefinite_bound(
    cost: QuadraticCost, count: int, mask: np.ndarray, free: np.ndarray, seconds: float, seed: int
) -> float:
    """A lower bound on masks with ``count`` ones that agree with ``mask`` where it is not ``free``.

    That of the relaxation with X in the place of mm', where X - xx' is positive semidefinite,
    X_ii = x_i and products of two entries are not negative, be they m_i or 1 - m_i, whichever x
    expects to be small. Any multipliers D of the diagonal and N >= 0 of the products turn the cost
    into one that is nowhere larger on masks, of S - diag(D) - N; where that is convex, its
    relaxation over the box is the bound (A. Billionnet, S. Elloumi and A. Lambert, "Extending the
    QCR method to general mixed-integer programs", 2012, with equality constraints as here).

    Args:
        cost: convex.
        seconds: what this may take, about.

    Returns:
        The bound, or -infinity if the seconds are too few or numbers overflow.
    """
    core = np.flatnonzero(free)
    size = len(core)
    if size < _SMALLEST_MIXED:
        return -math.inf
    rank = math.ceil(_RANK * math.sqrt(size))
    seconds -= _CERTIFYING * size**3
    if _LEAST_MIXING * rank * size**2 > seconds:
        return -math.inf
    inner = _restricted(cost, core, mask & ~free)
    total = count - int(np.count_nonzero(mask & ~free))
    constant = _solver.objective(cost.quadratic, cost.linear, mask & ~free)
    below, constant_below = _below(inner, total, mask[core], rank, seconds, seed)
    entries = sum(
        float(np.abs(values).sum())
        for values in (below.quadratic, below.linear, cost.quadratic, cost.linear)
    )
    if not math.isfinite(entries):
        return -math.inf
    convex = convexified(below)
    bound = _solver.relaxation_bound(
        convex.quadratic, convex.linear, total, convex.defect, mask[core]
    )
    rounding = 8 * (size + 2) * float(np.finfo(np.float64).eps) * entries
    bound += constant + constant_below - rounding
    return bound if math.isfinite(bound) else -math.inf


def _below(
    cost: QuadraticCost, total: int, mask: np.ndarray, rank: int, seconds: float, seed: int
) -> tuple[QuadraticCost, float]:
    """A cost and a constant to add that are no larger on masks with ``total`` ones."""
    size = len(cost.linear)
    x = _solver.relaxed_minimum(cost.quadratic, cost.linear, total, mask.astype(np.float64))
    slope = cost.quadratic @ x - cost.linear
    price = np.median(slope[np.argsort(np.abs(x - 0.5), kind="stable")[: size // 8 + 1]])
    flipped = x > 0.5
    sign = np.where(flipped, -1.0, 1.0)
    signs = np.outer(sign, sign)
    # coupling / 2 (1'm - total)^2 and the price of 1'm keep the vectors near the constraint.
    coupling = _COUPLING * float(np.diagonal(cost.quadratic).mean())
    coupled = cost.quadratic + coupling
    linear = cost.linear + coupling * total + price
    diagonal, products = _solver.semidefinite_multipliers(
        coupled * signs,
        sign * (linear - coupled @ flipped),
        np.where(flipped, 1 - x, x),
        rank=rank,
        rounds=_ROUNDS,
        sweeps=_SWEEPS,
        last=_LAST,
        time_limit=seconds,
        seed=seed,
    )
    # On masks, coupling / 2 (1'm)^2 equals coupling / 2 total 1'm. The literals' products are
    # those of f + sign m: N costs 1/2 m'(N * signs)m + (sign * Nf)'m + 1/2 f'Nf.
    quadratic = coupled - products * signs
    shift = diagonal - np.diagonal(coupled)
    np.fill_diagonal(quadratic, diagonal)
    costs = products @ flipped
    linear = cost.linear + 0.5 * (coupling * total + shift) + sign * costs
    return QuadraticCost(quadratic, linear), -0.5 * float(costs[flipped].sum())


def lowered(cost: QuadraticCost) -> QuadraticCost:
    """As :func:`lowered_where_free`, but for every channel and for all counts alike."""
    shift = _lowering(cost, lambda _: np.ones(len(cost.linear)), math.inf)
    return _shifted(cost, -shift)


def _lowering(
    cost: QuadraticCost, gain: Callable[[QuadraticCost], np.ndarray], seconds: float
) -> np.ndarray:
    """As many steps as the seconds are expected to suffice for; zero if that is none."""
    begin = time.monotonic()
    shift = np.zeros(len(cost.linear))
    twins = _twins(cost)
    _factorises(cost.quadratic, 0.0)
    expected = _FACTORISATIONS * (time.monotonic() - begin)
    for steps in range(1, _STEPS + 1):
        if time.monotonic() - begin + expected > seconds:
            break
        present = _shifted(cost, -shift)
        step = _step(present.quadratic, gain(present))
        if step is None:
            break
        moved = shift + (np.bincount(twins, step) / np.bincount(twins))[twins]
        if not _factorises(cost.quadratic, -moved):
            break
        shift = moved
        expected = (time.monotonic() - begin) / steps
    return shift


def _twins(cost: QuadraticCost) -> np.ndarray:
    """Labels [C], equal where an exchange changes no cost: these have to stay exchangeable."""
    alone = np.column_stack([cost.linear, np.diagonal(cost.quadratic)])
    _, labels, counts = np.unique(alone, axis=0, return_inverse=True, return_counts=True)
    if (counts > 1).any():
        rows = np.column_stack([alone, np.sort(cost.quadratic, axis=1)])
        labels = np.unique(rows, axis=0, return_inverse=True)[1]
    return labels.reshape(-1)


def _step(quadratic: np.ndarray, gain: np.ndarray) -> np.ndarray | None:
    try:
        inverse = np.linalg.inv(quadratic)
        direction = np.linalg.solve(inverse * inverse, gain)
    except np.linalg.LinAlgError:
        return None
    decrement = float(direction @ gain)
    if not 0 < decrement < np.inf:
        return None
    step = direction / np.sqrt(decrement)  # inside the cone but for rounding
    if not _factorises(quadratic, -step):
        return None
    while _factorises(quadratic, -2 * step):
        step *= 2
    return _BACK * step


def _restricted(cost: QuadraticCost, core: np.ndarray, decided: np.ndarray) -> QuadraticCost:
    """The cost among the ``core`` channels, given those ``decided`` to be ones."""
    linear = cost.linear - cost.quadratic[:, decided].sum(axis=1)
    return QuadraticCost(np.ascontiguousarray(cost.quadratic[np.ix_(core, core)]), linear[core])


def _shifted(cost: QuadraticCost, shift: np.ndarray, defect: float | None = None) -> QuadraticCost:
    """S + diag(shift) and u + shift / 2; ``defect=None`` is what its factorisation would prove."""
    quadratic = _with_diagonal(cost.quadratic, shift)
    if defect is None:
        defect = _rounding(quadratic)
    return QuadraticCost(quadratic, cost.linear + 0.5 * shift, defect)


def _rounding(quadratic: np.ndarray) -> float:
    """A Cholesky factorisation that runs to its end proves eigenvalues of minus this or more."""
    scale = float(np.abs(np.diagonal(quadratic)).sum()) + _SMALLEST_SCALE
    return 2 * (len(quadratic) + 2) * float(np.finfo(np.float64).eps) * scale


def _with_diagonal(matrix: np.ndarray, shift: np.ndarray | float) -> np.ndarray:
    shifted = matrix.copy()
    shifted[np.diag_indices(len(matrix))] += shift
    return shifted


def _factorises(matrix: np.ndarray, shift: np.ndarray | float) -> bool:
    try:
        np.linalg.cholesky(_with_diagonal(matrix, shift))
    except np.linalg.LinAlgError:
        return False
    return True
