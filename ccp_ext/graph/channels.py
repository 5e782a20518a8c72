"""The channel graph as plain values: which channels live and die together, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from ccp_ext.allocation.resource import Affine, Resource
from ccp_ext.cutting import Cut
from ccp_ext.errors import InputError
from ccp_ext.tables import table

SCOPES = ("inner", "coupled", "all")
RESOURCES = ("macs", "params", "activations")


@dataclass(frozen=True)
class Slice:
    """The part of a module that belongs to a group.

    Attributes:
        module: path of the module.
        axis: "out": dimension 0 of the weight, with the bias (the features of a normalisation);
            "in": dimension 1 of the weight; "padding": output channels of a module that pads.
        index: ``index[i]`` are the positions along that axis that group channel i owns, equally
            many for every i.
    """

    module: str
    axis: str
    index: tuple[tuple[int, ...], ...] = field(repr=False)


@dataclass(frozen=True)
class Tap:
    """A tensor to observe while the model runs.

    Attributes:
        module: path of the module.
        port: "output" of the module, or its "input" (the first positional argument).
        channel_dim: the dimension of the tensor that holds the channels.
        index: group channel i is tensor channel ``index[i]``; None: it is tensor channel i.
    """

    module: str
    port: str = "output"
    channel_dim: int = 1
    index: tuple[int, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Group:
    """Channels that the same modules make, carry and read, each of which can be removed alone.

    Attributes:
        name: path of the first producer, with its positions (``layer2.0.conv2[8:24]``) if several
            groups share that producer.
        channels: how many there are.
        producers: output channels of convolutions and linear layers.
        channelwise: modules that treat each channel alone: normalisations, depthwise
            convolutions, PReLU.
        consumers: input channels of convolutions and linear layers.
        paddings: channels of zeros that padded shortcuts add to others of the group.
        weight_taps: the output of each producer.
        gate_taps: for each producer the last tensor, behind its normalisation and activation, that
            carries its channels before they are added to others: with a zero there the channel is
            gone (unless something later turns zeros into other values, as a normalisation does
            behind an addition). A producer that only scales other channels of the group has none.
        coupled: more than one module makes the channels, so none of them can be seen alone.
    """

    name: str
    channels: int
    producers: tuple[Slice, ...]
    channelwise: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    paddings: tuple[Slice, ...]
    weight_taps: tuple[Tap, ...]
    gate_taps: tuple[Tap, ...]
    coupled: bool

    @property
    def members(self) -> tuple[Slice, ...]:
        """Every part of every module that belongs to the group."""
        return self.producers + self.channelwise + self.consumers + self.paddings


class Fixed(NamedTuple):
    """Channels that cannot be removed, and why."""

    channels: str
    reason: str


@dataclass(frozen=True)
class Layer:
    """A module whose weight has channels, and what they cost.

    The module has ``out * (inputs * pair_parameters + out_parameters)`` parameters and
    ``out * inputs * pair_macs`` multiply-accumulate operations and ``out * positions`` elements in
    its output in one forward pass; ``positions`` is 0 for a module that is no convolution or linear
    layer.
    """

    module: str
    out: int
    inputs: int
    pair_parameters: int
    out_parameters: int
    pair_macs: int
    positions: int


@dataclass(frozen=True)
class Padding:
    """A module that adds channels of zeros: ``channel_padding`` before and after the input's."""

    module: str
    before: int
    inputs: int
    after: int


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype (as in ``"float32"``) of an example input."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, repr=False)
class ChannelGraph:
    """What :func:`ccp_ext.trace` finds out about a model; printed, a table of the groups.

    Attributes:
        model_name: class of the model.
        fingerprint: see :func:`ccp_ext.cutting.fingerprint`.
        inputs: the example inputs that the model was traced with.
        groups: channels that may be removed, in the order of the forward pass.
        fixed: channels that cannot be removed, with the reason.
        layers: modules whose weights have channels.
        paddings: modules that add channels of zeros.
        other_macs, other_parameters: what no layer accounts for.
    """

    model_name: str
    fingerprint: str
    inputs: tuple[InputSpec, ...]
    groups: tuple[Group, ...]
    fixed: tuple[Fixed, ...]
    layers: tuple[Layer, ...]
    paddings: tuple[Padding, ...]
    other_macs: int
    other_parameters: int

    def __repr__(self) -> str:
        inputs = ", ".join(f"{spec.dtype} {list(spec.shape)}" for spec in self.inputs)
        head = (
            f"ChannelGraph of {self.model_name} on {inputs}: {self.macs():,} MACs, "
            f"{self.parameters():,} parameters, {len(self.groups)} groups"
        )
        fixed = [f"fixed: {channels} ({reason})" for channels, reason in self.fixed]
        return "\n".join([head, *filter(None, [table(self._rows())]), *fixed])

    def __getitem__(self, name: str) -> Group:
        """The group of that name; InputError if there is none."""
        if name not in self._by_name:
            raise InputError(f"the graph has no group {name!r}; it has {list(self._by_name)}")
        return self._by_name[name]

    @property
    def inner(self) -> ChannelGraph:
        """The graph with only those groups that a single module makes."""
        return self.select_groups("inner")

    def select_groups(self, scope: str | Iterable[str]) -> ChannelGraph:
        """The graph with fewer groups; the channels of the others all stay.

        Args:
            scope: "inner" (one module makes the channels), "coupled" (several do), "all", or the
                names of the groups.

        Raises:
            InputError: unknown scope or group.
        """
        if isinstance(scope, str):
            if scope not in SCOPES:
                raise InputError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
            chosen = [g for g in self.groups if scope == "all" or g.coupled == (scope == "coupled")]
        else:
            names = {self[name].name for name in scope}
            chosen = [g for g in self.groups if g.name in names]
        return replace(self, groups=tuple(chosen))

    def macs(self, keep: Mapping[str, int] | None = None) -> int:
        """Multiply-accumulate operations of convolutions and matrix products.

        For one forward pass on inputs of the traced shapes, all samples; the addition of a bias
        counts nothing. A forecast: :func:`ccp_ext.measure.macs` of the pruned model is the same.

        Args:
            keep: {group name: channels that stay}; all stay in a group without an entry.

        Raises:
            InputError: unknown group, or a count outside of 1 to its channels.
        """
        return self.resource("macs")(self.counts(keep))

    def parameters(self, keep: Mapping[str, int] | None = None) -> int:
        """Parameters of the whole model; arguments and errors as in :meth:`macs`."""
        return self.resource("params")(self.counts(keep))

    def activations(self, keep: Mapping[str, int] | None = None) -> int:
        """Elements of the outputs of all convolutions and linear layers.

        For one forward pass on inputs of the traced shapes, all samples. This is the measure of I.
        Radosavovic et al., "Designing network design spaces", CVPR 2020, with linear layers: it
        goes with the memory that training needs and with the time of memory-bound passes.
        Arguments and errors as in :meth:`macs`.
        """
        return self.resource("activations")(self.counts(keep))

    def counts(self, keep: Mapping[str, int] | None = None) -> dict[str, int]:
        """The keep count of every group; arguments and errors as in :meth:`macs`."""
        for name, count in (keep or {}).items():
            channels = self[name].channels
            if not 1 <= count <= channels:
                raise InputError(f"group {name!r} can keep 1 to {channels} channels; got {count!r}")
        return {group.name: group.channels for group in self.groups} | dict(keep or {})

    def resource(self, kind: str) -> Resource:
        """MACs ("macs"), parameters ("params") or activations as a form in the keep counts.

        Raises:
            InputError: unknown kind.
        """
        if kind not in RESOURCES:
            raise InputError(f"resource must be one of {', '.join(RESOURCES)}; got {kind!r}")
        if kind not in self._resources:
            self._resources[kind] = self._make_resource(kind)
        return self._resources[kind]

    def sides(self) -> dict[str, tuple[Affine, Affine]]:
        """(out, inputs) of each layer by path, as functions of the keep counts."""
        removed: dict[tuple[str, str], dict[str, int]] = {}
        full: dict[tuple[str, str], int] = {}
        for layer in self.layers:
            full[layer.module, "out"], full[layer.module, "in"] = layer.out, layer.inputs
        for group in self.groups:
            for part in group.members:
                weights = removed.setdefault((part.module, part.axis), {})
                weights[group.name] = weights.get(group.name, 0) + len(part.index[0])

        def side(key: tuple[str, str]) -> Affine:
            weights = removed.get(key, {})
            whole = sum(weight * self[name].channels for name, weight in weights.items())
            return Affine(full[key] - whole, weights)

        return {
            layer.module: (side((layer.module, "out")), side((layer.module, "in")))
            for layer in self.layers
        }

    def with_totals(self, macs: int, parameters: int) -> ChannelGraph:
        """The graph with what the layers do not account for set by the totals of the model."""
        return replace(
            self,
            other_macs=self.other_macs + macs - self.macs(),
            other_parameters=self.other_parameters + parameters - self.parameters(),
        )

    def cuts(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Cut]:
        """What stays of each module if of each named group only the channels ``kept`` stay.

        Args:
            kept: {group name: indices in increasing order}.
        """
        removed: dict[tuple[str, str], set[int]] = {}
        for name, indices in kept.items():
            group = self[name]
            gone = set(range(group.channels)) - set(indices)
            for part in group.members if gone else ():
                positions = removed.setdefault((part.module, part.axis), set())
                positions.update(p for channel in gone for p in part.index[channel])
        cuts = {layer.module: _cut_layer(layer, removed) for layer in self.layers}
        cuts |= {padding.module: _cut_padding(padding, removed) for padding in self.paddings}
        return {module: cut for module, cut in cuts.items() if cut != Cut()}

    def _rows(self) -> list[dict[str, str | int]]:
        def paths(parts: Iterable[Slice]) -> str:
            names = list(dict.fromkeys(part.module for part in parts))
            return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)

        return [
            {
                "group": group.name,
                "channels": group.channels,
                "made by": paths(group.producers),
                "read by": paths(group.consumers),
            }
            for group in self.groups
        ]

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _resources(self) -> dict[str, Resource]:
        return {}

    def _make_resource(self, kind: str) -> Resource:
        one, terms = Affine(1), []
        sides = self.sides()
        for layer in self.layers:
            out, inputs = sides[layer.module]
            if kind == "macs":
                terms.append((layer.pair_macs, out, inputs))
            elif kind == "params":
                terms.append((layer.pair_parameters, out, inputs))
                terms.append((layer.out_parameters, out, one))
            else:
                terms.append((layer.positions, out, one))
        other = {"macs": self.other_macs, "params": self.other_parameters, "activations": 0}
        return Resource.of_products(other[kind], terms)


def _cut_layer(layer: Layer, removed: Mapping[tuple[str, str], set[int]]) -> Cut:
    return Cut(
        out=_remaining(layer.out, removed.get((layer.module, "out"))),
        inputs=_remaining(layer.inputs, removed.get((layer.module, "in"))),
    )


def _cut_padding(padding: Padding, removed: Mapping[tuple[str, str], set[int]]) -> Cut:
    gone = removed.get((padding.module, "padding"))
    if not gone:
        return Cut()
    first_after = padding.before + padding.inputs
    before = padding.before - sum(p < padding.before for p in gone)
    after = padding.after - sum(p >= first_after for p in gone)
    return Cut(channel_padding=(before, after))


def _remaining(size: int, removed: set[int] | None) -> tuple[int, ...] | None:
    return tuple(i for i in range(size) if i not in removed) if removed else None
