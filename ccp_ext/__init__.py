"""Channel pruning with pairwise channel importance."""

from __future__ import annotations

from ccp_ext import ops

__all__ = ["ops"]
