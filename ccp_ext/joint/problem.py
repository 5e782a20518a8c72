"""The cost of removing channels anywhere in the network, and the same in one numbering."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ccp_ext.errors import InputError

if TYPE_CHECKING:
    from ccp_ext.statistics import Statistics

# Gains of less than this many roundings of the largest terms are none.
_ROUNDINGS = 64

# What a channel is taken to use that uses nothing, so that the rates stay finite.
LEAST_USE = 1e-9


class Group(Protocol):
    name: str
    channels: int


class Graph(Protocol):
    """What :func:`refine` needs of a graph."""

    groups: Sequence[Group]


@dataclass(frozen=True, eq=False)
class JointCost:
    """``cost(m) = ||Qm||^2 / (2N) - u'm`` of removing channels anywhere in the network.

    Attributes:
        rows: by group Q_g [M, C_g], float32 or float64; row k is the same sample's in all groups.
        count: N, the number of samples.
        u: by group the linear term [C_g]; None is zero.
    """

    rows: Mapping[str, Tensor]
    count: int
    u: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, stats: Statistics, first_order: bool = False) -> JointCost:
        """The cost that statistics collected with ``keep_rows=True`` give.

        Args:
            first_order: with the linear term u.
        """
        u = {name: stats[name].u for name in stats} if first_order else None
        return cls(stats.rows(), stats[next(iter(stats))].count, u)

    def objective(self, removed: Mapping[str, Tensor]) -> float:
        """The cost, in float64, of the bool masks ``removed`` {group: [C_g]}."""
        total = sum(self._product(name, mask) for name, mask in removed.items())
        return 0.5 * torch.as_tensor(total).square().sum().item() / self.count - self._linear(
            removed
        )

    def within_groups(self, removed: Mapping[str, Tensor]) -> float:
        """The cost without the curvature between groups: the sum of what each group sees alone."""
        squares = (self._product(name, m).square().sum().item() for name, m in removed.items())
        return 0.5 * sum(squares) / self.count - self._linear(removed)

    def _product(self, name: str, mask: Tensor) -> Tensor:
        rows = self.rows[name]
        return rows[:, mask.to(rows.device)].double().sum(1)

    def _linear(self, removed: Mapping[str, Tensor]) -> float:
        if self.u is None:
            return 0.0
        terms = (self.u[name][mask.to(self.u[name].device)] for name, mask in removed.items())
        return sum(term.double().sum().item() for term in terms)


class Problem:
    """The cost over all channels in one numbering, group after group.

    Attributes:
        columns: Q' [C, M], contiguous.
        widths, spans: how many channels each group has, and which.
        group: of each channel its group's position [C].
        u, diagonal: linear term and diagonal of F [C], float64.
        tolerance: gains up to this size are rounding.
    """

    def __init__(self, cost: JointCost, names: Sequence[str]) -> None:
        self.names = list(names)
        self.count = cost.count
        self.columns = torch.cat([cost.rows[name].T for name in names])
        if self.columns.shape[1] > self.columns.shape[0]:
            # With Q = UR, U'U = I, R has fewer rows, and R'R = Q'Q.
            self.columns = torch.linalg.qr(self.columns.double().T, mode="r").R.T.contiguous()
        device = self.columns.device
        self.widths = [cost.rows[name].shape[1] for name in names]
        ends = list(itertools.accumulate(self.widths))
        self.spans = [slice(e - w, e) for e, w in zip(ends, self.widths, strict=True)]
        self.group = torch.arange(len(names)).repeat_interleave(torch.tensor(self.widths))
        self.group = self.group.to(device)
        self.u = torch.zeros(ends[-1], dtype=torch.float64, device=device)
        if cost.u is not None:
            self.u = torch.cat([cost.u[name].to(device, torch.float64) for name in names])
        self.diagonal = torch.cat(
            [self.columns[span].double().square().sum(1) / self.count for span in self.spans]
        )
        largest = (0.5 * self.diagonal + self.u.abs()).max().item()
        self.tolerance = _ROUNDINGS * torch.finfo(self.columns.dtype).eps * largest

    def times(self, vector: Tensor) -> Tensor:
        """Q'v / N [C] in float64, of v [M]; the products in the rows' own precision."""
        return (self.columns @ vector.to(self.columns.dtype)).double() / self.count

    def gradient(self, product: Tensor) -> Tensor:
        """Q'(Qm) / N - u, all in float64; a group at a time, so that no copy of Q is made."""
        parts = [self.columns[span].double() @ product for span in self.spans]
        return torch.cat(parts) / self.count - self.u


def check(caller: str, graph: Graph, cost: JointCost, removed: Mapping[str, Tensor]) -> None:
    """Raise InputError, in the name of the function called, for what does not fit together."""
    lengths = set()
    for group in graph.groups:
        rows, mask = cost.rows.get(group.name), removed.get(group.name)
        if rows is None or mask is None:
            missing = "rows" if rows is None else "mask"
            raise InputError(f"{caller}: group {group.name!r} has no {missing}")
        if rows.ndim != 2 or rows.shape[1] != group.channels:
            raise InputError(
                f"{caller}: the rows of group {group.name!r} must be [M, {group.channels}], got "
                f"{list(rows.shape)}"
            )
        if mask.dtype != torch.bool or list(mask.shape) != [group.channels]:
            raise InputError(
                f"{caller}: the mask of group {group.name!r} must be bool [{group.channels}], got "
                f"{mask.dtype} {list(mask.shape)}"
            )
        if mask.all():
            raise InputError(f"{caller}: the mask of group {group.name!r} removes all its channels")
        if not torch.isfinite(rows).all():
            raise InputError(f"{caller}: the rows of group {group.name!r} must be finite")
        lengths.add(len(rows))
    if len(lengths) > 1:
        raise InputError(f"{caller}: all groups must have equally many rows, got {sorted(lengths)}")
    if not lengths:
        raise InputError(f"{caller}: the graph has no groups")
