from __future__ import annotations

import pytest
import torch
from layouts import (
    Maker,
    assert_equal_bits_with_any_threads,
    channels_last,
    contiguous,
    converted,
    cropped,
    cropped_channels_last,
    misaligned,
    reversed_dims,
    slice_of_channels,
    view_amid_nan,
)
from torch import Tensor

from ccp_ext import ops, reference

KINDS = ["ssim", "psnr", "mse", "cosine", "pearson"]
SAME = {"ssim": 1.0, "psnr": 60.0, "mse": 0.0, "cosine": 1.0, "pearson": 1.0}
LAYOUTS = [
    contiguous,
    channels_last,
    slice_of_channels,
    cropped,
    cropped_channels_last,
    misaligned,
    reversed_dims,
]
SHAPES = [(40, 10), (3, 5, 7), (2, 13, 7, 7), (3, 72, 8, 8), (5, 33, 4, 15), (2, 3, 4, 5, 6)]
# Of which a GPU compares tiles of 128x128 maps: aligned, odd and packed ones; the last two in 16
# bits on Hopper by tiles of 256x128.
LARGE = [
    (64, 96, 7, 7),
    (96, 257, 6, 6),
    (48, 130, 28, 28),
    (33, 392, 16, 20),
    (200, 256, 16, 16),
]


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16])
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cuda" and request.param == torch.float64:
        pytest.skip("float64 is for the CPU")
    return request.param


def error_bound(x: Tensor, kind: str, y: Tensor | None = None) -> Tensor:
    """256 roundings of what the sums of products amount to, for data_range 1.

    That is 1 where they are divided by standard deviations or norms; the maps' mean squares for
    mse; and for psnr the same relative to mse, in decibels.
    """
    a = x.double().reshape(*x.shape[:2], x.shape[2:].numel())
    b = a if y is None else y.double().reshape(a.shape)
    power = a.square().mean(2)[:, :, None] + b.square().mean(2)[:, None, :]
    if kind == "mse":
        magnitude = power
    elif kind == "psnr":
        mse = torch.cdist(a, b).square() / a.shape[2]
        magnitude = 4.35 * power / mse.clamp(min=1e-6) + 60
    else:
        magnitude = torch.ones_like(power)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    return 256 * torch.finfo(accumulator).eps * magnitude.mean(0)


def assert_close_to_reference(d: Tensor, x: Tensor, kind: str, y: Tensor | None = None) -> None:
    expected = reference.map_similarity(x, kind, y)
    assert d.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert d.shape == expected.shape and d.is_contiguous()
    assert ((d - expected).abs() <= error_bound(x, kind, y)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_float64_reference(
    layout: Maker, kind: str, dtype: torch.dtype, device: str
) -> None:
    for shape in SHAPES:
        x, y = (converted(layout(shape), dtype, device) for _ in range(2))
        assert_close_to_reference(ops.map_similarity(x, kind), x, kind)
        assert_close_to_reference(ops.map_similarity(x, kind, y), x, kind, y)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_x_and_y_may_differ(kind: str, dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        x = converted(contiguous(shape), dtype, device)
        y = converted(channels_last(shape), dtype, device)
        assert_close_to_reference(ops.map_similarity(x, kind, y), x, kind, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [contiguous, channels_last, misaligned])
def test_symmetric_to_the_bit_with_an_exact_diagonal(
    layout: Maker, kind: str, dtype: torch.dtype, device: str
) -> None:
    d = ops.map_similarity(converted(layout((5, 72, 6, 8)), dtype, device), kind)
    assert torch.equal(d, d.T)
    assert (d.diagonal() == SAME[kind]).all()


def test_moments_are_those_of_the_population(device: str) -> None:
    """Maps (0, 1) and (1, 0): means 1/2, variances 1/4, covariance -1/4."""
    x = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], device=device)
    expected = {
        "ssim": (-0.5 + 9e-4) / (0.5 + 9e-4),
        "psnr": 0.0,
        "mse": 1.0,
        "cosine": 0.0,
        "pearson": -1.0,
    }
    for kind, value in expected.items():
        assert ops.map_similarity(x, kind)[0, 1].item() == pytest.approx(value, abs=1e-6)


