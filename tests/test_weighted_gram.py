from __future__ import annotations

import pytest
import torch
from layouts import assert_equal_bits_with_any_threads
from torch import Tensor

from ccp_ext import ops, reference

# S dtype, a dtype
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.bfloat16),
]
ROWS_AND_CHANNELS = [
    ((5,), 3),
    ((128,), 16),
    ((50, 10), 33),
    ((130,), 65),
    ((300,), 100),
    ((3, 1), 1),
]


def symmetric(channels: int, dtype: torch.dtype, device: str) -> Tensor:
    S = torch.randn(channels, channels, dtype=dtype)
    return (S + S.T).to(device)


def assert_added(S: Tensor, before: Tensor, a: Tensor, sigma: Tensor | None) -> None:
    added = reference.weighted_gram(a, sigma)
    magnitude = reference.weighted_gram(a.abs(), None if sigma is None else sigma.abs())
    bound = 16 * torch.finfo(S.dtype).eps * (magnitude + before.abs() + S.abs())
    assert ((S - (before.double() + added)).abs() <= bound).all()


@pytest.mark.parametrize("sigma_dtype", [torch.float32, torch.float64, None])
@pytest.mark.parametrize(("S_dtype", "a_dtype"), DTYPES)
def test_matches_float64_reference_and_stays_symmetric(
    S_dtype: torch.dtype, a_dtype: torch.dtype, sigma_dtype: torch.dtype | None, device: str
) -> None:
    for rows, channels in ROWS_AND_CHANNELS:
        a = torch.randn(*rows, channels).to(device=device, dtype=a_dtype)
        sigma = None if sigma_dtype is None else torch.randn(rows).to(device, sigma_dtype)
        S = symmetric(channels, S_dtype, device)
        before = S.clone()
        assert ops.weighted_gram_(S, a, sigma) is S
        assert_added(S, before, a, sigma)
        assert torch.equal(S, S.T)


def test_an_asymmetric_matrix_keeps_its_asymmetry(device: str) -> None:
    S = torch.randn(70, 70, device=device)
    before = S.clone()
    a = torch.randn(90, 70, device=device)
    ops.weighted_gram_(S, a)
    assert_added(S, before, a, None)


def test_a_corner_of_a_larger_matrix_is_updated_alone(device: str) -> None:
    larger = torch.zeros(50, 80, device=device)
    larger[3:45, 5:47] = symmetric(42, torch.float32, device)
    before = larger.clone()
    a, sigma = torch.randn(200, 42, device=device), torch.randn(200, device=device)
    S = larger[3:45, 5:47]
    ops.weighted_gram_(S, a, sigma)
    assert_added(S, before[3:45, 5:47], a, sigma)
    larger[3:45, 5:47] = before[3:45, 5:47]
    assert torch.equal(larger, before)


@pytest.mark.parametrize("view", ["transposed", "every second", "expanded samples", "one column"])
def test_any_strides_of_a_and_sigma(view: str, device: str) -> None:
    a = {
        "transposed": torch.randn(21, 4, 30).permute(2, 1, 0),
        "every second": torch.randn(60, 8, 42)[::2, ::2, ::2],
        "expanded samples": torch.randn(4, 21).expand(30, 4, 21),
        "one column": torch.randn(30, 4, 21, 3)[..., 1],
    }[view]
    sigma = torch.randn(4, 60).T[::2]
    S = torch.zeros(21, 21, device=device)
    ops.weighted_gram_(S, a.to(device), sigma.to(device))
    assert_added(S, torch.zeros_like(S), a.to(device), sigma.to(device))


def test_float32_is_not_rounded_to_tf32(device: str) -> None:
    """1 + 2^-13 is a float32 but no TF32 number."""
    a = torch.full((64, 64), 1 + 2.0**-13, device=device)
    S = torch.zeros(64, 64, device=device)
    ops.weighted_gram_(S, a)
    exact = 64 * (1 + 2.0**-13) ** 2
    assert ((S.double() - exact).abs() <= 16 * torch.finfo(torch.float32).eps * exact).all()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0, 5), (0, 3, 5)])
def test_no_rows_leave_S_alone(shape: tuple[int, ...], device: str) -> None:
    S = torch.randn(5, 5, device=device)
    before = S.clone()
    ops.weighted_gram_(S, torch.randn(shape, device=device), torch.randn(shape[:-1], device=device))
    assert torch.equal(S, before)


def test_no_channels(device: str) -> None:
    assert ops.weighted_gram_(
        torch.zeros(0, 0, device=device), torch.zeros(4, 0, device=device)
    ).shape == (0, 0)


@pytest.mark.parametrize(("S_dtype", "a_dtype"), DTYPES)
def test_every_run_and_every_number_of_threads_gives_equal_bits(
    S_dtype: torch.dtype, a_dtype: torch.dtype, device: str
) -> None:
    a, sigma = torch.randn(700, 150, device=device).to(a_dtype), torch.randn(700, device=device)
    S = torch.zeros(150, 150, device=device, dtype=S_dtype)
    assert_equal_bits_with_any_threads(lambda: ops.weighted_gram_(S.clone(), a, sigma))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [16, 257])
