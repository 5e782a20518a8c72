"""Channel maps: for each tensor, which channel of which module stands where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Node

from ccp_ext.graph.calls import Calls

# In place of an atom: a channel that no module of the model makes, such as one of the image.
FOREIGN = -1


class ChannelMap(NamedTuple):
    """Where the channels of a tensor are: position i along ``dim`` carries ``atoms[i]``."""

    dim: int
    atoms: tuple[int, ...]


class Unsupported(Exception):
    """An operator mixes channels in a way that is not followed; the message says which way."""


@dataclass
class Record:
    """What is known of a module with channels.

    Attributes:
        kind: "dense" (convolution or linear), "channelwise" or "padding".
        out: atom of each output channel.
        inputs: atom of each input channel; empty unless dense.
        pair_macs: multiply-accumulate operations for a pair of an output and an input channel.
        positions: elements of the output in one channel; 0 unless a convolution or linear layer.
    """

    path: str
    module: nn.Module
    kind: str
    out: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    pair_macs: int = 0
    positions: int = 0
    nodes: list[Node] = field(default_factory=list)


class Propagation:
    """The state while the nodes of a graph are visited in order.

    Atoms are the channels that modules make. A union-find structure holds which of them live and
    die together; an atom that is fixed takes its whole class with it.

    Args:
        calls: of the graph's modules.
        states: the parameter or buffer that a node stands for.
    """

    def __init__(self, calls: Calls, states: dict[Node, Tensor]) -> None:
        self.calls = calls
        self.maps: dict[Node, ChannelMap] = {}
        self.records: dict[str, Record] = {}
        self.channelwise_nodes: set[Node] = set()
        self.producer_of_atom: list[tuple[str, int]] = []
        self._states = states
        self._parent: list[int] = []
        self._reasons: dict[int, str] = {}
        self._pinned: dict[str, str] = {}

    # --- classes of atoms ------------------------------------------------------------------

    def root(self, atom: int) -> int:
        """The representative of the atom's class, the class's first atom."""
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def tie(self, first: int, second: int, reason: str) -> None:
        """Let two atoms live and die together; with FOREIGN, fix the other for ``reason``."""
        if FOREIGN in (first, second):
            self.fix((first, second), reason)
            return
        low, high = sorted((self.root(first), self.root(second)))
        if low == high:
            return
        self._parent[high] = low
        if high in self._reasons:
            self._reasons.setdefault(low, self._reasons.pop(high))

    def tie_all(self, first: Sequence[int], second: Sequence[int], reason: str) -> None:
        """Tie position by position."""
        for a, b in zip(first, second, strict=True):
            self.tie(a, b, reason)

    def fix(self, atoms: Iterable[int], reason: str) -> None:
        """Let none of the atoms be removed; the first reason stays."""
        for atom in atoms:
            if atom != FOREIGN:
                self._reasons.setdefault(self.root(atom), reason)

    def reason(self, atom: int) -> str | None:
        """Why the atom cannot be removed; None if it can."""
        return self._reasons.get(self.root(atom))

    def pin(self, path: str, reason: str) -> None:
        """Fix all channels of a module, those that later nodes find included."""
        self._pinned.setdefault(path, reason)

    def fix_pinned(self) -> None:
        """Act on :meth:`pin`; to be called when all nodes were visited."""
        for path, reason in self._pinned.items():
            record = self.records.get(path)
            if record is not None:
                self.fix(record.out + record.inputs, reason)

    # --- modules ---------------------------------------------------------------------------

    def new_atoms(self, path: str, positions: Sequence[int]) -> tuple[int, ...]:
        """Atoms for output channels of a module that nothing made before."""
        start = len(self._parent)
        self._parent.extend(range(start, start + len(positions)))
        self.producer_of_atom.extend((path, position) for position in positions)
        return tuple(range(start, start + len(positions)))

    def record(self, node: Node, module: nn.Module, kind: str, out: int | Sequence[int]) -> Record:
        """The record of the module, made at its first call.

        A later call makes, carries or reads the same channels, so it ties them to those of the
        first.

        Args:
            out: the atoms, or how many new ones the module makes.
        """
        path = self.calls.of(node).path
        if path not in self.records:
            atoms = self.new_atoms(path, range(out)) if isinstance(out, int) else tuple(out)
            self.records[path] = Record(path, module, kind, atoms)
        record = self.records[path]
        if not isinstance(out, int):
            self.tie_all(record.out, out, f"shared module {path!r} also has other channels")
        record.nodes.append(node)
        return record

    def read(self, record: Record, atoms: tuple[int, ...]) -> None:
        """Note the channels that a dense module reads."""
        if record.inputs:
            reason = f"shared module {record.path!r} also reads other channels"
            self.tie_all(record.inputs, atoms, reason)
        record.inputs = record.inputs or atoms

    def is_held(self, value: Any, module: nn.Module, names: Sequence[str]) -> bool:
        """Whether the node is the parameter or buffer of one of these names of the module."""
        tensor = self._states.get(value) if isinstance(value, Node) else None
        return tensor is not None and any(getattr(module, name, None) is tensor for name in names)

    def pin_states(self, nodes: Iterable[Node], reason: str) -> None:
        """Fix the channels of the modules whose parameters or buffers are among ``nodes``."""
        for node in nodes:
            for path in self.calls.owners(self._states.get(node)):
                self.pin(path, reason)

    # --- nodes -----------------------------------------------------------------------------

    def where(self, node: Node) -> str:
        """The operator and the module that calls it, for reasons."""
        name = getattr(node.target, "overloadpacket", node.target)
        name = getattr(name, "__name__", str(name))
        call = self.calls.of(node)
        return f"{name} in {f'module {call.path!r}' if call and call.path else 'the model itself'}"

    def opaque(self, node: Node, outputs: int, detail: str) -> tuple[int, ...]:
        """Fixed atoms for a layer that is not followed, so that it can be reported."""
        self.give_up(node, detail)
        call = self.calls.of(node)
        path = call.path if call and call.path else f"the model itself: {node.name}"
        atoms = self.new_atoms(path, range(outputs))
        self.fix(atoms, f"{self.where(node)}: {detail}")
        return atoms

    def give_up(self, node: Node, detail: str) -> None:
        """Fix what the node reads, and the modules whose parameters it reads."""
        reason = f"{self.where(node)}: {detail}"
        for argument in node.all_input_nodes:
            if argument in self.maps:
                self.fix(self.maps[argument].atoms, reason)
        self.pin_states(node.all_input_nodes, reason)


def shape(node: Node) -> tuple[int, ...]:
    """Shape of the node's value, of the first one if it is a tuple."""
    value = node.meta["val"]
    while not isinstance(value, Tensor):
        value = value[0]
    return tuple(value.shape)


