from __future__ import annotations

import pytest
import torch
from layouts import (
    FLOATING,
    LAYOUTS,
    Maker,
    assert_equal_bits_with_any_threads,
    channels_last,
    contiguous,
    converted,
    cropped,
    view_amid_nan,
)
from test_channel_dot import SHAPES
from torch import Tensor

from ccp_ext import ops, reference

MAKERS = sorted({maker for pair in LAYOUTS for maker in pair}, key=lambda maker: maker.__name__)


def sparse(x: Tensor) -> Tensor:
    """x with a third of its values zero, of both signs; the same strides, holes included."""
    storage = x.untyped_storage().nbytes() // x.element_size()
    values = x.as_strided((storage,), (1,), 0)
    values[values.abs() < 0.4] *= 0
    return x


def assert_close_to_reference(moments: ops.ChannelMoments, x: Tensor, channel_dim: int = 1) -> None:
    expected = reference.channel_moments(x, channel_dim)
    magnitude = reference.channel_moments(x.abs(), channel_dim)[0]
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-5
    assert moments.sum.dtype == torch.float64 and moments.zeros.dtype == torch.int64
    assert ((moments.sum - expected[0]).abs() <= tolerance * magnitude).all()
    assert ((moments.square_sum - expected[1]).abs() <= tolerance * expected[1]).all()
    assert torch.equal(moments.zeros, expected[2].long())
    assert torch.equal(moments.minimum, expected[3])
    assert torch.equal(moments.maximum, expected[4])
    assert moments.count * x.shape[channel_dim] == x.numel()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("layout", MAKERS)
def test_matches_float64_reference(layout: Maker, dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        x = sparse(converted(layout(shape), dtype, device))
        assert_close_to_reference(ops.channel_moments(x), x)


@pytest.mark.parametrize("channel_dim", [1, 2, -1, -2])
def test_channel_dim_names_the_channel(channel_dim: int, device: str) -> None:
    x = sparse(torch.randn(2, 3, 9, 21, device=device))
    assert_close_to_reference(ops.channel_moments(x, channel_dim), x, channel_dim)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_long_sums_keep_the_error_bound(layout: Maker, device: str) -> None:
    x = converted(layout((2, 3, 700, 701)).abs(), torch.float32, device)
    assert_close_to_reference(ops.channel_moments(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_do_not_overflow(dtype: torch.dtype, device: str) -> None:
    x = torch.full((4, 2, 64, 64), 60000.0, device=device).to(dtype)
    assert_close_to_reference(ops.channel_moments(x), x)


@pytest.mark.parametrize(
    ("dtype", "largest", "too_large"),
    [
        (torch.float32, 1e18, 1.9e19),
        (torch.bfloat16, 1e18, 1.9e19),
        (torch.float64, 1e153, 1.4e154),
        (torch.float16, 65504.0, None),
    ],
)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_squares_overflow_where_the_documentation_says(
    dtype: torch.dtype, largest: float, too_large: float | None, layout: Maker, device: str
) -> None:
    x = layout((3, 8, 7, 7)).to(device, dtype)
    x.fill_(largest)
    x[:, 1] *= -1
    assert_close_to_reference(ops.channel_moments(x), x)
    if too_large is None:
        return
    x[2, 0, 3, 3] = too_large
    moments = ops.channel_moments(x)
    expected = reference.channel_moments(x)
    square_sum = moments.square_sum[0]
    assert square_sum.isinf() or torch.isclose(square_sum, expected[1, 0])
    assert torch.allclose(moments.sum, expected[0], rtol=1e-5)
    assert torch.equal(moments.minimum, expected[3]) and torch.equal(moments.maximum, expected[4])
    assert moments.square_sum[1:].isfinite().all()


@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("dtype", FLOATING)
def test_nan_reaches_all_moments_of_its_channel_but_the_zeros(
    layout: Maker, dtype: torch.dtype, device: str
) -> None:
    for shape, where in {(3, 20, 6, 7): (1, 4, 5, 6), (2, 5, 64): (0, 3, 0)}.items():
        x = sparse(converted(layout(shape), dtype, device))
        clean = ops.channel_moments(x)
        x[where] = torch.nan
        moments = ops.channel_moments(x)
        others = torch.arange(shape[1], device=device) != where[1]
        for name in ("sum", "square_sum", "minimum", "maximum"):
            values = getattr(moments, name)
            assert values[where[1]].isnan()
            assert torch.equal(values[others], getattr(clean, name)[others])
        assert torch.equal(moments.zeros, (x == 0).movedim(1, 0).flatten(1).sum(1))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_infinities_are_extremes(layout: Maker, device: str) -> None:
    x = layout((3, 4, 6, 6)).to(device)
    x[0, 1, 2, 3] = torch.inf
    x[1, 2, 0, 0] = -torch.inf
    moments = ops.channel_moments(x)
    assert moments.maximum[1] == moments.sum[1] == torch.inf and moments.minimum[1].isfinite()
    assert moments.minimum[2] == moments.sum[2] == -torch.inf and moments.maximum[2].isfinite()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3)])
