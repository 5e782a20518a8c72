"""Criteria that look at what the layers behind the channels make of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ccp_ext.activations import Activations, Reader, input_tap
from ccp_ext.cost import Cost, SearchedCost
from ccp_ext.criteria.base import Criterion, register
from ccp_ext.criteria.refitting import GreedyPath, RefitProblem, greedy_path
from ccp_ext.graph import Group
from ccp_ext.patches import POSITIONS, Grid, output_sizes, patch_gram

_RIDGE = 1e-2


class Consumers:
    """Second moments of what each consumer of a group reads of its channels.

    Args:
        generator: draws the output positions.
    """

    def __init__(self, model: nn.Module, group: Group, generator: torch.Generator) -> None:
        self.channels = group.channels
        self._parts = [
            _Consumer(model.get_submodule(part.module), part.module, part.index, generator)
            for part in group.consumers
        ]

    def readers(self) -> Iterator[Reader]:
        for part in self._parts:
            yield part.tap, part.add

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
    def __init__(
        self,
        layer: nn.Module,
        path: str,
        channels: tuple[tuple[int, ...], ...],
        generator: torch.Generator,
    ) -> None:
        self.layer, self.tap = layer, input_tap(layer, path)
        self._channels = torch.tensor(channels, device=layer.weight.device).flatten()
        self._generator = generator
        self._total: Tensor | float = 0.0
        self._samples = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().index_select(self.tap.channel_dim, self._channels)
        at = Grid.draw(output_sizes(self.layer, x), POSITIONS, self._generator)
        # Every position is drawn with probability 1 / prod(step).
        self._total = self._total + math.prod(at.step) * patch_gram(self.layer, x, at)
        self._samples += len(x)

    @property
    def moments(self) -> Tensor:
        """Summed over positions, averaged over the samples."""
        return self._total / self._samples

    @property
    def weight(self) -> Tensor:
        return self.layer.weight.detach()[:, self._channels].flatten(1).double()


class _Reconstruction(Criterion):
    def observation(self, model, graph) -> Activations:
        generator = torch.Generator().manual_seed(self.options.seed)
        return Activations(model, {g.name: Consumers(model, g, generator) for g in graph.groups})

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
        f"up to {POSITIONS} output positions of an image on a grid, and all channels, instead of a "
        "random sample of both; the solver replaces the greedy choice (method='greedy' of "
        "make_plan is that one)"
    )

    def _cost(self, consumers: Consumers) -> Cost:
        return Cost(2 * consumers.response_gram())


@register
class ChannelPruning(_Reconstruction):
    """min over b of 1/2 ||Y - sum_i b_i Y_i||^2 + lambda ||b||_1; nonzero b_i stay."""

    name = "channel-pruning"
    source = "He et al., ICCV 2017 (Channel Pruning)"
    summary = "LASSO on the contributions of the channels to the next layer's outputs"
    note = (
        "the path of the LASSO is followed exactly instead of raising lambda in steps; up to "
        f"{POSITIONS} output positions of an image on a grid; selection alone, on the original "
        "network's maps: "
        "the least-squares reconstruction is ccp_ext.compensation.refit"
    )

    def _cost(self, consumers: Consumers) -> Cost:
        gram = consumers.response_gram().cpu()
        return SearchedCost(2 * gram, None, partial(lasso, gram))


@register
class OSSCAR(_Reconstruction):
    name = "osscar"
    source = "Meng et al., ICML 2024 (OSSCAR)"
    summary = "block OBS: error of the next layer after its refit, one channel at a time"
    uses = ("ridge",)
    note = (
        "greedy removal only, without the optional local search by swaps; the order is that of the "
        "original network, all layers at once; ridge 0.01 of the mean diagonal, as in the code"
    )

    def _cost(self, consumers: Consumers) -> Cost:
        problems = self._problems(consumers)
        return refitted_cost(problems, Cost(u=-sum(p.singles() for p in problems)))


@register
class Refit(_Reconstruction):
    """sum_i c_i m_i + sum_{i<j} (c_ij - c_i - c_j) m_i m_j, exact for one and two channels."""

    name = "refit"
    source = "this package; block OBS (Hassibi and Stork, NeurIPS 1993) as a pairwise cost"
    summary = "pairwise error of the next layer after its refit, chosen jointly by the solver"
    note = "exact for one and for two channels, a sum over pairs for more; ridge as in osscar"
    uses = ("ridge",)

    def _cost(self, consumers: Consumers) -> Cost:
        pairs = sum(p.pairs() for p in self._problems(consumers))
        alone = pairs.diagonal()
        S = pairs - (alone + alone.unsqueeze(1))
        return Cost(S + torch.diag(3 * alone))


def refitted_cost(problems: list[RefitProblem], nearest: Cost) -> SearchedCost:
    """The exact cost after a refit of all problems' layers, searched greedily."""

    @functools.cache
    def path() -> GreedyPath:
        return greedy_path(problems)

    def search(r: int) -> Tensor:
        removed = torch.zeros(problems[0].channels, dtype=torch.bool)
        removed[path().order[:r]] = True
        return removed

    def loss(removed: Tensor) -> float:
        r = int(removed.sum())
        if removed.cpu()[path().order[:r]].all():  # known, and a curve asks for it for every r
            return float(path().losses[r])
        return sum(problem.loss(removed) for problem in problems)

    return SearchedCost(nearest.S, nearest.u, search, loss)


def lasso(gram: Tensor, r: int) -> Tensor:
    """The channels that are zero on the LASSO's path where the support is about to exceed C - r.

    min over b of 1/2 b'Gb - (G1)'b + lambda ||b||_1, for lambda falling from where b is zero: the
    homotopy of Osborne, Presnell and Turlach (2000). Where it ends early, because the support
    explains everything, the largest of the others fill up.

    Args:
        gram: G, float64 ``[C, C]``, positive semidefinite.

    Returns:
        bool ``[C]`` with r ones.
    """
    keep = len(gram) - r
    target = gram.sum(1)
    level = float(target.abs().max())
    negligible = 1e-10 * level
    # Equal columns would make the system of the support singular.
    gram = gram + 1e-12 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    b = torch.zeros_like(target)
    support = [int(target.abs().argmax())] if level > 0 and keep > 0 else []
    while support and level > negligible:
        correlation = target - gram @ b
        direction = torch.linalg.solve(gram[support][:, support], correlation[support].sign())
        step, event = _next_event(gram, correlation, b, support, direction, level)
        if event is None or (event not in support and len(support) == keep):
            break
        b[support] += step * direction
        level -= step
        if event in support:
            b[event] = 0
            support.remove(event)
        else:
            support.append(event)
    removed = torch.ones(len(gram), dtype=torch.bool)
    removed[support] = False
    idle = torch.where(removed, gram.diagonal(), -torch.inf).argsort(descending=True, stable=True)
    removed[idle[: keep - len(support)]] = False
    return removed


def _next_event(
    gram: Tensor,
    correlation: Tensor,
    b: Tensor,
    support: list[int],
    direction: Tensor,
    level: float,
) -> tuple[float, int | None]:
    """How far lambda falls until a channel enters or leaves the support, and which one."""
    slope = gram[:, support] @ direction
    enter = torch.stack([(level - correlation) / (1 - slope), (level + correlation) / (1 + slope)])
    enter[~(enter > 1e-12 * level)] = torch.inf
    steps = enter.amin(0)
    leave = -b[support] / direction
    leave[~(leave > 1e-12 * level)] = torch.inf
    steps[support] = leave
    event = int(steps.argmin())
    step = float(steps[event])
    return (level, None) if step >= level else (step, event)
