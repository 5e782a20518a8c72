"""The operators in plain torch and float64: what the kernels' tests and benchmarks compare with."""

from __future__ import annotations

from torch import Tensor


def channel_dot(x: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """``a[n, c] = sum over positions p of x[n, c, p] * g[n, c, p]``, as float64.

    Args:
        x: ``[N, ..., C, ...]`` with the channel in ``channel_dim``, at least two dimensions.
        g: Same shape as ``x``.
        channel_dim: Any dimension but 0; negative counts from the end.

    Returns:
        ``[N, C]``, float64.
    """
    terms = (x.double() * g.double()).movedim(channel_dim, 1)
    return terms.reshape(*terms.shape[:2], terms.shape[2:].numel()).sum(2)


def weighted_gram(a: Tensor, sigma: Tensor | None = None) -> Tensor:
    """``sum over n, k of sigma[n, k] * a[n, k, :] a[n, k, :]^T``, as float64.

    Args:
        a: ``[N, C]`` or ``[N, K, C]``.
        sigma: ``a.shape[:-1]``; None means all ones.

    Returns:
        ``[C, C]``, float64.
    """
    rows = a.double().reshape(a.shape[:-1].numel(), a.shape[-1])
    weighted = rows if sigma is None else rows * sigma.double().reshape(-1, 1)
    return weighted.T @ rows
