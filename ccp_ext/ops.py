"""The operators, as typed functions over ``torch.ops.ccp_ext``.

The kernels check their arguments themselves: a call through ``torch.ops.ccp_ext`` is as safe as one
through this module. The fakes, which ``torch.compile`` and FakeTensorMode use, make the same checks
of shapes and dtypes, with the same messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccp_ext import _C  # noqa: F401  (its import registers the operators)

_channel_dot = torch.ops.ccp_ext.channel_dot.default
_weighted_gram = torch.ops.ccp_ext.weighted_gram_.default
_channel_moments = torch.ops.ccp_ext.channel_moments.default
_map_similarity = torch.ops.ccp_ext.map_similarity.default
_weighted_grams = torch.ops.ccp_ext.weighted_grams_.default
_patch_gram = torch.ops.ccp_ext.patch_gram_.default
_patch_cross = torch.ops.ccp_ext.patch_cross_.default

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GRAM_DTYPES = (torch.float32, torch.float64)
_SIMILARITIES = ("ssim", "psnr", "mse", "cosine", "pearson")


def channel_dot(x: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """Per sample and channel, the sum of ``x * g`` over all positions, in one pass over both.

    ``a[n, c] = sum over positions p of x[n, c, p] * g[n, c, p]``. With ``x`` a layer's output and
    ``g`` the gradient of the loss with respect to it, ``a[n, c]`` is the derivative of the n-th
    sample's loss along channel c: the gradient of a gate that multiplies the channel.

    Args:
        x: ``[N, C]``, ``[N, C, L]``, ``[N, C, H, W]``, ``[N, C, D, H, W]``, or with the channel
            elsewhere, such as ``[N, L, C]`` with ``channel_dim=-1``. float32, float64, bfloat16 or
            float16; any strides. Contiguous and channels-last tensors are read fastest; nothing is
            copied.
        g: Same shape, dtype and device as ``x``; its strides may differ, and may be 0 (expanded).
        channel_dim: The channel's dimension, not 0; negative counts from the end.

    Returns:
        ``[N, C]``, contiguous, float32; float64 for float64 inputs. Accumulated in that type or
        better. Two calls give equal bits, also with another number of CPU threads.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or ``channel_dim`` is out of range.

    Not differentiable: call it on detached tensors.
    """
    return _call(_channel_dot, x, g, channel_dim)


def weighted_gram_(S: Tensor, a: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Add the weighted Gram matrix of ``a`` to ``S`` in place.

    ``S += sum over n, k of sigma[n, k] * a[n, k, :] a[n, k, :]^T``. Each pair (i, j) is computed
    once and added to ``S[i, j]`` and ``S[j, i]``: a matrix symmetric to the bit stays so.

    Args:
        S: ``[C, C]``, float32 or float64, with contiguous rows; the stride between rows may be
            larger than C (a corner of a larger matrix). Sums are accumulated in its dtype, never
            in TF32.
        a: ``[N, C]`` or ``[N, K, C]``, float32, float64, bfloat16 or float16, not wider than
            ``S``; any strides. Must not share memory with ``S``.
        sigma: ``a.shape[:-1]``, that is ``[N]`` or ``[N, K]``; float32 or float64, of any sign;
            must not share memory with ``S``. None means all ones.

    Returns:
        ``S``.

        On CUDA a float32 ``S`` with a float32 ``a`` or with weights is made of pairs of TF32
        values, which infinity does not have. An infinite ``a[n, k, i]`` then makes NaN of row and
        column i of ``S``, and an infinite ``sigma[n, k]`` of all of it, where the CPU has infinity
        (with weights and 16 bits some elements of a row or column stay infinite). A float32 value,
        or a product of ``sigma`` and ``a``, counts as infinite from (2 - 2^-11) 2^127, about
        3.402e38, on. 16 bits without weights and a float64 ``S`` keep infinities.

        On CUDA an ``a`` whose rows are not whole aligned units of 16 bytes is copied, and weights
        other than contiguous float32 are, in the kernels' own workspace.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit, or memory is shared with ``S``.
    """
    _call(_weighted_gram, S, a, sigma)
    return S


class ChannelMoments(NamedTuple):
    """What ``channel_moments`` returns: for each channel, over samples and positions.

    Moments of several batches merge: sums, zeros and count add up, ``minimum`` and ``maximum`` are
    those of the batches. Without elements, ``minimum`` is infinity and ``maximum`` minus infinity.
    """

    sum: Tensor  # [C], float64, as all but zeros
    square_sum: Tensor
    zeros: Tensor  # [C], int64: values equal to 0, of either sign
    minimum: Tensor
    maximum: Tensor
    count: int  # values per channel


