"""Ways to S of every inner group for one batch: ours, and those of other libraries.

Each takes a :class:`Setting` and returns a function that makes one pass over the batch and returns
the Gram matrices [C, C] by group, or None where the method does not yield them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccp_ext import ChannelGraph, collect

Grams = dict[str, Tensor]
Pass = Callable[[], Grams | None]


@dataclass(frozen=True)
class Setting:
    """A model in eval mode, its groups and one batch, all on one device."""

    model: nn.Module
    graph: ChannelGraph
    x: Tensor
    y: Tensor
    autocast: bool = False

    def forward(self, model: nn.Module | None = None) -> Tensor:
        """The logits of the batch, by default by the model as it is."""
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            return (model or self.model)(self.x)

    def filters(self) -> dict[str, str]:
        """The parameter that makes each group's channels: group name to parameter name."""
        return {g.name: f"{_only(g.weight_taps).module}.weight" for g in self.graph.groups}

    def freeze_the_rest(self) -> None:
        """Only the groups' filters require gradients from here on."""
        wanted = set(self.filters().values())
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in wanted)


def plain(setting: Setting) -> Pass:
    """Forward and backward with the gradients of all parameters: the yardstick."""

    def run() -> None:
        F.cross_entropy(setting.forward(), setting.y, reduction="sum").backward()

    return run


def ours(setting: Setting, **options) -> Pass:
    """``collect`` with the given options."""

    def run() -> Grams:
        with collect(setting.model, setting.graph, **options) as stats:
            stats.backward(setting.forward(), setting.y)
        return {name: stats[name].S for name in stats}

    return run


def ours_beside_training(setting: Setting) -> Pass:
    """``collect`` around the user's own backward pass, which fills ``.grad`` as well."""
    backward = plain(setting)

    def run() -> Grams:
        options = {"curvature": "empirical", "parameter_gradients": True}
        with collect(setting.model, setting.graph, **options) as stats:
            backward()
        return {name: stats[name].S for name in stats}

    return run


def vmap(setting: Setting) -> Pass:
    """Per-sample gradients of the filters by ``torch.func``.

    Instead of autocast, with which it refuses BatchNorm, all in bfloat16.
    """
    from torch.func import functional_call, grad
    from torch.func import vmap as batched

    images = setting.x
    if setting.autocast:
        setting.model.bfloat16()
        images = images.bfloat16()
    parameters = dict(setting.model.named_parameters())
    filters = {name: parameters[name].detach() for name in setting.filters().values()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(setting.model, weights, x[None])
        return F.cross_entropy(logits.float() if setting.autocast else logits, y[None])

    gradients = batched(grad(loss), in_dims=(None, 0, 0))

    def run() -> Grams:
        return _grams(setting, gradients(filters, images, setting.y))

    return run


def opacus(setting: Setting) -> Pass:
    """Per-sample gradients by Opacus's hooks, which record only modules in training mode.

    Not in Opacus's strict mode, which refuses BatchNorm even in eval mode.
    """
    from opacus import GradSampleModule

    setting.freeze_the_rest()
    for module in setting.model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    wrapped = GradSampleModule(setting.model, loss_reduction="sum", strict=False)

    def run() -> Grams:
        wrapped.zero_grad()
        F.cross_entropy(setting.forward(wrapped), setting.y, reduction="sum").backward()
        parameters = dict(setting.model.named_parameters())
        return _grams(setting, {n: parameters[n].grad_sample for n in setting.filters().values()})

    return run


def backpack(setting: Setting) -> Pass:
    """Per-sample gradients by BackPACK's BatchGrad."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchGrad

    setting.freeze_the_rest()
    model, loss = extend(setting.model), extend(nn.CrossEntropyLoss(reduction="sum"))
    parameters = dict(model.named_parameters())

    def run() -> Grams:
        with extensions(BatchGrad()):
            loss(setting.forward(model), setting.y).backward()
        return _grams(setting, {n: parameters[n].grad_batch for n in setting.filters().values()})

    return run


def torch_pruning(setting: Setting) -> Pass:
    """Torch-Pruning's GroupHessianImportance by the loop of its documentation: a diagonal only."""
    from torch_pruning.pruner.importance import GroupHessianImportance

    importance = GroupHessianImportance()

    def run() -> None:
        importance.zero_grad()
        losses = F.cross_entropy(setting.forward(), setting.y, reduction="none")
        for loss in losses:
            setting.model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(setting.model)

    return run


BASELINE = "forward and backward"
PAPER = "ours: empirical, filters"
DEFAULT = "ours: logits, without u"
KEEPING = "ours: empirical, gates, keeping .grad"
METHODS: dict[str, Callable[[Setting], Pass]] = {
    BASELINE: plain,
    PAPER: partial(ours, site="weight", curvature="empirical"),
    "ours: empirical, gates": partial(ours, curvature="empirical"),
    KEEPING: ours_beside_training,
    DEFAULT: partial(ours, curvature="logits", first_order=False),
    "ours: logits, with u": partial(ours, curvature="logits"),
    "vmap": vmap,
    "Opacus": opacus,
    "BackPACK": backpack,
    "Torch-Pruning Hessian": torch_pruning,
}
PACKAGES = {
    "Opacus": "opacus",
    "BackPACK": "backpack-for-pytorch",
    "Torch-Pruning Hessian": "torch-pruning",
}
PER_SAMPLE = ("vmap", "Opacus", "BackPACK")  # other ways to per-sample gradients
# What the same S comes from, so that their results are compared.
SAME_AS_PAPER = (PAPER, *PER_SAMPLE)


def _grams(setting: Setting, gradients: dict[str, Tensor]) -> Grams:
    """S of each group from per-sample gradients [N, C, ...] of its filter."""
    parameters = dict(setting.model.named_parameters())
    found = {}
    for group, name in setting.filters().items():
        products = gradients[name] * parameters[name].detach()
        a = products.flatten(2).sum(2)
        found[group] = a.T @ a / len(a)
    return found


def _only(items: tuple) -> object:
    (item,) = items
    return item
