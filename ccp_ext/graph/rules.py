"""What each operator does to the channel maps of the tensors it reads.

A rule takes the state and a node and returns the map of the node's value, or None if no channel of
it can be followed. It raises Unsupported when the channels that it reads cannot be followed; they
are fixed then. An operator without a rule fixes all channels that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _NormBase

from ccp_ext.cutting import CONVOLUTIONS
from ccp_ext.graph.propagate import (
    FOREIGN,
    ChannelMap,
    Propagation,
    Unsupported,
    is_tensor,
    reshaped,
    shape,
)

Rule = Callable[[Propagation, Node], ChannelMap | None]

_ELEMENTWISE = """
    abs add addcdiv addcmul alias alpha_dropout ceil celu clamp clamp_max clamp_min clip clone
    contiguous copysign cos detach div divide dropout elu eq erf exp expm1 feature_alpha_dropout
    feature_dropout floor fmax fmin fmod ge gelu gt hardshrink hardsigmoid hardswish hardtanh le
    leaky_relu lerp lift_fresh_copy log log1p log_sigmoid logaddexp logical_and logical_not
    logical_or lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative positive
    pow reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin softplus
    softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold true_divide trunc
    where xlogy
"""
# Of several tensors only the first one's channels go on.
_CASTS = "to _to_copy type_as"
_SPATIAL = {
    **dict.fromkeys(("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"), 1),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"), 2),
    **dict.fromkeys(("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d"), 3),
    **dict.fromkeys(("max_pool1d_with_indices", "upsample_nearest1d", "upsample_linear1d"), 1),
    **dict.fromkeys(("max_pool2d_with_indices", "upsample_nearest2d", "upsample_bilinear2d"), 2),
    **dict.fromkeys(("upsample_bicubic2d", "reflection_pad2d", "replication_pad2d"), 2),
    **dict.fromkeys(("max_pool3d_with_indices", "upsample_nearest3d", "upsample_trilinear3d"), 3),
}
_REDUCTIONS = "all amax amin any argmax argmin logsumexp max mean min prod std std_mean sum var"
_ALONG_A_DIMENSION = """
    chunk cumsum flip log_softmax roll select slice softmax split split_with_sizes
"""
_RESHAPES = "_unsafe_view flatten reshape squeeze unflatten unsqueeze view"
_PER_CHANNEL_STATES = ("weight", "bias", "running_mean", "running_var")
_PERMUTATIONS = "movedim moveaxis permute swapaxes swapdims t transpose"


def apply(state: Propagation, node: Node) -> ChannelMap | None:
    """The map of the node's value, with all that the node implies noted in ``state``."""
    rule = _RULES.get(operator_name(node))
    if rule not in _TAKES_STATES:
        state.pin_states(node.all_input_nodes, f"{state.where(node)}: reads a parameter")
    if rule is None:
        state.give_up(node, "the operator is not known")
        return None
    try:
        channels = rule(state, node)
    except Unsupported as reason:
        state.give_up(node, str(reason))
        return None
    return channels


def operator_name(node: Node) -> str:
    """The operator without its overload, the in-place form named as the other."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    namespace, _, name = schema.name.partition("::")
    if namespace != "aten":
        return schema.name
    return name.removesuffix("_") if schema.is_mutable else name


def is_in_place(node: Node) -> bool:
    """Whether the node changes its first argument and returns it."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and schema.name.endswith("_")


# --- layers ------------------------------------------------------------------------------------


def _convolution(state: Propagation, node: Node) -> ChannelMap:
    argument = _arguments(node)
    outputs = shape(node)
    dim = len(outputs) - argument["weight"].meta["val"].dim() + 1
    groups, inputs = argument["groups"], shape(argument["input"])[dim]
    positions = math.prod(outputs) // outputs[dim]
    if 1 < groups == inputs:
        return ChannelMap(dim, _depthwise(state, node, argument, dim, positions))
    if groups > 1:
        detail = f"grouped convolution with {groups} groups"
        return ChannelMap(dim, _fixed_layer(state, node, argument, dim, positions, detail))
    return ChannelMap(dim, _dense(state, node, argument, dim, positions, CONVOLUTIONS))


def _linear(state: Propagation, node: Node) -> ChannelMap:
    outputs = shape(node)
    dim = len(outputs) - 1
    positions = math.prod(outputs[:-1])
    return ChannelMap(dim, _dense(state, node, _arguments(node), dim, positions, (nn.Linear,)))


