"""Least squares of a layer's outputs on its patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ccp_ext.least_squares import Regression
from ccp_ext.patches import Grid


def samples() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer, its input, wanted outputs [N, O, H, W] and the rows of patches [N, P, F]."""
    layer, x = nn.Conv2d(5, 4, 3, padding=1).double(), torch.randn(7, 5, 6, 6).double()
    return layer, x, torch.randn(7, 4, 6, 6).double(), F.unfold(x, 3, padding=1).mT


def assert_sums(sums: Regression, rows: torch.Tensor, wanted: torch.Tensor) -> None:
    """Of rows [N, P, F] and wanted outputs [N, O, ...]."""
    rows, y = rows.flatten(0, 1), wanted.transpose(0, 1).flatten(1).T
    assert sums.count == len(rows)
    torch.testing.assert_close(sums.x, rows.sum(0))
    torch.testing.assert_close(sums.y, y.sum(0))
    torch.testing.assert_close(sums.xx, rows.T @ rows)
    torch.testing.assert_close(sums.xy, rows.T @ y)
    torch.testing.assert_close(sums.yy, y.square().sum(0))


def test_sums_add_up_over_batches():
    layer, x, y, rows = samples()
    sums = Regression()
    for part in (slice(0, 5), slice(5, 7)):
        sums.add(layer, x[part], y[part])
    assert_sums(sums, rows, y)


def test_only_the_positions_asked_for_count():
    layer, x, y, rows = samples()
    at = Grid((2, 3), (1, 2))
    sums = Regression()
    sums.add(layer, x, at.of(y), at)
    assert_sums(sums, rows.unflatten(1, (6, 6))[:, 1::2, 2::3].flatten(1, 2), y[..., 1::2, 2::3])


def test_half_precision_is_summed_in_float32():
    layer, x, y, _ = samples()
    x, y = x.bfloat16(), y.bfloat16()
    sums, exact = Regression(), Regression()
    sums.add(layer, x, y)
    exact.add(layer, x.double(), y.double())
    for name in ("x", "y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(sums, name), getattr(exact, name), rtol=1e-5, atol=1e-3)


def test_the_covariance_is_that_of_the_patches():
    layer, x, y, rows = samples()
    sums = Regression()
    sums.add(layer, x, y)
    torch.testing.assert_close(sums.covariance(), rows.flatten(0, 1).T.cov(correction=0))


def test_tokens_of_a_linear_layer_are_rows():
    layer, x, y = nn.Linear(4, 3), torch.randn(2, 6, 4).double(), torch.randn(2, 3, 6).double()
    sums = Regression()
    sums.add(layer, x, y)
    assert_sums(sums, x, y)
