"""What collecting S for all inner groups costs, beside a plain pass and other libraries.

    python -m benchmarks.statistics_cost [--network resnet50] [--methods vmap Opacus ...]

Time and peak memory of one pass over one batch. Before timing, the S of all methods that compute
the same quantity is compared with that of per-sample gradients in float64; ours in bfloat16 with
that of the same pass with our operators in float64, while the others, which round elsewhere, are
compared in float32 and timed in bfloat16.
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

import ccp_ext
from benchmarks import statistics_methods as methods
from benchmarks import targets
from benchmarks.common import (
    RESULTS,
    OutOfTime,
    interleaved,
    ratio,
    seconds_of,
    time_limit,
    version_of,
    write_results,
)
from benchmarks.limits import float32_precision
from benchmarks.networks import NETWORKS
from benchmarks.statistics_methods import BASELINE, METHODS, PAPER, SAME_AS_PAPER, Pass, Setting
from ccp_ext import ChannelGraph, collect, ops, reference, trace
from ccp_ext.report import table

CPU_BATCH = {"resnet56": 32, "resnet50": 4}
CHECKED_IMAGES = 4
TOLERANCE = 1e-4  # of S in the Frobenius norm; float32 against float64
# Of S in bfloat16 against the same pass with sums in float64; a GPU may round a pass in two ways.
SAME_PASS_TOLERANCE = 1e-2
MEBIBYTE = 1 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.peak_of:
        print(_resident_peak(options))
        return
    result = measure(options)
    print(table([_with_short_error(row) for row in result["rows"]]))
    for name, reason in result["left out"].items():
        print(f"{name} is left out: {reason}")
    print(targets.lines(result["targets"]))
    print(write_results(f"statistics_{options.network}{options.tag}", result, options.output))


def measure(options: argparse.Namespace) -> dict:
    """The content of the results file.

    Raises:
        AssertionError: a method's S is further from float64 than the tolerance.
    """
    errors, left_out = _check(options)
    passes = {}
    for name in options.methods:
        if name not in left_out:
            prepared = _attempt(lambda n=name: METHODS[n](_setting(options)))
            (left_out if isinstance(prepared, str) else passes)[name] = prepared
    seconds, failed = _times(passes, options)
    left_out |= failed
    peaks = {name: _peak(name, options) for name in seconds}
    rows = [
        {
            "method": name,
            "ms": 1e3 * median(times),
            "rounds": len(times),
            "over forward and backward": _ratio(times, seconds[BASELINE]),
            "images/s": options.batch_size / median(times),
            "peak MiB": peaks[name],
            "more than forward and backward, MiB": peaks[name] - peaks[BASELINE],
            "error of S": errors.get(name),
        }
        for name, times in seconds.items()
    ]
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "peak_of")}
    return {
        "settings": settings,
        "targets": targets.of_statistics(settings, rows),
        "versions": {name: version_of(package) for name, package in methods.PACKAGES.items()},
        "rows": rows,
        "channel_dot inside the pass": _inside_the_pass(_setting(options), options.rounds),
        "left out": left_out,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet56")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, help=f"default on a CPU: {CPU_BATCH}")
    parser.add_argument("--image-size", type=int, help="default: the network's")
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each method, about")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument(
        "--give-up-after",
        type=float,
        default=600.0,
        help="seconds of a method's first two passes; it is left out then",
    )
    parser.add_argument("--tag", default="", help="added to the name of the results file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--peak-of", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    network = NETWORKS[options.network]
    if options.device == "auto":
        options.device = ccp_ext.usable_devices()[-1]
    if options.batch_size is None:
        on_cpu = torch.device(options.device).type == "cpu"
        options.batch_size = CPU_BATCH[options.network] if on_cpu else network.batch
    options.image_size = options.image_size or network.image_size
    if BASELINE not in options.methods:
        options.methods = [BASELINE, *options.methods]
    return options


def _setting(
    options: argparse.Namespace, images: int | None = None, dtype: torch.dtype = torch.float32
) -> Setting:
    """A fresh model, since some libraries change the one they are given; always the same one."""
    torch.manual_seed(0)
    network = NETWORKS[options.network]
    count = images or options.batch_size
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model = network.create().eval().to(options.device, dtype, memory_format=layout)
    x = torch.randn(count, 3, options.image_size, options.image_size)
    x = x.to(options.device, dtype, memory_format=layout)
    y = torch.randint(network.classes, (count,), device=options.device)
    graph = _inner_graph(options.network, options.image_size)
    return Setting(model, graph, x, y, options.autocast)


@cache
def _inner_graph(network: str, image_size: int) -> ChannelGraph:
    """The same for all models of a network: it knows names and shapes only."""
    return trace(NETWORKS[network].create().eval(), torch.randn(1, 3, image_size, image_size)).inner


def _check(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """Errors of S by method, on a few images without TF32; and why a method is left out."""
    same = [name for name in options.methods if name in SAME_AS_PAPER]
    errors, left_out = {}, {}
    expected = cache(lambda rounded: _expected(options, rounded))  # many methods share one
    with float32_precision("highest"):
        for name in same:
            rounded = options.autocast and name == PAPER
            setting = replace(_setting(options, CHECKED_IMAGES), autocast=rounded)
            outcome = _attempt(lambda n=name, s=setting: METHODS[n](s)())
            if isinstance(outcome, str):
                left_out[name] = outcome
                continue
            errors[name] = max(_error(S, expected(rounded)[group]) for group, S in outcome.items())
            if not errors[name] <= (SAME_PASS_TOLERANCE if rounded else TOLERANCE):
                raise AssertionError(f"S by {name} is off by {errors[name]:.1e}")
    if PAPER in left_out:
        raise AssertionError(f"{PAPER}: {left_out[PAPER]}")
    return errors, left_out


def _expected(options: argparse.Namespace, rounded: bool) -> methods.Grams:
    """S from per-sample gradients in float64.

    Of a pass with autocast from the same pass with our operators in float64: bfloat16 itself is
    too far off.
    """
    if not rounded:
        setting = _setting(options, CHECKED_IMAGES, torch.float64)
        return METHODS["vmap"](replace(setting, autocast=False))()

    def channel_dot(*arguments) -> torch.Tensor:
        return reference.channel_dot(*arguments).float()

    def weighted_grams_(S: Sequence, a: Sequence, sigma: torch.Tensor | None) -> None:
        for matrix, rows in zip(S, a, strict=True):
            matrix += reference.weighted_gram(rows, sigma)

    with (
        patch.object(ops, "channel_dot", channel_dot),
        patch.object(ops, "weighted_grams_", weighted_grams_),
    ):
        return METHODS[PAPER](_setting(options, CHECKED_IMAGES))()


def _attempt(function: Callable, seconds: float = math.inf) -> object:
    """What the function returns, or in words why another library failed or took too long."""
    try:
        with time_limit(seconds) if seconds < math.inf else nullcontext():
            return function()
    except (Exception, OutOfTime) as error:  # other libraries fail in any way
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _with_short_error(row: dict) -> dict:
    error = row["error of S"]
    return row | {"error of S": None if error is None else f"{error:.0e}"}


def _error(S: torch.Tensor, expected: torch.Tensor) -> float:
    return ((S - expected).norm() / expected.norm()).item()


def _times(
    passes: dict[str, Pass], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each method, in turns; those that take long are timed once, by themselves."""
    second, failed = {}, {}
    for name, run in passes.items():
        limit = math.inf if name == BASELINE else options.give_up_after
        outcome = _attempt(lambda r=run: _second_pass(r, options.device), limit)
        (failed if isinstance(outcome, str) else second)[name] = outcome
    slow = {name for name, seconds in second.items() if seconds > options.seconds / 3}
    fast = {name: passes[name] for name in second if name not in slow or name == BASELINE}
    rounds = int(options.seconds * len(fast) / sum(second[name] for name in fast))
    rounds = max(3, min(options.rounds, rounds))
    seconds = interleaved(fast, rounds, warmup=1, device=options.device)
    return seconds | {name: [second[name]] for name in second if name not in fast}, failed


