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


def channel_moments(x: Tensor, channel_dim: int = 1) -> Tensor:
    """Per channel, over samples and positions: sum, sum of squares, zeros, minimum, maximum.

    Args:
        x: ``[N, ..., C, ...]`` with the channel in ``channel_dim``, at least two dimensions.
        channel_dim: Any dimension but 0; negative counts from the end.

    Returns:
        ``[5, C]``, float64. Without elements: 0, 0, 0, infinity, minus infinity.
    """
    values = x.double().movedim(channel_dim, 0).flatten(1)
    limit = values.new_full((values.shape[0], 1), torch.inf)
    return torch.stack(
        [
            values.sum(1),
            values.square().sum(1),
            (values == 0).sum(1).double(),
            torch.cat([values, limit], 1).amin(1),
            torch.cat([values, -limit], 1).amax(1),
        ]
    )


def map_similarity(
    x: Tensor, kind: str = "ssim", y: Tensor | None = None, data_range: float = 1.0
) -> Tensor:
    """The mean over the samples of the similarity between map i of ``x`` and map j of ``y``.

    The formulas are those of ``ops.map_similarity``. Holds the similarities of all samples at once.

    Args:
        x: ``[N, C, ...]``.
        kind: ssim, psnr, mse, cosine or pearson.
        y: Same shape as ``x``; None means ``x`` itself, whose diagonal is then exact.
        data_range: L of SSIM and PSNR.

    Returns:
        ``[C, C]``, float64.
    """
    a = x.double().reshape(*x.shape[:2], x.shape[2:].numel())
    b = a if y is None else y.double().reshape(a.shape)
    mean_a, mean_b = a.mean(2), b.mean(2)
    centred_a, centred_b = a - mean_a[:, :, None], b - mean_b[:, :, None]
    variance_a, variance_b = centred_a.square().mean(2), centred_b.square().mean(2)
    covariance = centred_a @ centred_b.mT / a.shape[2]
    mean_i, mean_j = mean_a[:, :, None], mean_b[:, None, :]
    variance_i, variance_j = variance_a[:, :, None], variance_b[:, None, :]
    squared_error = variance_i + variance_j - 2 * covariance + (mean_i - mean_j).square()
    if kind == "ssim":
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        luminance = (2 * mean_i * mean_j + c1) / (mean_i.square() + mean_j.square() + c1)
        similarity = luminance * (2 * covariance + c2) / (variance_i + variance_j + c2)
    elif kind == "psnr":
        similarity = -10 * (squared_error / data_range**2).clamp(min=1e-6).log10()
    elif kind == "mse":
        similarity = squared_error
    elif kind == "cosine":
        product = covariance + mean_i * mean_j
        power = (variance_i + mean_i.square()) * (variance_j + mean_j.square())
        similarity = (product / power.sqrt()).where(power != 0, 0)
    else:
        power = variance_i * variance_j
        similarity = (covariance / power.sqrt()).where(power != 0, 0)
    if y is None:
        similarity.diagonal(dim1=1, dim2=2).fill_({"psnr": 60.0, "mse": 0.0}.get(kind, 1.0))
    return similarity.mean(0)


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
