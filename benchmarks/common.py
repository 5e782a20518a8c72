"""What every benchmark shares: fair timing in one process, and results that say where from."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

import ccp_ext
from ccp_ext.files import write_text

RESULTS = Path(__file__).parent / "results"
# The GPU idles before timed calls, so that the host gets ahead of it and its launch time stays out
# of the measurement: so many clock cycles at first, and at most (about 17 ms: the queue of a GPU
# holds 1,024 launches, and a longer start would not let the host get further ahead).
HEAD_START = 1 << 18
LONGEST_HEAD_START = 1 << 25
# What takes longer than this is not measured again with a longer head start.
LONG_SECONDS = 0.02
# Inputs that take turns are together several times the last-level cache.
CPU_ROTATION_BYTES = 256 << 20
MAX_COPIES = 256

Functions = Mapping[str, Callable[..., Any]]
# Mean seconds of calls of a function with the arguments that the other one makes.
Timer = Callable[[Callable[..., Any], Callable[[], Sequence[tuple]]], float]


class OutOfTime(BaseException):
    """Raised by :func:`time_limit`; no Exception, so that no library takes it for a failure."""


def interleaved(
    functions: Functions,
    rounds: int,
    warmup: int = 2,
    prepare: Callable[[], tuple] = tuple,
    device: str | torch.device = "cpu",
    calls: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call; the functions take turns, so that a drifting machine hits all alike.

    Args:
        functions: by name.
        rounds: measurements of each function.
        warmup: rounds before them.
        prepare: makes the arguments of one call; not timed.
        device: where the functions work: on a GPU the time is that between two events on its
            stream, without the host's; on a CPU it is the clock's.
        calls: of each function in one measurement, each with its own arguments, by default one;
            the result is their mean.
    """
    timers = {name: _timer(device) for name in functions}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(warmup + rounds):
        for name, function in functions.items():
            count = calls[name] if calls else 1
            spent = timers[name](function, lambda n=count: [prepare() for _ in range(n)])
            if k >= warmup:
                seconds[name].append(spent)
    return seconds


def seconds_of(
    function: Callable[..., Any], arguments: Sequence[tuple], device: str | torch.device
) -> float:
    """Mean seconds of one call with each of the arguments in turn."""
    return _timer(device)(function, lambda: arguments)


def calls_for(seconds: float) -> int:
    """So many calls that a measurement takes a millisecond, at most 20."""
    return max(1, min(20, math.ceil(1e-3 / seconds)))


def _timer(device: str | torch.device) -> Timer:
    return _CudaTimer() if torch.device(device).type == "cuda" else _wall_seconds


def _wall_seconds(function: Callable[..., Any], make: Callable[[], Sequence[tuple]]) -> float:
    arguments = make()
    begin = time.perf_counter()
    for each in arguments:
        function(*each)
    return (time.perf_counter() - begin) / len(arguments)


class _CudaTimer:
    """Seconds of a call on the GPU; finds the head start that the host needs, and remembers it."""

    def __init__(self) -> None:
        self.head_start = HEAD_START

    def __call__(self, function: Callable[..., Any], make: Callable[[], Sequence[tuple]]) -> float:
        while True:
            arguments = make()  # others each time: those of a try are in the cache after it
            spent, ahead = _queued(function, arguments, self.head_start)
            if ahead or spent > LONG_SECONDS or self.head_start >= LONGEST_HEAD_START:
                return spent / len(arguments)
            self.head_start = min(4 * self.head_start, LONGEST_HEAD_START)


def _queued(
    function: Callable[..., Any], arguments: Sequence[tuple], head_start: int
) -> tuple[float, bool]:
    """Seconds of all calls on the GPU, and whether all were queued before it began the first."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(head_start)
    begin.record()
    for each in arguments:
        function(*each)
    ahead = not begin.query()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, ahead


def cold_copies(inputs: tuple, device: str | torch.device) -> list[tuple]:
    """The inputs and so many copies that, taking turns, none is left in the last-level cache."""
    rotation = CPU_ROTATION_BYTES
    if torch.device(device).type == "cuda":
        rotation = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(t.nbytes for t in inputs if isinstance(t, Tensor))
    count = max(2, min(MAX_COPIES, math.ceil(rotation / size)))
    return [inputs, *(map_tensors(Tensor.clone, inputs) for _ in range(count - 1))]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The function of a tensor, also of those in a tuple or list; anything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, each) for each in value)
    return value


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the block once it has taken longer; main thread only."""

    def stop(*_) -> None:
        raise OutOfTime(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The 10%, 50% and 90% quantiles in microseconds."""
    cuts = quantiles(seconds, n=10, method="inclusive")
    return {"us": 1e6 * median(seconds), "us 10%": 1e6 * cuts[0], "us 90%": 1e6 * cuts[8]}


@cache
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
        # "+" marks a changed work tree. A copy without its history is told by CCP_COMMIT.
        "commit": _answer("git", "describe", "--always", "--abbrev=12", "--dirty=+")
        or os.environ.get("CCP_COMMIT"),
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
