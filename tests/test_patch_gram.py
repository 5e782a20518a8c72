from __future__ import annotations

import pytest
import torch
from layouts import assert_equal_bits_with_any_threads
from torch import Tensor

from ccp_ext import ops, reference

# out dtype, input dtype
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float64, torch.float64),
]
# shape of x, options
WINDOWS = [
    ((2, 3, 8, 8), {"kernel_size": 3, "padding": 1}),
    ((3, 5, 9, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((2, 4, 6, 11), {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)}),
    ((1, 2, 13, 12), {"kernel_size": 3, "dilation": (2, 3), "padding": (1, 0)}),
    ((2, 40, 5, 5), {"kernel_size": 1}),
    # Whole pairs of positions; channels that fill one vector, two, three, and none.
    ((3, 16, 14, 13), {"kernel_size": 1}),
    ((4, 32, 15, 20), {"kernel_size": 1}),
    ((2, 96, 6, 6), {"kernel_size": 1, "groups": 2}),
    ((2, 24, 1, 8), {"kernel_size": 1}),
    ((1, 3, 24, 25), {"kernel_size": 7, "stride": 2, "padding": 3}),
    ((2, 6, 7, 7), {"kernel_size": 3, "padding": 1, "groups": 3}),
    ((2, 8, 5, 6), {"kernel_size": 2, "padding": 2, "groups": 8}),
    ((5, 17, 1, 1), {"kernel_size": 1}),
    ((1, 1, 3, 3), {"kernel_size": 3}),
    # Channels enough that taps of equal difference share a product; also maps that are nearly
    # all border, and maps smaller than the window.
    ((2, 20, 6, 9), {"kernel_size": 3, "padding": 1}),
    ((2, 34, 7, 5), {"kernel_size": 3}),
    ((2, 40, 7, 8), {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
    ((1, 24, 9, 8), {"kernel_size": (3, 4), "stride": (3, 2), "dilation": 2, "padding": (3, 4)}),
    ((2, 33, 2, 1), {"kernel_size": (3, 5), "padding": (1, 2)}),
    ((1, 32, 1, 150), {"kernel_size": (1, 3), "padding": (0, 5)}),
]


def random_input(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool = False
) -> Tensor:
    x = torch.randn(shape).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def output_like(added: Tensor, dtype: torch.dtype) -> Tensor:
    """A random start of the shape and dtype that the operator takes, symmetric where square."""
    start = torch.randn(added.shape, device=added.device, dtype=dtype)
    start = start + start.mT if start.shape[-1] == start.shape[-2] else start
    return start[0].clone() if len(start) == 1 else start


def assert_added(out: Tensor, before: Tensor, added: Tensor, magnitude: Tensor) -> None:
    added, magnitude = added.reshape(out.shape), magnitude.reshape(out.shape)
    bound = 16 * torch.finfo(out.dtype).eps * (magnitude + before.abs() + out.abs())
    assert ((out - (before.double() + added)).abs() <= bound).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("out_dtype", "dtype"), DTYPES)
def test_the_gram_matches_unfold_in_float64_and_stays_symmetric(
    out_dtype: torch.dtype, dtype: torch.dtype, channels_last: bool, device: str
) -> None:
    for shape, window in WINDOWS:
        x = random_input(shape, dtype, device, channels_last)
        added = reference.patch_gram(x, **window)
        A = output_like(added, out_dtype)
        before = A.clone()
        assert ops.patch_gram_(A, x, **window) is A
        assert_added(A, before, added, reference.patch_gram(x.abs(), **window))
        assert torch.equal(A, A.mT)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("out_dtype", "dtype"), DTYPES)
def test_the_cross_product_matches_unfold_in_float64(
    out_dtype: torch.dtype, dtype: torch.dtype, channels_last: bool, device: str
) -> None:
    for shape, window in WINDOWS:
        x = random_input(shape, dtype, device, channels_last)
        groups = window.get("groups", 1)
        weight = torch.zeros(5 * groups, x.shape[1] // groups, *_pair(window["kernel_size"]))
        options = {name: value for name, value in window.items() if name != "kernel_size"}
        y_shape = torch.nn.functional.conv2d(x.float().cpu(), weight, **options).shape
        y = random_input(y_shape, dtype, device, channels_last)
        added = reference.patch_cross(x, y, **window)
        B = output_like(added, out_dtype)
        before = B.clone()
        assert ops.patch_cross_(B, x, y, **window) is B
        assert_added(B, before, added, reference.patch_cross(x.abs(), y.abs(), **window))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def test_many_positions(device: str) -> None:
    """More rows of the patch matrix than are taken at a time."""
    x = random_input((6, 4, 31, 33), torch.float32, device)
    A = torch.zeros(36, 36, device=device)
    ops.patch_gram_(A, x, 3, padding=1)
    magnitude = reference.patch_gram(x.abs(), 3, padding=1)
    assert_added(A, torch.zeros_like(A), reference.patch_gram(x, 3, padding=1), magnitude)


@pytest.mark.parametrize("view", ["cropped", "every second", "expanded", "transposed"])
def test_any_strides_of_x(view: str, device: str) -> None:
    x = {
        "cropped": torch.randn(2, 9, 12, 12)[:, 2:5, 1:8, 3:10],
        "every second": torch.randn(4, 6, 14, 14)[::2, ::2, ::2, ::2],
        "expanded": torch.randn(3, 1, 7).expand(2, 3, 7, 7),
        "transposed": torch.randn(2, 3, 7, 7).transpose(2, 3),
    }[view].to(device)
    A = torch.zeros(27, 27, device=device)
    ops.patch_gram_(A, x, 3, padding=1)
    magnitude = reference.patch_gram(x.abs(), 3, padding=1)
    assert_added(A, torch.zeros_like(A), reference.patch_gram(x, 3, padding=1), magnitude)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("view", ["odd offset", "odd channels", "odd samples", "odd maps", "rows"])
def test_positions_that_do_not_lie_in_whole_pairs(
    view: str, dtype: torch.dtype, device: str
) -> None:
    x = random_input((3, 20, 9, 12), dtype, device)
    flat = x.flatten()
    x = {
        "odd offset": flat[1:].as_strided((2, 20, 6, 8), (960, 48, 8, 1), 1),
        "odd channels": flat.as_strided((2, 20, 6, 8), (980, 49, 8, 1)),
        "odd samples": flat.as_strided((2, 20, 6, 8), (961, 48, 8, 1)),
        "odd maps": flat.as_strided((2, 20, 3, 3), (180, 9, 3, 1)),
        "rows": x[:, :, :6, :8],
    }[view]
    A = torch.zeros(20, 20, device=device)
    ops.patch_gram_(A, x, 1)
    assert_added(
        A, torch.zeros_like(A), reference.patch_gram(x, 1), reference.patch_gram(x.abs(), 1)
    )


def test_a_corner_of_a_larger_matrix_is_updated_alone(device: str) -> None:
    larger = torch.zeros(40, 50, device=device)
    x = random_input((2, 3, 6, 6), torch.float32, device)
    ops.patch_gram_(larger[4:31, 7:34], x, 3)
    magnitude = reference.patch_gram(x.abs(), 3)
    assert_added(
        larger[4:31, 7:34], torch.zeros(27, 27).to(device), reference.patch_gram(x, 3), magnitude
    )
    larger[4:31, 7:34] = 0
    assert not larger.any()


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5)])
def test_nothing_to_add(shape: tuple[int, ...], device: str) -> None:
    A = torch.randn(shape[1] * 9, shape[1] * 9, device=device)
    before = A.clone()
    ops.patch_gram_(A, torch.zeros(shape, device=device), 3)
    assert torch.equal(A, before)


