"""Which channels of one group go: the binary quadratic program with a fixed number of ones.

For the mask ``m`` in {0,1}^C of the REMOVED channels,

    cost(m) = 1/2 m'Sm - u'm        subject to 1'm = r, or to w'm = r for weights w.

The solvers are C++ (``ccp_ext._solver``), run in float64 on one thread, can be interrupted, and
give equal results for equal input unless a time limit stops them.
"""

from __future__ import annotations

from ccp_ext.selection.counts import Curve, curve
from ccp_ext.selection.search import METHODS, WEIGHTED_METHODS, Choice, select
from ccp_ext.selection.subset import random_subset

__all__ = [
    "METHODS",
    "WEIGHTED_METHODS",
    "Choice",
    "Curve",
    "curve",
    "random_subset",
    "select",
]
