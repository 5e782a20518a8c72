"""One candidate of every operator against the float64 reference, on small odd sizes.

    python -m benchmarks.check [--device cuda] [--candidate triton]

What the compute sanitizer watches, and, with TRITON_INTERPRET=1 and ``--candidate triton`` on a
CPU, the check of the rivals in Triton. Inputs are made and results compared on the CPU, so that on
a GPU nothing runs but copies and the candidate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import suite, triton_kernels
from benchmarks.common import map_tensors
from benchmarks.limits import float32_precision
from benchmarks.networks import Window
from benchmarks.operation import DTYPES, Candidate, Case, Operation
from benchmarks.sweep import error_of

# Between them they reach every kernel, its wide and its narrow loads, and its sums of parts.
MAPS = (
    (2, 5, 6, 7),
    (3, 33, 9, 8),
    (4, 72, 8, 8),  # wide loads along the channels; two tiles of maps; large tiles of patches
    (1, 3, 25, 43),  # a block for each row
    (1, 8, 48, 50),  # a warp for each row; the positions in parts
)
# So many that tiles of 128 maps are worth it, read where they are and packed; in 16 bits on Hopper,
# for the last, tiles of 256 by 128.
MANY_MAPS = ((18, 264, 16, 20), (18, 257, 7, 7), (33, 392, 16, 20))
ROWS = ((5, 71), (33, 16), (200, 16))  # the last in parts
WINDOW = Window(3, 1, 1)  # by pieces from 33 channels on, else by patches
WIDTHS = (3, 16, 33)


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
    print(f"{checked} results of {options.candidate!r} are within their bounds")


def small_cases(operation: Operation) -> Iterator[Case]:
    shapes, dtypes = MAPS if operation.of_maps else ROWS, DTYPES
    if triton_kernels.INTERPRETED:
        dtypes = (torch.float32, torch.float16)  # its products take bfloat16's bits for integers
    elif operation.name == "map_similarity":
        shapes += MANY_MAPS
    for shape in shapes:
        for layout in operation.layouts:
            for dtype in dtypes:
                yield Case("none", shape, dtype, layout, "cpu", WINDOW, WIDTHS)


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