def test_float32_is_not_rounded_to_tf32(device: str) -> None:
    """1 + 2^-13 is a float32 but no TF32 number."""
    x = torch.full((1, 3, 8, 8), 1 + 2.0**-13, device=device)
    A = torch.zeros(27, 27, device=device)
    ops.patch_gram_(A, x, 3)
    exact = 36 * (1 + 2.0**-13) ** 2
    assert ((A.double() - exact).abs() <= 16 * torch.finfo(torch.float32).eps * exact).all()


def test_the_normal_equations_recover_a_convolution_with_bias(device: str) -> None:
    """The refit that the operators are for: filters and bias from inputs and outputs alone."""
    conv = torch.nn.Conv2d(6, 5, 3, padding=1, device=device, dtype=torch.float64)
    x = random_input((8, 6, 9, 9), torch.float64, device)
    y = conv(x).detach()
    A = torch.zeros(55, 55, device=device, dtype=torch.float64)
    B = torch.zeros(55, 5, device=device, dtype=torch.float64)
    ones = torch.ones(1, device=device, dtype=torch.float64).expand(8, 1, 9, 9)
    ops.patch_gram_(A[:54, :54], x, 3, padding=1)
    ops.patch_cross_(A[:54, 54:], x, ones, 3, padding=1)
    A[54, :54] = A[:54, 54]
    A[54, 54] = ones.numel()
    ops.patch_cross_(B[:54], x, y, 3, padding=1)
    B[54] = y.sum((0, 2, 3))
    solution = torch.linalg.solve(A, B)
    torch.testing.assert_close(solution[:54].T.reshape(5, 6, 3, 3), conv.weight.detach())
    torch.testing.assert_close(solution[54], conv.bias.detach())


