"""What every criterion produces: a cost on the set of removed channels of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccp_ext.errors import InputError
from ccp_ext.selection import Choice, Curve, curve, select


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

    def choose(self, r: int, **options: Any) -> Choice:
        """The ``r`` channels whose removal costs least; options of :func:`ccp_ext.select`."""
        return select(self.S, u=self.u, r=r, **options)

    def curve(self, counts: Sequence[int]) -> Curve:
        """The cost of removing so many channels, for each of ``counts``, ascending."""
        return curve(self.S, u=self.u, counts=counts)

    def diagonal(self) -> Cost:
        """The same cost without the interactions between channels (the ablation's control)."""
        return Cost(None if self.S is None else torch.diag(self.S.diagonal()), self.u)


@dataclass(frozen=True)
class SearchedCost(Cost):
    """A cost whose criterion brings its own search, or that no quadratic describes.

    Attributes:
        S, u: the nearest quadratic cost.
        search: r -> bool mask [C] on the CPU with r ones, the channels to remove.
        loss: the cost of such a mask, 0 for the empty one; None if it is the quadratic.
    """

    search: Callable[[int], Tensor] | None = None
    loss: Callable[[Tensor], float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search is None:
            raise ValueError("SearchedCost: search must be given")

    def objective(self, removed: Tensor) -> float:
        return super().objective(removed) if self.loss is None else self.loss(removed)

    def choose(self, r: int, **options: Any) -> Choice:
        """What the criterion's search finds; the options of a solver have no effect.

        Raises:
            InputError: ``r`` is not within 0 to C.
        """
        if not 0 <= r <= self.channels:
            raise InputError(f"choose: r must lie within 0 to C = {self.channels}; got {r!r}")
        removed = self.search(r)
        return Choice(removed, self.objective(removed), -math.inf, "heuristic", "search")

    def curve(self, counts: Sequence[int]) -> Curve:
        """What the search finds for each count; it has no lower bound."""
        choices = [self.choose(r) for r in counts]
        return Curve(
            tuple(counts),
            np.array([choice.objective for choice in choices]),
            np.array([choice.lower_bound for choice in choices]),
            torch.stack([choice.removed for choice in choices]).numpy(),
        )
