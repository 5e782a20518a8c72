"""Time and memory of a block of code."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ccp_ext import memory


@dataclass
class Resources:
    """What a block of code took; filled at its end.

    Attributes:
        seconds: by the wall clock, work queued on the device included.
        mebibytes: peak memory as :func:`memory_kind` says, or None where it is not to be had.
    """

    seconds: float = 0.0
    mebibytes: float | None = None

    def then(self, other: Resources) -> Resources:
        """Of this block and another after it."""
        peaks = (self.mebibytes, other.mebibytes)
        return Resources(self.seconds + other.seconds, None if None in peaks else max(peaks))


@contextlib.contextmanager
def resources(device: torch.device | str) -> Iterator[Resources]:
    """Measure the block, which computes on ``device``; not to be nested."""
    device, used = torch.device(device), Resources()
    before = _begin_peak(device)
    start = time.perf_counter()
    try:
        yield used
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        used.seconds = time.perf_counter() - start
        after = _peak(device)
        used.mebibytes = None if None in (before, after) else (after - before) / 2**20


def memory_kind(device: torch.device | str) -> str:
    """What :class:`Resources` counts on that device, in words."""
    if torch.device(device).type == "cuda":
        return "peak of the memory that torch allocated on the GPU, the model included"
    return (
        "peak of the process's resident memory above its start, before which what the allocator "
        "held free was given back"
    )


def _begin_peak(device: torch.device) -> int | None:
    """Forget earlier peaks; returns the bytes that do not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    memory.trim()  # what is free but resident would hide as much of the block's memory
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int | None:
    return (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")
    )


def _status_bytes(name: str) -> int | None:
    """A figure of Linux's /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)
