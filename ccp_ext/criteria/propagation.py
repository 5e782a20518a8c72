"""NISP: importance of the final responses, carried back through the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ccp_ext.activations import Activations, input_tap, read_at
from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register
from ccp_ext.cutting import CONVOLUTIONS
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph, Tap

# So small that no bounded activation (ReLU6) reaches its bound on the way through the network.
_INPUT = 1e-100
# Share of redundancy against spread in the features' graph, and of the largest admissible damping.
_BALANCE, _DAMPING = 0.5, 0.9


class _Responses:
    """The final responses of every image."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._seen: list[Tensor] = []

    def readers(self) -> Iterator:
        yield self._tap, lambda x: self._seen.append(_pooled(x.detach().double(), self._tap))

    def values(self) -> Tensor:
        """float64 ``[N, F]``."""
        return torch.cat(self._seen)


@register
class NISP(Criterion):
    """s_l = |W_l+1|' s_l+1: the gradient of s'f(x) in a network f of absolute weights."""

    name = "nisp"
    source = "Yu et al., CVPR 2018 (NISP); Roffo et al., ICCV 2015 (Inf-FS)"
    summary = "importance of the final responses, propagated back through absolute weights"
    note = (
        "the final responses are the input of the last layer; Inf-FS mixes spread and 1 - |rank "
        f"correlation| with equal weights and damps by {_DAMPING} of the limit; a BatchNorm counts "
        "as its absolute factor, an activation as the identity, a max pooling as its largest input "
        "in that network; scores of a group sum to 1, as rates by layer are given"
    )

    def observation(self, model, graph) -> Activations:
        return Activations(model, {"final responses": _Responses(_last_input(model, graph))})

    def costs(self, model, graph, data) -> dict[str, Cost]:
        importance = infinite_feature_selection(data["final responses"].values())
        gates = {group.name: group.gate_taps for group in graph.groups}
        scores = _propagate(model, graph, gates, importance)
        return {name: Cost(u=-score / score.sum()) for name, score in scores.items()}


def infinite_feature_selection(values: Tensor) -> Tensor:
    """Inf-FS: the energy of each feature over paths of all lengths in the features' graph.

    Args:
        values: ``[N, F]``, N samples of F features.

    Returns:
        float64 ``[F]``, positive, with sum 1.
    """
    x = values.double()
    spread = x.std(0, correction=0)
    spread = spread / spread.max().clamp(min=torch.finfo(x.dtype).tiny)
    ranks = _ranks(x)
    ranks = ranks - ranks.mean(0)
    norms = ranks.norm(dim=0)
    correlation = (ranks.T @ ranks) / (norms.outer(norms)).clamp(min=torch.finfo(x.dtype).tiny)
    apart = 1 - correlation.abs()
    graph = _BALANCE * torch.maximum(spread, spread.unsqueeze(1)) + (1 - _BALANCE) * apart
    radius = torch.linalg.eigvalsh(graph).abs().max()
    ones = x.new_ones(len(graph))
    if radius > 0:
        identity = torch.eye(len(graph), dtype=x.dtype, device=x.device)
        energy = torch.linalg.solve(identity - _DAMPING / radius * graph, ones) - ones
        return energy / energy.sum()
    return ones / len(ones)


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value in its column; equal values share their mean rank."""
    columns = []
    for column in values.T.contiguous():
        _, inverse, counts = column.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).to(values.dtype)
        columns.append((last - (counts - 1) / 2)[inverse])
    return torch.stack(columns, 1)


def _propagate(
    model: nn.Module, graph: ChannelGraph, gates: dict[str, tuple[Tap, ...]], importance: Tensor
) -> dict[str, Tensor]:
    network = _absolute(model)
    tap = _last_input(model, graph)
    scores = dict.fromkeys(gates, 0.0)
    responses: list[Tensor] = []

    def watch(name: str, at: Tap):
        def add(gradient: Tensor) -> None:
            owned = gradient.movedim(at.channel_dim, 1).flatten(2) if gradient.dim() > 2 else gradient
            sums = owned.sum(2).sum(0) if owned.dim() > 2 else owned.sum(0)
            scores[name] = scores[name] + (sums if at.index is None else sums[list(at.index)])

        return lambda tensor: tensor.register_hook(add)

    for name, taps in gates.items():
        for at in taps:
            read_at(network, at, watch(name, at))
    read_at(network, tap, lambda x: responses.append(_pooled(x, tap)))
    device = importance.device
    shape = graph.inputs[0].shape
    x = torch.full(shape, _INPUT, dtype=torch.float64, device=device, requires_grad=True)
    network(x * 1)
    (responses[0] @ importance).sum().backward()
    return {name: score.detach() for name, score in scores.items()}


def _absolute(model: nn.Module) -> nn.Module:
    """A copy in float64 with absolute weights and without shifts, in eval mode."""
    network = copy.deepcopy(model).double().eval().requires_grad_(False)
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameter.data = torch.zeros_like(parameter) if name == "bias" else parameter.abs()
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.zero_()
    return network


def _last_input(model: nn.Module, graph: ChannelGraph) -> Tap:
    kinds = (*CONVOLUTIONS, nn.Linear)
    layers = [(m, model.get_submodule(m)) for m in (layer.module for layer in graph.layers)]
    weighted = [(path, layer) for path, layer in layers if isinstance(layer, kinds)]
    if not weighted:
        raise InputError("criterion 'nisp' needs a convolution or linear layer that ends the network")
    path, layer = weighted[-1]
    return input_tap(layer, path)


def _pooled(x: Tensor, tap: Tap) -> Tensor:
    """``[N, F]``: the mean over positions."""
    x = x.movedim(tap.channel_dim, 1)
    return x.flatten(2).mean(2) if x.dim() > 2 else x
