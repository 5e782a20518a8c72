"""What every benchmark shares: fair timing in one process, and results that say where from."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import ccp_ext
from ccp_ext.files import write_text

RESULTS = Path(__file__).parent / "results"
# The GPU idles this long before each timed run of calls, so that the host is ahead of it and its
# launch time stays out of the measurement.
HEAD_START_CYCLES_A_CALL = 300_000

Functions = Mapping[str, Callable[..., Any]]


def interleaved(
    functions: Functions,
    rounds: int,
    warmup: int = 2,
    prepare: Callable[[], tuple] = tuple,
    device: str | torch.device = "cpu",
    calls: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each call; the functions take turns, so that a drifting machine hits all alike.

    Args:
        functions: by name.
        rounds: measurements of each function.
        warmup: rounds before them.
        prepare: makes the arguments of one call; not timed.
        device: where the functions work: on a GPU the time is that between two events on its
            stream, without the host's; on a CPU it is the clock's.
        calls: calls in one measurement, each with its own arguments; the result is their mean.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(warmup + rounds):
        for name, function in functions.items():
            spent = seconds_of(function, [prepare() for _ in range(calls)], device)
            if k >= warmup:
                seconds[name].append(spent)
    return seconds


def seconds_of(
    function: Callable[..., Any], arguments: Sequence[tuple], device: str | torch.device
) -> float:
    """Mean seconds of one call with each of the arguments in turn."""
    cuda = torch.device(device).type == "cuda"
    return (_cuda_seconds if cuda else _wall_seconds)(function, arguments) / len(arguments)


def _wall_seconds(function: Callable[..., Any], arguments: Sequence[tuple]) -> float:
    begin = time.perf_counter()
    for each in arguments:
        function(*each)
    return time.perf_counter() - begin


def _cuda_seconds(function: Callable[..., Any], arguments: Sequence[tuple]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES_A_CALL * len(arguments))
    begin.record()
    for each in arguments:
        function(*each)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The 10%, 50% and 90% quantiles in microseconds."""
    cuts = quantiles(seconds, n=10, method="inclusive")
    return {"us": 1e6 * median(seconds), "us 10%": 1e6 * cuts[0], "us 90%": 1e6 * cuts[8]}


def environment() -> dict[str, Any]:
    """Machine, versions and commit, for the head of a results file."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "ccp_ext": ccp_ext.__version__,
        "build": ccp_ext.build_info(),
        # "+" marks a changed work tree.
        "commit": _answer("git", "describe", "--always", "--abbrev=12", "--dirty=+"),
    }


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_results(name: str, content: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write ``<name>.json`` atomically, to ``results`` by default; returns its path."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text(path, json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _answer(*command: str) -> str | None:
    """What a command prints; None where it fails."""
    try:
        finished = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return finished.stdout.strip() or None
