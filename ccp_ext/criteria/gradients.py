"""What criteria see in backward passes beyond the statistics of :func:`ccp_ext.collect`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ccp_ext.evaluation import training_flags_kept
from ccp_ext.graph import ChannelGraph, Slice
from ccp_ext.observation import Observer
from ccp_ext.patches import patches


class GradientObservation:
    """Base of an observation: inside ``with`` the model is in eval mode with frozen parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._exit = contextlib.ExitStack()

    def prepare(self, images, *, batch_size: int, progress: bool) -> None:
        """Nothing to do: one pass is all."""

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(training_flags_kept(self.model))
            stack.enter_context(gradients_only_of((), self.model))
            self.model.eval()
            self._attach(stack)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def _attach(self, stack: contextlib.ExitStack) -> None:
        """Put hooks into the model; ``stack`` takes them out."""


@contextlib.contextmanager
def gradients_only_of(wanted: Iterable[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Let only these parameters require gradients; at the end all are as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in wanted}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


class MiniBatchGram(GradientObservation):
    """Sum over mini-batches of b b', with b the mean loss's derivatives along a group's gates.

    Args:
        size: samples in a mini-batch; a batch of the pass is cut into such.

    Attributes:
        count: mini-batches seen.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, size: int) -> None:
        super().__init__(model)
        self.size, self.count = size, 0
        device = next(model.parameters()).device
        self._sums = {
            group.name: torch.zeros(
                group.channels, group.channels, dtype=torch.float64, device=device
            )
            for group in graph.groups
        }
        self._batch: dict[str, Tensor] = {}
        taps = {group.name: group.gate_taps for group in graph.groups}
        self._observer = Observer(
            model, taps, of_filter=False, freeze=True, begin=dict, deliver=self._receive
        )

    def mean(self, group: str) -> Tensor:
        """float64 ``[C, C]``."""
        return self._sums[group] / self.count

    def update(self, x: Tensor, y: Tensor) -> None:
        self._batch = {}
        cross_entropy(self.model(x), y, reduction="sum").backward()
        for group, a in self._batch.items():
            means = torch.stack([part.mean(0) for part in a.double().split(self.size)])
            self._sums[group] += means.T @ means
        self.count += -(-len(x) // self.size)

    def _attach(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(self._observer)

    def _receive(self, _: object, group: str, a: Tensor) -> None:
        """The derivatives of coupled channels add up."""
        self._batch[group] = self._batch.get(group, 0) + a


class WeightFisher(GradientObservation):
    """Sum over the samples of the squared gradient of each weight in the groups' producers.

    A sample's weight gradient is (gradient at the output)' (patches of the input). Labels are drawn
    from the model's softmax. The calls of a module that runs several times count as samples.

    Attributes:
        count: samples seen.
    """

    # So many values of per-sample gradients are formed at a time.
    _VALUES = 1 << 24

    def __init__(self, model: nn.Module, graph: ChannelGraph, seed: int) -> None:
        super().__init__(model)
        self.count = 0
        self._layers = _producers(model, graph)
        self._sums = {
            layer.weight: torch.zeros_like(layer.weight, dtype=torch.float64, requires_grad=False)
            for layer in self._layers
        }
        self._generator = torch.Generator().manual_seed(seed)

    def mean(self, weight: nn.Parameter) -> Tensor:
        """float64, in the shape of the weight."""
        return self._sums[weight] / self.count

    def update(self, x: Tensor, y: Tensor) -> None:
        logits = self.model(x.requires_grad_() * 1)
        probabilities = logits.detach().softmax(1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=self._generator).squeeze(1)
        cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()
        self.count += len(x)

    def _attach(self, stack: contextlib.ExitStack) -> None:
        for layer in self._layers:
            stack.callback(layer.register_forward_hook(self._watch).remove)

    def _watch(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen = args[0].detach()
        output.register_hook(lambda gradient: self._add(layer, seen, gradient))

    def _add(self, layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
        convolution = layer.weight.dim() > 2
        if convolution:
            gradient = gradient.flatten(2)  # [N, O, P]
        else:
            gradient = gradient.reshape(len(x), -1, gradient.shape[-1]).mT
        positions = gradient.shape[2]
        values = layer.weight.numel() + positions * layer.weight[0].numel()
        step = max(1, self._VALUES // values)
        for part, g in zip(x.split(step), gradient.split(step), strict=True):
            squares = (g @ patches(layer, part)).square()
            self._sums[layer.weight] += squares.sum(0, dtype=torch.float64).view_as(layer.weight)


class HessianProduct(GradientObservation):
    """Sums over the samples of the gradient g and of H w, for the weights w of all producers.

    H is the Hessian of the cross-entropy in these weights together; one product with it is one
    more backward pass.

    Attributes:
        count: samples seen.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        super().__init__(model)
        self.count = 0
        self._weights = [layer.weight for layer in _producers(model, graph)]
        self._sums = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self._weights]

    def means(self, weight: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian product, in the shape of the weight."""
        k = next(k for k, w in enumerate(self._weights) if w is weight)
        gradient, product = self._sums[k]
        return gradient / self.count, product / self.count

    def update(self, x: Tensor, y: Tensor) -> None:
        with gradients_only_of(self._weights, self.model):
            loss = cross_entropy(self.model(x), y, reduction="sum")
            gradients = torch.autograd.grad(loss, self._weights, create_graph=True)
            along = sum(
                (g * w.detach()).sum() for g, w in zip(gradients, self._weights, strict=True)
            )
            products = torch.autograd.grad(along, self._weights)
        for (g_sum, p_sum), g, p in zip(self._sums, gradients, products, strict=True):
            g_sum += g.detach()
            p_sum += p
        self.count += len(x)


def _producers(model: nn.Module, graph: ChannelGraph) -> list[nn.Module]:
    """Every layer that makes channels of a group, once."""
    parts: list[Slice] = [part for group in graph.groups for part in group.producers]
    return [model.get_submodule(path) for path in dict.fromkeys(part.module for part in parts)]
