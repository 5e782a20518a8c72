"""What every criterion produces: a quadratic cost on the set of removed channels of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """``cost(m) = 1/2 m'Sm - u'm`` for the mask ``m`` in {0,1}^C of the REMOVED channels.

    Attributes:
        S: pairwise term [C, C], symmetric, or None for a criterion without one.
        u: linear term [C], or None for zero. A score by which important channels are kept is
            ``u = -score``, so that removing a channel costs its score.
    """

    S: Tensor | None = None
    u: Tensor | None = None

    def __post_init__(self) -> None:
        if self.S is None and self.u is None:
            raise ValueError("Cost: S and u are both None; at least one of them must be given")

    @property
    def channels(self) -> int:
        return len(self.u if self.S is None else self.S)

    def objective(self, removed: Tensor) -> float:
        """The cost of removing the channels where the bool mask ``removed`` [C] is true."""
        m = removed.detach().cpu().double()
        value = m.new_zeros(())
        if self.S is not None:
            value = value + 0.5 * m @ self.S.detach().cpu().double() @ m
        if self.u is not None:
            value = value - self.u.detach().cpu().double() @ m
        return value.item()

    def diagonal(self) -> Cost:
        """The same cost without the interactions between channels (the ablation's control)."""
        return Cost(None if self.S is None else torch.diag(self.S.diagonal()), self.u)
