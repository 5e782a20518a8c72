"""Criteria that look at what the layers behind the channels make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ccp_ext.activations import Activations, input_tap, patch_columns, patch_gram
from ccp_ext.cost import Cost, SearchedCost
from ccp_ext.criteria.base import Criterion, register
from ccp_ext.criteria.refitting import RefitProblem, greedy_order
from ccp_ext.graph import Group

_RIDGE = 1e-2


class Consumers:
    """Second moments of what each consumer of a group reads of its channels."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.channels = group.channels
        self.samples = 0
        self._parts = [
            _Consumer(model.get_submodule(part.module), part.module, part.index)
            for part in group.consumers
        ]

    def readers(self) -> Iterator:
        for part in self._parts:
            yield input_tap(part.layer, part.path), part.add

    def problems(self, ridge: float) -> list[RefitProblem]:
        return [RefitProblem(p.moments, p.weight, self.channels, ridge) for p in self._parts]

    def response_gram(self) -> Tensor:
        """float64 ``[C, C]``: products of the channels' contributions to the outputs.

        Contribution i is the consumer's output from channel i alone. Products are summed over
        output channels, positions and consumers, and averaged over the samples.
        """
        total = 0.0
        for part in self._parts:
            products = part.moments * (part.weight.T @ part.weight)
            step = len(products) // self.channels
            blocks = products.view(self.channels, step, self.channels, step)
            total = total + blocks.sum((1, 3))
        return total


class _Consumer:
    def __init__(self, layer: nn.Module, path: str, positions: tuple[tuple[int, ...], ...]) -> None:
        self.layer, self.path = layer, path
        self.columns = patch_columns(layer, positions).flatten()
        self.total: Tensor | float = 0.0
        self.samples = 0

    def add(self, x: Tensor) -> None:
        self.total = self.total + patch_gram(self.layer, x.detach(), self.columns)
        self.samples += len(x)

    @property
    def moments(self) -> Tensor:
        """Summed over positions, averaged over the samples."""
        return self.total / self.samples

    @property
    def weight(self) -> Tensor:
        weight = self.layer.weight.detach().flatten(1).double()
        return weight[:, self.columns.to(weight.device)]


class _Reconstruction(Criterion):
    def observation(self, model, graph) -> Activations:
        return Activations(model, {g.name: Consumers(model, g) for g in graph.groups})

    def costs(self, model, graph, data) -> dict[str, Cost]:
        return {name: self._cost(data[name]) for name in data}

    def _cost(self, consumers: Consumers) -> Cost:
        raise TypeError(f"criterion {self.name!r} does not define its costs")

    def _problems(self, consumers: Consumers) -> list[RefitProblem]:
        ridge = self.options.ridge
        return consumers.problems(_RIDGE if ridge is None else ridge)


@register
class ThiNet(_Reconstruction):
    """||sum of the removed channels' contributions||^2: S is twice their Gram matrix."""

    name = "thinet"
    source = "Luo et al., ICCV 2017 (ThiNet)"
    summary = "squared error of the next layer's outputs without the channels"
    note = (
        "all output positions and channels instead of a random sample; the solver replaces the "
        "greedy choice (method='greedy' of make_plan is that one)"
    )

    def _cost(self, consumers: Consumers) -> Cost:
        return Cost(2 * consumers.response_gram())


@register
class ChannelPruning(_Reconstruction):
    """min over b of 1/2 ||Y - sum_i b_i Y_i||^2 + lambda ||b||_1, with as many b_i as shall stay."""

    name = "channel-pruning"
    source = "He et al., ICCV 2017 (Channel Pruning)"
    summary = "LASSO on the contributions of the channels to the next layer's outputs"
    note = (
        "the path of the LASSO is followed exactly instead of raising lambda in steps; all output "
        "positions instead of a random sample; selection alone, on the original network's maps: "
        "the least-squares reconstruction is ccp_ext.compensation.refit"
    )

    def _cost(self, consumers: Consumers) -> Cost:
        gram = consumers.response_gram().cpu()
        return SearchedCost(2 * gram, None, partial(_lasso, gram))


