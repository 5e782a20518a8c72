"""How many channels each group keeps under a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np

from ccp_ext.allocation.lagrangian import Program, cheapest, solve
from ccp_ext.allocation.latency import LatencyTable
from ccp_ext.allocation.resource import Resource
from ccp_ext.errors import InputError

# Absorbs the binary rounding of decimal fractions: 0.29 * 100 channels are 29.
_ROUNDING = 1e-9

Cost = Callable[[Mapping[str, int]], float]


class _Group(Protocol):
    name: str
    channels: int


class _Graph(Protocol):
    """What :func:`allocate` needs of a graph; no cost decreases in any keep count."""

    groups: Sequence[_Group]

    def macs(self, keep: Mapping[str, int]) -> int: ...

    def parameters(self, keep: Mapping[str, int]) -> int: ...

    def activations(self, keep: Mapping[str, int]) -> int: ...

    def resource(self, kind: str) -> Resource: ...


class _Curve(Protocol):
    """What :func:`allocate` needs of a curve; see :class:`ccp_ext.selection.Curve`."""

    counts: Any
    objective: Any
    lower_bound: Any


@dataclass(frozen=True)
class Allocation:
    """The outcome of :func:`allocate`.

    Attributes:
        keep: {group name: channels that stay}, every group of the graph, in its order.
        kind: the budget's kind: "macs", "params", "activations", "latency", "ratio" or "per_group".
        budget: the largest cost allowed, in MACs, parameters, elements or milliseconds; None for
            the other kinds.
        achieved: the cost of ``keep`` in the same unit, at most ``budget``; None likewise.
        objective: with curves, the sum of the groups' objectives at ``keep``; None without.
        lower_bound: with curves, no allocation within the budget has a lower sum of the groups'
            lower bounds; so no masks within the budget cost less in all, where a group's cost does
            not depend on the other groups' masks. None without curves, or where one has no bounds.
        multiplier: with curves and one of the first four kinds, the multiplier of the budget for
            which the bound was found: about as much as the objective falls for one unit more.
        relaxed: how many terms of the cost had to be relaxed for the bound, because the exact
            computation would need tables of more than
            :data:`ccp_ext.allocation.elimination.TABLE_LIMIT` entries; 0 for most networks.
    """

    keep: dict[str, int]
    kind: str
    budget: float | int | None = None
    achieved: float | int | None = None
    objective: float | None = None
    lower_bound: float | None = None
    multiplier: float | None = None
    relaxed: int = 0

    @property
    def gap(self) -> float | None:
        """``objective - lower_bound``, in units of the cost; None without a bound."""
        return None if self.lower_bound is None else self.objective - self.lower_bound


def allocate(
    graph: _Graph,
    *,
    curves: Mapping[str, _Curve] | None = None,
    macs: float | int | None = None,
    params: float | int | None = None,
    activations: float | int | None = None,
    latency: float | str | None = None,
    ratio: float | Mapping[str, float] | None = None,
    per_group: Mapping[str, float | int] | None = None,
    latency_table: LatencyTable | None = None,
    multiple: int | Mapping[str, int] = 1,
    minimum: int = 1,
    floors: Mapping[str, int] | None = None,
    ceilings: Mapping[str, int] | None = None,
    protected: Iterable[str] = (),
) -> Allocation:
    """Turn one budget into the number of channels that each group keeps.

    Without ``curves``, a budget in MACs, parameters, activations or latency gives all groups one
    common fraction of their channels, the largest that the budget allows. What this leaves is used
    up by giving back single channels (or ``multiple``), each time to the group that keeps the
    smallest fraction and still fits.

    With ``curves`` the sum of the groups' costs is minimised within the budget, by Lagrangian
    duality over the exact cost of the whole network (every layer's cost depends on the widths on
    both of its sides), and bounded from below.

    Args:
        graph: from :func:`ccp_ext.trace`.
        curves: by group name, the cost of removing ``counts`` channels and a lower bound of it, as
            :func:`ccp_ext.selection.curve` returns. A group keeps only counts that its curve has.
            A group that must keep all channels needs none.
        macs: what to KEEP: a float in (0, 1] is a fraction of the plain model's multiply-accumulate
            operations, an int is a count.
        params: likewise for parameters.
        activations: likewise for the elements that convolutions and linear layers put out.
        latency: what to keep of the plain model's time by ``latency_table``: a float in (0, 1] is a
            fraction, a text such as "12.5ms" milliseconds.
        ratio: the fraction of channels to REMOVE in each group, in [0, 1), rounded down to a count;
            a mapping gives it by group name, and groups without an entry keep all channels.
        per_group: by group name, the channels to KEEP as an int or the fraction to REMOVE as a
            float; groups without an entry keep all channels.
        latency_table: from :func:`ccp_ext.measure.latency_table`.
        multiple: keep counts are divisible by it, or all channels of the group; a mapping gives it
            by group name, and groups without an entry keep any count.
        minimum: the least keep count of a group (all channels of a group that has fewer).
        floors, ceilings: by group name, the least and the largest keep count.
        protected: names of groups that keep all channels.

    Raises:
        InputError: not exactly one budget, a value out of range, an unknown group, or a budget
            below what the rules on the counts let the model reach.
    """
    budgets = {
        "macs": macs,
        "params": params,
        "activations": activations,
        "latency": latency,
        "ratio": ratio,
        "per_group": per_group,
    }
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            f"allocate: give exactly one of {', '.join(budgets)}; got {', '.join(given) or 'none'}"
        )
    kind = given[0]
    if (kind == "latency") != (latency_table is not None):
        raise InputError("allocate: latency and latency_table must be given together")
    widths = _Widths.make(graph, multiple, minimum, floors or {}, ceilings or {}, protected)
    if kind == "ratio":
        return _valued(_by_ratio(ratio, widths), kind, curves, widths)
    if kind == "per_group":
        return _valued(_by_group(per_group, widths), kind, curves, widths)
    if curves is None:
        return _within(_cost(graph, kind, latency_table), kind, budgets[kind], widths)
    resource = latency_table.resource(graph) if kind == "latency" else graph.resource(kind)
    return _optimal(resource, kind, budgets[kind], widths, curves)


def allowed_counts(
    graph: _Graph,
    *,
    multiple: int | Mapping[str, int] = 1,
    minimum: int = 1,
    floors: Mapping[str, int] | None = None,
    ceilings: Mapping[str, int] | None = None,
    protected: Iterable[str] = (),
) -> dict[str, list[int]]:
    """The keep counts that :func:`allocate` may choose from, by group name, increasing.

    Arguments and errors are those of :func:`allocate`.
    """
    widths = _Widths.make(graph, multiple, minimum, floors or {}, ceilings or {}, protected)
    return {name: widths.all(name) for name in widths.channels}


@dataclass(frozen=True)
class _Widths:
    """The allowed keep counts: steps of ``multiple`` and all channels, within floor and ceiling."""

    channels: dict[str, int]
    multiple: dict[str, int]
    floor: dict[str, int]
    ceiling: dict[str, int]
    rules: str

    @classmethod
    def make(
        cls,
        graph: _Graph,
        multiple: Any,
        minimum: Any,
        floors: Mapping[str, int],
        ceilings: Mapping[str, int],
        protected: Iterable[str],
    ) -> _Widths:
        channels = {group.name: group.channels for group in graph.groups}
        protected = [protected] if isinstance(protected, str) else list(protected)
        each = "by group" if isinstance(multiple, Mapping) else multiple
        rules = f"minimum={minimum} and multiple={each}"
        for option, values in (
            ("multiple", multiple if isinstance(multiple, Mapping) else {}),
            ("floors", floors),
            ("ceilings", ceilings),
            ("protected", dict.fromkeys(protected, 1)),
        ):
            _check_names(option, values, channels)
            for name, value in values.items():
                _positive(f"{option}[{name!r}]", value)
            if values and option != "multiple":
                rules = rules.replace(" and ", ", ") + f" and {option}"
        if not isinstance(multiple, Mapping):
            multiple = dict.fromkeys(channels, _positive("multiple", multiple))
        least = dict.fromkeys(channels, _positive("minimum", minimum))
        least |= {name: max(least[name], floor) for name, floor in floors.items()}
        widths = cls(
            channels,
            {name: multiple.get(name, 1) for name in channels},
            least | {name: channels[name] for name in protected},
            {name: ceilings.get(name, count) for name, count in channels.items()},
            rules,
        )
        for name in channels:
            if widths.least(name) > widths.ceiling[name]:
                raise InputError(
                    f"allocate: group {name!r} must keep at least {widths.least(name)} of its "
                    f"{channels[name]} channels ({rules}), but ceilings allow {ceilings[name]}"
                )
        return widths

    def least(self, name: str) -> int:
        step = self.multiple[name]
        return min(self.channels[name], math.ceil(self.floor[name] / step) * step)

    def most(self, name: str) -> int:
        return self.at_most(name, self.ceiling[name])

    def at_most(self, name: str, count: int) -> int:
        """The largest allowed count up to ``count``, or the least allowed one."""
        count = min(count, self.ceiling[name])
        if count >= self.channels[name]:
            return self.channels[name]
        step = self.multiple[name]
        return max(self.least(name), count // step * step)

    def at_least(self, name: str, count: int) -> int:
        """The smallest allowed count from ``count`` on, or the largest allowed one."""
        step = self.multiple[name]
        rounded = math.ceil(count / step) * step
        return min(self.most(name), max(self.least(name), rounded))

    def after(self, name: str, count: int) -> int:
        """The next allowed count above ``count``, which is allowed and not the largest."""
        return self.at_least(name, count + 1)

    def all(self, name: str) -> list[int]:
        """Every allowed count, increasing."""
        counts = [self.least(name)]
        while counts[-1] < self.most(name):
            counts.append(self.after(name, counts[-1]))
        return counts

    def uniform(self, fraction: Fraction) -> dict[str, int]:
        return {
            name: self.at_most(name, math.floor(fraction * channels))
            for name, channels in self.channels.items()
        }


# --- with curves -------------------------------------------------------------------------------


def _optimal(
    resource: Resource,
    kind: str,
    asked: float | int | str,
    widths: _Widths,
    curves: Mapping[str, _Curve],
) -> Allocation:
    plain = resource(widths.channels)
    budget = _budget(kind, asked, plain)
    tables = {name: _points(name, curves, widths) for name in widths.channels}
    counts, upper, lower = ({name: t[k] for name, t in tables.items()} for k in range(3))
    program = Program(counts, upper, resource, budget)
    reachable = program.cost(cheapest(program))
    _check_reachable(kind, asked, budget, plain, reachable, widths)
    bounded = all(np.isfinite(values).all() for values in lower.values())
    best = solve(program, lower if bounded else upper)
    return Allocation(
        best.keep,
        kind,
        budget,
        resource(best.keep),
        best.objective,
        best.lower_bound if bounded else None,
        best.multiplier,
        best.relaxed,
    )


def _points(
    name: str, curves: Mapping[str, _Curve], widths: _Widths
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keep counts that are allowed and on the curve, increasing, and its values there."""
    channels, allowed = widths.channels[name], widths.all(name)
    if allowed == [channels]:
        return np.array(allowed), np.zeros(1), np.zeros(1)
    if name not in curves:
        raise InputError(f"allocate: curves has no group {name!r}, which may lose channels")
    curve = curves[name]
    kept = channels - np.asarray(curve.counts, dtype=np.int64)
    upper, lower = (np.asarray(v, dtype=np.float64) for v in (curve.objective, curve.lower_bound))
    if not kept.shape == upper.shape == lower.shape == (kept.size,):
        raise InputError(
            f"allocate: the curve of group {name!r} has {kept.shape} counts, {upper.shape} "
            f"objectives and {lower.shape} lower bounds"
        )
    usable = np.isin(kept, allowed) & np.isfinite(upper)
    if not usable.any():
        raise InputError(
            f"allocate: the curve of group {name!r} has none of the counts that it may keep, "
            f"{allowed[0]} to {allowed[-1]} of {channels} ({widths.rules})"
        )
    order = np.flatnonzero(usable)[np.argsort(kept[usable], kind="stable")]
    return kept[order], upper[order], np.minimum(lower, upper)[order]


