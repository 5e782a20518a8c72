"""How many channels each group keeps under a budget, at the least cost."""

from ccp_ext.allocation.budgets import Allocation, allocate, allowed_counts

__all__ = ["Allocation", "allocate", "allowed_counts"]