def _second_pass(run: Pass, device: str) -> float:
    """Its seconds: the first also makes the gradients, tunes and fills the allocator's pools."""
    run()
    return seconds_of(lambda: run() and None, [()], device)


def _ratio(times: list[float], baseline: list[float]) -> float:
    if len(times) == len(baseline):
        return ratio(times, baseline)
    return median(times) / median(baseline)


def _peak(name: str, options: argparse.Namespace) -> float:
    """Most memory held in a pass, in MiB: allocated on a GPU, resident on a CPU.

    On a CPU in a process of its own, that starts with nothing but one image's pass.
    """
    if torch.device(options.device).type == "cuda":
        return _allocated_peak(name, options)
    arguments = ["--network", options.network, "--batch-size", options.batch_size]
    arguments += ["--image-size", options.image_size, "--device", "cpu", "--peak-of", name]
    arguments += ["--channels-last"] if options.channels_last else []
    arguments += ["--autocast"] if options.autocast else []
    command = [sys.executable, "-m", "benchmarks.statistics_cost", *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _allocated_peak(name: str, options: argparse.Namespace) -> float:
    """What the second pass of a fresh model holds, with the model, its gradients and the batch."""
    gc.collect()  # a model with hooks is held by cycles
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run = METHODS[name](_setting(options))
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE


def _resident_peak(options: argparse.Namespace) -> float:
    """The process's largest resident memory in a pass of ``options.peak_of``, in MiB."""
    METHODS[options.peak_of](_setting(options, images=1))()
    run = METHODS[options.peak_of](_setting(options))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    run()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) / 1024


def _inside_the_pass(setting: Setting, rounds: int) -> dict[str, float]:
    """Time spent in all calls of channel_dot, and in the torch expression in its place.

    Here the caches are as they are in use: autograd has just written g, x is long gone.
    """
    device = setting.x.device

    def time_in(function: Callable) -> float:
        spent = []

        def timed(*arguments):
            results = []
            spent.append(seconds_of(lambda: results.append(function(*arguments)), [()], device))
            return results[0]

        with (
            patch.object(ops, "channel_dot", timed),
            collect(setting.model, setting.graph, curvature="empirical") as stats,
        ):
            stats.backward(setting.forward(), setting.y)
        return sum(spent)

    ours, expression = [], []
    for k in range(1 + rounds):
        pair = time_in(ops.channel_dot), time_in(_expression)
        if k:  # the first round warms up
            ours.append(pair[0])
            expression.append(pair[1])
    return {
        "ours, median ms": 1e3 * median(ours),
        "torch, median ms": 1e3 * median(expression),
        "speed-up": ratio(expression, ours),
    }


def _expression(x: torch.Tensor, g: torch.Tensor, channel_dim: int) -> torch.Tensor:
    return (x * g).sum((2, 3), dtype=torch.float32)


if __name__ == "__main__":
    main()
