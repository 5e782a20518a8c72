"""Published pruning criteria, each a small object that gives every group its cost.

``get("l1").costs(model, graph, data)`` returns a :class:`ccp_ext.cost.Cost` for each group, with
``data = gather(model, graph, criterion, images)``; the same allocation, selection and surgery
follow whatever the criterion. A new criterion is one class with the attributes of
:class:`Criterion` and one ``@register`` above it.
"""

from __future__ import annotations

from ccp_ext.criteria import (  # noqa: F401  (they register)
    activation,
    auxiliary,
    ccp,
    gates,
    magnitude,
    propagation,
    random,
    reconstruction,
    sensitivity,
    similarity,
    taylor,
)
from ccp_ext.criteria.base import Criterion, Options, get, names, register
from ccp_ext.criteria.gathering import gather

__all__ = ["Criterion", "Options", "gather", "get", "names", "register"]
