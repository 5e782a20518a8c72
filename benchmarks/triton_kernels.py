"""The rivals in Triton, as a good user of it would write them, and the rate of multiply-adds.

Products of float32 values are made of three TF32 products, as ours are. ``triton`` is None where it
is missing.

They run on a GPU, or on a CPU in Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if triton is not None:

    def _briefly(call, quantiles):
        return triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)

    # Many short rows, or a piece of a long one; the interpreter, which times nothing, takes one.
    BLOCKS = [
        triton.Config({"ROWS": rows, "BLOCK": block}, num_warps=warps)
        for rows, block, warps in ((16, 64, 4), (8, 256, 4), (2, 1024, 4), (1, 2048, 8))
    ]

    @triton.autotune(BLOCKS[:1] if INTERPRETED else BLOCKS, ["positions"], do_bench=_briefly)
    @triton.jit
    def _dot_of_rows(x, g, out, rows, positions, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """One program for ROWS rows: x and g [rows, positions] to out [rows]."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        start = row.to(tl.int64)[:, None] * positions
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for begin in range(0, positions, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            inside = (row < rows)[:, None] & (at < positions)[None, :]
            left = tl.load(x + start + at[None, :], mask=inside, other=0.0).to(tl.float32)
            right = tl.load(g + start + at[None, :], mask=inside, other=0.0).to(tl.float32)
            total += left * right
        tl.store(out + row, tl.sum(total, 1), mask=row < rows)

    @triton.jit
    def _dot_of_columns(x, g, out, positions, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """One program for a sample's block of channels: [N, positions, C] to out [N, C]."""
        sample = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, positions, ROWS):
            row = begin + tl.arange(0, ROWS)
            inside = (row < positions)[:, None] & (column < channels)[None, :]
            at = (sample * positions + row)[:, None] * channels + column[None, :]
            left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            right = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
            total += left * right
        tl.store(out + sample * channels + column, tl.sum(total, 0), mask=column < channels)

    # Tiles of a symmetric result [C, C]; the interpreter takes the smallest.
    TILES = [
        triton.Config({"TILE": tile, "DEPTH": 32}, num_warps=8 if tile > 64 else 4)
        for tile in (16, 32, 64, 128)
    ]

    def _filled(configs, arguments, **_):
        """The three largest tiles that the channels fill, or the smallest."""
        widest = max(16, triton.next_power_of_2(arguments["channels"]))
        return [config for config in configs if config.kwargs["TILE"] <= widest][-3:]

    def _tuned(key, **preserved):
        """Tunes the tiles; ``preserved`` keeps the trials out of the result."""
        return triton.autotune(
            TILES[:1] if INTERPRETED else TILES, key, do_bench=_briefly,
            prune_configs_by={"early_config_prune": _filled}, **preserved,
        )  # fmt: skip

    @triton.jit
    def _add_tile(S, row, column, channels, tile):
        inside = (row < channels)[:, None] & (column < channels)[None, :]
        at = S + row[:, None] * channels + column[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + tile, mask=inside)

    @_tuned(["samples", "channels"], restore_value=["S"])
    @triton.jit
    def _gram(S, a, sigma, samples, channels, TILE: tl.constexpr, DEPTH: tl.constexpr):
        """One program for a tile of the triangle of S [C, C] += a' diag(sigma) a, a [N, C]."""
        if tl.program_id(0) > tl.program_id(1):
            return
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        total = tl.zeros((TILE, TILE), tl.float32)
        for begin in range(0, samples, DEPTH):
            sample = begin + tl.arange(0, DEPTH)
            some = sample < samples
            left = tl.load(
                a + sample[None, :] * channels + row[:, None],
                mask=some[None, :] & (row < channels)[:, None],
                other=0.0,
            ).to(tl.float32)
            right = tl.load(
                a + sample[:, None] * channels + column[None, :],
                mask=some[:, None] & (column < channels)[None, :],
                other=0.0,
            ).to(tl.float32)
            weight = tl.load(sigma + sample, mask=some, other=0.0)
            total += tl.dot(left * weight[None, :], right, input_precision="tf32x3")
        _add_tile(S, row, column, channels, total)
        if tl.program_id(0) < tl.program_id(1):
            _add_tile(S, column, row, channels, tl.trans(total))

    @triton.jit
    def _grams(
        tiles, layers, samples,
        ELEMENT: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """One program for each tile of the triangles of all layers' S [C, C] += a' a."""
        tile = tiles + 3 * tl.program_id(0)
        layer = layers + 3 * tl.load(tile)
        S = tl.multiple_of(tl.load(layer).to(tl.pointer_type(tl.float32)), 16)
        a = tl.multiple_of(tl.load(layer + 1).to(tl.pointer_type(ELEMENT)), 16)
        channels = tl.multiple_of(tl.load(layer + 2).to(tl.int32), UNIT)
        row = tl.load(tile + 1) * TILE + tl.arange(0, TILE)
        column = tl.load(tile + 2) * TILE + tl.arange(0, TILE)
        total = tl.zeros((TILE, TILE), tl.float32)
        for begin in range(0, samples, DEPTH):
            sample = begin + tl.arange(0, DEPTH)
            some = (sample < samples)[:, None]
            rows = a + sample[:, None] * channels
            left = tl.load(rows + row[None, :], mask=some & (row < channels)[None, :], other=0.0)
            right = tl.load(
                rows + column[None, :], mask=some & (column < channels)[None, :], other=0.0
            )
            total += tl.dot(tl.trans(left), right, input_precision="tf32x3")
        _add_tile(S, row, column, channels, total)
        if tl.load(tile + 1) != tl.load(tile + 2):
            _add_tile(S, column, row, channels, tl.trans(total))

    @triton.jit
    def _element(column, channels, AREA: tl.constexpr, CHANNELS_LAST: tl.constexpr):
        """Channel and tap of a column; columns are taken in the order of the memory."""
        if CHANNELS_LAST:
            channel, tap = column % channels, column // channels
        else:
            channel, tap = column // AREA, column % AREA
        return channel, tap

    @triton.jit
    def _patches(
        x, columns, positions, last, shape, strides, SIZE: tl.constexpr, STRIDE: tl.constexpr,
        PADDING: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ):  # fmt: skip
        """[columns, positions] of the unfolded input, gathered; zero from position last on."""
        if CHANNELS_LAST:  # the last dimension is that of neighbours in memory
            column, position = columns[None, :], positions[:, None]
        else:
            column, position = columns[:, None], positions[None, :]
        channels, height, width, rows_out, columns_out = shape
        of_sample, of_channel, of_row, of_column = strides
        channel, tap = _element(column, channels, SIZE * SIZE, CHANNELS_LAST)
        down, right = tap // SIZE, tap % SIZE
        sample = position // (rows_out * columns_out)
        row = position // columns_out % rows_out * STRIDE - PADDING
        across = position % columns_out * STRIDE - PADDING
        inside = (channel < channels) & (tap < SIZE * SIZE) & (position < last)
        inside = inside & (row + down >= 0) & (row + down < height)
        inside = inside & (across + right >= 0) & (across + right < width)
        corner = sample.to(tl.int64) * of_sample + row * of_row + across * of_column
        within = channel * of_channel + down * of_row + right * of_column
        values = tl.load(x + corner + within, mask=inside, other=0.0)
        if CHANNELS_LAST:
            values = tl.trans(values)
        return values

    @triton.jit
    def _patch_gram(
        A, x, positions, positions_a_part, channels, height, width, rows_out, columns_out,
        of_sample, of_channel, of_row, of_column,
        SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
        CHANNELS_LAST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a tile of A's triangle and a part of the positions."""
        if tl.program_id(0) > tl.program_id(1):
            return
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        shape = (channels, height, width, rows_out, columns_out)
        strides = (of_sample, of_channel, of_row, of_column)
        first = tl.program_id(2) * positions_a_part
        last = tl.minimum(positions, first + positions_a_part)
        total = tl.zeros((TILE, TILE), tl.float32)
        for begin in range(first, last, DEPTH):
            at = begin + tl.arange(0, DEPTH)
            left = _patches(x, row, at, last, shape, strides, SIZE, STRIDE, PADDING, CHANNELS_LAST)
            right = _patches(
                x, column, at, last, shape, strides, SIZE, STRIDE, PADDING, CHANNELS_LAST
            )
            total += tl.dot(left, tl.trans(right), input_precision="tf32x3")
        size = channels * SIZE * SIZE
        inside = (row < size)[:, None] & (column < size)[None, :]
        channel, tap = _element(row, channels, SIZE * SIZE, CHANNELS_LAST)
        row = (channel * SIZE * SIZE + tap)[:, None]
        channel, tap = _element(column, channels, SIZE * SIZE, CHANNELS_LAST)
        column = (channel * SIZE * SIZE + tap)[None, :]
        tl.atomic_add(A + row * size + column, total, mask=inside, sem="relaxed")
        if tl.program_id(0) < tl.program_id(1):
            tl.atomic_add(A + column * size + row, total, mask=inside, sem="relaxed")

    @_tuned(["samples", "channels", "positions", "of_position"], reset_to_zero=["out"])
    @triton.jit
    def _ssim(
        x, mean, variance, out, samples, channels, positions, of_sample, of_channel, of_position,
        C1: tl.constexpr, C2: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a tile of the sum's triangle [C, C] and a part of the samples."""
        if tl.program_id(0) > tl.program_id(1):
            return
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        total = tl.zeros((TILE, TILE), tl.float32)
        samples_a_part = tl.cdiv(samples, tl.num_programs(2))
        first = tl.program_id(2) * samples_a_part
        maps = x + first.to(tl.int64) * of_sample
        for sample in range(first, tl.minimum(samples, first + samples_a_part)):
            product = tl.zeros((TILE, TILE), tl.float32)
            for begin in range(0, positions, DEPTH):
                at = begin + tl.arange(0, DEPTH)
                left = tl.load(
                    maps + row[:, None] * of_channel + at[None, :] * of_position,
                    mask=(row < channels)[:, None] & (at < positions)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    maps + column[None, :] * of_channel + at[:, None] * of_position,
                    mask=(column < channels)[None, :] & (at < positions)[:, None],
                    other=0.0,
                )
                product += tl.dot(left, right, input_precision="tf32x3")
            some = sample * channels
            mean_i = tl.load(mean + some + row, mask=row < channels, other=0.0)[:, None]
            mean_j = tl.load(mean + some + column, mask=column < channels, other=0.0)[None, :]
            variance_i = tl.load(variance + some + row, mask=row < channels, other=0.0)[:, None]
            variance_j = tl.load(variance + some + column, mask=column < channels, other=0.0)
            covariance = product / positions - mean_i * mean_j
            luminance = (2 * mean_i * mean_j + C1) / (mean_i * mean_i + mean_j * mean_j + C1)
            total += luminance * (2 * covariance + C2) / (variance_i + variance_j[None, :] + C2)
            maps += of_sample
        inside = (row < channels)[:, None] & (column < channels)[None, :]
        at = row[:, None] * channels + column[None, :]
        tl.atomic_add(out + at, total, mask=inside, sem="relaxed")
        if tl.program_id(0) < tl.program_id(1):
            at = column[None, :] * channels + row[:, None]
            tl.atomic_add(out + at, total, mask=inside, sem="relaxed")

    @triton.jit
    def _moments(
        x, out, samples, channels, positions, of_sample, of_channel, of_position,
        parts, samples_a_part, WIDE: tl.constexpr, LONG: tl.constexpr,
    ):  # fmt: skip
        """One program for WIDE channels of a part of the samples: out [5, parts, C]."""
        channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
        part = tl.program_id(1)
        total = tl.zeros((WIDE, LONG), tl.float32)
        square = tl.zeros((WIDE, LONG), tl.float32)
        zeros = tl.zeros((WIDE, LONG), tl.float32)
        low = tl.full((WIDE, LONG), float("inf"), tl.float32)
        high = tl.full((WIDE, LONG), float("-inf"), tl.float32)
        first = part * samples_a_part
        maps = x + first.to(tl.int64) * of_sample
        for _ in range(first, tl.minimum(samples, first + samples_a_part)):
            for begin in range(0, positions, LONG):
                at = begin + tl.arange(0, LONG)
                inside = (channel < channels)[:, None] & (at < positions)[None, :]
                place = channel[:, None] * of_channel + at[None, :] * of_position
                value = tl.load(maps + place, mask=inside, other=0.0).to(tl.float32)
                total += value
                square += value * value
                zeros += tl.where(inside & (value == 0), 1.0, 0.0)
                low = tl.minimum(low, tl.where(inside, value, float("inf")))
                high = tl.maximum(high, tl.where(inside, value, float("-inf")))
            maps += of_sample
        at = out + part * channels + channel
        of_moment = parts * channels
        tl.store(at, tl.sum(total, 1), mask=channel < channels)
        tl.store(at + of_moment, tl.sum(square, 1), mask=channel < channels)
        tl.store(at + 2 * of_moment, tl.sum(zeros, 1), mask=channel < channels)
        tl.store(at + 3 * of_moment, tl.min(low, 1), mask=channel < channels)
        tl.store(at + 4 * of_moment, tl.max(high, 1), mask=channel < channels)

    @triton.jit
    def _multiply_adds(x, out, TURNS: tl.constexpr, CHAIN: tl.constexpr, BLOCK: tl.constexpr):
        """TURNS * CHAIN multiply-adds of every element, with itself alone."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        factor = tl.load(x + at)
        value = factor
        for _ in range(TURNS):
            for _ in tl.static_range(CHAIN):
                value = tl.fma(value, factor, factor)
        tl.store(out + at, value)


# Enough to fill a GPU several times; the interpreter runs one after the other.
PROGRAMS = 8 if INTERPRETED else 512
CHAIN = 32
MULTIPLY_ADDS = 256 * CHAIN


def channel_dot(x: Tensor, g: Tensor) -> Tensor:
    """``(x * g).sum((2, 3))`` of NCHW or channels-last tensors [N, C, H, W], as float32."""
    n, c, h, w = x.shape
    out = torch.empty(n, c, device=x.device)
    if x.is_contiguous():
        _dot_of_rows[lambda block: (triton.cdiv(n * c, block["ROWS"]),)](x, g, out, n * c, h * w)
    else:
        columns = min(64, triton.next_power_of_2(c))
        grid = (n, triton.cdiv(c, columns))
        _dot_of_columns[grid](x, g, out, h * w, c, ROWS=32, COLUMNS=columns)
    return out


def weighted_gram_(S: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """``S += a' diag(sigma) a`` for S [C, C] float32, a [N, C], sigma [N]."""
    n, c = a.shape
    _gram[lambda block: 2 * (triton.cdiv(c, block["TILE"]),)](S, a, sigma, n, c)
    return S


def weighted_grams_(S: Sequence[Tensor], a: Sequence[Tensor]) -> Sequence[Tensor]:
    """``S += a' a`` for S [C, C] float32 and a [N, C] of each layer, all in one launch."""
    widths, device = tuple(rows.shape[1] for rows in a), a[0].device
    tile = min(128, max(32, triton.next_power_of_2(max(widths)) // 8))
    tiles = _tiles(widths, tile, device)
    addresses = [[s.data_ptr(), r.data_ptr(), c] for s, r, c in zip(S, a, widths, strict=True)]
    layers = torch.tensor(addresses, pin_memory=device.type == "cuda")
    _grams[(len(tiles),)](
        tiles, layers.to(device, non_blocking=True), len(a[0]),
        ELEMENT=getattr(tl, str(a[0].dtype).removeprefix("torch.")),
        UNIT=math.gcd(16, *widths), TILE=tile, DEPTH=32, num_warps=8 if tile > 64 else 4,
    )  # fmt: skip
    return S


@cache
def _tiles(widths: tuple[int, ...], tile: int, device: torch.device) -> Tensor:
    """Layer, row and column of every tile of the triangles, int32 [tiles, 3]."""
    counts = [triton.cdiv(width, tile) for width in widths]
    tiles = [
        (layer, row, column)
        for layer, count in enumerate(counts)
        for row in range(count)
        for column in range(row, count)
    ]
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def patch_gram_(A: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """``A += P' P`` for A [K, K] float32, P the unfolded x [N, C, H, W], which is not made."""
    n, c, h, w = x.shape
    rows, columns = ((size + 2 * padding - kernel_size) // stride + 1 for size in (h, w))
    positions, depth = n * rows * columns, 32
    tile = min(128, max(16, triton.next_power_of_2(len(A))))
    tiles = triton.cdiv(len(A), tile)
    parts = max(1, min(PROGRAMS // tiles**2, triton.cdiv(positions, depth)))
    _patch_gram[(tiles, tiles, parts)](
        A, x, positions, triton.cdiv(positions, parts), c, h, w, rows, columns, *x.stride(),
        SIZE=kernel_size, STRIDE=stride, PADDING=padding,
        CHANNELS_LAST=x.stride(1) == 1, TILE=tile, DEPTH=depth, num_warps=8 if tile > 32 else 4,
    )  # fmt: skip
    return A


def map_similarity(x: Tensor) -> Tensor:
    """The mean over the samples of the SSIM between maps, [N, C, H, W] to [C, C]."""
    n, c, h, w = x.shape
    mean = x.mean((2, 3), dtype=torch.float32)
    variance = x.float().square().mean((2, 3)) - mean.square()
    out = torch.zeros(c, c, device=x.device)
    of_sample, of_channel, _, of_position = x.stride()

    def grid(block):
        tiles = triton.cdiv(c, block["TILE"])
        return tiles, tiles, max(1, min(n, PROGRAMS // (tiles * (tiles + 1) // 2)))

    _ssim[grid](
        x, mean, variance, out, n, c, h * w, of_sample, of_channel, of_position,
        C1=0.01**2, C2=0.03**2,
    )  # fmt: skip
    return out / n


def channel_moments(x: Tensor) -> tuple[Tensor, ...]:
    """Per channel of [N, C, H, W]: the sum, the sum of squares, zeros, least and largest value."""
    n, c, h, w = x.shape
    of_sample, of_channel, _, of_position = x.stride()
    wide, long = (1, 1024) if of_position == 1 else (min(64, triton.next_power_of_2(c)), 32)
    blocks = triton.cdiv(c, wide)
    samples_a_part = triton.cdiv(n, max(1, min(n, 4 * PROGRAMS // blocks)))
    parts = triton.cdiv(n, samples_a_part)
    out = torch.empty(5, parts, c, device=x.device)
    _moments[(blocks, parts)](
        x, out, n, c, h * w, of_sample, of_channel, of_position, parts, samples_a_part,
        WIDE=wide, LONG=long,
    )  # fmt: skip
    return *out[:3].sum(1), out[3].amin(0), out[4].amax(0)


def multiply_adds(x: Tensor) -> Tensor:
    """Busy with MULTIPLY_ADDS dependent ones for every element of x, a multiple of 1024."""
    out = torch.empty_like(x)
    _multiply_adds[(x.numel() // 1024,)](
        x, out, TURNS=MULTIPLY_ADDS // CHAIN, CHAIN=CHAIN, BLOCK=1024
    )
    return out