def _valued(
    keep: dict[str, int], kind: str, curves: Mapping[str, _Curve] | None, widths: _Widths
) -> Allocation:
    """The allocation with what the curves say of it."""
    if curves is None:
        return Allocation(keep, kind)
    objective = lower_bound = 0.0
    for name, count in keep.items():
        if count < widths.channels[name]:
            kept, upper, lower = _points(name, curves, widths)
            at = np.flatnonzero(kept == count)
            if not at.size:
                raise InputError(
                    f"allocate: the curve of group {name!r} has no value for keeping {count} of "
                    f"{widths.channels[name]} channels"
                )
            objective += float(upper[at[0]])
            lower_bound += float(lower[at[0]])
    bound = lower_bound if math.isfinite(lower_bound) else None
    return Allocation(keep, kind, objective=objective, lower_bound=bound)


# --- uniform -----------------------------------------------------------------------------------


def _cost(graph: _Graph, kind: str, table: LatencyTable | None) -> Cost:
    if kind == "latency":
        return table.resource(graph)
    return getattr(graph, "parameters" if kind == "params" else kind)


def _within(cost: Cost, kind: str, asked: float | int | str, widths: _Widths) -> Allocation:
    plain = cost(widths.channels)
    budget = _budget(kind, asked, plain)
    reachable = cost({name: widths.least(name) for name in widths.channels})
    _check_reachable(kind, asked, budget, plain, reachable, widths)
    keep = _largest_uniform(cost, budget, widths)
    keep = _give_back(keep, cost, budget, widths)
    return Allocation(keep, kind, budget, cost(keep))


