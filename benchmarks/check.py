"""One candidate of every operator against the float64 reference, on small odd sizes.

Ours also with the options that no benchmark takes.

    python -m benchmarks.check [--device cuda] [--candidate triton]

What the compute sanitizer watches, and, with TRITON_INTERPRET=1 and ``--candidate triton`` on a
CPU, the check of the rivals in Triton. Inputs are made and results compared on the CPU, so that on
a GPU nothing runs but copies and the candidate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import suite, triton_kernels
from benchmarks.common import map_tensors
from benchmarks.limits import float32_precision
from benchmarks.networks import Window
from benchmarks.operation import DTYPES, Candidate, Case, Operation
from benchmarks.sweep import error_of
from benchmarks.weighted_gram import updated
from ccp_ext import ops, reference

# Between them they reach every kernel, its wide and its narrow loads, and its sums of parts.
MAPS = (
    (2, 5, 6, 7),
    (3, 33, 9, 8),
    (4, 72, 8, 8),  # wide loads along the channels; two tiles of maps; large tiles of patches
    (1, 3, 25, 43),  # a block for each row
    (1, 16, 48, 50),  # a warp for each row; the positions in parts, channels last in more than 32
)
# So many that tiles of 128 maps are worth it, read where they are and packed; in 16 bits on Hopper,
# for the last, tiles of 256 by 128.
MANY_MAPS = ((18, 264, 16, 20), (18, 257, 7, 7), (33, 392, 16, 20))
ROWS = ((5, 71), (33, 16), (600, 16))  # the last in parts
WIDE_ROWS = (5, 3072)  # in large tiles
WINDOW = Window(3, 1, 1)  # by pieces from 33 channels on, else by patches
WIDTHS = (3, 16, 33)
WINDOWS = (
    {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": (2, 3), "dilation": (1, 2), "padding": (0, 2)},
)
TF32 = 2.0**-10  # the error of a product of two values rounded to TF32


class Call(NamedTuple):
    """A call with options that no benchmark takes, and what it must give.

    Attributes:
        magnitude: the sum of |terms| of each element of ``expected``.
        tolerance: the largest error over it.
    """

    function: Candidate
    inputs: tuple
    options: dict
    expected: Tensor
    magnitude: Tensor
    tolerance: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--candidate", default="ours")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    checked = 0
    with float32_precision("highest"):
        for operation in suite.OPERATIONS.values():
            for case in small_cases(operation):
                function = operation.candidates(case).get(options.candidate)
                if function is not None:
                    _check(operation, case, options.candidate, function, options.device)
                    checked += 1
        for call in (*grams(), *similarities(), *patches()) if options.candidate == "ours" else ():
            _check_call(call, options.device)
            checked += 1
    print(f"{checked} results of {options.candidate!r} are within their bounds")


def small_cases(operation: Operation) -> Iterator[Case]:
    def cases(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], widths=WIDTHS):
        for shape in shapes:
            for layout in operation.layouts:
                for dtype in dtypes:
                    yield Case("none", shape, dtype, layout, "cpu", WINDOW, widths)

    shapes = MAPS if operation.of_maps else ROWS
    if triton_kernels.INTERPRETED:  # its products take bfloat16's bits for integers
        yield from cases(shapes, (torch.float32, torch.float16))
        return
    yield from cases(shapes, (*DTYPES, torch.float16))
    if operation.name == "map_similarity":
        yield from cases(MANY_MAPS, DTYPES)
    elif operation.name == "weighted_grams_":
        yield from cases([WIDE_ROWS], DTYPES, widths=WIDE_ROWS[1:])


def grams() -> Iterator[Call]:
    """Sums in float64, weights that are packed (in another order, in float64), and large tiles."""
    for dtype in DTYPES:
        inputs = torch.zeros(3072, 3072), torch.randn(5, 3072).to(dtype), torch.rand(5)
        yield Call(ops.weighted_gram_, inputs, {}, *updated(*inputs), _tolerance(torch.float32))
    for S_dtype, dtype in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
    ):
        for n, k, c in ((5, 1, 71), (40, 15, 16)):  # the second in parts
            for sigma in (torch.rand(k, n).T, torch.rand(n, k, dtype=torch.float64)):
                inputs = torch.zeros(c, c, dtype=S_dtype), torch.randn(n, k, c).to(dtype), sigma
                yield Call(ops.weighted_gram_, inputs, {}, *updated(*inputs), _tolerance(S_dtype))


def similarities() -> Iterator[Call]:
    """Of every kind, between the maps of two tensors; with TF32."""
    for kind in ("ssim", "psnr", "mse", "cosine", "pearson"):
        for dtype, tf32 in ((torch.float32, False), (torch.float16, False), (torch.float32, True)):
            x, y = torch.randn(2, 3, 67, 9, 7).to(dtype)
            expected = reference.map_similarity(x, kind, y)
            tolerance = TF32 if tf32 else _tolerance(torch.float32)
            magnitude = expected.abs().clamp(min=1)  # of such maps
            options = {"allow_tf32": tf32}
            yield Call(ops.map_similarity, (x, kind, y), options, expected, magnitude, tolerance)


def patches() -> Iterator[Call]:
    """With strides, dilation and groups; beside targets; in float64; with TF32."""
    for dtype, sum_dtype, tf32 in (
        (torch.float32, torch.float32, False),
        (torch.float32, torch.float32, True),
        (torch.float16, torch.float32, False),
        (torch.float32, torch.float64, False),
    ):
        for width in (3, 51):  # channels of a group: by patches; by pieces, but for float64
            for window in WINDOWS:
                channels = width * window.get("groups", 1)
                conv = nn.Conv2d(channels, 10, **window, device="meta")
                x = torch.randn(3, channels, 9, 8)
                x, y = x.to(dtype), torch.randn(conv(x.to("meta")).shape).to(dtype)
                tolerance = TF32 if tf32 else _tolerance(sum_dtype)
                for function, products, maps in (
                    (ops.patch_gram_, reference.patch_gram, (x,)),
                    (ops.patch_cross_, reference.patch_cross, (x, y)),
                ):
                    expected, magnitude = (
                        products(*values, **window).squeeze(0)
                        for values in (maps, map(Tensor.abs, maps))
                    )
                    inputs = torch.zeros_like(expected, dtype=sum_dtype), *maps
                    options = window | {"allow_tf32": tf32}
                    yield Call(function, inputs, options, expected, magnitude, tolerance)


def _tolerance(accumulator: torch.dtype) -> float:
    return 64 * torch.finfo(accumulator).eps


def _check_call(call: Call, device: str) -> None:
    inputs = map_tensors(lambda x: whole(x, device), call.inputs)
    error = (call.function(*inputs, **call.options).cpu() - call.expected).abs()
    if not (error <= call.tolerance * call.magnitude).all():  # False for NaN
        shapes = [list(x.shape) for x in inputs if isinstance(x, Tensor)]
        raise AssertionError(f"{call.function.__name__} is wrong on {shapes} with {call.options}")


def _check(operation: Operation, case: Case, name: str, function: Candidate, device: str) -> None:
    """Ours also on maps that are part of larger ones, which have kernels of their own."""
    inputs = operation.inputs(case)
    expected = operation.reference(*inputs)
    for place in (whole, cut) if name == "ours" and operation.of_maps else (whole,):
        result = function(*map_tensors(lambda x, p=place: p(x, device), inputs))
        error_of(operation, case, name, map_tensors(Tensor.cpu, result), expected)


def whole(x: Tensor, device: str) -> Tensor:
    """A copy."""
    return x.to(device, copy=True)


def cut(x: Tensor, device: str) -> Tensor:
    """A copy; maps are part of larger ones."""
    return F.pad(x, (0, 1)).to(device)[..., :-1] if x.dim() == 4 else whole(x, device)


if __name__ == "__main__":
    main()
