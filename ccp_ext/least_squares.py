"""Least squares of a layer's outputs on the patches of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ccp_ext.activations import patches, sample_blocks


class Regression:
    """Sums, in float64, over rows (patch, wanted output); a column of ones stands for the constant.

    Products are formed in float32, or float64 for float64 inputs.
    """

    def __init__(self) -> None:
        self.xx = self.xy = self.yy = 0.0  # [F + 1, F + 1], [F + 1, O], [O]

    def add(self, layer: nn.Module, x: Tensor, y: Tensor, at: Tensor | None = None) -> None:
        """Add the samples of a batch.

        Args:
            layer, x, at: as for :func:`ccp_ext.activations.patches`.
            y: what the layer should give, ``[N, P, O]``.
        """
        for samples in sample_blocks(layer, x):
            rows = patches(layer, x[samples], at).flatten(0, 1)
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            wanted = y[samples].flatten(0, 1).to(rows)
            self.xx = self.xx + (rows.T @ rows).double()
            self.xy = self.xy + (rows.T @ wanted).double()
            self.yy = self.yy + wanted.square().sum(0, dtype=torch.float64)

    def covariance(self) -> Tensor:
        """float64 ``[F, F]``: second moments of the patches about their mean."""
        count, x = self.xx[-1, -1], self.xx[-1, :-1]
        return self.xx[:-1, :-1] / count - x.outer(x) / count**2

    def solve(self, old: Tensor, ridge: float, constant: bool) -> tuple[Tensor, Tensor, float]:
        """min over W, b of ||Y - W X - b||^2 + lambda ||W - old||^2.

        Args:
            old: float64 ``[O, F]``.
            ridge: lambda in units of the mean diagonal of XX' (centred, with a constant).
            constant: whether there is a b; else it is zero.

        Returns:
            W ``[O, F]``, b ``[O]``, and the share of Y's variance that is not explained.
        """
        xx, xy, yy = self.xx[:-1, :-1], self.xy[:-1], self.yy
        count, x, y = self.xx[-1, -1], self.xx[-1, :-1], self.xy[-1]
        if constant:
            xx = xx - x.outer(x) / count
            xy = xy - x.outer(y) / count
            yy = yy - y.square() / count
        level = ridge * xx.diagonal().mean()
        ridged = xx + level * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        weight = _solve(ridged, xy + level * old.T).T
        left = yy.sum() - 2 * (weight * xy.T).sum() + ((weight @ xx) * weight).sum()
        share = (left / yy.sum()).item() if yy.sum() > 0 else 0.0
        b = (y - weight @ x) / count if constant else torch.zeros_like(y)
        return weight, b, max(0.0, share)


def draw_positions(
    count: int | None, generator: torch.Generator, of: int, device: torch.device
) -> Tensor | None:
    """int64 ``[count]`` of ``of`` output positions, ascending; None if all are to be used."""
    if count is None or of <= count:
        return None
    return torch.randperm(of, generator=generator)[:count].sort().values.to(device)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for a semidefinite matrix; the least solution if it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    negligible = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal().max()
    if not failed and pivots.min() > negligible:
        return torch.cholesky_solve(right, factor)
    solution = torch.linalg.lstsq(matrix.cpu(), right.cpu(), driver="gelsd").solution
    return solution.to(matrix.device)