def _check_reachable(
    kind: str, asked: Any, budget: float, plain: float, reachable: float, widths: _Widths
) -> None:
    if reachable > budget:
        raise InputError(
            f"allocate: {kind}={asked!r} allows {budget} of the plain model's {plain}, but the "
            f"smallest that can be reached is {reachable} (a fraction of "
            f"{_rounded_up(reachable / plain)}): {widths.rules} hold in each of the "
            f"{len(widths.channels)} groups, and layers outside of the groups stay"
        )


def _largest_uniform(cost: Cost, budget: float, widths: _Widths) -> dict[str, int]:
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
    cost: Cost,
    budget: float,
    widths: _Widths,
) -> dict[str, int]:
    # A channel's cost does not fall while other groups grow, so a group that once failed to fit
    # need not be tried again.
    keep = dict(keep)
    growing = [name for name in keep if keep[name] < widths.most(name)]
    while growing:
        name = min(growing, key=lambda n: Fraction(keep[n], widths.channels[n]))
        wider = {**keep, name: widths.after(name, keep[name])}
        fits = cost(wider) <= budget
        if fits:
            keep = wider
        if not fits or keep[name] == widths.most(name):
            growing.remove(name)
    return keep


def _by_ratio(ratio: float | Mapping[str, float], widths: _Widths) -> dict[str, int]:
    if not isinstance(ratio, Mapping):
        ratio = dict.fromkeys(widths.channels, _removed_fraction("ratio", ratio))
    _check_names("ratio", ratio, widths.channels)
    keep = {
        name: _keep_after(_removed_fraction(f"ratio[{name!r}]", value), name, widths)
        for name, value in ratio.items()
    }
    return {**widths.channels, **keep}


