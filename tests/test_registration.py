from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ccp_ext import ops

Call = Callable[[], Tensor]

CHANNEL_DOT_SAMPLES = [
    lambda device: (torch.randn(2, 3, 4, 5, device=device), torch.randn(2, 3, 4, 5, device=device)),
    lambda device: (
        torch.randn(2, 4, 3, device=device).bfloat16(),
        torch.randn(2, 4, 3, device=device).bfloat16(),
        -1,
    ),
    lambda device: (
        torch.randn(2, 3, device=device, dtype=torch.float64),
        torch.randn(2, 3, device=device, dtype=torch.float64),
    ),
]
WEIGHTED_GRAM_SAMPLES = [
    lambda device: (torch.randn(3, 3, device=device), torch.randn(5, 3, device=device)),
    lambda device: (
        torch.randn(3, 3, device=device),
        torch.randn(5, 2, 3, device=device),
        torch.randn(5, 2, device=device),
    ),
    lambda device: (
        torch.randn(3, 3, device=device, dtype=torch.float64),
        torch.randn(5, 3, device=device).half(),
        torch.randn(5, device=device, dtype=torch.float64),
    ),
]
WEIGHTED_GRAMS_SAMPLES = [
    lambda device: (
        [torch.randn(3, 3, device=device), torch.randn(4, 4, device=device)],
        [torch.randn(5, 3, device=device), torch.randn(2, 2, 4, device=device)],
    ),
    lambda device: (
        [torch.randn(3, 3, device=device), torch.randn(4, 4, device=device)],
        [torch.randn(5, 3, device=device), torch.randn(2, 2, 4, device=device)],
        [torch.randn(5, device=device), torch.randn(2, 2, device=device)],
    ),
]
PATCH_SAMPLES = [
    lambda device: (
        torch.randn(18, 18, device=device),
        torch.randn(2, 2, 5, 6, device=device),
        [3, 3],
        [2, 1],
        [1, 1],
        [1, 1],
    ),
    lambda device: (
        torch.randn(2, 4, 4, device=device, dtype=torch.float64),
        torch.randn(1, 4, 5, 6, device=device).half(),
        [1, 2],
        [1, 1],
        [0, 0],
        [1, 2],
        2,
    ),
]
PATCH_CROSS_SAMPLES = [
    lambda device: (
        torch.randn(18, 3, device=device),
        torch.randn(2, 2, 5, 6, device=device),
        torch.randn(2, 3, 3, 6, device=device),
        [3, 3],
        [2, 1],
        [1, 1],
        [1, 1],
    ),
    lambda device: (
        torch.randn(2, 4, 3, device=device, dtype=torch.float64),
        torch.randn(1, 4, 5, 6, device=device).half(),
        torch.randn(1, 6, 5, 4, device=device).half(),
        [1, 2],
        [1, 1],
        [0, 0],
        [1, 2],
        2,
    ),
]
MAP_SIMILARITY_SAMPLES = [
    lambda device: (torch.randn(2, 3, 4, 5, device=device),),
    lambda device: (
        torch.randn(2, 3, 4, device=device).bfloat16(),
        "pearson",
        torch.randn(2, 3, 4, device=device).bfloat16(),
    ),
    lambda device: (torch.randn(2, 3, device=device), "mse"),
]
CHANNEL_MOMENTS_SAMPLES = [
    lambda device: (torch.randn(2, 3, 4, 5, device=device),),
    lambda device: (torch.randn(2, 4, 3, device=device).bfloat16(), -1),
    lambda device: (torch.randn(2, 3, device=device, dtype=torch.float64),),
]


@pytest.mark.parametrize("sample", MAP_SIMILARITY_SAMPLES)
def test_opcheck_of_map_similarity(sample: Callable[[str], tuple], device: str) -> None:
    torch.library.opcheck(
        torch.ops.ccp_ext.map_similarity.default, sample(device), {"data_range": 2.0}
    )


@pytest.mark.parametrize("sample", CHANNEL_MOMENTS_SAMPLES)
def test_opcheck_of_channel_moments(sample: Callable[[str], tuple], device: str) -> None:
    torch.library.opcheck(torch.ops.ccp_ext.channel_moments.default, sample(device))


@pytest.mark.parametrize("dynamic", [False, True])
def test_statistics_of_maps_compile_without_graph_breaks(dynamic: bool, device: str) -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor, int]:
        moments = ops.channel_moments(2 * x)
        similarity = ops.map_similarity(x, "ssim", data_range=3.0)
        return similarity + 1, moments.zeros + moments.sum, moments.count

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for samples in (3, 4):
        x = torch.randn(samples, 5, 4, 4, device=device)
        for actual, expected in zip(compiled(x), step(x), strict=True):
            assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected))


