"""How many channels each group keeps under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Protocol

from ccp_ext.errors import InputError

# Absorbs the binary rounding of decimal fractions: 0.29 * 100 channels are 29.
_ROUNDING = 1e-9


class _Group(Protocol):
    name: str
    channels: int


class _Graph(Protocol):
    """What :func:`allocate` needs of a graph; both costs do not decrease in any keep count."""

    groups: Sequence[_Group]

    def macs(self, keep: Mapping[str, int]) -> int: ...

    def parameters(self, keep: Mapping[str, int]) -> int: ...


@dataclass(frozen=True)
class Allocation:
    """The outcome of :func:`allocate`.

    Attributes:
        keep: {group name: channels that stay}, every group of the graph, in its order.
        kind: the budget's kind: "macs", "params", "ratio" or "per_group".
        budget: the largest cost allowed, in MACs or parameters; None for the other kinds.
        achieved: the cost of ``keep`` in the same unit, at most ``budget``; None likewise.
    """

    keep: dict[str, int]
    kind: str
    budget: int | None = None
    achieved: int | None = None


def allocate(
    graph: _Graph,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    ratio: float | Mapping[str, float] | None = None,
    per_group: Mapping[str, float | int] | None = None,
    multiple: int = 1,
    minimum: int = 1,
) -> Allocation:
    """Turn one budget into the number of channels that each group keeps.

    For ``macs`` and ``params`` all groups keep one common fraction of their channels, the
    largest that the budget allows. What this leaves is used up by giving back single channels
    (or ``multiple``), each time to the group that keeps the smallest fraction and still fits.

    Args:
        graph: ``groups`` (each with ``name`` and ``channels``), ``macs(keep)``,
            ``parameters(keep)``.
        macs: what to KEEP: a float in (0, 1] is a fraction of the plain model's multiply-accumulate
            operations, an int is a count.
        params: likewise for parameters.
        ratio: the fraction of channels to REMOVE in each group, in [0, 1), rounded down to a count;
            a mapping gives it by group name, and groups without an entry keep all channels.
        per_group: by group name, the channels to KEEP as an int or the fraction to REMOVE as a
            float; groups without an entry keep all channels.
        multiple: keep counts are divisible by it, or all channels of the group.
        minimum: the least keep count of a group (all channels of a group that has fewer).

    Raises:
        InputError: not exactly one budget, a value out of range, an unknown group, or a budget
            below what ``minimum`` and ``multiple`` let the model reach.
    """
    budgets = {"macs": macs, "params": params, "ratio": ratio, "per_group": per_group}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            f"allocate: give exactly one of {', '.join(budgets)}; got {', '.join(given) or 'none'}"
        )
    widths = _Widths(
        {group.name: group.channels for group in graph.groups},
        _positive("multiple", multiple),
        _positive("minimum", minimum),
    )
    kind = given[0]
    if kind == "macs":
        return _within(graph.macs, kind, macs, widths)
    if kind == "params":
        return _within(graph.parameters, kind, params, widths)
    if kind == "ratio":
        return Allocation(_by_ratio(ratio, widths), kind)
    return Allocation(_by_group(per_group, widths), kind)


@dataclass(frozen=True)
class _Widths:
    """The allowed keep counts: ``least(name)``, on in steps of ``multiple``, and all channels."""

    channels: dict[str, int]
    multiple: int
    minimum: int

    def least(self, name: str) -> int:
        return min(self.channels[name], math.ceil(self.minimum / self.multiple) * self.multiple)

    def at_most(self, name: str, count: int) -> int:
        """The largest allowed count up to ``count``, or the least allowed one."""
        if count >= self.channels[name]:
            return self.channels[name]
        return max(self.least(name), count // self.multiple * self.multiple)

    def at_least(self, name: str, count: int) -> int:
        """The smallest allowed count from ``count`` on."""
        rounded = math.ceil(count / self.multiple) * self.multiple
        return min(self.channels[name], max(self.least(name), rounded))

    def after(self, name: str, count: int) -> int:
        """The next allowed count above ``count``, which is allowed and not all channels."""
        return self.at_least(name, count + 1)

    def uniform(self, fraction: Fraction) -> dict[str, int]:
        return {
            name: self.at_most(name, math.floor(fraction * channels))
            for name, channels in self.channels.items()
        }


def _within(
    cost: Callable[[Mapping[str, int]], int], kind: str, asked: float | int, widths: _Widths
) -> Allocation:
    plain = cost(widths.channels)
    budget = _budget(kind, asked, plain)
    least = {name: widths.least(name) for name in widths.channels}
    reachable = cost(least)
    if reachable > budget:
        raise InputError(
            f"allocate: {kind}={asked!r} allows {budget} of the plain model's {plain}, but the "
            f"smallest that can be reached is {reachable} (a fraction of "
            f"{_rounded_up(reachable / plain)}): minimum={widths.minimum} and "
            f"multiple={widths.multiple} hold in each of the {len(least)} groups, and layers "
            "outside of the groups stay"
        )
    keep = _largest_uniform(cost, budget, widths)
    keep = _give_back(keep, cost, budget, widths)
    return Allocation(keep, kind, budget, cost(keep))


def _largest_uniform(
    cost: Callable[[Mapping[str, int]], int], budget: int, widths: _Widths
) -> dict[str, int]:
    """Bisect on the common fraction, over the finitely many values where a count changes."""
    steps = {Fraction(0)}
    for channels in widths.channels.values():
        steps.update(Fraction(count, channels) for count in range(1, channels + 1))
    fractions = sorted(steps)
    low, high = 0, len(fractions)  # fractions[low] fits, fractions[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if cost(widths.uniform(fractions[middle])) <= budget:
            low = middle
        else:
            high = middle
    return widths.uniform(fractions[low])


def _give_back(
    keep: dict[str, int],
    cost: Callable[[Mapping[str, int]], int],
    budget: int,
    widths: _Widths,
) -> dict[str, int]:
    # A channel's cost does not fall while other groups grow, so a group that once failed to fit
    # need not be tried again.
    keep = dict(keep)
    growing = [name for name, channels in widths.channels.items() if keep[name] < channels]
    while growing:
        name = min(growing, key=lambda n: Fraction(keep[n], widths.channels[n]))
        wider = {**keep, name: widths.after(name, keep[name])}
        fits = cost(wider) <= budget
        if fits:
            keep = wider
        if not fits or keep[name] == widths.channels[name]:
            growing.remove(name)
    return keep


def _by_ratio(ratio: float | Mapping[str, float], widths: _Widths) -> dict[str, int]:
    if not isinstance(ratio, Mapping):
        ratio = dict.fromkeys(widths.channels, _removed_fraction("ratio", ratio))
    _check_names("ratio", ratio, widths)
    keep = {
        name: _keep_after(_removed_fraction(f"ratio[{name!r}]", value), name, widths)
        for name, value in ratio.items()
    }
    return {**widths.channels, **keep}


def _by_group(per_group: Any, widths: _Widths) -> dict[str, int]:
    if not isinstance(per_group, Mapping):
        raise InputError(f"allocate: per_group must be a mapping by group name; got {per_group!r}")
    _check_names("per_group", per_group, widths)
    keep = {}
    for name, value in per_group.items():
        option = f"per_group[{name!r}]"
        if _is_int(value):
            keep[name] = _keep_count(option, value, name, widths)
        else:
            keep[name] = _keep_after(_removed_fraction(option, value), name, widths)
    return {**widths.channels, **keep}


def _keep_after(removed: float, name: str, widths: _Widths) -> int:
    channels = widths.channels[name]
    return widths.at_least(name, channels - math.floor(removed * channels + _ROUNDING))


def _keep_count(option: str, value: int, name: str, widths: _Widths) -> int:
    count, channels = int(value), widths.channels[name]
    if not widths.least(name) <= count <= channels:
        raise InputError(
            f"allocate: {option} must keep between {widths.least(name)} and {channels} channels "
            f"(minimum={widths.minimum}, multiple={widths.multiple}); got {value!r}"
        )
    if widths.at_least(name, count) != count:
        raise InputError(
            f"allocate: {option} must be divisible by multiple={widths.multiple} or all "
            f"{channels} channels; got {value!r}"
        )
    return count


def _budget(kind: str, asked: Any, plain: int) -> int:
    if _is_int(asked):
        if 0 < asked <= plain:
            return int(asked)
        raise InputError(
            f"allocate: {kind} as a count must lie between 1 and the plain model's {plain}; "
            f"got {asked!r}"
        )
    if _is_real(asked) and 0 < asked <= 1:
        return math.floor(float(asked) * plain)
    raise InputError(
        f"allocate: {kind} must be a fraction to keep, in (0, 1], or a count as an int; "
        f"got {asked!r}"
    )


def _removed_fraction(option: str, value: Any) -> float:
    if not _is_real(value) or not 0 <= value < 1:
        raise InputError(
            f"allocate: {option} must be the fraction of channels to remove, in [0, 1); "
            f"got {value!r}"
        )
    return float(value)


def _check_names(option: str, values: Mapping[str, Any], widths: _Widths) -> None:
    unknown = [name for name in values if name not in widths.channels]
    if unknown:
        raise InputError(
            f"allocate: {option} names unknown groups {unknown}; the graph has "
            f"{list(widths.channels)}"
        )


def _positive(option: str, value: Any) -> int:
    if not _is_int(value) or value < 1:
        raise InputError(f"allocate: {option} must be an integer >= 1; got {value!r}")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _rounded_up(fraction: float) -> float:
    return math.ceil(fraction * 1e4) / 1e4