def is_tensor(value: Any) -> bool:
    """Whether a node argument stands for one tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def reshaped(before: Sequence[int], after: Sequence[int], channels: ChannelMap) -> ChannelMap:
    """The map of a tensor of shape ``before`` when its elements are read in shape ``after``.

    Raises:
        Unsupported: channels end up in several dimensions.
    """
    dim, atoms = channels
    outer, inner = math.prod(before[:dim]), math.prod(before[dim + 1 :])
    for new_dim, size in enumerate(after):
        left, right = math.prod(after[:new_dim]), math.prod(after[new_dim + 1 :])
        if outer % left == 0 and inner % right == 0:
            # Whatever is merged from the left repeats all channels, but samples never merge.
            if outer == left or (dim > 0 and left % before[0] == 0):
                repeated = [atom for atom in atoms for _ in range(inner // right)]
                return ChannelMap(new_dim, tuple(repeated * (outer // left)))
        elif outer == left and size and len(atoms) % size == 0:
            block = len(atoms) // size
            blocks = [set(atoms[i : i + block]) for i in range(0, len(atoms), block)]
            if all(len(b) == 1 and FOREIGN not in b for b in blocks):
                return ChannelMap(new_dim, tuple(atoms[::block]))
    raise Unsupported(f"channels are split or merged by {tuple(before)} to {tuple(after)}")