@pytest.mark.parametrize("sample", CHANNEL_DOT_SAMPLES)
def test_opcheck_of_channel_dot(sample: Callable[[str], tuple], device: str) -> None:
    torch.library.opcheck(torch.ops.ccp_ext.channel_dot.default, sample(device))


@pytest.mark.parametrize("sample", WEIGHTED_GRAM_SAMPLES)
def test_opcheck_of_weighted_gram(sample: Callable[[str], tuple], device: str) -> None:
    torch.library.opcheck(torch.ops.ccp_ext.weighted_gram_.default, sample(device))


@pytest.mark.parametrize("sample", WEIGHTED_GRAMS_SAMPLES)
def test_opcheck_of_weighted_grams(sample: Callable[[str], tuple], device: str) -> None:
    torch.library.opcheck(torch.ops.ccp_ext.weighted_grams_.default, sample(device))


@pytest.mark.parametrize("sample", PATCH_SAMPLES)
def test_opcheck_of_patch_gram(sample: Callable[[str], tuple], device: str) -> None:
    torch.library.opcheck(torch.ops.ccp_ext.patch_gram_.default, sample(device))


@pytest.mark.parametrize("sample", PATCH_CROSS_SAMPLES)
def test_opcheck_of_patch_cross(sample: Callable[[str], tuple], device: str) -> None:
    torch.library.opcheck(torch.ops.ccp_ext.patch_cross_.default, sample(device))


@pytest.mark.parametrize("dynamic", [False, True])
def test_patch_products_compile_without_graph_breaks(dynamic: bool, device: str) -> None:
    def step(A: Tensor, B: Tensor, x: Tensor, y: Tensor) -> Tensor:
        ops.patch_cross_(B, 2 * x, y, 3, padding=1)
        return ops.patch_gram_(A, 2 * x, 3, padding=1) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for samples in (3, 4):
        x, y = torch.randn(2, samples, 2, 5, 5, device=device)
        A, B = torch.zeros(18, 18, device=device), torch.zeros(18, 2, device=device)
        compiled_A, compiled_B = A.clone(), B.clone()
        assert torch.equal(compiled(compiled_A, compiled_B, x, y), step(A, B, x, y))
        assert torch.equal(compiled_A, A) and torch.equal(compiled_B, B)


