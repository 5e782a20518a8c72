"""Validates and times one operator beside its rivals, at every size, type and layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import geometric_mean, median

import torch
from torch import Tensor

from benchmarks import triton_kernels
from benchmarks.common import (
    OutOfTime,
    calls_for,
    cold_copies,
    interleaved,
    map_tensors,
    ratio,
    seconds_of,
    spread,
    time_limit,
)
from benchmarks.limits import Limits
from benchmarks.operation import DTYPES, Candidate, Case, Operation, Work

YARDSTICK = "read"  # not a rival: reads the same inputs and computes nothing of use
COMPILED = "compile"
COMPILE_MODE = {"cpu": "default", "cuda": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class Effort:
    """How much is spent on each case.

    Attributes:
        seconds: that the timed calls of a case take together, about.
        rounds: at most.
        budget: seconds after which no further case of an operator is begun; None for all.
        compiled: "all" cases also as torch.compile makes them, "some" (an operator's first size,
            with all types and layouts) or "none".
        compile_seconds: after which a compilation is given up.
        warm: one set of inputs for all calls, so that small ones come from the cache.
    """

    seconds: float = 1.0
    rounds: int = 30
    budget: float | None = None
    compiled: str = "some"
    compile_seconds: float = 120.0
    warm: bool = False


def cases(
    operation: Operation, network: str, device: str, batch: int, smallest: bool = False
) -> Iterator[Case]:
    """Every distinct size of a network, or the smallest alone, in all layouts and types."""
    sizes = list(operation.sizes(network, batch))
    if smallest:
        sizes = [min(sizes, key=lambda size: math.prod(size["shape"]))]
    for size in sizes:
        for layout, dtype in itertools.product(operation.layouts, DTYPES):
            yield Case(network=network, layout=layout, dtype=dtype, device=device, **size)


def measure(
    operation: Operation, case: Case, limits: Limits, effort: Effort, compiled: bool
) -> tuple[list[dict], dict[str, str]]:
    """Rows of a case, one a candidate, "ours" first; and the rivals left out, with reasons.

    Raises:
        AssertionError: our result is further from the float64 reference than the bound allows.
    """
    torch.manual_seed(0)
    functions, left_out = _candidates(operation, case, compiled)
    inputs = operation.inputs(case)
    expected = operation.reference(*inputs)
    errors = {}
    for name, function in list(functions.items()):
        try:
            with time_limit(effort.compile_seconds) if name == COMPILED else nullcontext():
                result = function(*map_tensors(Tensor.clone, inputs))
            errors[name] = error_of(operation, case, name, result, expected)
        # A rival may lack memory, a type, accuracy, a compiler or time.
        except (Exception, OutOfTime) as error:
            if name == "ours":
                raise
            left_out[name] = str(error).partition("\n")[0]
            del functions[name]
    work = operation.work(case)
    cold = operation.cold and not effort.warm
    if cold and limits.floor(work)[1] == "memory":
        functions[YARDSTICK] = _reader(case, work)
    seconds = _times(operation, case, functions, effort, cold)
    rows = [
        of_case(operation, case, effort)
        | {"candidate": name, **_figures(times, work, limits)}
        | {"time over ours": ratio(times, seconds["ours"]), "error": errors.get(name)}
        for name, times in seconds.items()
    ]
    if torch.device(case.device).type == "cuda":
        rows[0]["extra MiB"] = _extra_bytes(functions["ours"], inputs) / 2**20
    return rows, left_out


def of_case(operation: Operation, case: Case, effort: Effort) -> dict:
    """What all rows of a case have in common."""
    cold = operation.cold and not effort.warm
    return case.description(operation.name) | {
        "shape": list(case.shape),
        "device": torch.device(case.device).type,
        "inputs": "cold" if cold else "warm",
        "MB": 1e-6 * operation.work(case).bytes,
    }


def _extra_bytes(function: Candidate, inputs: tuple) -> int:
    """What torch's allocator of the GPU holds at most during a call, beyond the inputs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*inputs)
    return torch.cuda.max_memory_allocated() - before


def _figures(times: list[float], work: Work, limits: Limits) -> dict:
    """Quantiles of the time, and its middle as rates and shares of the limits."""
    middle = median(times)
    floor, bound = limits.floor(work)
    matrix_rate = limits.rate(work.rate)
    by_patches = 100 * work.by_patches / middle / matrix_rate
    return {
        **spread(times),
        "rounds": len(times),
        "GB/s": 1e-9 * work.bytes / middle,
        "TFLOP/s": 1e-12 * work.operations / middle,
        "bound by": bound,
        "% of limit": 100 * floor / middle,
        "% of matrix rate": 100 * work.products / middle / matrix_rate,
        **({"% of matrix rate, by patches": by_patches} if work.by_patches else {}),
        "% of copy": 100 * work.bytes / middle / limits.copy,
        "% of two-stream read": 100 * work.bytes / middle / limits.read_two,
    }


