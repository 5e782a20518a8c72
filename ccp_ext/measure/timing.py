"""How long a forward pass takes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ccp_ext.counting import as_arguments, inference
from ccp_ext.errors import InputError


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
    with inference(model):
        for _ in range(warmup):
            model(*arguments)
        times = timed(model, arguments, repeats)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Latency(statistics.median(times), deciles[0], deciles[-1], repeats)


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
