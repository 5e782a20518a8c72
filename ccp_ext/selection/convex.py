"""An equal cost on masks that is convex, for the sake of its relaxation."""

from __future__ import annotations

import time

import numpy as np

from ccp_ext.selection.quadratic import QuadraticCost

# Lowering a definite F takes about this many times the time of one factorisation, of which a
# search with a time limit grants it a part.
_LOWERING = 16
_GRANTED = 0.1
_BISECTIONS = 7
_SMALLEST_SCALE = 1e-100  # beside entries of about 1: F may be zero


def convexified(cost: QuadraticCost, seconds: float) -> QuadraticCost:
    """A cost that is equal on masks and convex but for rounding: S + diag(d) and u + d/2, with a
    ``defect`` such that no eigenvalue of the new S is below ``-defect``.

    The less is added, the better the relaxation (A. Billionnet and S. Elloumi, "Using a mixed
    integer quadratic programming solver for the unconstrained quadratic 0-1 problem", 2007). S is
    lowered where it is definite: -d = t / diag(S^-1), with the largest t of a few bisections. A
    Cholesky factorisation that runs to its end proves the defect (S. M. Rump, "Verification of
    positive definiteness", 2006). ``seconds`` are what the search may take in all.
    """
    begin = time.monotonic()
    channels = len(cost.linear)
    scale = np.abs(np.diagonal(cost.quadratic)).sum() + _SMALLEST_SCALE
    rounding = 2 * (channels + 2) * np.finfo(np.float64).eps
    ridge = 2 * rounding * scale
    shift = np.full(channels, ridge)
    if not _factorises(cost.quadratic, ridge):
        shift[:] = _raising(cost.quadratic, ridge)
    elif _LOWERING * (time.monotonic() - begin) < _GRANTED * seconds:
        shift -= _lowering(cost.quadratic, ridge)
    convex = _shifted(cost.quadratic, shift)
    defect = rounding * float(np.abs(np.diagonal(convex)).sum())
    return QuadraticCost(convex, cost.linear + 0.5 * shift, defect)


def _shifted(matrix: np.ndarray, shift: np.ndarray | float) -> np.ndarray:
    shifted = matrix.copy()
    shifted[np.diag_indices(len(matrix))] += shift
    return shifted


def _factorises(matrix: np.ndarray, shift: np.ndarray | float) -> bool:
    try:
        np.linalg.cholesky(_shifted(matrix, shift))
    except np.linalg.LinAlgError:
        return False
    return True


def _raising(matrix: np.ndarray, ridge: float) -> float:
    """What the whole diagonal needs, at least ``ridge``, for a factorisation to run to its end."""
    least = np.linalg.eigvalsh(matrix)[0]
    while not _factorises(matrix, ridge - least):
        ridge *= 2
    return ridge - least


def _lowering(matrix: np.ndarray, ridge: float) -> np.ndarray:
    """What the diagonal of ``matrix + ridge`` can lose."""
    alone = 1 / np.abs(np.diagonal(np.linalg.inv(_shifted(matrix, ridge))))
    proven, failed = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (proven + failed)
        if _factorises(matrix, ridge - middle * alone):
            proven = middle
        else:
            failed = middle
    return proven * alone