@register
class OSSCAR(_Reconstruction):
    name = "osscar"
    source = "Meng et al., ICML 2024 (OSSCAR)"
    summary = "block OBS: error of the next layer after its refit, one channel at a time"
    note = (
        "greedy removal only, without the optional local search by swaps; the order is that of the "
        "original network, all layers at once; ridge 0.01 of the mean diagonal, as in the code"
    )

    def _cost(self, consumers: Consumers) -> Cost:
        problems = self._problems(consumers)
        alone = sum(p.pairs().diagonal() for p in problems)
        return refitted_cost(problems, Cost(u=-alone))


@register
class Refit(_Reconstruction):
    """cost = sum_i c_i m_i + sum_{i<j} (c_ij - c_i - c_j) m_i m_j, exact for one and two channels."""

    name = "refit"
    source = "this package; block OBS (Hassibi and Stork, NeurIPS 1993) as a pairwise cost"
    summary = "pairwise error of the next layer after its refit, chosen jointly by the solver"

    def _cost(self, consumers: Consumers) -> Cost:
        pairs = sum(p.pairs() for p in self._problems(consumers))
        alone = pairs.diagonal()
        S = pairs - alone - alone.unsqueeze(1)
        return Cost(S + torch.diag(3 * alone))


def refitted_cost(problems: list[RefitProblem], nearest: Cost) -> SearchedCost:
    """The exact cost after a refit of all problems' layers, searched greedily."""
    order = _once(partial(greedy_order, problems))

    def search(r: int) -> Tensor:
        removed = torch.zeros(problems[0].channels, dtype=torch.bool)
        removed[order()[:r]] = True
        return removed

    def loss(removed: Tensor) -> float:
        return sum(problem.loss(removed) for problem in problems)

    return SearchedCost(nearest.S, nearest.u, search, loss)


def _once(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    found: list[Tensor] = []

    def get() -> Tensor:
        if not found:
            found.append(compute())
        return found[0]

    return get


def _lasso(gram: Tensor, r: int) -> Tensor:
    """The channels that are zero on the LASSO's path before the support exceeds C - r.

    min over b of 1/2 b'Gb - (G1)'b + lambda ||b||_1, for lambda falling from where b is zero: the
    homotopy of Osborne, Presnell and Turlach (2000). Where it ends early, because the support
    explains everything, the largest of the others fill up.
    """
    channels = len(gram)
    target = gram.sum(1)
    b = torch.zeros_like(target)
    active: list[int] = []
    scale = gram.diagonal().mean()
    regular = gram + 1e-12 * scale * torch.eye(channels, dtype=gram.dtype)
    level = float(target.abs().max())
    negligible = 1e-10 * level
    while len(active) < channels - r and level > negligible:
        correlation = target - regular @ b
        if not active:
            active.append(int(correlation.abs().argmax()))
        signs = correlation[active].sign()
        direction = torch.linalg.solve(regular[active][:, active], signs)
        step, event = _next_event(regular, correlation, b, active, direction, level)
        b[active] += step * direction
        level -= step
        if event is None:
            break
        if event in active:
            b[event] = 0
            active.remove(event)
        else:
            active.append(event)
    removed = torch.ones(channels, dtype=torch.bool)
    removed[active] = False
    missing = int(removed.sum()) - r
    idle = torch.where(removed, gram.diagonal(), -torch.inf)
    removed[idle.argsort(descending=True, stable=True)[:missing]] = False
    return removed


def _next_event(
    gram: Tensor, correlation: Tensor, b: Tensor, active: list[int], direction: Tensor, level: float
) -> tuple[float, int | None]:
    """How far lambda falls until a channel enters or leaves the support, and which one."""
    slope = gram[:, active] @ direction
    enter = torch.stack(
        [(level - correlation) / (1 - slope), (level + correlation) / (1 + slope)]
    )
    enter[~(enter > 1e-12 * level)] = torch.inf
    steps = enter.amin(0)
    leave = -b[active] / direction
    leave[~(leave > 1e-12 * level)] = torch.inf
    steps[active] = leave
    event = int(steps.argmin())
    step = float(steps[event])
    return (level, None) if step >= level else (step, event)