def _dense(
    state: Propagation,
    node: Node,
    argument: dict[str, Any],
    dim: int,
    positions: int,
    kinds: tuple[type[nn.Module], ...],
) -> tuple[int, ...]:
    """Atoms of the output of a convolution or linear layer that reads all input channels."""
    outputs = shape(node)[dim]
    module = _owner(state, node, argument, kinds)
    if module is None:
        # The operators are named as the modules: conv2d, linear.
        kind = operator_name(node).capitalize()
        detail = f"its weight is not the parameter of a plain {kind} module"
        return state.opaque(node, outputs, detail)
    record = state.record(node, module, "dense", outputs)
    record.positions += positions
    record.pair_macs += positions * math.prod(module.weight.shape[2:])
    source = argument["input"]
    channels = state.maps.get(source)
    if channels is not None and channels.dim != dim:
        state.give_up(node, "works across another dimension than that of the channels")
        channels = None
    atoms = (FOREIGN,) * shape(source)[dim] if channels is None else channels.atoms
    state.read(record, atoms)
    return record.out


def _depthwise(
    state: Propagation, node: Node, argument: dict[str, Any], dim: int, positions: int
) -> tuple[int, ...]:
    module = _owner(state, node, argument, CONVOLUTIONS)
    channels = state.maps.get(argument["input"])
    if module is None or channels is None or channels.dim != dim or FOREIGN in channels.atoms:
        detail = "depthwise convolution of channels that are not followed"
        return _fixed_layer(state, node, argument, dim, positions, detail)
    multiplier = shape(node)[dim] // len(channels.atoms)
    atoms = tuple(atom for atom in channels.atoms for _ in range(multiplier))
    record = state.record(node, module, "channelwise", atoms)
    record.positions += positions
    record.pair_macs += positions * math.prod(module.weight.shape[2:])
    state.channelwise_nodes.add(node)
    return atoms


def _fixed_layer(
    state: Propagation,
    node: Node,
    argument: dict[str, Any],
    dim: int,
    positions: int,
    detail: str,
) -> tuple[int, ...]:
    """A convolution whose channels stay, but whose operations count."""
    module = _owner(state, node, argument, CONVOLUTIONS)
    outputs = shape(node)[dim]
    if module is None:
        return state.opaque(node, outputs, detail)
    record = state.record(node, module, "dense", outputs)
    record.positions += positions
    record.pair_macs += positions * math.prod(module.weight.shape[2:])
    state.read(record, (FOREIGN,) * module.weight.shape[1])
    state.give_up(node, detail)
    return record.out


def _normalisation(state: Propagation, node: Node) -> ChannelMap | None:
    """BatchNorm and InstanceNorm: each channel alone."""
    argument = _arguments(node)
    channels = state.maps.get(argument["input"])
    if channels is None:
        return None
    if channels.dim != 1:
        raise Unsupported("normalises another dimension than that of the channels")
    states = [argument[name] for name in _PER_CHANNEL_STATES if argument.get(name) is not None]
    return _channelwise(state, node, channels, _NormBase, states)


def _prelu(state: Propagation, node: Node) -> ChannelMap | None:
    argument = _arguments(node)
    channels = state.maps.get(argument["self"])
    if channels is None:
        return None
    if math.prod(shape(argument["weight"])) == 1:
        state.channelwise_nodes.add(node)
        return channels
    if channels.dim != 1:
        raise Unsupported("its weight stands along another dimension than that of the channels")
    return _channelwise(state, node, channels, nn.PReLU, [argument["weight"]])


def _channelwise(
    state: Propagation,
    node: Node,
    channels: ChannelMap,
    kind: type[nn.Module],
    states: list[Any],
) -> ChannelMap:
    call = state.calls.of(node)
    if call is None or not isinstance(call.module, kind):
        raise Unsupported(f"not called by a module of kind {kind.__name__.lstrip('_')}")
    if not all(state.is_held(value, call.module, _PER_CHANNEL_STATES) for value in states):
        raise Unsupported("its parameters are computed or belong to another module")
    state.record(node, call.module, "channelwise", channels.atoms)
    state.channelwise_nodes.add(node)
    return channels


def _owner(
    state: Propagation, node: Node, argument: dict[str, Any], kinds: tuple[type[nn.Module], ...]
) -> nn.Module | None:
    """The module that holds the weight and bias, if it also makes the call and its output."""
    call = state.calls.of(node)
    if call is None or not isinstance(call.module, kinds):
        return None
    module, bias = call.module, argument["bias"]
    is_plain = (
        {*module._parameters, *module._buffers} == {"weight", "bias"}
        and state.is_held(argument["weight"], module, ["weight"])
        and (bias is None or state.is_held(bias, module, ["bias"]))
        and state.calls.output(call) in (node, None)
    )
    return module if is_plain else None


