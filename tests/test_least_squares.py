"""Least squares of a layer's outputs on its patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ccp_ext.least_squares import Regression, draw_positions


def samples() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer, its input, wanted outputs [N, P, O] and the rows of patches."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 4, 3, padding=1).double(), torch.randn(7, 5, 6, 6).double()
    return layer, x, torch.randn(7, 36, 4).double(), F.unfold(x, 3, padding=1).mT


def test_sums_add_up_over_batches_and_blocks_of_samples(monkeypatch):
    layer, x, y, rows = samples()
    rows = torch.cat([rows.flatten(0, 1), torch.ones(7 * 36, 1)], 1)
    wanted = y.flatten(0, 1)
    for values in (1 << 24, 2 * 36 * 45):  # all at once, two samples at a time
        monkeypatch.setattr("ccp_ext.activations._PATCH_VALUES", values)
        sums = Regression()
        for part in (slice(0, 5), slice(5, 7)):
            sums.add(layer, x[part], y[part])
        torch.testing.assert_close(sums.xx, rows.T @ rows)
        torch.testing.assert_close(sums.xy, rows.T @ wanted)
        torch.testing.assert_close(sums.yy, wanted.square().sum(0))


def test_only_the_positions_asked_for_count():
    layer, x, y, rows = samples()
    at = torch.tensor([0, 7, 35])
    sums = Regression()
    sums.add(layer, x, y[:, at], at)
    some = torch.cat([rows[:, at].flatten(0, 1), torch.ones(21, 1)], 1)
    torch.testing.assert_close(sums.xx, some.T @ some)
    torch.testing.assert_close(sums.xy, some.T @ y[:, at].flatten(0, 1))


def test_the_covariance_is_that_of_the_patches():
    layer, x, y, rows = samples()
    sums = Regression()
    sums.add(layer, x, y)
    torch.testing.assert_close(sums.covariance(), rows.flatten(0, 1).T.cov(correction=0))


def test_tokens_of_a_linear_layer_are_rows():
    layer, x, y = nn.Linear(4, 3), torch.randn(2, 6, 4).double(), torch.randn(2, 6, 3).double()
    sums = Regression()
    sums.add(layer, x, y)
    torch.testing.assert_close(sums.xy[:-1], torch.einsum("nlf,nlk->fk", x, y))


def test_positions_are_drawn_without_repeats():
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    assert draw_positions(None, generator, 9, device) is None
    assert draw_positions(9, generator, 9, device) is None
    drawn = draw_positions(5, generator, 9, device)
    assert len(set(drawn.tolist())) == 5 and torch.equal(drawn, drawn.sort().values)
    assert drawn.min() >= 0 and drawn.max() < 9