def test_a_grouped_update_compiles_without_graph_breaks(device: str) -> None:
    def step(S: list[Tensor], a: list[Tensor], sigma: Tensor) -> Tensor:
        return ops.weighted_grams_(S, [2 * rows for rows in a], sigma)[1].diagonal() + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a = [torch.randn(6, C, device=device) for C in (3, 5)]
    sigma = torch.randn(6, device=device)
    S = [torch.zeros(C, C, device=device) for C in (3, 5)]
    compiled_S = [matrix.clone() for matrix in S]
    assert torch.equal(compiled(compiled_S, a, sigma), step(S, a, sigma))
    assert all(torch.equal(one, other) for one, other in zip(compiled_S, S, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_both_operators_compile_without_graph_breaks(dynamic: bool, device: str) -> None:
    def step(S: Tensor, x: Tensor, g: Tensor, sigma: Tensor) -> Tensor:
        return ops.weighted_gram_(S, ops.channel_dot(x, 2 * g), sigma).diagonal() + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for samples in (3, 4):
        x, g = torch.randn(2, samples, 5, 4, 4, device=device)
        sigma = torch.randn(samples, device=device)
        S = torch.zeros(5, 5, device=device)
        compiled_S = S.clone()
        assert torch.equal(compiled(compiled_S, x, g, sigma), step(S, x, g, sigma))
        assert torch.equal(compiled_S, S)


def test_operators_compile_with_the_default_backend(device: str) -> None:
    """In code of the compiler's own, which reuses buffers, in-place updates last."""

    def step(S: Tensor, A: Tensor, x: Tensor, g: Tensor) -> Tensor:
        ops.weighted_gram_(S, ops.channel_dot(x + 1, 2 * g))
        ops.patch_gram_(A, x.relu(), 3, padding=1)
        return S.diagonal() + ops.map_similarity(x.relu()).sum(0)

    compiled = torch.compile(step, fullgraph=True)
    x, g = torch.randn(2, 3, 5, 4, 4, device=device)
    sums = [torch.zeros(5, 5, device=device), torch.zeros(45, 45, device=device)]
    compiled_sums = [torch.zeros_like(matrix) for matrix in sums]
    try:
        first = compiled(*compiled_sums, x, g)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"torch.compile does not work on this machine: {error}"[:200])
    torch.testing.assert_close(first, step(*sums, x, g))
    torch.testing.assert_close(compiled(*compiled_sums, 2 * x, g), step(*sums, 2 * x, g))
    torch.testing.assert_close(compiled_sums, sums)


def test_the_operators_work_inside_autograd_hooks(device: str) -> None:
    S = torch.zeros(3, 3, device=device)
    x = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    z = x * 2

    def accumulate(g: Tensor) -> None:
        ops.weighted_gram_(S, ops.channel_dot(z.detach(), g))

    z.register_hook(accumulate)
    z.square().sum().backward()
    a = (z * 2 * z).sum((2, 3)).detach()
    torch.testing.assert_close(S, a.T @ a)


BAD_ARGUMENTS: dict[str, Call] = {
    "patch_gram_: x must be [N, C, H, W], got [3, 4, 4]": lambda: ops.patch_gram_(
        torch.ones(27, 27), torch.ones(3, 4, 4), 3
    ),
    "patch_gram_: x must be float32, float64, bfloat16 or float16, got int64": lambda: (
        ops.patch_gram_(torch.ones(27, 27), torch.ones(1, 3, 4, 4).long(), 3)
    ),
    "patch_gram_: kernel_size must be two integers of at least 1, got [3, 0]": lambda: (
        ops.patch_gram_(torch.ones(27, 27), torch.ones(1, 3, 4, 4), (3, 0))
    ),
    "patch_gram_: padding must be two integers of at least 0, got [1, 1, 1]": lambda: (
        ops.patch_gram_(torch.ones(27, 27), torch.ones(1, 3, 4, 4), 3, padding=(1, 1, 1))
    ),
    "patch_gram_: groups must divide the channels of x [1, 3, 4, 4], got 2": lambda: (
        ops.patch_gram_(torch.ones(27, 27), torch.ones(1, 3, 4, 4), 3, groups=2)
    ),
    "patch_gram_: the kernel must fit into the padded input, got x [1, 3, 4, 4], kernel_size "
    "[3, 3], padding [0, 0] and dilation [2, 2]": lambda: ops.patch_gram_(
        torch.ones(27, 27), torch.ones(1, 3, 4, 4), 3, dilation=2
    ),
    "patch_gram_: the padded maps must have at most 2^30 positions, got x [1, 3, 4, 4] and "
    "padding [20000, 20000]": lambda: ops.patch_gram_(
        torch.ones(27, 27), torch.ones(1, 3, 4, 4), 3, padding=20000
    ),
    "patch_gram_: A must be [27, 27] for x [1, 3, 4, 4], got [9, 9]": lambda: ops.patch_gram_(
        torch.ones(9, 9), torch.ones(1, 3, 4, 4), 3
    ),
    "patch_gram_: A must be [3, 9, 9] for x [1, 3, 4, 4], got [27, 27]": lambda: ops.patch_gram_(
        torch.ones(27, 27), torch.ones(1, 3, 4, 4), 3, groups=3
    ),
    "patch_gram_: A must be float32 or float64, got bfloat16": lambda: ops.patch_gram_(
        torch.ones(27, 27).bfloat16(), torch.ones(1, 3, 4, 4), 3
    ),
    "patch_gram_: x must not be wider than A, got x float64 and A float32": lambda: ops.patch_gram_(
        torch.ones(27, 27), torch.ones(1, 3, 4, 4).double(), 3
    ),
    "patch_cross_: y must be [N, K, Ho, Wo] with N = 1, output positions [2, 2] and K a multiple "
    "of groups, got [1, 5, 4, 4]": lambda: ops.patch_cross_(
        torch.ones(27, 5), torch.ones(1, 3, 4, 4), torch.ones(1, 5, 4, 4), 3
    ),
    "patch_cross_: y must have the dtype of x, got x float32 and y float16": lambda: (
        ops.patch_cross_(
            torch.ones(27, 5), torch.ones(1, 3, 4, 4), torch.ones(1, 5, 2, 2).half(), 3
        )
    ),
    "patch_cross_: B must be [27, 5] for x [1, 3, 4, 4], got [27, 4]": lambda: ops.patch_cross_(
        torch.ones(27, 4), torch.ones(1, 3, 4, 4), torch.ones(1, 5, 2, 2), 3
    ),
    "channel_dot: x must have at least 2 dimensions, [N, C, ...], got [3]": lambda: ops.channel_dot(
        torch.ones(3), torch.ones(3)
    ),
    "channel_dot: g must have the shape of x, got x [2, 3, 4, 4] and g [2, 3, 4, 5]": lambda: (
        ops.channel_dot(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5))
    ),
    "channel_dot: channel_dim must name a dimension of x [2, 3, 4] other than 0 (the samples), "
    "got 0": lambda: ops.channel_dot(torch.ones(2, 3, 4), torch.ones(2, 3, 4), 0),
    "channel_dot: channel_dim must name a dimension of x [2, 3, 4] other than 0 (the samples), "
    "got -3": lambda: ops.channel_dot(torch.ones(2, 3, 4), torch.ones(2, 3, 4), -3),
    "channel_dot: channel_dim must name a dimension of x [2, 3] other than 0 (the samples), "
    "got 2": lambda: ops.channel_dot(torch.ones(2, 3), torch.ones(2, 3), 2),
    "channel_dot: x must be float32, float64, bfloat16 or float16, got int32": lambda: (
        ops.channel_dot(torch.ones(2, 3).int(), torch.ones(2, 3).int())
    ),
    "channel_dot: g must have the dtype of x, got x float32 and g float16": lambda: ops.channel_dot(
        torch.ones(2, 3), torch.ones(2, 3).half()
    ),
    "channel_moments: x must have at least 2 dimensions, [N, C, ...], got [3]": lambda: (
        ops.channel_moments(torch.ones(3))
    ),
    "channel_moments: channel_dim must name a dimension of x [2, 3] other than 0 (the samples), "
    "got -2": lambda: ops.channel_moments(torch.ones(2, 3), -2),
    "channel_moments: x must be float32, float64, bfloat16 or float16, got int64": lambda: (
        ops.channel_moments(torch.ones(2, 3).long())
    ),
    "map_similarity: x must have at least 2 dimensions, [N, C, ...], got [3]": lambda: (
        ops.map_similarity(torch.ones(3))
    ),
    "map_similarity: x must be float32, float64, bfloat16 or float16, got uint8": lambda: (
        ops.map_similarity(torch.ones(2, 3).byte())
    ),
    "map_similarity: kind must be ssim, psnr, mse, cosine or pearson, got l1": lambda: (
        ops.map_similarity(torch.ones(2, 3), "l1")
    ),
    "map_similarity: data_range must be positive and finite, got -0.5": lambda: ops.map_similarity(
        torch.ones(2, 3), data_range=-0.5
    ),
    "map_similarity: data_range must be positive and finite, got nan": lambda: ops.map_similarity(
        torch.ones(2, 3), data_range=float("nan")
    ),
    "map_similarity: y must have the shape of x, got x [2, 3] and y [2, 4]": lambda: (
        ops.map_similarity(torch.ones(2, 3), "ssim", torch.ones(2, 4))
    ),
    "map_similarity: y must have the dtype of x, got x float32 and y float16": lambda: (
        ops.map_similarity(torch.ones(2, 3), "ssim", torch.ones(2, 3).half())
    ),
    "weighted_gram_: S must be a square matrix [C, C], got [3, 4]": lambda: ops.weighted_gram_(
        torch.ones(3, 4), torch.ones(5, 3)
    ),
    "weighted_gram_: a must be [N, C] or [N, K, C], got [3]": lambda: ops.weighted_gram_(
        torch.ones(3, 3), torch.ones(3)
    ),
    "weighted_gram_: a must have as many channels as S, got a [5, 4] and S [3, 3]": lambda: (
        ops.weighted_gram_(torch.ones(3, 3), torch.ones(5, 4))
    ),
    "weighted_gram_: S must be float32 or float64, got float16": lambda: ops.weighted_gram_(
        torch.ones(3, 3).half(), torch.ones(5, 3)
    ),
    "weighted_gram_: a must be float32, float64, bfloat16 or float16, got int64": lambda: (
        ops.weighted_gram_(torch.ones(3, 3), torch.ones(5, 3).long())
    ),
    "weighted_gram_: a must not be wider than S, got a float64 and S float32": lambda: (
        ops.weighted_gram_(torch.ones(3, 3), torch.ones(5, 3).double())
    ),
    "weighted_gram_: sigma must have one value per row of a [5, 3], shape a.shape[:-1], "
    "got [4]": lambda: ops.weighted_gram_(torch.ones(3, 3), torch.ones(5, 3), torch.ones(4)),
    "weighted_gram_: sigma must be float32 or float64, got bfloat16": lambda: ops.weighted_gram_(
        torch.ones(3, 3), torch.ones(5, 3), torch.ones(5).bfloat16()
    ),
    "weighted_grams_: a must have one tensor per matrix of S, got 1 for 2": lambda: (
        ops.weighted_grams_([torch.ones(3, 3), torch.ones(3, 3)], [torch.ones(5, 3)])
    ),
    "weighted_grams_: sigma must have one tensor per matrix of S, got 0 for 1": lambda: (
        ops.weighted_grams_([torch.ones(3, 3)], [torch.ones(5, 3)], [])
    ),
    "weighted_grams_: layer 1: a must have as many channels as S, got a [5, 4] and S "
    "[3, 3]": lambda: ops.weighted_grams_(
        [torch.ones(4, 4), torch.ones(3, 3)], [torch.ones(5, 4), torch.ones(5, 4)]
    ),
    "weighted_grams_: layer 1: S must have the dtype of layer 0's, got float64 and "
    "float32": lambda: ops.weighted_grams_(
        [torch.ones(3, 3), torch.ones(3, 3).double()], [torch.ones(5, 3), torch.ones(5, 3)]
    ),
    "weighted_grams_: layer 1: a must have the dtype of layer 0's, got bfloat16 and "
    "float32": lambda: ops.weighted_grams_(
        [torch.ones(3, 3), torch.ones(3, 3)], [torch.ones(5, 3), torch.ones(5, 3).bfloat16()]
    ),
    "weighted_grams_: layer 0: sigma must have one value per row of a [5, 3], shape "
    "a.shape[:-1], got [4]": lambda: ops.weighted_grams_(
        [torch.ones(3, 3)], [torch.ones(5, 3)], torch.ones(4)
    ),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_get_the_same_message_from_kernel_and_fake(message: str) -> None:
    with pytest.raises(ValueError) as from_kernel:
        BAD_ARGUMENTS[message]()
    with FakeTensorMode(), pytest.raises(ValueError) as from_fake:
        BAD_ARGUMENTS[message]()
    assert str(from_kernel.value) == str(from_fake.value) == message


def test_columns_of_S_must_be_contiguous() -> None:
    with pytest.raises(ValueError, match=r"S must have contiguous rows .* got strides \[1, 3\]"):
        ops.weighted_gram_(torch.ones(3, 3).T, torch.ones(5, 3))


def test_memory_shared_with_S_is_refused() -> None:
    S = torch.ones(6, 3)
    with pytest.raises(ValueError, match="a must not share memory with S"):
        ops.weighted_gram_(S[:3], S[2:])
    x = torch.ones(1, 3, 5, 5)
    with pytest.raises(ValueError, match="x must not share memory with A"):
        ops.patch_gram_(x.view(-1)[:9].view(3, 3), x, 1)
    with pytest.raises(ValueError, match="y must not share memory with B"):
        ops.patch_cross_(x.view(-1)[:9].view(3, 3), torch.ones(1, 3, 5, 5), x, 1)
    with pytest.raises(ValueError, match="A must have contiguous rows that do not overlap"):
        ops.patch_gram_(torch.ones(3, 3).T, torch.ones(1, 3, 5, 5), 1)
    with pytest.raises(ValueError, match="sigma must not share memory with S"):
        ops.weighted_gram_(S[:3], torch.ones(3, 3), S[0])
    with pytest.raises(ValueError, match="no two matrices of S may share memory"):
        ops.weighted_grams_([S[:3], S[2:5]], [torch.ones(3, 3), torch.ones(3, 3)])
    with pytest.raises(ValueError, match="layer 0: a must not share memory with S"):
        ops.weighted_grams_([torch.ones(3, 3), S[:3]], [S[2:], torch.ones(3, 3)])


def test_too_many_strided_dimensions_are_refused() -> None:
    x = torch.ones([3] * 11)[(slice(None, 2),) * 11]
    with pytest.raises(ValueError, match="at most 8 strided position dimensions"):
        ops.channel_dot(x, x)


@pytest.mark.gpu
def test_different_devices_are_refused(cuda: str) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match="g must be on the device of x, got x on cpu and g on cuda"
    ):
        ops.channel_dot(x, x.to(cuda))
    with pytest.raises(ValueError, match="a must be on the device of S"):
        ops.weighted_gram_(torch.ones(3, 3, device=cuda), x)