# --- elementwise -------------------------------------------------------------------------------


def _elementwise(state: Propagation, node: Node) -> ChannelMap | None:
    """Any number of tensors, broadcast: channels at the same place are tied."""
    arguments = [a for a in node.all_input_nodes if is_tensor(a)]
    tracked = [a for a in arguments if a in state.maps]
    if not tracked:
        return None
    rank = len(shape(node))
    widest = max(tracked, key=lambda a: len(state.maps[a].atoms))
    first = state.maps[widest]
    dim = first.dim + rank - len(shape(widest))
    if shape(node)[dim] != len(first.atoms):
        raise Unsupported("one channel is repeated along the channels of another tensor")
    for argument in arguments:
        _tie_broadcast(state, node, ChannelMap(dim, first.atoms), argument)
    if len(tracked) == len(arguments) == 1:
        state.channelwise_nodes.add(node)
    return ChannelMap(dim, first.atoms)


def _tie_broadcast(state: Propagation, node: Node, first: ChannelMap, argument: Node) -> None:
    sizes = shape(argument)
    position = first.dim - (len(shape(node)) - len(sizes))
    channels = state.maps.get(argument)
    if channels is None:
        if position >= 0 and sizes[position] == len(first.atoms) and math.prod(sizes) > 1:
            raise Unsupported("combines channels with a tensor whose channels cannot be removed")
    elif channels.dim != position:
        raise Unsupported("combines channels that stand in different dimensions")
    elif len(channels.atoms) != len(first.atoms):
        raise Unsupported("one channel is repeated along the channels of another tensor")
    else:
        reason = f"{state.where(node)}: combined with channels that cannot be removed"
        state.tie_all(first.atoms, channels.atoms, reason)


def _first_argument(state: Propagation, node: Node) -> ChannelMap | None:
    channels = state.maps.get(node.args[0])
    if channels is not None:
        state.channelwise_nodes.add(node)
    return channels


# --- shapes ------------------------------------------------------------------------------------


def _spatial(dimensions: int) -> Rule:
    """Pooling and resizing of the last ``dimensions`` dimensions."""

    def rule(state: Propagation, node: Node) -> ChannelMap | None:
        channels, sizes = _followed(state, node)
        if channels is not None and channels.dim >= len(sizes) - dimensions:
            raise Unsupported("works along the channels")
        return channels

    return rule


def _reduction(state: Propagation, node: Node) -> ChannelMap | None:
    channels, sizes = _followed(state, node)
    if channels is None:
        return None
    argument = _arguments(node)
    dims = _dimensions(argument.get("dim"), len(sizes))
    if not dims or channels.dim in dims:
        raise Unsupported("works along the channels")
    if argument.get("keepdim"):
        return channels
    return ChannelMap(channels.dim - sum(d < channels.dim for d in dims), channels.atoms)


def _along_a_dimension(state: Propagation, node: Node) -> ChannelMap | None:
    """Operators that only rearrange or combine along dimensions other than the channels'."""
    channels, sizes = _followed(state, node)
    if channels is None:
        return None
    argument = _arguments(node)
    dims = _dimensions(argument.get("dim", argument.get("dims")), len(sizes))
    is_whole = operator_name(node) == "slice" and shape(node) == sizes
    if not is_whole and (not dims or channels.dim in dims):
        raise Unsupported("works along the channels")
    if operator_name(node) == "select":
        return ChannelMap(channels.dim - (dims[0] < channels.dim), channels.atoms)
    return channels


def _reshape(state: Propagation, node: Node) -> ChannelMap | None:
    channels, sizes = _followed(state, node)
    return None if channels is None else reshaped(sizes, shape(node), channels)


def _permutation(state: Propagation, node: Node) -> ChannelMap | None:
    channels, sizes = _followed(state, node)
    if channels is None:
        return None
    order = _order(operator_name(node), node.args[1:], len(sizes))
    return ChannelMap(order.index(channels.dim), channels.atoms)


