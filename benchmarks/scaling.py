"""How the cost of S grows with batch, channels and positions, and what a whole data set costs.

    python -m benchmarks.scaling [--device cuda] [--images-per-second 2500]

The growth is measured, for one group, of its channel_dot from memory and its Gram update, and for
all groups of a small network of ResNet-56's kind of the pass that collects S, beside a plain one.
The cost of ImageNet on several GPUs is computed: from images a second of one GPU, as given, as
measured, or else as assumed; from the exact size of all sums of ResNet-50, and from the links'
nominal speeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import nn

import ccp_ext
from benchmarks.common import (
    RESULTS,
    calls_for,
    cold_copies,
    interleaved,
    ratio,
    seconds_of,
    write_results,
)
from benchmarks.networks import NETWORKS
from benchmarks.statistics_methods import BASELINE, DEFAULT, KEEPING, METHODS, Setting
from ccp_ext import ops, trace
from ccp_ext.models.resnet import BasicBlock
from ccp_ext.report import table

IMAGES = 1_281_167  # ImageNet-1k's training images
GPUS = (1, 8, 64)
# Bytes a second that one GPU sends while it receives as many (nominal).
LINKS = {"NVLink 4": 450e9, "400 Gbit/s network": 50e9, "100 Gbit/s network": 12.5e9}
START = {"N": 128, "C": 64, "H=W": 16}
STEPS = {"N": (32, 64, 128, 256, 512), "C": (16, 32, 64, 128, 256), "H=W": (4, 8, 16, 32, 64)}
# Images a second of one GPU, where none was measured: assumptions, to show how the cost follows.
ASSUMED = (1000.0, 2500.0, 5000.0)
# Of the pass: batch, channels of the first of three stages, and the images' side.
PASS_START = {"N": 32, "C": 16, "H=W": 32}
PASS_STEPS = {"N": (8, 16, 32, 64), "C": (8, 16, 32, 64), "H=W": (16, 32, 48, 64)}
PASSES = (BASELINE, DEFAULT, KEEPING)
# What the counted bytes and operations grow with: a power of each variable.
EXPECTED = {
    "channel_dot": {"N": 1, "C": 1, "H=W": 2},
    "weighted_gram_": {"N": 1, "C": 2, "H=W": 0},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a trial: two sizes, three rounds")
    parser.add_argument("--images-per-second", type=float, help="of one GPU, positive")
    parser.add_argument(
        "--statistics", type=Path, help="results of statistics_cost to take images a second from"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of scaling.json")
    options = parser.parse_args(arguments)
    rates, origin = rates_of_one_gpu(options)
    device = ccp_ext.usable_devices()[-1] if options.device == "auto" else options.device
    rows = [row for variable in STEPS for row in growth(variable, device, options)]
    print(table(rows))
    exponents = [fitted(rows, operator, variable) for operator in EXPECTED for variable in STEPS]
    print(table(exponents))
    passes = [row for variable in PASS_STEPS for row in pass_growth(variable, device, options)]
    print("the pass over a small network, all groups")
    print(table(passes))
    size = bytes_of_sums("resnet50")
    projected = [
        {"images/s of a GPU": each, "rate": origin} | projection(each, n, link)
        for each in rates
        for n in GPUS
        for link in LINKS
    ]
    print(f"all sums of ResNet-50: {size:,} bytes. Computed, not measured:")
    print(table(projected))
    content = {
        "settings": {"device": device, "rounds": options.rounds, "start": START},
        "measured": rows,
        "exponents": exponents,
        "measured passes": passes,
        "computed, not measured": {"bytes of all sums, ResNet-50": size, "passes": projected},
    }
    print(write_results("scaling", content, options.output))


def growth(variable: str, device: str, options: argparse.Namespace) -> list[dict]:
    """Times along one variable, the others at ``START``."""
    rows = []
    for value in STEPS[variable][: 2 if options.quick else None]:
        size = START | {variable: value}
        n, c, side = size.values()
        x, g = torch.randn(2, n, c, side, side, device=device)
        a, S = ops.channel_dot(x, g), torch.zeros(c, c, device=device)
        functions = {
            "channel_dot": (ops.channel_dot, cold_copies((x, g), device)),
            "weighted_gram_": (ops.weighted_gram_, [(S, a)]),  # in use, it was just written
        }
        rounds = 3 if options.quick else options.rounds
        rows.append(
            {"variable": variable, **size}
            | {f"{n}, us": 1e6 * _median(*pair, rounds, device) for n, pair in functions.items()}
        )
    return rows


def pass_growth(variable: str, device: str, options: argparse.Namespace) -> list[dict]:
    """Times of whole passes along one variable, the others at ``PASS_START``."""
    rows = []
    for value in PASS_STEPS[variable][: 2 if options.quick else None]:
        size = PASS_START | {variable: value}
        passes = {name: METHODS[name](_setting(*size.values(), device)) for name in PASSES}
        rounds = 3 if options.quick else options.rounds
        seconds = interleaved(passes, rounds, 2, device=device)
        rows.append(
            {"variable": variable, **size}
            | {f"{name}, ms": 1e3 * median(times) for name, times in seconds.items()}
            | {f"{n}, over plain": ratio(seconds[n], seconds[BASELINE]) for n in PASSES[1:]}
        )
    return rows


def _setting(n: int, width: int, side: int, device: str) -> Setting:
    """Random images for a fresh network: three stages of two blocks, as in ResNet-56 of nine."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    stages = [
        BasicBlock(inputs * width, planes * width, stride)
        for inputs, planes, stride in (
            (1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1),
        )
    ]  # fmt: skip
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    model = nn.Sequential(*stem, *stages, *head).eval()
    images = torch.randn(n, 3, side, side)
    graph = trace(model, images[:1]).inner
    labels = torch.randint(10, (n,), device=device)
    return Setting(model.to(device), graph, images.to(device), labels)


