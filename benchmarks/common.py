"""What every benchmark shares: fair timing in one process, and results that say where from."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import ccp_ext
from ccp_ext.files import write_text

RESULTS = Path(__file__).parent / "results"


def interleaved(
    functions: Mapping[str, Callable[..., Any]],
    rounds: int,
    warmup: int = 2,
    prepare: Callable[[], tuple] = tuple,
) -> dict[str, list[float]]:
    """Seconds of each call; the functions take turns, so that a drifting machine hits all alike.

    Before each call ``prepare``, which is not timed, makes its arguments.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(warmup + rounds):
        for name, function in functions.items():
            arguments = prepare()
            _synchronize()
            begin = time.perf_counter()
            function(*arguments)
            _synchronize()
            if k >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def environment() -> dict[str, Any]:
    """Machine, versions and commit, for the head of a results file."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ccp_ext": ccp_ext.__version__,
        "commit": _commit(),
    }


def write_results(name: str, content: Mapping[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json`` atomically; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_text(path, json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    return path


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit measured; "+" marks a changed work tree."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "unknown"