def test_moments_of_nothing_are_neutral(shape: tuple[int, ...], device: str) -> None:
    moments = ops.channel_moments(torch.randn(shape, device=device))
    assert moments.sum.tolist() == moments.square_sum.tolist() == [0.0, 0.0, 0.0]
    assert moments.zeros.tolist() == [0, 0, 0] and moments.count == 0
    assert (moments.minimum == torch.inf).all() and (moments.maximum == -torch.inf).all()


def test_no_channels_give_empty_moments(device: str) -> None:
    moments = ops.channel_moments(torch.randn(2, 0, 4, device=device))
    assert moments.sum.shape == moments.zeros.shape == (0,)
    assert moments.count == 8


def test_moments_of_batches_merge(device: str) -> None:
    x = sparse(torch.randn(12, 5, 9, 9, device=device))
    whole, parts = ops.channel_moments(x), [ops.channel_moments(part) for part in x.split(5)]
    error = (sum(part.sum for part in parts) - whole.sum).abs()
    assert (error <= 1e-7 * x.double().abs().sum((0, 2, 3))).all()
    assert torch.equal(sum(part.zeros for part in parts), whole.zeros)
    assert torch.equal(torch.stack([part.minimum for part in parts]).amin(0), whole.minimum)
    assert sum(part.count for part in parts) == whole.count == 12 * 81


def test_batch_norm_estimates_the_same_mean_and_variance(device: str) -> None:
    x = torch.randn(8, 5, 9, 9, device=device) * 3 + 2
    norm = torch.nn.BatchNorm2d(5, momentum=1.0).to(device)
    norm(x)
    moments = ops.channel_moments(x)
    mean = moments.sum / moments.count
    variance = moments.square_sum / moments.count - mean.square()
    torch.testing.assert_close(mean.float(), norm.running_mean)
    unbiased = variance * moments.count / (moments.count - 1)
    torch.testing.assert_close(unbiased.float(), norm.running_var)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(3, 17, 7, 7), (1, 5, 300, 307)])
def test_every_output_and_every_partial_sum_is_written(
    layout: Maker, shape: tuple[int, ...], device: str
) -> None:
    assert torch.empty(3).isnan().all()
    x = sparse(converted(layout(shape), torch.float32, device))
    assert_close_to_reference(ops.channel_moments(x), x)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(3, 17, 7, 7), (1, 5, 300, 307)])
def test_every_run_gives_equal_bits(
    layout: Maker, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = converted(layout(shape), dtype, device)
    first, second = (torch.ops.ccp_ext.channel_moments(x) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(64, 17, 14, 14), (1, 5, 300, 307)])
def test_the_number_of_threads_does_not_change_a_bit(layout: Maker, shape: tuple[int, ...]) -> None:
    x = layout(shape)
    assert_equal_bits_with_any_threads(lambda: torch.ops.ccp_ext.channel_moments(x))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_nothing_outside_a_view_is_used(layout: Maker, device: str) -> None:
    """NaN around a cropped view stays outside the result."""
    view = view_amid_nan(layout, device)
    assert_close_to_reference(ops.channel_moments(view), view)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (1, 2, 300, 300)])
def test_a_captured_graph_replays_with_new_values(shape: tuple[int, ...], cuda: str) -> None:
    x = torch.randn(shape, device=cuda)
    ops.channel_moments(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moments = ops.channel_moments(x)
    x.normal_()
    graph.replay()
    assert_close_to_reference(moments, x)
