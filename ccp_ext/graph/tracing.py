"""Tracing a model into its channel graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from ccp_ext.counting import as_arguments, parameters
from ccp_ext.cutting import fingerprint
from ccp_ext.eager import eager
from ccp_ext.errors import InputError
from ccp_ext.evaluation import training_flags_kept
from ccp_ext.graph import rules
from ccp_ext.graph.calls import Calls
from ccp_ext.graph.channels import ChannelGraph, InputSpec, Layer, Padding
from ccp_ext.graph.groups import find_fixed, find_groups
from ccp_ext.graph.probe import Probe
from ccp_ext.graph.propagate import Propagation, Record


def trace(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> ChannelGraph:
    """Find out which channels of a model live and die together.

    The model is exported in eval mode with torch.export, and the position of every channel is
    followed through every operator. Then the model runs on fake tensors with a channel less in
    every group. Where an operator is not known, or the model's code relies on the number of
    channels, the channels stay; ``ChannelGraph.fixed`` says which and why. The model is left as it
    was: training flags, buffers and random state included.

    Args:
        model: any module that torch.export can handle, or what ``torch.compile`` made of it.
        example_inputs: a tensor, or the tensors of the positional arguments, on the model's device.
            Their values do not matter, their shapes decide the operation counts.

    Raises:
        InputError: the model cannot be exported, or the inputs are not tensors with elements.
    """
    model = eager(model)
    arguments = as_arguments(example_inputs)
    for i, x in enumerate(arguments):
        if x.numel() == 0:
            raise InputError(f"example_inputs[{i}] has no elements, its shape is {tuple(x.shape)}")
    with training_flags_kept(model), random_state_kept(model):
        model.eval()
        state = _propagate(model, arguments)
        with _refusing(model, "run on fake tensors"):
            probe = Probe(model, arguments, training=_has_idle_parameters(state, model))
        graph = _graph(model, arguments, state, probe)
        for name, error in probe.misfits(graph).items():
            reason = f"the model's code relies on their number: {error}"
            for part in graph[name].producers:
                out = state.records[part.module].out
                state.fix((out[positions[0]] for positions in part.index), reason)
        return _graph(model, arguments, state, probe)


@contextlib.contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Give the generators of the CPU and of the model's GPUs their state back at the end."""
    tensors = (*model.parameters(), *model.buffers())
    with torch.random.fork_rng(sorted({t.get_device() for t in tensors if t.is_cuda})):
        yield


@contextlib.contextmanager
def _refusing(model: nn.Module, action: str) -> Iterator[None]:
    """Turn whatever torch or the model's own code raises into one sentence."""
    try:
        yield
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{type(model).__name__} cannot be {action}: {type(error).__name__}: {first_line}"
        ) from error


class Program(NamedTuple):
    """A model's operators in order, and the modules' calls that they belong to.

    Attributes:
        states: the parameter or buffer that a node stands for.
    """

    nodes: list[Node]
    calls: Calls
    states: dict[Node, Tensor]


def exported(model: nn.Module, arguments: tuple[Tensor, ...]) -> Program:
    """The model by torch.export; whoever reads a changed tensor reads the result of the change.

    Raises:
        InputError: the model cannot be exported.
    """
    with _refusing(model, "traced by torch.export"), torch.enable_grad():
        program = torch.export.export(model, arguments)
    signature = program.graph_signature
    tensors = {
        **{k: model.get_parameter(v) for k, v in signature.inputs_to_parameters.items()},
        **{k: model.get_buffer(v) for k, v in signature.inputs_to_buffers.items()},
    }
    nodes = list(program.graph.nodes)
    _follow_in_place_results(nodes)
    inputs = set(signature.user_inputs)
    constants = {n for n in nodes if n.op == "placeholder" and n.name not in inputs}
    states = {node: tensors[node.name] for node in constants if node.name in tensors}
    return Program(nodes, Calls(model, nodes, constants), states)


def _propagate(model: nn.Module, arguments: tuple[Tensor, ...]) -> Propagation:
    nodes, calls, states = exported(model, arguments)
    state = Propagation(calls, states)
    for node in nodes:
        _visit(state, node)
    _pin_tied_modules(state, model)
    state.fix_pinned()
    return state


def _visit(state: Propagation, node: Node) -> None:
    if node.op == "output":
        for argument in node.all_input_nodes:
            if argument in state.maps:
                state.fix(state.maps[argument].atoms, "output of the model")
    elif node.op == "call_function":
        channels = rules.apply(state, node)
        if channels is not None:
            state.maps[node] = channels


def _has_idle_parameters(state: Propagation, model: nn.Module) -> bool:
    """Whether a module with parameters is not called in eval mode, such as an auxiliary head."""
    return any(
        module._parameters and not state.calls.of_module(path)
        for path, module in model.named_modules()
    )


def _follow_in_place_results(nodes: list[Node]) -> None:
    """Let whoever reads a tensor after it was changed in place read the result of that change."""
    order = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if node.op == "call_function" and rules.is_in_place(node) and node.args:
            changed = node.args[0]
            changed.replace_all_uses_with(node, lambda user, at=order[node]: order[user] > at)


def _pin_tied_modules(state: Propagation, model: nn.Module) -> None:
    """Fix the channels of modules that hold one parameter or buffer together."""
    for tensor in (*model.parameters(), *model.buffers()):
        paths = state.calls.owners(tensor)
        if len(paths) > 1:
            for path in paths:
                state.pin(path, f"modules {', '.join(map(repr, paths))} share a parameter")


def _graph(
    model: nn.Module, arguments: tuple[Tensor, ...], state: Propagation, probe: Probe
) -> ChannelGraph:
    groups = find_groups(state)  # fixes some channels, so before find_fixed
    records = state.records.values()
    graph = ChannelGraph(
        model_name=type(model).__name__,
        fingerprint=fingerprint(model),
        inputs=tuple(
            InputSpec(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in arguments
        ),
        groups=groups,
        fixed=find_fixed(state),
        layers=tuple(_layer(record) for record in records if record.kind != "padding"),
        paddings=tuple(_padding(record) for record in records if record.kind == "padding"),
        other_macs=0,
        other_parameters=0,
    )
    return graph.with_totals(macs=probe.macs, parameters=parameters(model))


def _layer(record: Record) -> Layer:
    tensors = dict(record.module.named_parameters(recurse=False))
    weight = tensors.get("weight")
    has_kernel = weight is not None and weight.dim() > 1
    return Layer(
        module=record.path,
        out=len(record.out),
        inputs=weight.shape[1] if has_kernel else 0,
        pair_parameters=math.prod(weight.shape[2:]) if has_kernel else 0,
        out_parameters=sum(tensor.dim() == 1 for tensor in tensors.values()),
        pair_macs=record.pair_macs,
        positions=record.positions,
    )


def _padding(record: Record) -> Padding:
    before, after = record.module.channel_padding
    return Padding(record.path, before, len(record.out) - before - after, after)
