"""What selection's functions check about their scalar arguments."""

from __future__ import annotations

import numbers
import operator
import time
from dataclasses import dataclass
from typing import Any

from ccp_ext.errors import InputError

_NO_LIMIT = 2**63 - 1


def to_integer(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def to_count(r: Any, channels: int, op: str = "select") -> int:
    count = to_integer(r)
    if count is None or not 0 <= count <= channels:
        raise InputError(f"{op}: r must be an integer with 0 <= r <= C = {channels}; got {r!r}")
    return count


@dataclass(frozen=True)
class Limits:
    deadline: float  # of time.monotonic()
    gap: float
    nodes: int

    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.deadline - time.monotonic())


def to_limits(
    begin: float, time_limit: Any, gap: Any, node_limit: Any, op: str = "select"
) -> Limits:
    for name, value in (("time_limit", time_limit), ("gap", gap)):
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and value >= 0):
            raise InputError(f"{op}: {name} must be a number >= 0; got {value!r}")
    try:
        nodes = _NO_LIMIT if node_limit is None else operator.index(node_limit)
    except TypeError:
        nodes = -1
    if isinstance(node_limit, bool) or not 0 <= nodes <= _NO_LIMIT:
        raise InputError(f"select: node_limit must be an integer >= 0 or None; got {node_limit!r}")
    return Limits(begin + float(time_limit), float(gap), nodes)


def to_seed(op: str, seed: Any) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**64:
        raise InputError(f"{op}: seed must be an integer with 0 <= seed < 2^64; got {seed!r}")
    return value
