"""The pruning plan: what stays of each module, as names and indices that fit in a JSON file."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ccp_ext import files, plots
from ccp_ext.cutting import Cut
from ccp_ext.errors import InputError
from ccp_ext.graph.channels import ChannelGraph, Group, InputSpec
from ccp_ext.tables import table

VERSION = 1
_FORECASTS = ("macs_before", "macs_after", "parameters_before", "parameters_after")
_SIDES = {"out": "out", "in": "inputs", "channel_padding": "channel_padding"}


@dataclass(frozen=True)
class KeptGroup:
    """What stays of one group.

    Attributes:
        channels: how many channels the group has in the plain model.
        kept: those that stay, in increasing order.
        module, positions: the output channels of a module that the group's channels are.
    """

    channels: int
    kept: tuple[int, ...]
    module: str
    positions: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class PruningPlan:
    """Everything that surgery needs, without model, graph or data; printed, a table of the groups.

    Attributes:
        model: class name of the plain model.
        fingerprint: of the plain model, see :func:`ccp_ext.cutting.fingerprint`.
        groups: what stays of each group, by name.
        modules: what stays of each module that loses channels, by path.
        inputs: shapes and dtypes that the model takes, for verification.
        forecast: MACs and parameters before and after, for one forward pass on ``inputs``.
        record: how the plan came about (criterion, options, seed); any JSON values.
    """

    model: str
    fingerprint: str
    groups: Mapping[str, KeptGroup]
    modules: Mapping[str, Cut]
    inputs: tuple[InputSpec, ...]
    forecast: Mapping[str, int]
    record: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_kept(
        cls,
        graph: ChannelGraph,
        kept: Mapping[str, Sequence[int] | Tensor | np.ndarray],
        record: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """Make a plan from the channels that stay.

        Args:
            graph: from :func:`ccp_ext.trace`.
            kept: {group name: indices, in any order, or a bool tensor or array ``[channels]`` that
                is True where a channel stays}. All channels stay in a group without an entry.
            record: see the attribute; scalars of numpy and torch become numbers.

        Raises:
            InputError: unknown group, an index out of range or twice, a mask of the wrong shape, a
                group that would keep no channel, or a record that JSON cannot hold.
        """
        indices = {name: _indices(graph[name], chosen) for name, chosen in kept.items()}
        counts = {name: len(chosen) for name, chosen in indices.items()}
        return cls(
            model=graph.model_name,
            fingerprint=graph.fingerprint,
            groups={name: _kept_group(graph[name], chosen) for name, chosen in indices.items()},
            modules=graph.cuts(indices),
            inputs=graph.inputs,
            forecast={
                "macs_before": graph.macs(),
                "macs_after": graph.macs(counts),
                "parameters_before": graph.parameters(),
                "parameters_after": graph.parameters(counts),
            },
            record=_plain("record", record or {}),
        )

    def __repr__(self) -> str:
        sizes = []
        for what in ("MACs", "parameters"):
            before = self.forecast[f"{what.lower()}_before"]
            after = self.forecast[f"{what.lower()}_after"]
            sizes.append(f"{before:,} to {after:,} {what} ({after / before:.1%})")
        rows = [
            {"group": name, "channels": group.channels, "kept": len(group.kept)}
            for name, group in self.groups.items()
        ]
        head = f"PruningPlan of {self.model}: {', '.join(sizes)}"
        return "\n".join([head, *filter(None, [table(rows)])])

    def then(self, other: PruningPlan) -> PruningPlan:
        """One plan for the plain model that does what this one and then ``other`` do.

        Args:
            other: a plan made on the model that this one leaves.

        Raises:
            InputError: ``other`` keeps positions that this plan does not leave.
        """
        paths = [*self.modules, *(path for path in other.modules if path not in self.modules)]
        modules = {
            path: _compose(path, self.modules.get(path, Cut()), other.modules.get(path, Cut()))
            for path in paths
        }
        before, after = self.forecast, other.forecast
        return PruningPlan(
            model=self.model,
            fingerprint=self.fingerprint,
            groups=_compose_groups(self, other, modules),
            modules=modules,
            inputs=self.inputs,
            forecast={
                name: (before if name.endswith("before") else after)[name] for name in _FORECASTS
            },
            record={"first": dict(self.record), "then": dict(other.record)},
        )

    def to_json(self) -> str:
        """The plan as JSON text that :meth:`from_json` reads."""
        content = {
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "groups": {name: vars(group) for name, group in self.groups.items()},
            "modules": {path: _sides(cut) for path, cut in self.modules.items()},
            "inputs": [vars(spec) for spec in self.inputs],
            "forecast": dict(self.forecast),
            "record": dict(self.record),
        }
        try:
            return json.dumps(content, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"plan: the record holds what JSON cannot: {error}") from error

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> PruningPlan:
        """Read what :meth:`to_json` wrote.

        Args:
            source: what to call the text in errors, such as its file name.

        Raises:
            InputError: not JSON, or a field is missing, unknown or malformed; names the field and
                its value.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InputError(f"{source}: not valid JSON: {error}") from error
        return _Reader(source).plan(content)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an interruption leaves the old file whole.

        Raises:
            InputError: the record holds what JSON cannot, or the file cannot be written.
        """
        try:
            files.write_text(path, self.to_json() + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"plan {os.fspath(path)!r} cannot be written: {reason}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the kept and removed channels by group; see :func:`ccp_ext.plots.plan_figure`."""
        plots.plan_figure(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan from a file.

        Raises:
            InputError: the file cannot be read or is malformed.
        """
        source = f"plan {os.fspath(path)!r}"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read: {error}") from error
        return cls.from_json(text, source)


# --- making ------------------------------------------------------------------------------------


def _indices(group: Group, chosen: Sequence[int] | Tensor | np.ndarray) -> tuple[int, ...]:
    if isinstance(chosen, Tensor | np.ndarray):
        chosen = torch.as_tensor(chosen)
        if chosen.dtype == torch.bool:
            chosen = _positions_of_mask(group, chosen)
        chosen = chosen.tolist()
    if not isinstance(chosen, Iterable):
        raise InputError(f"group {group.name!r} takes indices or a mask; got {chosen!r}")
    kept = [_index(group, value) for value in chosen]
    if not kept:
        raise InputError(f"group {group.name!r} must keep at least one channel")
    if len(set(kept)) < len(kept):
        raise InputError(f"group {group.name!r} keeps a channel twice: {kept}")
    return tuple(sorted(kept))


def _positions_of_mask(group: Group, mask: Tensor) -> Tensor:
    if mask.shape != (group.channels,):
        raise InputError(
            f"group {group.name!r} has {group.channels} channels; got a mask of shape "
            f"{tuple(mask.shape)}"
        )
    return torch.nonzero(mask).flatten()


def _index(group: Group, value: Any) -> int:
    """A channel of the group, from an integer of any type."""
    try:
        index = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        index = None
    if index is None or not 0 <= index < group.channels:
        raise InputError(
            f"group {group.name!r} has channels 0 to {group.channels - 1}; got {value!r}"
        )
    return index


def _plain(name: str, value: Any) -> Any:
    """``value`` with the types that JSON has; ``name`` is what errors call it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    is_scalar = isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0
    plain = value.item() if is_scalar else value
    if not isinstance(plain, str | int | float | None):
        raise InputError(f"plan: {name} is a {type(value).__name__}, which JSON cannot hold")
    if isinstance(plain, float) and not math.isfinite(plain):
        raise InputError(f"plan: {name} is {plain}, which JSON cannot hold")
    return plain


def _kept_group(group: Group, kept: tuple[int, ...]) -> KeptGroup:
    first = group.producers[0]
    positions = tuple(owned[0] for owned in first.index)
    return KeptGroup(group.channels, kept, first.module, positions)


# --- composition -------------------------------------------------------------------------------


def _compose(path: str, first: Cut, second: Cut) -> Cut:
    return Cut(
        out=_through(path, first.out, second.out),
        inputs=_through(path, first.inputs, second.inputs),
        channel_padding=second.channel_padding or first.channel_padding,
    )


def _through(
    path: str, first: tuple[int, ...] | None, second: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """The positions ``second`` of what ``first`` leaves, as positions of the plain model."""
    if first is None or second is None:
        return first if second is None else second
    if second[-1] >= len(first):
        raise InputError(
            f"the second plan keeps position {second[-1]} of module {path!r}, of which the first "
            f"leaves {len(first)}"
        )
    return tuple(first[position] for position in second)


def _compose_groups(
    first: PruningPlan, second: PruningPlan, modules: Mapping[str, Cut]
) -> dict[str, KeptGroup]:
    """The first plan's groups as the second leaves them, and the groups that only it has."""
    groups, known = {}, set()
    for name, group in first.groups.items():
        left = modules.get(group.module, Cut()).out
        kept = [i for i in group.kept if left is None or group.positions[i] in left]
        groups[name] = KeptGroup(group.channels, tuple(kept), group.module, group.positions)
        known |= {(group.module, position) for position in group.positions}
    for name, group in second.groups.items():
        left = first.modules.get(group.module, Cut()).out
        positions = _through(group.module, left, group.positions)
        if not known.intersection((group.module, position) for position in positions):
            groups[name] = KeptGroup(group.channels, group.kept, group.module, positions)
    return groups


# --- reading -----------------------------------------------------------------------------------


def _sides(cut: Cut) -> dict[str, tuple[int, ...]]:
    """The JSON fields of a cut."""
    values = {side: getattr(cut, name) for side, name in _SIDES.items()}
    return {side: value for side, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Reader:
    """Checks every field of a plan; ``source`` is what errors call the text."""

    source: str

    def plan(self, content: Any) -> PruningPlan:
        names = ("version", "model", "fingerprint", "groups", "modules", "inputs", "forecast")
        self._fields("the plan", content, (*names, "record"))
        if content["version"] != VERSION:
            self._refuse("version", content["version"], str(VERSION))
        return PruningPlan(
            model=self._text("model", content["model"]),
            fingerprint=self._fingerprint(content["fingerprint"]),
            groups={
                name: self._group(f"groups[{name!r}]", value)
                for name, value in self._object("groups", content["groups"]).items()
            },
            modules={
                path: self._cut(f"modules[{path!r}]", value)
                for path, value in self._object("modules", content["modules"]).items()
            },
            inputs=self._inputs(content["inputs"]),
            forecast=self._forecast(content["forecast"]),
            record=self._object("record", content["record"]),
        )

    def _group(self, name: str, value: Any) -> KeptGroup:
        self._fields(name, value, ("channels", "kept", "module", "positions"))
        channels = value["channels"]
        if not _is_int(channels) or channels < 1:
            self._refuse(f"{name}.channels", channels, "an integer of 1 or more")
        kept = self._positions(f"{name}.kept", value["kept"])
        if kept[-1] >= channels:
            self._refuse(f"{name}.kept", value["kept"], f"indices below {channels}")
        positions = self._positions(f"{name}.positions", value["positions"])
        if len(positions) != channels:
            self._refuse(f"{name}.positions", value["positions"], f"{channels} positions")
        return KeptGroup(channels, kept, self._text(f"{name}.module", value["module"]), positions)

    def _cut(self, name: str, value: Any) -> Cut:
        content = self._object(name, value)
        unknown = sorted(content.keys() - _SIDES.keys())
        if unknown or not content:
            self._refuse(name, value, f"an object with one or more of {', '.join(_SIDES)}")
        padding = content.get("channel_padding")
        if padding is not None:
            padding = self._integers(f"{name}.channel_padding", padding)
            if len(padding) != 2:
                self._refuse(f"{name}.channel_padding", list(padding), "two integers")
        sides = {
            _SIDES[side]: self._positions(f"{name}.{side}", content[side])
            for side in ("out", "in")
            if side in content
        }
        return Cut(**sides, channel_padding=padding)

    def _inputs(self, value: Any) -> tuple[InputSpec, ...]:
        if not isinstance(value, list) or not value:
            self._refuse("inputs", value, "a non-empty list")
        specs = []
        for i, spec in enumerate(value):
            name = f"inputs[{i}]"
            self._fields(name, spec, ("shape", "dtype"))
            if not isinstance(getattr(torch, str(spec["dtype"]), None), torch.dtype):
                self._refuse(f"{name}.dtype", spec["dtype"], "a dtype of torch, such as 'float32'")
            specs.append(InputSpec(self._integers(f"{name}.shape", spec["shape"]), spec["dtype"]))
        return tuple(specs)

    def _forecast(self, value: Any) -> dict[str, int]:
        self._fields("forecast", value, _FORECASTS)
        for name, count in value.items():
            if not _is_int(count) or count < 0:
                self._refuse(f"forecast.{name}", count, "an integer of 0 or more")
        return value

    def _fingerprint(self, value: Any) -> str:
        text = self._text("fingerprint", value)
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            self._refuse("fingerprint", value, "64 hexadecimal digits")
        return text

    def _positions(self, name: str, value: Any) -> tuple[int, ...]:
        positions = self._integers(name, value)
        increasing = all(a < b for a, b in zip(positions, positions[1:], strict=False))
        if not positions or not increasing:
            self._refuse(name, value, "one or more integers in increasing order")
        return positions

    def _integers(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(_is_int(v) and v >= 0 for v in value):
            self._refuse(name, value, "a list of integers of 0 or more")
        return tuple(value)

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            self._refuse(name, value, "a string")
        return value

    def _object(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(name, value, "an object")
        return value

    def _fields(self, name: str, value: Any, expected: Sequence[str]) -> None:
        found = self._object(name, value).keys()
        if found != set(expected):
            missing = ", ".join(sorted(set(expected) - found)) or "none"
            unknown = ", ".join(sorted(found - set(expected))) or "none"
            raise InputError(
                f"{self.source}: {name} must have the fields {', '.join(expected)}; missing: "
                f"{missing}; unknown: {unknown}"
            )

    def _refuse(self, name: str, value: Any, accepted: str) -> NoReturn:
        text = repr(value)
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise InputError(f"{self.source}: field {name} must be {accepted}; got {shown}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
