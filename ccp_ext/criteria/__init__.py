"""Published pruning criteria, each a small object that gives every group its (u, S).

``get("l1").costs(model, graph, stats)`` returns a :class:`ccp_ext.cost.Cost` for each group; the
same allocation, selection and surgery follow whatever the criterion. A new criterion is one class
with the attributes of :class:`Criterion` and one ``@register`` above it.
"""

from __future__ import annotations

from ccp_ext.criteria import ccp, magnitude, random, taylor  # noqa: F401  (they register)
from ccp_ext.criteria.base import Criterion, Options, get, names, register

__all__ = ["Criterion", "Options", "get", "names", "register"]