def _by_group(per_group: Any, widths: _Widths) -> dict[str, int]:
    if not isinstance(per_group, Mapping):
        raise InputError(f"allocate: per_group must be a mapping by group name; got {per_group!r}")
    _check_names("per_group", per_group, widths.channels)
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
    count, most = int(value), widths.most(name)
    if not widths.least(name) <= count <= most:
        raise InputError(
            f"allocate: {option} must keep between {widths.least(name)} and {most} channels "
            f"({widths.rules}); got {value!r}"
        )
    if widths.at_least(name, count) != count:
        raise InputError(
            f"allocate: {option} must be divisible by multiple={widths.multiple[name]} or all "
            f"{widths.channels[name]} channels; got {value!r}"
        )
    return count


def _budget(kind: str, asked: Any, plain: float) -> float | int:
    if kind == "latency":
        return _time_budget(asked, plain)
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


def _time_budget(asked: Any, plain: float) -> float:
    """Milliseconds."""
    if _is_real(asked) and not _is_int(asked) and 0 < asked <= 1:
        return float(asked) * plain
    if isinstance(asked, str) and asked.endswith("ms"):
        try:
            milliseconds = float(asked.removesuffix("ms"))
        except ValueError:
            milliseconds = math.nan
        if 0 < milliseconds <= plain:
            return milliseconds
    raise InputError(
        "allocate: latency must be a fraction to keep, a float in (0, 1], or milliseconds as a "
        f"text from '0.1ms' to the plain model's '{plain:.4g}ms'; got {asked!r}"
    )


def _removed_fraction(option: str, value: Any) -> float:
    if not _is_real(value) or not 0 <= value < 1:
        raise InputError(
            f"allocate: {option} must be the fraction of channels to remove, in [0, 1); "
            f"got {value!r}"
        )
    return float(value)


def _check_names(option: str, values: Any, channels: Mapping[str, int]) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"allocate: {option} must be a mapping by group name; got {values!r}")
    unknown = [name for name in values if name not in channels]
    if unknown:
        raise InputError(
            f"allocate: {option} names unknown groups {unknown}; the graph has {list(channels)}"
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
