"""One candidate of every operator against the float64 reference, on small odd sizes.

    python -m benchmarks.check [--device cuda] [--candidate triton]

What the compute sanitizer watches, and, with TRITON_INTERPRET=1 and ``--candidate triton`` on a
CPU, the check of the rivals in Triton.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from benchmarks import suite, sweep, triton_kernels
from benchmarks.limits import float32_precision
from benchmarks.networks import Window
from benchmarks.operation import DTYPES, Case, Operation

MAPS = ((2, 5, 6, 7), (3, 33, 9, 8))
ROWS = ((5, 71), (33, 16))
WINDOW = Window(3, 2, 1)
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
            for case in small_cases(operation, options.device):
                function = operation.candidates(case).get(options.candidate)
                if function is not None:
                    sweep.validate(operation, case, options.candidate, function)
                    checked += 1
    print(f"{checked} results of {options.candidate!r} are within their bounds")


def small_cases(operation: Operation, device: str) -> Iterator[Case]:
    # The interpreter's products take bfloat16's bits for integers.
    dtypes = (torch.float32, torch.float16) if triton_kernels.INTERPRETED else DTYPES
    for shape in MAPS if operation.of_maps else ROWS:
        for layout in operation.layouts:
            for dtype in dtypes:
                yield Case("none", shape, dtype, layout, device, WINDOW, WIDTHS)


if __name__ == "__main__":
    main()