def channel_moments(x: Tensor, channel_dim: int = 1) -> ChannelMoments:
    """Sum, sum of squares, number of zeros, minimum and maximum of each channel, in one read of x.

    ``sum[c] = sum over samples n and positions p of x[n, c, p]``, and so on. ``zeros / count`` is
    the average percentage of zeros (APoZ, Hu et al., arXiv 1607.03250); ``sum / count`` and
    ``square_sum / count - (sum / count)^2`` are the mean and the population variance that a
    BatchNorm layer estimates; minimum and maximum bound a histogram.

    Args:
        x: ``[N, C]``, ``[N, C, L]``, ``[N, C, H, W]``, ``[N, C, D, H, W]``, or with the channel
            elsewhere, such as ``[N, L, C]`` with ``channel_dim=-1``. float32, float64, bfloat16 or
            float16; any strides. Contiguous and channels-last tensors are read fastest; nothing is
            copied.
        channel_dim: The channel's dimension, not 0; negative counts from the end.

    Returns:
        ``ChannelMoments``. Sums are made of short sums in float32 (float64 for float64 inputs),
        added up in float64: their error is at most about 1e-5 (1e-12) of the sum of the terms'
        magnitudes. A channel that holds NaN has NaN for sum, square_sum, minimum and maximum. Two
        calls give equal bits, also with another number of CPU threads.

        Squares of bfloat16 and float32 values beyond about 1.8e19 (float64: 1.3e154) overflow the
        short sums' type: square_sum is then infinite, or right where a kernel took the value by
        itself in float64. Up to 1e18 (1e153) square_sum is finite and within its error; float16
        values are never larger. Zeros and extremes are exact, and sum is within its error, up to
        1e36 (1e306).

    Raises:
        ValueError: x has fewer than two dimensions or another dtype, or ``channel_dim`` is out of
            range.

    Not differentiable: call it on detached tensors.
    """
    moments = _call(_channel_moments, x, channel_dim)
    total, square_sum, zeros, minimum, maximum = moments.unbind()
    count = x.shape[:channel_dim].numel() * x.shape[channel_dim:][1:].numel()
    return ChannelMoments(total, square_sum, zeros.long(), minimum, maximum, count)


def map_similarity(
    x: Tensor,
    kind: str = "ssim",
    y: Tensor | None = None,
    *,
    data_range: float = 1.0,
    allow_tf32: bool = False,
) -> Tensor:
    """The mean over the samples of the similarity between the feature maps of a sample.

    ``D[i, j] = mean over n of s(x[n, i], y[n, j])``, where ``y`` is ``x`` unless given. With
    μ the mean over a map's positions, σ² and σ_ij the population variance and covariance over them
    (divided by the number of positions), and L = ``data_range``, s is

    - ``"ssim"``: ((2 μ_i μ_j + C1) (2 σ_ij + C2)) / ((μ_i² + μ_j² + C1) (σ_i² + σ_j² + C2)) with
      C1 = (0.01 L)², C2 = (0.03 L)²: the structural similarity index of Wang et al. (2004, IEEE
      Transactions on Image Processing 13(4), equation 13) with one window, the whole map;
    - ``"mse"``: the mean squared difference, σ_i² + σ_j² - 2 σ_ij + (μ_i - μ_j)²;
    - ``"psnr"``: 10 log10(L² / mse) in decibels, where an mse below 1e-6 L² counts as 1e-6 L²:
      identical maps have 60 dB;
    - ``"cosine"``: (σ_ij + μ_i μ_j) / sqrt((σ_i² + μ_i²) (σ_j² + μ_j²)); 0 if a map is zero;
    - ``"pearson"``: σ_ij / (σ_i σ_j); 0 if a map is constant.

    Feature maps of one layer compared in this way measure the redundancy of its channels (QSFM,
    arXiv 2105.06052). The similarities of single samples are never stored: beside the result, the
    memory taken is some numbers per map and sample and partial results of fixed size, and on a GPU,
    from 65 channels on, copies of tensors whose maps are not whole aligned units of 16 bytes.
    There samples and tiles of 64 maps or more are spread over the multiprocessors, positions are
    not, since a similarity is not a sum over them: one sample of up to 64 channels occupies one.

    Args:
        x: ``[N, C]``, ``[N, C, L]``, ``[N, C, H, W]`` and so on; a map may be a single number.
            float32, bfloat16 or float16; on the CPU also float64. Any strides; contiguous and
            channels-last tensors are read fastest.
        kind: The similarity.
        y: Same shape, dtype and device as ``x``; its strides may differ.
        data_range: L, positive: the distance between the largest and the smallest value that the
            maps can take. SSIM and PSNR depend on ``x / data_range`` only; the others ignore it.
        allow_tf32: Whether float32 values may be rounded to TF32 (11 significant bits) on CUDA.

    Returns:
        ``[C, C]``, float32; float64 for float64 inputs. Without ``y`` it is symmetric to the bit
        and its diagonal exact: 1, or 0 for mse, or 60 for psnr. Maps that hold NaN or infinity make
        NaN of their row and column, on every device. With N = 0 or no positions, all NaN.

        float32 maps are centred by their mean before products are summed: a large mean costs no
        accuracy. Moments are float32 (float64 for float64 inputs), so that large numbers overflow,
        and results become 0, infinite or NaN: for SSIM, which multiplies variances, from about 3e9
        ``data_range`` on, for the others from about 1e18; for cosine and Pearson, maps whose
        deviations are below about 1e-22 count as constant. Two calls give equal bits, also with
        another number of CPU threads.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, an unknown ``kind``, or ``data_range`` is
            not positive and finite.

    Not differentiable: call it on detached tensors.
    """
    return _call(_map_similarity, x, kind, y, data_range=data_range, allow_tf32=allow_tf32)