def test_ssim_and_psnr_depend_on_the_maps_divided_by_the_range(device: str) -> None:
    x = torch.rand(3, 9, 6, 6, device=device)
    for kind in ("ssim", "psnr"):
        expected = reference.map_similarity(255 * x, kind, data_range=255)
        scaled = ops.map_similarity(255 * x, kind, data_range=255)
        torch.testing.assert_close(scaled, expected.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scaled, ops.map_similarity(x, kind), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(scaled, ops.map_similarity(255 * x, kind))


@pytest.mark.parametrize("kind", ["ssim", "mse", "pearson"])
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
def test_a_large_mean_does_not_cancel(layout: Maker, kind: str, device: str) -> None:
    """Mean 1000 and deviation 1: the raw products are a million times the covariance."""
    x = converted(layout((2, 40, 5, 5)) + 1000, torch.float32, device)
    d = ops.map_similarity(x, kind)
    expected = reference.map_similarity(x, kind)
    # As exact as of the centred maps: what a difference of rounded means loses is beyond the bound.
    assert (
        (d - expected).abs() <= 32 * torch.finfo(torch.float32).eps * (1 + expected.abs())
    ).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
def test_a_large_mean_does_not_cancel_in_16_bits(
    layout: Maker, half: torch.dtype, device: str
) -> None:
    x = converted(layout((3, 20, 12, 12)) + 30, half, device)
    assert_close_to_reference(ops.map_similarity(x, "pearson"), x, "pearson")


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 1, 1)])
def test_maps_of_a_single_number(shape: tuple[int, ...], device: str) -> None:
    x, y = torch.randn(2, *shape, device=device)
    for kind in KINDS:
        assert_close_to_reference(ops.map_similarity(x, kind, y), x, kind, y)
    assert torch.equal(ops.map_similarity(x, "pearson"), torch.eye(6, device=device))
    numbers = x.reshape(4, 6)
    signs = (numbers[:, :, None] * numbers[:, None, :]).sign().mean(0)
    torch.testing.assert_close(ops.map_similarity(x, "cosine"), signs)


@pytest.mark.parametrize("layout", [contiguous, channels_last, misaligned])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -3.3e7])
def test_constant_maps_have_defined_similarities(layout: Maker, value: float, device: str) -> None:
    x = layout((2, 3, 8, 8))
    x[:, 0] = value
    x[:, 1] = 0
    x = x.to(device)
    pearson = ops.map_similarity(x, "pearson")
    assert torch.equal(pearson, torch.eye(3, device=device))
    cosine = ops.map_similarity(x, "cosine")
    assert torch.equal(cosine[1], torch.tensor([0.0, 1.0, 0.0], device=device))
    for kind in KINDS:
        assert ops.map_similarity(x, kind).isfinite().all()
        assert ops.map_similarity(x, kind, x.clone()).isfinite().all()


def test_equal_maps_of_different_channels_are_as_similar_as_they_can_be(device: str) -> None:
    x = torch.randn(4, 6, 14, 14, device=device).relu()
    x[:, 4] = x[:, 1]
    for kind in KINDS:
        assert ops.map_similarity(x, kind)[1, 4].item() == pytest.approx(
            SAME[kind], abs=0.2 if kind == "psnr" else 1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", [contiguous, channels_last, misaligned])
@pytest.mark.parametrize("shape", [(2, 6, 5, 8), (64, 96, 5, 8)])
def test_nan_and_infinity_reach_their_row_and_column_only(
    shape: tuple[int, ...], layout: Maker, bad: float, kind: str, device: str
) -> None:
    x = layout(shape)
    x[1, 2, 3, 4] = bad
    d = ops.map_similarity(x.to(device), kind)
    assert d[2].isnan().all() and d[:, 2].isnan().all()
    others = [channel for channel in range(shape[1]) if channel != 2]
    assert d[others][:, others].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3)])
def test_the_mean_over_nothing_is_nan(shape: tuple[int, ...], device: str) -> None:
    d = ops.map_similarity(torch.randn(shape, device=device))
    assert d.shape == (3, 3) and d.isnan().all()


def test_no_channels_give_an_empty_result(device: str) -> None:
    assert ops.map_similarity(torch.randn(2, 0, 4, device=device)).shape == (0, 0)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(70, 5, 7, 7), (2, 130, 4, 4), (64, 96, 3, 3)])
def test_every_output_and_every_partial_result_is_written(
    layout: Maker, shape: tuple[int, ...], device: str
) -> None:
    assert torch.empty(3).isnan().all()
    x, y = (converted(layout(shape), torch.float32, device) for _ in range(2))
    assert_close_to_reference(ops.map_similarity(x), x, "ssim")
    assert_close_to_reference(ops.map_similarity(x, "ssim", y), x, "ssim", y)


