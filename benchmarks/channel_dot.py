"""channel_dot beside the same in plain torch, on the shapes of ResNet-56 at batch 128.

python -m benchmarks.channel_dot
"""

from __future__ import annotations

import argparse
import itertools
from statistics import geometric_mean, median

import torch

from benchmarks.common import interleaved, ratio, write_results
from ccp_ext import ops, reference
from ccp_ext.report import table

SHAPES = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8))
ROTATION_BYTES = 256 << 20  # several times the last-level cache, so that inputs come from memory

# Where x and g are when the operator is called. In a backward pass x comes from memory and autograd
# has just written g.
CASES = ("both in memory", "g just written", "both in cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    rows = [
        _measure(shape, dtype, layout, case, options.rounds)
        for case in CASES
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    print(table(rows))
    summary = {
        case: geometric_mean(
            row["speed-up"] for row in rows if row["dtype"] == "float32" and row["case"] == case
        )
        for case in CASES
    }
    for case, value in summary.items():
        print(f"geometric mean of the float32 speed-ups, {case}: {value:.2f}")
    content = {"settings": vars(options), "rows": rows, "float32 geometric mean": summary}
    print(write_results("channel_dot", content))


def _measure(shape, dtype, layout, case: str, rounds: int) -> dict:
    torch.manual_seed(0)
    size = torch.Size(shape).numel() * dtype.itemsize
    copies = max(4, ROTATION_BYTES // (2 * size))
    inputs = [_inputs(shape, dtype, layout) for _ in range(copies)]
    _validate(*inputs[0][:2])
    # One turn for all: an input that another has just read would lie in the cache.
    turns = itertools.cycle(inputs)

    def prepared() -> tuple[torch.Tensor, ...]:
        x, g, both = next(turns)
        if case != "both in memory":
            g.mul_(1)
        if case == "both in cache":
            x.mul_(1)
        return x, g, both

    seconds = interleaved(
        {
            "ours": lambda x, g, both: ops.channel_dot(x, g),
            "torch": lambda x, g, both: (x * g).sum((2, 3)),
            "read": lambda x, g, both: both.sum(),
        },
        rounds,
        prepare=prepared,
    )
    return {
        "case": case,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": str(layout).removeprefix("torch.").removesuffix("_format"),
        "GB/s": 2e-9 * size / median(seconds["ours"]),
        "% of reading": 100 * ratio(seconds["read"], seconds["ours"]),
        "speed-up": ratio(seconds["torch"], seconds["ours"]),
    }


def _inputs(shape, dtype, layout) -> tuple[torch.Tensor, ...]:
    """x and g, and the memory of both as one float32 vector: its sum is a plain read."""
    n, c, h, w = shape
    memory = torch.randn(2, n * c * h * w).to(dtype)
    both = memory.view(-1).view(torch.float32)
    if layout is torch.channels_last:
        x, g = (part.view(n, h, w, c).permute(0, 3, 1, 2) for part in memory)
    else:
        x, g = (part.view(shape) for part in memory)
    return x, g, both


def _validate(x: torch.Tensor, g: torch.Tensor) -> None:
    error = (ops.channel_dot(x, g) - reference.channel_dot(x, g)).abs()
    if not (error <= 1e-5 * reference.channel_dot(x.abs(), g.abs())).all():
        raise AssertionError(f"channel_dot is wrong on {list(x.shape)} {x.dtype}")


if __name__ == "__main__":
    main()