def _order(name: str, args: tuple[Any, ...], rank: int) -> list[int]:
    """``order[i]`` is the dimension of the input that becomes dimension i."""
    if name == "permute":
        return _dimensions(args[0], rank)
    order = list(range(rank))
    if name == "t":
        return order[::-1]
    sources, targets = _dimensions(args[0], rank), _dimensions(args[1], rank)
    if name in ("movedim", "moveaxis"):
        order = [d for d in order if d not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            order.insert(target, source)
        return order
    order[sources[0]], order[targets[0]] = targets[0], sources[0]
    return order


def _expand(state: Propagation, node: Node) -> ChannelMap | None:
    channels, sizes = _followed(state, node)
    if channels is None:
        return None
    dim = channels.dim + len(shape(node)) - len(sizes)
    if shape(node)[dim] != sizes[channels.dim]:
        raise Unsupported("one channel is repeated along the channels of another tensor")
    return ChannelMap(dim, channels.atoms)


def _cat(state: Propagation, node: Node) -> ChannelMap | None:
    argument = _arguments(node)
    parts, rank = argument["tensors"], len(shape(node))
    tracked = [state.maps[part] for part in parts if part in state.maps]
    if not tracked:
        return None
    (dim,) = _dimensions(argument["dim"], rank)
    if len({channels.dim for channels in tracked}) > 1:
        raise Unsupported("combines channels that stand in different dimensions")
    if tracked[0].dim == dim:
        atoms: list[int] = []
        for part in parts:
            channels = state.maps.get(part)
            atoms += (FOREIGN,) * shape(part)[dim] if channels is None else channels.atoms
        state.channelwise_nodes.add(node)
        return ChannelMap(dim, tuple(atoms))
    if len(tracked) < len(parts):
        raise Unsupported("combines channels with a tensor whose channels cannot be removed")
    reason = f"{state.where(node)}: combined with channels that cannot be removed"
    for channels in tracked[1:]:
        state.tie_all(tracked[0].atoms, channels.atoms, reason)
    return tracked[0]


def _pad(state: Propagation, node: Node) -> ChannelMap | None:
    channels, sizes = _followed(state, node)
    if channels is None:
        return None
    amounts = _arguments(node)["pad"]
    first = 2 * (len(sizes) - 1 - channels.dim)
    before, after = [*amounts, *(0,) * 2 * len(sizes)][first : first + 2]
    if not before and not after:
        return channels
    call = state.calls.of(node)
    if call is None or tuple(getattr(call.module, "channel_padding", ())) != (before, after):
        raise Unsupported("pads the channels in a module without attribute channel_padding")
    if before < 0 or after < 0:
        raise Unsupported("takes channels away")
    return ChannelMap(channels.dim, _padded(state, node, channels, before, after))


def _padded(
    state: Propagation, node: Node, channels: ChannelMap, before: int, after: int
) -> tuple[int, ...]:
    call = state.calls.of(node)
    inputs = len(channels.atoms)
    known = state.records.get(call.path)
    if known is not None and known.kind != "padding":
        raise Unsupported("pads the channels in a module with channels of its own")
    if known is not None:
        left, right = known.out[:before], known.out[before + inputs :]
    else:
        left = state.new_atoms(call.path, range(before))
        right = state.new_atoms(call.path, range(before + inputs, before + inputs + after))
    record = state.record(node, call.module, "padding", left + channels.atoms + right)
    return record.out


def _getitem(state: Propagation, node: Node) -> ChannelMap | None:
    """An item of a tuple of which each item has the channels at the same place."""
    channels = state.maps.get(node.args[0])
    if channels is None or not is_tensor(node):
        return None
    sizes = shape(node)
    fits = channels.dim < len(sizes) and sizes[channels.dim] == len(channels.atoms)
    return channels if fits else None


def _nothing(state: Propagation, node: Node) -> None:
    return None


# --- arguments ---------------------------------------------------------------------------------


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments of the operator by the names in its schema."""
    found = {}
    for i, argument in enumerate(node.target._schema.arguments):
        given = node.args[i] if i < len(node.args) else argument.default_value
        found[argument.name] = node.kwargs.get(argument.name, given)
    return found


def _dimensions(value: Any, rank: int) -> list[int]:
    if value is None:
        return []
    return [d % rank for d in (value if isinstance(value, list | tuple) else [value])]


def _followed(state: Propagation, node: Node) -> tuple[ChannelMap | None, tuple[int, ...]]:
    """Map and shape of the first argument."""
    return state.maps.get(node.args[0]), shape(node.args[0])


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_CASTS.split(), _first_argument),
    **{name: _spatial(dimensions) for name, dimensions in _SPATIAL.items()},
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_ALONG_A_DIMENSION.split(), _along_a_dimension),
    **dict.fromkeys(_RESHAPES.split(), _reshape),
    **dict.fromkeys(_PERMUTATIONS.split(), _permutation),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "linear": _linear,
    "batch_norm": _normalisation,
    "instance_norm": _normalisation,
    "prelu": _prelu,
    "getitem": _getitem,
    "_assert_tensor_metadata": _nothing,
}
_TAKES_STATES = {_convolution, _linear, _normalisation, _prelu}
