"""The least cost by the number of removed channels."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ccp_ext import _solver
from ccp_ext.selection.arguments import to_count, to_limits
from ccp_ext.selection.convex import convexified, lowered
from ccp_ext.selection.items import to_protected
from ccp_ext.selection.quadratic import QuadraticCost, in_range, quadratic_cost

_LARGEST_LOWERED = 512  # of which nobody expects the best bounds


@dataclass(frozen=True, eq=False)
class Curve:
    """The outcome of :func:`curve`: the least cost by the number of removed channels.

    Attributes:
        counts: K different numbers of removed channels, ascending.
        objective: float64 [K], the cost of each row of ``removed``.
        lower_bound: float64 [K]; no mask with ``counts[k]`` ones costs less than
            ``lower_bound[k]``, rounding accounted for.
        removed: bool [K, C]; row k has ``counts[k]`` ones.
    """

    counts: tuple[int, ...]
    objective: np.ndarray
    lower_bound: np.ndarray
    removed: np.ndarray


def curve(
    F: Any = None,
    *,
    Q: Any = None,
    u: Any = None,
    counts: Sequence[int] | None = None,
    protected: Any = None,
    time_limit: float = math.inf,
) -> Curve:
    """Bound the least cost of removing r channels, for many r at once, with masks near it.

    One convex relaxation moves along the counts, each solution starting from the last; masks come
    from rounding it and from the masks of both neighbours, each improved by exchanges.

    Args:
        F, Q, u: the cost, as for :func:`select`.
        counts: numbers of channels to remove; None is 0, 1, ... up to all that are not protected.
        protected: bool [C] or indices of channels that stay.
        time_limit: seconds. Counts that are not reached in time get weaker bounds and masks, valid
            all the same; without a limit the result is deterministic.

    Raises:
        InputError: as :func:`select`, and a count out of range.
    """
    limits = to_limits(time.monotonic(), time_limit, 0.0, None, op="curve")
    cost = quadratic_cost(F, Q, u, op="curve")
    channels = len(cost.linear)
    open_ = np.flatnonzero(~to_protected("curve", protected, channels))
    asked = range(len(open_) + 1) if counts is None else counts
    asked = sorted({to_count(r, len(open_), op="curve") for r in asked})
    if len(open_) < channels:
        cost = QuadraticCost(
            np.ascontiguousarray(cost.quadratic[np.ix_(open_, open_)]), cost.linear[open_]
        )
    scaled, exponent = in_range(cost)
    convex = convexified(scaled)
    if len(open_) <= _LARGEST_LOWERED:
        convex = lowered(convex)
    objective, bound, masks = _solver.curve(
        convex.quadratic, convex.linear, asked, convex.defect, limits.left()
    )
    objective = np.array(
        [_solver.objective(scaled.quadratic, scaled.linear, mask) for mask in masks]
    ).reshape(len(asked))
    removed = np.zeros((len(asked), channels), bool)
    removed[:, open_] = masks
    bound = np.minimum(bound, objective)
    return Curve(tuple(asked), np.ldexp(objective, exponent), np.ldexp(bound, exponent), removed)