def test_gpu_and_cpu_agree(channels: int, cuda: str) -> None:
    a, sigma = torch.randn(200, channels), torch.randn(200)
    on_cpu = ops.weighted_gram_(torch.zeros(channels, channels), a, sigma)
    S = torch.zeros(channels, channels, device=cuda)
    on_gpu = ops.weighted_gram_(S, a.to(cuda), sigma.to(cuda)).cpu()
    magnitude = reference.weighted_gram(a.abs(), sigma.abs())
    assert ((on_gpu - on_cpu).abs() <= 32 * torch.finfo(torch.float32).eps * magnitude).all()


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_tiles_match_float64_reference(dtype: torch.dtype, weighted: bool, cuda: str) -> None:
    a = torch.randn(5, 3072, device=cuda).to(dtype)
    sigma = torch.randn(5, device=cuda) if weighted else None
    S = torch.zeros(3072, 3072, device=cuda)
    ops.weighted_gram_(S, a, sigma)
    assert_added(S, torch.zeros_like(S), a, sigma)


LAYERS = [((5,), 3), ((128,), 64), ((50, 10), 33), ((300,), 100), ((0,), 7), ((3,), 0), ((9, 1), 1)]


@pytest.mark.parametrize(("S_dtype", "a_dtype"), DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_many_layers_in_one_call(
    S_dtype: torch.dtype, a_dtype: torch.dtype, weighted: bool, device: str
) -> None:
    a = [torch.randn(*rows, C).to(device=device, dtype=a_dtype) for rows, C in LAYERS]
    sigma = [torch.randn(rows, device=device) for rows, _ in LAYERS] if weighted else None
    S = [symmetric(C, S_dtype, device) for _, C in LAYERS]
    before = [matrix.clone() for matrix in S]
    result = ops.weighted_grams_(S, a, sigma)
    assert all(one is other for one, other in zip(result, S, strict=True))
    for layer, matrix in enumerate(S):
        assert_added(matrix, before[layer], a[layer], sigma[layer] if weighted else None)
        assert torch.equal(matrix, matrix.T)


def test_more_layers_than_one_launch_takes(device: str) -> None:
    channels = [1 + layer % 9 for layer in range(150)]
    a = [torch.randn(4, C, device=device) for C in channels]
    S = [torch.zeros(C, C, device=device) for C in channels]
    ops.weighted_grams_(S, a)
    for matrix, rows in zip(S, a, strict=True):
        assert_added(matrix, torch.zeros_like(matrix), rows, None)


def test_no_layers_are_no_work() -> None:
    assert ops.weighted_grams_([], []) == []
    assert ops.weighted_grams_([], [], torch.ones(3)) == []
    with pytest.raises(ValueError, match="weighted_grams_"):
        ops.weighted_grams_([], [torch.ones(2, 2)])


def test_one_sigma_serves_all_layers(device: str) -> None:
    a = [torch.randn(20, C, device=device) for C in (4, 70)]
    sigma = torch.randn(20, device=device)
    S = [torch.zeros(C, C, device=device) for C in (4, 70)]
    ops.weighted_grams_(S, a, sigma)
    for matrix, rows in zip(S, a, strict=True):
        assert_added(matrix, torch.zeros_like(matrix), rows, sigma)


def test_grouped_updates_give_equal_bits_with_any_number_of_threads(device: str) -> None:
    a = [torch.randn(700, C, device=device) for C in (150, 20, 64)]

    def grams() -> Tensor:
        S = [torch.zeros(C, C, device=device) for C in (150, 20, 64)]
        return torch.cat([matrix.flatten() for matrix in ops.weighted_grams_(S, a)])

    assert_equal_bits_with_any_threads(grams)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize(("S_dtype", "a_dtype"), DTYPES)
def test_every_copy_and_every_partial_sum_is_written(
    S_dtype: torch.dtype, a_dtype: torch.dtype, device: str
) -> None:
    """Rows and weights that a GPU packs, and sums in parts."""
    assert torch.empty(3).isnan().all()
    a = [torch.randn(600, C, device=device).to(a_dtype) for C in (16, 33)]
    sigma = torch.randn(600, device=device, dtype=torch.float64)
    S = [torch.zeros(C, C, device=device, dtype=S_dtype) for C in (16, 33)]
    ops.weighted_grams_(S, a, sigma)
    for matrix, rows in zip(S, a, strict=True):
        assert_added(matrix, torch.zeros_like(matrix), rows, sigma)


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("S_dtype", "a_dtype"), DTYPES)
def test_updates_captured_in_a_graph_replay_with_new_values(
    S_dtype: torch.dtype, a_dtype: torch.dtype, grouped: bool, cuda: str
) -> None:
    """Rows and weights that are packed, and sums in parts."""
    a = [torch.randn(600, C, device=cuda).to(a_dtype) for C in (16, 33)]
    sigma = torch.randn(600, device=cuda, dtype=torch.float64)
    S = [torch.zeros(C, C, device=cuda, dtype=S_dtype) for C in (16, 33)]

    def add() -> None:
        if grouped:
            ops.weighted_grams_(S, a, sigma)
            return
        for matrix, rows in zip(S, a, strict=True):
            ops.weighted_gram_(matrix, rows, sigma)

    add()
    before = [matrix.clone() for matrix in S]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add()
    for values in (*a, sigma):
        values.normal_()
    graph.replay()
    for matrix, old, rows in zip(S, before, a, strict=True):
        assert_added(matrix, old, rows, sigma)
