"""From channel maps to groups: classes of atoms with the same modules, and where to watch them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from torch.fx import Node

from ccp_ext.graph.calls import users
from ccp_ext.graph.channels import Fixed, Group, Slice, Tap
from ccp_ext.graph.propagate import FOREIGN, Propagation, Record, is_tensor, shape
from ccp_ext.graph.rules import operator_name

# A part of a module that a class of atoms owns: (path, role).
_Part = tuple[str, str]
_AXES = {"producer": "out", "channelwise": "out", "consumer": "in", "padding": "padding"}


def find_groups(state: Propagation) -> tuple[Group, ...]:
    """The groups of channels that can be removed, in the order of the forward pass.

    Classes that have no producer or no consumer, or that hold two channels of one producer, are
    fixed on the way.
    """
    alike: dict[tuple[tuple[_Part, int], ...], list[int]] = defaultdict(list)
    classes = _classes(state)
    for root, parts in classes.items():
        _fix_odd_class(state, root, parts)
        if state.reason(root) is None:
            alike[tuple((part, len(positions)) for part, positions in parts.items())].append(root)
    order = {path: i for i, path in enumerate(state.records)}
    members = [_Members(state, [classes[root] for root in roots]) for roots in alike.values()]
    members.sort(key=lambda m: (order[m.first_producer], m.first_positions))
    shared = [m.first_producer for m in members]
    return tuple(m.group(has_siblings=shared.count(m.first_producer) > 1) for m in members)


def find_fixed(state: Propagation) -> tuple[Fixed, ...]:
    """The channels that cannot be removed, by producer and reason."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for atom, (path, position) in enumerate(state.producer_of_atom):
        reason = state.reason(atom)
        if reason is not None:
            found[path, reason].append(position)
    return tuple(
        Fixed(f"{path}[{ranges(positions)}]", reason) for (path, reason), positions in found.items()
    )


def ranges(positions: Iterable[int]) -> str:
    """Increasing positions as half-open ranges: ``0:8,24:32``."""
    runs = itertools.groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0])
    ends = [[position for _, position in run] for _, run in runs]
    return ",".join(f"{run[0]}:{run[-1] + 1}" for run in ends)


def _classes(state: Propagation) -> dict[int, dict[_Part, list[int]]]:
    """For each class, by its root, the positions it owns of each part of each module."""
    classes: dict[int, dict[_Part, list[int]]] = defaultdict(lambda: defaultdict(list))
    for record in state.records.values():
        for role, position, atom in _positions(record):
            if atom != FOREIGN:
                classes[state.root(atom)][record.path, role].append(position)
    return classes


def _positions(record: Record) -> Iterable[tuple[str, int, int]]:
    """(role, position, atom) of all channels of a module."""
    role = "producer" if record.kind == "dense" else record.kind
    before, after = getattr(record.module, "channel_padding", (0, 0))
    inside = range(before, len(record.out) - after)
    for position, atom in enumerate(record.out):
        if role != "padding" or position not in inside:
            yield role, position, atom
    for position, atom in enumerate(record.inputs):
        yield "consumer", position, atom


def _fix_odd_class(state: Propagation, root: int, parts: dict[_Part, list[int]]) -> None:
    roles = {role for _, role in parts}
    if "producer" not in roles:
        state.fix([root], "zeros that a module pads with, tied to no layer's channels")
    elif "consumer" not in roles:
        state.fix([root], "no layer reads them")
    for (path, role), positions in parts.items():
        if role == "producer" and len(positions) > 1:
            state.fix([root], f"tied to another channel of the same module {path!r}")


def _is_factor(node: Node) -> bool:
    """Whether the tensor only multiplies another one that is larger, or that stands first."""
    following = users(node)
    while len(following) == 1 and following[0].all_input_nodes == [node]:
        node = following[0]
        following = users(node)
    if len(following) != 1 or operator_name(following[0]) not in ("mul", "multiply"):
        return False
    factors = [a for a in following[0].args if is_tensor(a)]
    return node is not max(factors, key=lambda factor: math.prod(shape(factor)))


class _Members:
    """Classes of atoms that own equally much of the same modules: one group."""

    def __init__(self, state: Propagation, classes: Sequence[dict[_Part, list[int]]]) -> None:
        self._state = state
        first = next(part for part in classes[0] if part[1] == "producer")
        self._classes = sorted(classes, key=lambda parts: parts[first])
        self.first_producer = first[0]
        self.first_positions = [parts[first][0] for parts in self._classes]

    def group(self, has_siblings: bool) -> Group:
        """``has_siblings``: other groups share the first producer."""
        name = self.first_producer
        producers, paddings = self._slices("producer"), self._slices("padding")
        return Group(
            name=f"{name}[{ranges(self.first_positions)}]" if has_siblings else name,
            channels=len(self._classes),
            producers=producers,
            channelwise=self._slices("channelwise"),
            consumers=self._slices("consumer"),
            paddings=paddings,
            weight_taps=self._taps(self._output_tap),
            gate_taps=self._taps(self._gate),
            coupled=len(producers) + len(paddings) > 1,
        )

    def _slices(self, wanted: str) -> tuple[Slice, ...]:
        return tuple(
            Slice(path, _AXES[role], tuple(tuple(c[path, role]) for c in self._classes))
            for path, role in self._classes[0]
            if role == wanted
        )

    def _taps(self, find: Callable[[Node], Tap | None]) -> tuple[Tap, ...]:
        nodes = [
            node
            for part in self._slices("producer")
            for node in self._state.records[part.module].nodes
        ]
        return tuple(dict.fromkeys(tap for node in nodes if (tap := find(node)) is not None))

    def _gate(self, producer: Node) -> Tap | None:
        """The last tensor behind the producer that carries the channels alone and can be tapped.

        None if it only scales another tensor of the group: a zero there is implied by one in the
        other, and would count twice.
        """
        chain = [producer]
        while self._goes_on_alone(chain[-1]):
            chain.extend(users(chain[-1]))
        if _is_factor(chain[-1]):
            return None
        taps = (self._tap(node) for node in reversed(chain[1:]))
        return next((tap for tap in taps if tap is not None), self._output_tap(producer))

    def _goes_on_alone(self, node: Node) -> bool:
        """Whether the only user treats each channel alone and makes one channel of each."""
        following = users(node)
        return (
            len(following) == 1
            and following[0] in self._state.channelwise_nodes
            and self._index(following[0]) is not None
        )

    def _tap(self, node: Node) -> Tap | None:
        place = self._state.calls.place(node)
        return None if place is None else self._make_tap(*place, node)

    def _output_tap(self, node: Node) -> Tap:
        return self._make_tap(self._state.calls.of(node).path, "output", node)

    def _make_tap(self, path: str, port: str, node: Node) -> Tap:
        index = self._index(node)
        size = len(self._state.maps[node].atoms)
        is_identity = index == tuple(range(size))
        return Tap(path, port, self._state.maps[node].dim, None if is_identity else index)

    def _index(self, node: Node) -> tuple[int, ...] | None:
        """Where the group's channels stand in the tensor; None unless each stands there once."""
        found: dict[int, list[int]] = defaultdict(list)
        for position, atom in enumerate(self._state.maps[node].atoms):
            if atom != FOREIGN:
                found[self._state.root(atom)].append(position)
        mine = [found.get(root, []) for root in self._roots()]
        return tuple(p[0] for p in mine) if all(len(p) == 1 for p in mine) else None

    def _roots(self) -> list[int]:
        atoms = self._state.records[self.first_producer].out
        return [self._state.root(atoms[position]) for position in self.first_positions]
