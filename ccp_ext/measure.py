"""What a model costs, measured by running it: nothing here looks at the channel graph."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ccp_ext.errors import InputError
from ccp_ext.evaluation import training_flags_kept


def macs(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> int:
    """Multiply-accumulate operations of one forward pass on the example inputs, all samples.

    Counts convolutions and matrix products as they are executed; additions of a bias,
    normalisations and activations count nothing.

    Args:
        example_inputs: a tensor, or the tensors of the positional arguments.
    """
    counter = FlopCounterMode(display=False)
    with _inference(model), counter:
        model(*as_arguments(example_inputs))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    """The number of parameters; one that is shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Latency:
    """Times of one forward pass in milliseconds.

    Attributes:
        median: the middle of the repeats.
        low, high: the 10% and 90% quantiles.
        repeats: how many passes were timed.
    """

    median: float
    low: float
    high: float
    repeats: int


def latency(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    repeats: int = 30,
    warmup: int = 5,
) -> Latency:
    """Time the forward pass in eval mode, without gradients.

    On a CUDA device by events on the current stream, one synchronisation at the end; otherwise by
    the wall clock.

    Args:
        example_inputs: a tensor, or the tensors of the positional arguments, on the model's device.
        repeats: passes timed, 2 or more.
        warmup: passes before them, 0 or more.

    Raises:
        InputError: ``repeats`` or ``warmup`` is out of range.
    """
    if repeats < 2:
        raise InputError(f"repeats must be 2 or more, got {repeats!r}")
    if warmup < 0:
        raise InputError(f"warmup must be 0 or more, got {warmup!r}")
    arguments = as_arguments(example_inputs)
    timed = _cuda_times if any(x.is_cuda for x in arguments) else _wall_times
    with _inference(model):
        for _ in range(warmup):
            model(*arguments)
        times = timed(model, arguments, repeats)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Latency(statistics.median(times), deciles[0], deciles[-1], repeats)


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
    return "peak of the process's resident memory above its start"


def _begin_peak(device: torch.device) -> int | None:
    """Forget earlier peaks; returns the bytes that do not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
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


def as_arguments(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The positional arguments that ``example_inputs`` stands for.

    Raises:
        InputError: it is neither a tensor nor a non-empty sequence of tensors.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    is_sequence = isinstance(example_inputs, list | tuple)
    if not is_sequence or not example_inputs:
        raise InputError(
            "example_inputs must be a tensor or a non-empty sequence of tensors, "
            f"got {type(example_inputs).__name__}"
        )
    for i, value in enumerate(example_inputs):
        if not isinstance(value, Tensor):
            raise InputError(f"example_inputs[{i}] must be a tensor, got {type(value).__name__}")
    return tuple(example_inputs)


def _wall_times(model: nn.Module, arguments: tuple[Tensor, ...], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_times(model: nn.Module, arguments: tuple[Tensor, ...], repeats: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    with torch.cuda.device(next(x.device for x in arguments if x.is_cuda)):
        events[0].record()
        for event in events[1:]:
            model(*arguments)
            event.record()
        torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the training flags come back."""
    with training_flags_kept(model), torch.no_grad():
        model.eval()
        yield