@pytest.mark.parametrize("channels", [20, 57])  # on a GPU by patches, in parts; by packed pieces
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_run_and_every_number_of_threads_gives_equal_bits(
    dtype: torch.dtype, channels: int, device: str
) -> None:
    x, y = (random_input((4, width, 17, 15), dtype, device) for width in (channels, 33))
    A, B = (torch.zeros(9 * channels, columns, device=device) for columns in (9 * channels, 33))
    assert_equal_bits_with_any_threads(lambda: ops.patch_gram_(A.clone(), x, 3, padding=1))
    assert_equal_bits_with_any_threads(lambda: ops.patch_cross_(B.clone(), x, y, 3, padding=1))


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("channels", [20, 57])  # on a GPU by patches, in parts; by packed pieces
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_copy_and_every_partial_sum_is_written(
    dtype: torch.dtype, channels: int, device: str
) -> None:
    assert torch.empty(3).isnan().all()
    x, y = (random_input((4, width, 17, 15), dtype, device) for width in (channels, 33))
    for function, products, maps in (
        (ops.patch_gram_, reference.patch_gram, (x,)),
        (ops.patch_cross_, reference.patch_cross, (x, y)),
    ):
        added, magnitude = (products(*values, 3, padding=1) for values in (maps, map(abs, maps)))
        out = torch.zeros_like(added[0], dtype=torch.float32)
        function(out, *maps, 3, padding=1)
        assert_added(out, torch.zeros_like(out), added, magnitude)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_allowed_tf32_stays_within_its_precision(channels_last: bool, cuda: str) -> None:
    x = random_input((2, 33, 12, 12), torch.float32, cuda, channels_last)
    A = torch.zeros(297, 297, device=cuda)
    ops.patch_gram_(A, x, 3, padding=1, allow_tf32=True)
    magnitude = reference.patch_gram(x.abs(), 3, padding=1)[0]
    error = (A - reference.patch_gram(x, 3, padding=1)[0]).abs()
    assert (error <= 2.0**-10 * magnitude).all()


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [5, 96])  # by patches; by pieces, packed where NCHW
def test_updates_captured_in_a_graph_replay_with_new_values(
    channels: int, channels_last: bool, cuda: str
) -> None:
    x, other = (random_input((3, channels, 9, 8), torch.float32, cuda, channels_last) for _ in "ab")
    y = random_input((3, 4, 9, 8), torch.float32, cuda, channels_last)

    def add(A: Tensor, B: Tensor) -> None:
        ops.patch_gram_(A, x, 3, padding=1)
        ops.patch_cross_(B, x, y, 3, padding=1)

    A, B = (torch.zeros(9 * channels, columns, device=cuda) for columns in (9 * channels, 4))
    add(A, B)
    expected = A.clone(), B.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(A, B)
    x.copy_(other)
    add(*expected)
    graph.replay()
    assert torch.equal(A, expected[0]) and torch.equal(B, expected[1])
