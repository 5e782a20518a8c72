"""What is lost of the logits, not of the next layer's outputs, when inputs are removed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ccp_ext.activations import input_tap
from ccp_ext.cost import Cost
from ccp_ext.criteria.base import Criterion, register
from ccp_ext.criteria.gradients import GradientObservation
from ccp_ext.criteria.reconstruction import refitted_cost
from ccp_ext.criteria.refitting import RefitProblem
from ccp_ext.graph import ChannelGraph, Group
from ccp_ext.least_squares import Regression
from ccp_ext.patches import POSITIONS, Grid, as_maps

_RIDGE = 1e-3


class Consumer:
    """A layer that reads a group's channels: moments of what it reads, and of its gradients.

    Gradients are those of a random projection of the logits, sum_c v_c f_c with v_c = +-1: their
    second moments are those of the logits' Jacobian, summed over the logits.

    Args:
        positions: in its input, of each channel; see :class:`ccp_ext.graph.Slice`.
    """

    def __init__(self, layer: nn.Module, positions: tuple[tuple[int, ...], ...]) -> None:
        self.layer = layer
        self._channel_dim = input_tap(layer, "").channel_dim
        self._channels = torch.tensor(positions, device=layer.weight.device).flatten()
        self._moments = Regression()
        self._gradients: Tensor | float = 0.0
        self._outputs = 0  # samples and positions whose gradients were seen

    def read(self, x: Tensor, output: Tensor, generator: torch.Generator) -> None:
        """The layer's input and output in a call."""
        maps = as_maps(self.layer, output)
        at = Grid.draw(maps.shape[2:], POSITIONS, generator)
        x = x.index_select(self._channel_dim, self._channels)
        self._moments.add(self.layer, x, at.of(maps)[:, :0], at)

    def feel(self, gradient: Tensor) -> None:
        """The gradient at the output of a call."""
        g = gradient.movedim(self._channel_dim, 0).flatten(1)  # [O, samples and positions]
        self._gradients = self._gradients + (g @ g.T).double()
        self._outputs += g.shape[1]

    def problem(self, channels: int, samples: int, ridge: float) -> RefitProblem:
        """The layer's outputs weighed by how much the logits change with them."""
        outputs = self._outputs / samples  # positions, of all calls
        moments = self._moments.covariance() * outputs
        weight = self.layer.weight.detach()[:, self._channels].flatten(1).double()
        return RefitProblem(moments, self._metric() @ weight, channels, ridge)

    def state_dict(self) -> dict[str, Any]:
        return {
            "moments": dict(vars(self._moments)),
            "gradients": self._gradients,
            "outputs": self._outputs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.layer.weight.device
        self._gradients = state["gradients"].to(device)
        self._outputs = state["outputs"]
        for name, value in state["moments"].items():
            setattr(self._moments, name, value if name == "count" else value.to(device))

    def _metric(self) -> Tensor:
        """A with A'A the mean of g g': the squared change of the logits is |A e|^2."""
        values, vectors = torch.linalg.eigh(self._gradients / self._outputs)
        return values.clamp_min(0).sqrt()[:, None] * vectors.T


class LossSensitivity(GradientObservation):
    """The :class:`Consumer` objects of every group, filled by one pass."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, seed: int) -> None:
        super().__init__(model)
        self._count = 0
        self._consumers = {
            group.name: [Consumer(model.get_submodule(p.module), p.index) for p in group.consumers]
            for group in graph.groups
        }
        self._generator = torch.Generator().manual_seed(seed)

    def problems(self, group: Group, ridge: float) -> list[RefitProblem]:
        """Of the layers that read the group's channels, in the unit of squared logits."""
        parts = self._consumers[group.name]
        return [part.problem(group.channels, self._count, ridge) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for :meth:`load_state_dict` of the same model's."""
        consumers = {k: [part.state_dict() for part in v] for k, v in self._consumers.items()}
        return {
            "count": self._count,
            "generator": self._generator.get_state(),
            "consumers": consumers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count = state["count"]
        self._generator.set_state(state["generator"])
        for name, parts in self._consumers.items():
            for part, mine in zip(parts, state["consumers"][name], strict=True):
                part.load_state_dict(mine)

    def update(self, x: Tensor, y: Tensor) -> None:
        outputs = self.model(x.requires_grad_() * 1)
        signs = torch.randint(0, 2, outputs.shape, generator=self._generator) * 2 - 1
        outputs.backward(signs.to(outputs))
        self._count += len(x)

    def _attach(self, stack: contextlib.ExitStack) -> None:
        for consumers in self._consumers.values():
            for consumer in consumers:
                hook = consumer.layer.register_forward_hook(partial(self._watch, consumer))
                stack.callback(hook.remove)

    def _watch(self, consumer: Consumer, layer: nn.Module, args: tuple, output: Tensor) -> None:
        consumer.read(args[0].detach(), output.detach(), self._generator)
        output.register_hook(consumer.feel)


@register
class RefitLoss(Criterion):
    """1/2 sum over positions of |A e|^2 for the error e that the refit of the next layer leaves.

    A'A is the second moment of the logits' derivatives at the layer's output, so that costs of all
    layers are in one unit, squared changes of the logits, and can be added and allocated.
    """

    name = "refit-loss"
    source = (
        "this package; block OBS (Hassibi and Stork, NeurIPS 1993) in the metric of the logits' "
        "Jacobian at the layer's output"
    )
    summary = "block OBS: change of the logits after the next layer's refit, one channel at a time"
    note = (
        "greedy removal; errors at different positions count as independent; a constant is "
        f"refitted too; up to {POSITIONS} positions of an image, on a grid, enter the moments"
    )
    uses = ("ridge",)
    allocation = "optimal"

    def observation(self, model, graph) -> LossSensitivity:
        return LossSensitivity(model, graph, self.options.seed)

    def costs(self, model, graph, data) -> dict[str, Cost]:
        ridge = _RIDGE if self.options.ridge is None else self.options.ridge
        costs = {}
        for group in graph.groups:
            problems = data.problems(group, ridge)
            costs[group.name] = refitted_cost(problems, Cost(u=-sum(p.singles() for p in problems)))
        return costs
