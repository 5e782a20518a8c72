from __future__ import annotations

import math

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
from torch import Tensor

from ccp_ext import ops, reference

SHAPES = [
    (4, 10),
    (128, 300),
    (3, 5, 7),
    (2, 13, 7, 7),
    (8, 16, 8, 8),
    (2, 33, 14, 15),
    (1, 2, 99, 103),
    (2, 3, 4, 5, 6),
]


def assert_close_to_reference(a: Tensor, x: Tensor, g: Tensor, channel_dim: int = 1) -> None:
    expected = reference.channel_dot(x, g, channel_dim)
    magnitude = reference.channel_dot(x.abs(), g.abs(), channel_dim)
    assert a.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert a.shape == expected.shape and a.is_contiguous()
    bound = 16 * torch.finfo(a.dtype).eps * magnitude
    assert ((a - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(
    "layouts", LAYOUTS, ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}"
)
def test_matches_float64_reference(
    layouts: tuple[Maker, Maker], dtype: torch.dtype, device: str
) -> None:
    for shape in SHAPES:
        x, g = (converted(make(shape), dtype, device) for make in layouts)
        assert_close_to_reference(ops.channel_dot(x, g), x, g)


@pytest.mark.parametrize("channel_dim", [1, 2, -1, -2])
def test_channel_dim_names_the_channel(channel_dim: int, device: str) -> None:
    x, g = torch.randn(2, 3, 9, 21, device=device)
    assert_close_to_reference(ops.channel_dot(x, g, channel_dim), x, g, channel_dim)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_long_sums_keep_the_error_bound(layout: Maker, device: str) -> None:
    x, g = (converted(layout((1, 3, 500, 401)), torch.float32, device) for _ in range(2))
    assert_close_to_reference(ops.channel_dot(x, g), x, g)


def test_gradient_from_autograd_equals_the_gate_gradient(device: str) -> None:
    """A gate that multiplies a channel receives channel_dot(z, dL/d(gated z)) as its gradient."""
    z = torch.randn(4, 6, 5, 5, device=device, requires_grad=True)
    weight = torch.randn(4, 6, 5, 5, device=device)
    gate = torch.ones(4, 6, 1, 1, device=device, requires_grad=True)
    gated = gate * z
    gated.retain_grad()
    (torch.tanh(gated) * weight).sum().backward()
    a = ops.channel_dot(z.detach(), gated.grad)
    torch.testing.assert_close(a, gate.grad[:, :, 0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 65536), (65536, 1)])
def test_every_16_bit_number_is_widened_exactly(
    dtype: torch.dtype, shape: tuple[int, int], device: str
) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).to(device).view(shape)
    torch.testing.assert_close(
        ops.channel_dot(every, torch.ones_like(every)),
        every.float(),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0), (0, 3, 0)])
def test_empty_samples_or_channels_give_an_empty_result(
    shape: tuple[int, ...], device: str
) -> None:
    x = torch.randn(shape, device=device)
    assert ops.channel_dot(x, x).shape == shape[:2]


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(3, 17, 7, 7), (1, 5, 300, 307)])
def test_every_output_and_every_partial_sum_is_written(
    layout: Maker, shape: tuple[int, ...], device: str
) -> None:
    assert torch.empty(3).isnan().all()
    x, g = (converted(layout(shape), torch.float32, device) for _ in range(2))
    assert_close_to_reference(ops.channel_dot(x, g), x, g)


def test_sums_over_no_positions_are_zero(device: str) -> None:
    x = torch.randn(2, 3, 0, 5, device=device)
    assert torch.equal(ops.channel_dot(x, x), torch.zeros(2, 3, device=device))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(3, 17, 7, 7), (1, 5, 300, 307)])
def test_every_run_gives_equal_bits(
    layout: Maker, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x, g = (converted(layout(shape), dtype, device) for _ in range(2))
    assert torch.equal(ops.channel_dot(x, g), ops.channel_dot(x, g))


@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
@pytest.mark.parametrize("shape", [(64, 17, 14, 14), (1, 5, 300, 307)])
def test_the_number_of_threads_does_not_change_a_bit(layout: Maker, shape: tuple[int, ...]) -> None:
    x, g = layout(shape), layout(shape)
    assert_equal_bits_with_any_threads(lambda: ops.channel_dot(x, g))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_nothing_outside_a_view_is_used(layout: Maker, device: str) -> None:
    """NaN around a cropped view stays outside the result."""
    view = view_amid_nan(layout, device)
    assert_close_to_reference(ops.channel_dot(view, view), view, view)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
def test_gpu_and_cpu_agree(layout: Maker, dtype: torch.dtype, cuda: str) -> None:
    for shape in SHAPES:
        x, g = (converted(layout(shape), dtype, "cpu") for _ in range(2))
        on_gpu = ops.channel_dot(converted(x, dtype, cuda), converted(g, dtype, cuda)).cpu()
        on_cpu = ops.channel_dot(x, g)
        magnitude = reference.channel_dot(x.abs(), g.abs())
        assert ((on_gpu - on_cpu).abs() <= 32 * torch.finfo(on_cpu.dtype).eps * magnitude).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (1, 2, 300, 300)])
def test_a_captured_graph_replays_with_new_values(shape: tuple[int, ...], cuda: str) -> None:
    x, g = torch.randn(2, *shape, device=cuda)
    ops.channel_dot(x, g)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a = ops.channel_dot(x, g)
    x.normal_()
    graph.replay()
    assert_close_to_reference(a, x, g)


@pytest.mark.gpu
def test_the_current_stream_is_used(cuda: str) -> None:
    x, g = torch.randn(2, 64, 64, 56, 56, device=cuda)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        x.mul_(2)
        a = ops.channel_dot(x, g)
    torch.cuda.synchronize()
    assert_close_to_reference(a, x, g)


@pytest.mark.parametrize(
    ("value", "factor"), [(3e37, 0.0), (3e37, 1e-5), (2.0, math.inf), (0.0, math.inf)]
)
def test_a_gradient_expanded_over_the_positions_multiplies_each_of_them(
    value: float, factor: float, device: str
) -> None:
    x = torch.full((2, 3, 50), value, device=device)  # 50 * 3e37 has no float32
    x[..., 7] = -1.0
    g = torch.full((2, 3, 1), factor, device=device).expand(2, 3, 50)
    expected = ops.channel_dot(x, g.contiguous())
    torch.testing.assert_close(ops.channel_dot(x, g), expected, equal_nan=True)
    torch.testing.assert_close(ops.channel_dot(g, x), expected, equal_nan=True)
    assert expected.isfinite().all() == (factor < 1)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("step", [1, 2])
def test_equal_terms_keep_the_error_bound(step: int, dtype: torch.dtype, device: str) -> None:
    x = torch.rand(40, 2, 1, device=device).expand(40, 2, 8192 * step).to(dtype).contiguous()
    x, one = x[..., ::step], torch.ones((), dtype=dtype, device=device).expand(40, 2, 8192)
    assert_close_to_reference(ops.channel_dot(x, x), x, x)
    assert_close_to_reference(ops.channel_dot(x, one), x, one)
