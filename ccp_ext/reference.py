"""The operators in plain torch and float64: what the kernels' tests and benchmarks compare with."""

from __future__ import annotations

import torch
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


def patches(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """The inputs that a convolution's window meets, one row per sample and output position.

    Args:
        x: ``[N, C, H, W]``.
        kernel_size, stride, padding, dilation: As in ``torch.nn.functional.unfold``.
        groups: Of the convolution; divides C.

    Returns:
        ``[groups, N*Ho*Wo, C/groups*kh*kw]``, float64.
    """
    unfolded = torch.nn.functional.unfold(x.double(), kernel_size, dilation, padding, stride)
    columns = unfolded.shape[1] // groups
    return unfolded.unflatten(1, (groups, columns)).permute(1, 0, 3, 2).reshape(groups, -1, columns)


def patch_gram(x: Tensor, kernel_size: int | tuple[int, int], **window: int | tuple) -> Tensor:
    """``sum over samples n and output positions p of P[n, p] P[n, p]^T`` per group, as float64.

    Args:
        x: ``[N, C, H, W]``.
        kernel_size: And ``window``: the options of :func:`patches`, which gives P.

    Returns:
        ``[groups, C/groups*kh*kw, C/groups*kh*kw]``, float64.
    """
    rows = patches(x, kernel_size, **window)
    return rows.mT @ rows


def patch_cross(
    x: Tensor, y: Tensor, kernel_size: int | tuple[int, int], **window: int | tuple
) -> Tensor:
    """``sum over samples n and output positions p of P[n, p] y[n, :, p]^T`` per group, as float64.

    Args:
        x: ``[N, C, H, W]``.
        y: ``[N, K, Ho, Wo]``; group g has its channels from ``g * K/groups`` on.
        kernel_size: And ``window``: the options of :func:`patches`, which gives P.

    Returns:
        ``[groups, C/groups*kh*kw, K/groups]``, float64.
    """
    rows = patches(x, kernel_size, **window)
    targets = patches(y, 1, groups=rows.shape[0])
    return rows.mT @ targets