@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(100, 5, 7, 7), (3, 70, 20, 30), (64, 96, 7, 7)])
def test_every_run_gives_equal_bits(
    layout: Maker, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = converted(layout(shape), dtype, device)
    assert torch.equal(ops.map_similarity(x), ops.map_similarity(x))


@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(100, 5, 17, 17), (3, 70, 20, 30)])
def test_the_number_of_threads_does_not_change_a_bit(layout: Maker, shape: tuple[int, ...]) -> None:
    x, y = layout(shape), layout(shape)
    assert_equal_bits_with_any_threads(lambda: ops.map_similarity(x))
    assert_equal_bits_with_any_threads(lambda: ops.map_similarity(x, y=y))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_nothing_outside_a_view_is_used(layout: Maker, device: str) -> None:
    """NaN around a cropped view stays outside the result."""
    view = view_amid_nan(layout, device)
    assert_close_to_reference(ops.map_similarity(view), view, "ssim")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped, misaligned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_tiles_match_float64_reference(
    dtype: torch.dtype, layout: Maker, kind: str, cuda: str
) -> None:
    for shape in LARGE:
        x, y = (converted(layout(shape), dtype, cuda) for _ in range(2))
        assert_close_to_reference(ops.map_similarity(x, kind), x, kind)
        assert_close_to_reference(ops.map_similarity(x, kind, y), x, kind, y)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_large_tiles_of_maps_with_a_large_mean(layout: Maker, cuda: str) -> None:
    for half in (torch.bfloat16, torch.float16):
        for shape in LARGE:
            x = converted(layout(shape) + 30, half, cuda)
            assert_close_to_reference(ops.map_similarity(x, "pearson"), x, "pearson")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [contiguous, channels_last, misaligned])
def test_large_tiles_are_symmetric_to_the_bit_with_an_exact_diagonal(
    layout: Maker, cuda: str
) -> None:
    for shape in LARGE:
        for kind in KINDS:
            d = ops.map_similarity(converted(layout(shape), torch.bfloat16, cuda), kind)
            assert torch.equal(d, d.T)
            assert (d.diagonal() == SAME[kind]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [contiguous, channels_last, misaligned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_tiles_give_equal_bits_in_every_run(
    dtype: torch.dtype, layout: Maker, cuda: str
) -> None:
    for shape in LARGE:
        x, y = (converted(layout(shape), dtype, cuda) for _ in range(2))
        for other in (None, y):
            first, second = (ops.map_similarity(x, y=other) for _ in range(2))
            assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
def test_gpu_and_cpu_agree(layout: Maker, kind: str, cuda: str) -> None:
    for shape in [*SHAPES, (4, 160, 28, 28)]:
        x = layout(shape)
        on_gpu = ops.map_similarity(converted(x, torch.float32, cuda), kind).cpu()
        assert ((on_gpu - ops.map_similarity(x, kind)).abs() <= 2 * error_bound(x, kind)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 64, 28, 28), (64, 96, 28, 28)])
def test_tf32_is_used_only_where_allowed(shape: tuple[int, ...], cuda: str) -> None:
    x = torch.randn(shape, device=cuda)
    expected = reference.map_similarity(x, "pearson")
    exact = (ops.map_similarity(x, "pearson") - expected).abs().max()
    rounded = (ops.map_similarity(x, "pearson", allow_tf32=True) - expected).abs().max()
    assert exact < 1e-6 < rounded < 1e-3


@pytest.mark.gpu
def test_float64_on_a_gpu_is_refused(cuda: str) -> None:
    x = torch.randn(2, 3, 4, device=cuda, dtype=torch.float64)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16 on a GPU, got float64"):
        ops.map_similarity(x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 8, 16, 16), torch.float32),
        ((200, 70, 8, 8), torch.float32),
        ((64, 96, 7, 7), torch.float32),
        ((33, 392, 16, 20), torch.bfloat16),
    ],
)
def test_a_captured_graph_replays_with_new_values(
    shape: tuple[int, ...], dtype: torch.dtype, cuda: str
) -> None:
    x = torch.randn(shape, device=cuda, dtype=dtype)
    ops.map_similarity(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        d = ops.map_similarity(x)
    x.normal_()
    graph.replay()
    assert_close_to_reference(d, x, "ssim")
