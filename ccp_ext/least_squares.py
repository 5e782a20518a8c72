"""Least squares of a layer's outputs on the patches of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ccp_ext.patches import Grid, as_maps, at_least_float32, patch_cross, patch_gram, patch_sum


class Regression:
    """Sums, in float64, over samples and positions: patches x and the outputs y wanted of them.

    Products are formed in float32, or float64 for float64 inputs.
    """

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = self.xx = self.xy = self.yy = 0.0  # [F], [O], [F, F], [F, O], [O]

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, at: Grid | None = None) -> None:
        """Add the samples of a batch.

        Args:
            layer, x, at: as for :func:`ccp_ext.patches.patches`.
            y: what the layer should give, ``[N, O, *positions]``.
        """
        self.count += len(y) * y.shape[2:].numel()
        self.x = self.x + patch_sum(layer, x, at)
        self.xx = self.xx + patch_gram(layer, x, at)
        self.xy = self.xy + patch_cross(layer, x, y, at)
        y = at_least_float32(y.transpose(0, 1).flatten(1))
        self.y = self.y + y.sum(1, dtype=torch.float64)
        self.yy = self.yy + y.square().sum(1, dtype=torch.float64)

    def covariance(self) -> Tensor:
        """float64 ``[F, F]``: second moments of the patches about their mean."""
        return self.xx / self.count - self.x.outer(self.x) / self.count**2

    def solve(self, old: Tensor, ridge: float, constant: bool) -> tuple[Tensor, Tensor, float]:
        """min over W, b of ||Y - W X - b||^2 + lambda ||W - old||^2.

        Args:
            old: float64 ``[O, F]``.
            ridge: lambda in units of the mean diagonal of XX' (centred, with a constant).
            constant: whether there is a b; else it is zero.

        Returns:
            W ``[O, F]``, b ``[O]``, and the share of Y's variance that is not explained.
        """
        xx, xy, yy = self.xx, self.xy, self.yy
        if constant:
            xx = xx - self.x.outer(self.x) / self.count
            xy = xy - self.x.outer(self.y) / self.count
            yy = yy - self.y.square() / self.count
        level = ridge * xx.diagonal().mean()
        ridged = xx + level * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        weight = _solve(ridged, xy + level * old.T).T
        left = yy.sum() - 2 * (weight * xy.T).sum() + ((weight @ xx) * weight).sum()
        share = (left / yy.sum()).item() if yy.sum() > 0 else 0.0
        b = (self.y - weight @ self.x) / self.count if constant else torch.zeros_like(self.y)
        return weight, b, max(0.0, share)


class ConstantError:
    """Sums, in float64, over samples and positions: outputs y wanted of a layer, and what lacks."""

    def __init__(self) -> None:
        self.count = 0
        self.y = self.yy = self.error = self.squares = 0.0  # [O] each

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, at: Grid) -> None:
        """Add the samples of a batch; as for :class:`Regression`."""
        error = y - at.of(as_maps(layer, layer(x)))
        self.count += len(y) * y.shape[2:].numel()
        for values, first, second in ((y, "y", "yy"), (error, "error", "squares")):
            values = values.transpose(0, 1).flatten(1).double()
            setattr(self, first, getattr(self, first) + values.sum(1))
            setattr(self, second, getattr(self, second) + values.square().sum(1))

    def solve(self, constant: bool) -> tuple[Tensor, float]:
        """What to add to the layer's output, ``[O]``, zero without a constant; and the share of
        y's variance that is then not explained.
        """
        yy, squares = self.yy, self.squares
        b = self.error / self.count if constant else torch.zeros_like(self.error)
        if constant:
            yy, squares = yy - self.y.square() / self.count, squares - b.square() * self.count
        return b, (squares.sum() / yy.sum()).item() if yy.sum() > 0 else 0.0


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for a semidefinite matrix; the least solution if it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    negligible = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal().max()
    if not failed and pivots.min() > negligible:
        return torch.cholesky_solve(right, factor)
    solution = torch.linalg.lstsq(matrix.cpu(), right.cpu(), driver="gelsd").solution
    return solution.to(matrix.device)