def _median(function: Callable, inputs: Sequence[tuple], rounds: int, device: str) -> float:
    """Seconds of a call, the inputs taking turns."""
    turns = itertools.cycle(inputs)
    function(*next(turns))
    calls = {"it": calls_for(seconds_of(function, [next(turns)], device))}
    times = interleaved({"it": function}, rounds, 2, lambda: next(turns), device, calls)
    return median(times["it"])


def fitted(rows: Sequence[dict], operator: str, variable: str) -> dict:
    """The power of a variable in an operator's time between its two largest values."""
    *_, before, last = (row for row in rows if row["variable"] == variable)
    times = last[f"{operator}, us"] / before[f"{operator}, us"]
    return {
        "operator": operator,
        "variable": variable,
        "exponent at the largest": math.log(times) / math.log(last[variable] / before[variable]),
        "of the counted work": EXPECTED[operator][variable],
    }


@cache
def bytes_of_sums(network: str) -> int:
    """What all ranks reduce: of each group S [C, C], two vectors [C], in float32, width, count."""
    model = NETWORKS[network].create().eval()
    image = torch.randn(1, 3, *2 * (NETWORKS[network].image_size,))
    return sum(4 * (g.channels**2 + 2 * g.channels) + 16 for g in trace(model, image).groups)


def ring_seconds(size: int, gpus: int, link: float) -> float:
    """A ring all-reduce sends 2 (p - 1) / p of the bytes through each link, in both directions."""
    return 2 * (gpus - 1) / gpus * size / link


def rates_of_one_gpu(options: argparse.Namespace) -> tuple[Sequence[float], str]:
    """Images a second, and where they come from.

    Raises:
        InputError: the rate that was given is not positive.
    """
    given = options.images_per_second
    if given is not None:
        if not 0 < given < math.inf:
            raise ccp_ext.InputError(
                f"scaling: --images-per-second must be positive and finite; got {given}"
            )
        return [given], "given"
    if options.statistics is not None:
        return [images_per_second(options.statistics)], "measured"
    return ASSUMED, "assumed, not measured"


def images_per_second(statistics: Path) -> float:
    """What the default way to S reached in a run of ``statistics_cost``."""
    rows = json.loads(statistics.read_text(encoding="utf-8"))["rows"]
    return next(row["images/s"] for row in rows if row["method"] == DEFAULT)


def projection(images_per_second: float, gpus: int, link: str) -> dict:
    """What one pass over ImageNet costs; the sums are reduced once, at its end."""
    size = bytes_of_sums("resnet50")
    reduce = ring_seconds(size, gpus, LINKS[link])
    compute = IMAGES / (images_per_second * gpus)
    return {
        "GPUs": gpus,
        "link": link,
        "pass over the images, s": compute,
        "MB sent by each": 1e-6 * 2 * (gpus - 1) / gpus * size,
        "all-reduce, ms": 1e3 * reduce,
        "efficiency %": 100 * compute / (compute + reduce),
    }


if __name__ == "__main__":
    main()