def overview(rows: Iterable[dict]) -> list[dict]:
    """One line a case for the terminal: ours, and the rivals as multiples of our time."""
    lines = []
    for _, group in itertools.groupby(rows, key):
        of = {row["candidate"]: row for row in group}
        ours = of.pop("ours")
        unit = "GB/s" if ours["bound by"] == "memory" else "TFLOP/s"
        lines.append(
            {
                "size": ours["size"],
                "layout": ours["layout"],
                "dtype": ours["dtype"],
                "us": ours["us"],
                "rate": f"{ours[unit]:.2f} {unit}",
                "% of limit": ours["% of limit"],
                **{f"{name} x": row["time over ours"] for name, row in of.items()},
            }
        )
    columns = dict.fromkeys(itertools.chain.from_iterable(lines))
    return [{column: line.get(column) for column in columns} for line in lines]


def summary(rows: Iterable[dict]) -> list[dict]:
    """Geometric means over the sizes of the rivals' times over ours."""
    found: dict[tuple, list[float]] = {}
    for row in rows:
        if row["candidate"] != "ours":
            key = (row["operator"], row["network"], row["dtype"], row["candidate"])
            found.setdefault(key, []).append(row["time over ours"])
    heads = ("operator", "network", "dtype", "candidate")
    return [
        dict(zip(heads, key, strict=True)) | {"cases": len(v), "time over ours": geometric_mean(v)}
        for key, v in found.items()
    ]


def key(row: dict) -> tuple[str, ...]:
    """Which case a row is of."""
    return tuple(row[name] for name in ("operator", "network", "size", "layout", "dtype"))


def _candidates(
    operation: Operation, case: Case, compiled: bool
) -> tuple[dict[str, Candidate], dict[str, str]]:
    functions, notes = dict(operation.candidates(case)), {}
    cuda = torch.device(case.device).type == "cuda"
    if "triton" in functions and (triton_kernels.triton is None or not cuda):
        del functions["triton"]
        notes["triton"] = "runs on a GPU only" if triton_kernels.triton else "not installed"
    if compiled:
        torch.compiler.reset()
        mode = COMPILE_MODE[torch.device(case.device).type]
        functions[COMPILED] = torch.compile(functions["eager"], dynamic=False, mode=mode)
    return functions, notes


def error_of(operation: Operation, case: Case, name: str, result, expected: tuple) -> float:
    """The largest error of a result over the sum of |terms|, ``expected`` being the reference's.

    Raises:
        AssertionError: it is larger than the candidate's bound.
    """
    result, expected, magnitude = _flat(result), *map(_flat, expected)
    bound = operation.tolerance(case, name)
    error = (result - expected).abs()
    if not (error <= bound * magnitude).all():  # False for NaN
        worst = (error / magnitude).nan_to_num(math.inf).max().item()
        raise AssertionError(
            f"{operation.name}: {name} is wrong on {case.label} {case.layout} {case.dtype_name}: "
            f"error {worst:.1e} of the sum of |terms|, allowed {bound:.1e}"
        )
    return (error / magnitude.clamp(min=torch.finfo(torch.float64).tiny)).max().item()


def _flat(result: Tensor | Sequence[Tensor]) -> Tensor:
    """All numbers of a result in one row, as float64."""
    parts = [result] if isinstance(result, Tensor) else result
    return torch.cat([part.double().flatten() for part in parts])


def _times(
    operation: Operation, case: Case, functions: dict[str, Callable], effort: Effort, cold: bool
) -> dict[str, list[float]]:
    """Seconds of each function; cold inputs take turns, so that none lies in the cache."""
    inputs = operation.inputs(case)
    turns = itertools.cycle(cold_copies(inputs, case.device) if cold else [inputs])
    once = {}
    for name, function in functions.items():
        function(*next(turns))
        once[name] = seconds_of(function, [next(turns)], case.device)
    calls = {name: calls_for(seconds) for name, seconds in once.items()}
    rounds = int(effort.seconds / sum(calls[name] * once[name] for name in once))
    rounds = max(3, min(effort.rounds, rounds))
    return interleaved(functions, rounds, 1, lambda: next(turns), device=case.device, calls=calls)


def _reader(case: Case, work: Work) -> Callable:
    """Reads the inputs as often as the operator does: two of them side by side on a CPU."""
    side_by_side = work.streams == 2 and torch.device(case.device).type == "cpu"
    return _read_two if side_by_side else _read


def _read(*inputs) -> None:
    """Read every tensor once, as one stream of float32."""
    for x in inputs:
        if isinstance(x, Tensor):
            _stream(x).sum()


def _read_two(x: Tensor, g: Tensor) -> None:
    torch.dot(_stream(x), _stream(g))


def _stream(x: Tensor) -> Tensor:
    """The tensor's memory in its order, as float32."""
    return x.as_strided((x.numel(),), (1,)).view(torch.float32)