def weighted_grams_(
    S: Sequence[Tensor], a: Sequence[Tensor], sigma: Tensor | Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Add the weighted Gram matrices of many layers in one call, in place.

    ``S[l] += sum over n, k of sigma[l][n, k] * a[l][n, k, :] a[l][n, k, :]^T`` for every layer l:
    :func:`weighted_gram_` for each, without its cost per call. On CUDA up to 64 layers share a
    kernel launch, and a second one where rows were summed in parts; nothing is copied from the
    host and nothing waits, so that the call can be captured in a CUDA graph. On the CPU all layers
    share the threads.

    Args:
        S: The matrices, each ``[C_l, C_l]`` as in :func:`weighted_gram_`, all of one dtype and on
            one device; no two may share memory.
        a: One tensor ``[N_l, C_l]`` or ``[N_l, K_l, C_l]`` per matrix, all of one dtype; none may
            share memory with any of ``S``.
        sigma: One tensor ``a[l].shape[:-1]`` per matrix, or one tensor that serves all of them.
            None means all ones.

    Returns:
        ``S``, as a list. On CUDA infinities become NaN as in :func:`weighted_gram_`.

    Raises:
        ValueError: As in :func:`weighted_gram_`; the message names the layer. Or the numbers of
            tensors differ.

    Two equal calls give equal bits. How rows are split into parts depends on all the layers of the
    call, so that other companions may change a layer's last bits.
    """
    matrices, rows = list(S), list(a)
    weights = [sigma] * len(matrices) if isinstance(sigma, Tensor) else sigma
    if matrices or rows or weights:  # an operator is chosen by its tensors
        _call(_weighted_grams, matrices, rows, None if weights is None else list(weights))
    return matrices


def patch_gram_(
    A: Tensor,
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    allow_tf32: bool = False,
) -> Tensor:
    """Add the Gram matrix of a convolution's input patches to ``A`` in place.

    ``A += sum over samples n and output positions p of P[n, p] P[n, p]^T``, where ``P[n, p]`` holds
    the ``C * kh * kw`` inputs that the convolution's window meets at p, in the order of
    ``torch.nn.functional.unfold``: channel, kernel row, kernel column; zeros in the padding. The
    normal equations' matrix of a least-squares refit of the convolution's weights. The matrix P
    itself, ``kh * kw`` times the size of ``x``, is never stored.

    Args:
        A: ``[C*kh*kw, C*kh*kw]``, with several groups ``[groups, C/groups*kh*kw, C/groups*kh*kw]``;
            float32 or float64, the last dimension contiguous. Sums are accumulated in its dtype.
        x: ``[N, C, H, W]``, float32, float64, bfloat16 or float16, not wider than ``A``; any
            strides; on CUDA what is not channels last in whole aligned units of 16 bytes may be
            copied once, so that channels-last tensors are read fastest. Must not share memory with
            ``A``.
        kernel_size: One integer or (vertical, horizontal); also below, as in ``torch.nn.Conv2d``.
        stride: At least 1.
        padding: Zeros on each side; at least 0.
        dilation: At least 1.
        groups: Of the convolution; divides C.
        allow_tf32: Whether float32 inputs may be rounded to TF32 (11 significant bits) on CUDA.

    Returns:
        ``A``. A matrix symmetric to the bit stays so. Two calls give equal bits, also with another
        number of CPU threads.

        On CUDA a float32 ``A`` with a float32 ``x`` is made of pairs of TF32 values, which infinity
        does not have: an infinite value, or one of at least (2 - 2^-11) 2^127, about 3.402e38,
        makes NaN of every element of ``A`` that it takes part in, where the CPU has infinity. With
        ``allow_tf32`` such a value counts as infinity, and infinities stay; they stay too with 16
        bits and in a float64 ``A``.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit, or memory is shared with ``A``.
    """
    sizes = map(_pair, (kernel_size, stride, padding, dilation))
    _call(_patch_gram, A, x, *sizes, groups, allow_tf32)
    return A


def patch_cross_(
    B: Tensor,
    x: Tensor,
    y: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    allow_tf32: bool = False,
) -> Tensor:
    """Add the products of a convolution's input patches and its output maps to ``B`` in place.

    ``B += sum over samples n and output positions p of P[n, p] y[n, :, p]^T`` with the patches P of
    :func:`patch_gram_`: the right-hand sides of a least-squares refit. The weights W that best map
    the patches to targets y solve ``A W = B``; the column k of W, reshaped to ``[C, kh, kw]``, is
    the k-th filter. For an intercept, ``y = torch.ones(1, device=...).expand(N, groups, Ho, Wo)``
    gives the patches' sums, which A lacks.

    Args:
        B: ``[C*kh*kw, K]``, with several groups ``[groups, C/groups*kh*kw, K/groups]``; float32 or
            float64, the last dimension contiguous. Sums are accumulated in its dtype.
        x: ``[N, C, H, W]`` as in :func:`patch_gram_`.
        y: ``[N, K, Ho, Wo]``, the shape of the convolution's output; the dtype of ``x``, any
            strides. K is a multiple of ``groups``. Must not share memory with ``B``.
        kernel_size, stride, padding, dilation, groups, allow_tf32: As in :func:`patch_gram_`.

    Returns:
        ``B``. On CUDA infinities in ``x`` and ``y`` become NaN as in :func:`patch_gram_`.

    Raises:
        ValueError: Shapes, dtypes, strides or devices do not fit, or memory is shared with ``B``.
    """
    sizes = map(_pair, (kernel_size, stride, padding, dilation))
    _call(_patch_cross, B, x, y, *sizes, groups, allow_tf32)
    return B


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _call(op: torch._ops.OpOverload, *arguments: Any, **options: Any) -> Any:
    """The operator's result; a failed check of the kernel becomes a ValueError.

    Such a message begins with the operator's name, whatever type torch made of the error.
    """
    try:
        return op(*arguments, **options)
    except RuntimeError as error:
        if str(error).startswith(op.name().removeprefix("ccp_ext::") + ": "):
            raise ValueError(str(error)) from None
        raise


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@torch.library.register_fake("ccp_ext::channel_dot")
def _(x: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    _check(
        x.dim() >= 2,
        f"channel_dot: x must have at least 2 dimensions, [N, C, ...], got {list(x.shape)}",
    )
    _check(
        x.shape == g.shape,
        f"channel_dot: g must have the shape of x, got x {list(x.shape)} and g {list(g.shape)}",
    )
    channel = channel_dim + x.dim() if channel_dim < 0 else channel_dim
    _check(
        0 < channel < x.dim(),
        f"channel_dot: channel_dim must name a dimension of x {list(x.shape)} other than 0 "
        f"(the samples), got {channel_dim}",
    )
    _check(
        x.dtype in _FLOATING,
        f"channel_dot: x must be float32, float64, bfloat16 or float16, got {_dtype_name(x.dtype)}",
    )
    _check(
        x.dtype == g.dtype,
        f"channel_dot: g must have the dtype of x, got x {_dtype_name(x.dtype)} and g "
        f"{_dtype_name(g.dtype)}",
    )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], x.shape[channel]), dtype=dtype)


@torch.library.register_fake("ccp_ext::weighted_gram_")
def _(S: Tensor, a: Tensor, sigma: Tensor | None = None) -> None:
    _check_gram("weighted_gram_: ", S, a)
    if sigma is not None:
        _check_gram_sigma("weighted_gram_: ", a, sigma)


@torch.library.register_fake("ccp_ext::weighted_grams_")
def _(S: Sequence[Tensor], a: Sequence[Tensor], sigma: Sequence[Tensor] | None = None) -> None:
    op = "weighted_grams_"
    if sigma is not None:
        _check(
            len(sigma) == len(S),
            f"{op}: sigma must have one tensor per matrix of S, got {len(sigma)} for {len(S)}",
        )
    _check(
        len(a) == len(S), f"{op}: a must have one tensor per matrix of S, got {len(a)} for {len(S)}"
    )
    for layer in range(len(S)):
        name = f"{op}: layer {layer}: "
        _check_gram(name, S[layer], a[layer])
        if sigma is not None:
            _check_gram_sigma(name, a[layer], sigma[layer])
        for argument, tensors in (("S", S), ("a", a)):
            _check(
                tensors[layer].dtype == tensors[0].dtype,
                f"{name}{argument} must have the dtype of layer 0's, got "
                f"{_dtype_name(tensors[layer].dtype)} and {_dtype_name(tensors[0].dtype)}",
            )


def _check_gram(name: str, S: Tensor, a: Tensor) -> None:
    _check(
        S.dim() == 2 and S.shape[0] == S.shape[1],
        f"{name}S must be a square matrix [C, C], got {list(S.shape)}",
    )
    _check(a.dim() in (2, 3), f"{name}a must be [N, C] or [N, K, C], got {list(a.shape)}")
    _check(
        a.shape[-1] == S.shape[0],
        f"{name}a must have as many channels as S, got a {list(a.shape)} and S {list(S.shape)}",
    )
    _check(
        S.dtype in _GRAM_DTYPES,
        f"{name}S must be float32 or float64, got {_dtype_name(S.dtype)}",
    )
    _check(
        a.dtype in _FLOATING,
        f"{name}a must be float32, float64, bfloat16 or float16, got {_dtype_name(a.dtype)}",
    )
    _check(
        S.dtype == torch.float64 or a.dtype != torch.float64,
        f"{name}a must not be wider than S, got a float64 and S float32",
    )


def _check_gram_sigma(name: str, a: Tensor, sigma: Tensor) -> None:
    _check(
        sigma.shape == a.shape[:-1],
        f"{name}sigma must have one value per row of a {list(a.shape)}, shape a.shape[:-1], got "
        f"{list(sigma.shape)}",
    )
    _check(
        sigma.dtype in _GRAM_DTYPES,
        f"{name}sigma must be float32 or float64, got {_dtype_name(sigma.dtype)}",
    )


@torch.library.register_fake("ccp_ext::patch_gram_")
def _(
    A: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    allow_tf32: bool = False,
) -> None:
    window = _Window(kernel_size, stride, padding, dilation, groups)
    window.check("patch_gram_", x)
    columns = window.columns(x)
    _check_patch_output("patch_gram_", "A", A, x, groups, columns, columns)


@torch.library.register_fake("ccp_ext::patch_cross_")
def _(
    B: Tensor,
    x: Tensor,
    y: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    allow_tf32: bool = False,
) -> None:
    window = _Window(kernel_size, stride, padding, dilation, groups)
    window.check("patch_cross_", x)
    positions = window.positions(x)
    _check(
        y.dim() == 4
        and y.shape[0] == x.shape[0]
        and list(y.shape[2:]) == positions
        and y.shape[1] % groups == 0,
        f"patch_cross_: y must be [N, K, Ho, Wo] with N = {x.shape[0]}, output positions "
        f"{positions} and K a multiple of groups, got {list(y.shape)}",
    )
    _check(
        x.dtype == y.dtype,
        f"patch_cross_: y must have the dtype of x, got x {_dtype_name(x.dtype)} and y "
        f"{_dtype_name(y.dtype)}",
    )
    _check_patch_output("patch_cross_", "B", B, x, groups, window.columns(x), y.shape[1] // groups)


class _Window(NamedTuple):
    """A convolution's window: two values each, the vertical one first."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def columns(self, x: Tensor) -> int:
        return x.shape[1] // self.groups * self.kernel_size[0] * self.kernel_size[1]

    def positions(self, x: Tensor) -> list[int]:
        sizes = []
        for dim in range(2):
            extent = self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
            room = x.shape[2 + dim] + 2 * self.padding[dim] - extent
            sizes.append(max(0, room // self.stride[dim] + 1))
        return sizes

    def check(self, op: str, x: Tensor) -> None:
        _check(x.dim() == 4, f"{op}: x must be [N, C, H, W], got {list(x.shape)}")
        _check(
            x.dtype in _FLOATING,
            f"{op}: x must be float32, float64, bfloat16 or float16, got {_dtype_name(x.dtype)}",
        )
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            values = list(getattr(self, name))
            _check(
                len(values) == 2 and min(values) >= least,
                f"{op}: {name} must be two integers of at least {least}, got {values}",
            )
        _check(
            self.groups >= 1 and x.shape[1] % self.groups == 0,
            f"{op}: groups must divide the channels of x {list(x.shape)}, got {self.groups}",
        )
        _check(
            min(self.positions(x)) > 0,
            f"{op}: the kernel must fit into the padded input, got x {list(x.shape)}, kernel_size "
            f"{list(self.kernel_size)}, padding {list(self.padding)} and dilation "
            f"{list(self.dilation)}",
        )
        padded = [x.shape[2 + dim] + 2 * self.padding[dim] for dim in range(2)]
        _check(
            padded[0] * padded[1] <= 2**30,
            f"{op}: the padded maps must have at most 2^30 positions, got x {list(x.shape)} and "
            f"padding {list(self.padding)}",
        )


def _check_patch_output(
    op: str, name: str, out: Tensor, x: Tensor, groups: int, rows: int, columns: int
) -> None:
    expected = [groups, rows, columns] if groups > 1 else [rows, columns]
    _check(
        list(out.shape) == expected,
        f"{op}: {name} must be {expected} for x {list(x.shape)}, got {list(out.shape)}",
    )
    _check(
        out.dtype in _GRAM_DTYPES,
        f"{op}: {name} must be float32 or float64, got {_dtype_name(out.dtype)}",
    )
    _check(
        out.dtype == torch.float64 or x.dtype != torch.float64,
        f"{op}: x must not be wider than {name}, got x float64 and {name} float32",
    )


@torch.library.register_fake("ccp_ext::map_similarity")
def _(
    x: Tensor,
    kind: str = "ssim",
    y: Tensor | None = None,
    *,
    data_range: float = 1.0,
    allow_tf32: bool = False,
) -> Tensor:
    _check(
        x.dim() >= 2,
        f"map_similarity: x must have at least 2 dimensions, [N, C, ...], got {list(x.shape)}",
    )
    _check(
        x.dtype in _FLOATING,
        "map_similarity: x must be float32, float64, bfloat16 or float16, got "
        f"{_dtype_name(x.dtype)}",
    )
    _check(
        kind in _SIMILARITIES,
        f"map_similarity: kind must be ssim, psnr, mse, cosine or pearson, got {kind}",
    )
    _check(
        0 < data_range < float("inf"),
        f"map_similarity: data_range must be positive and finite, got {data_range:g}",
    )
    if y is not None:
        _check(
            x.shape == y.shape,
            f"map_similarity: y must have the shape of x, got x {list(x.shape)} and y "
            f"{list(y.shape)}",
        )
        _check(
            x.dtype == y.dtype,
            f"map_similarity: y must have the dtype of x, got x {_dtype_name(x.dtype)} and y "
            f"{_dtype_name(y.dtype)}",
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[1], x.shape[1]), dtype=dtype)


@torch.library.register_fake("ccp_ext::channel_moments")
def _(x: Tensor, channel_dim: int = 1) -> Tensor:
    _check(
        x.dim() >= 2,
        f"channel_moments: x must have at least 2 dimensions, [N, C, ...], got {list(x.shape)}",
    )
    channel = channel_dim + x.dim() if channel_dim < 0 else channel_dim
    _check(
        0 < channel < x.dim(),
        f"channel_moments: channel_dim must name a dimension of x {list(x.shape)} other than 0 "
        f"(the samples), got {channel_dim}",
    )
    _check(
        x.dtype in _FLOATING,
        "channel_moments: x must be float32, float64, bfloat16 or float16, got "
        f"{_dtype_name(x.dtype)}",
    )
    return x.new_empty((5, x.shape[channel]), dtype=torch.float64)
