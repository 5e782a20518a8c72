"""Which backward passes make S: the rows a_nk and weights sigma_nk of each kind of curvature.

No loss is built on the autograd graph: the derivatives at the model's outputs, from which a
backward pass starts, have closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ccp_ext.errors import InputError

KINDS = ("logits", "sampled", "empirical", "exact")
LOSSES = ("cross_entropy", "least_squares")


@dataclass(frozen=True)
class BackwardPass:
    """One backward pass over a batch: where it starts, and which sums its derivatives feed.

    Attributes:
        seed: gives the gradient at the outputs [N, K, ...]; None for a pass that the user runs.
        sigma: weight of each sample [N] in S, or None for ones.
        gram, first_order: whether S, and whether u, takes this pass.
        counts: whether the samples are counted with this pass (once a batch).
    """

    seed: Callable[[], Tensor] | None = None
    sigma: Tensor | None = None
    gram: bool = True
    first_order: bool = True
    counts: bool = True


@dataclass(frozen=True)
class Curvature:
    """The options of :func:`ccp_ext.collect` that decide what S and u mean.

    Raises:
        InputError: an unknown kind or loss, or a number out of range.
    """

    kind: str = "logits"
    loss: str = "cross_entropy"
    first_order: bool = True
    rows: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choice("curvature", self.kind, KINDS)
        check_choice("loss", self.loss, LOSSES)
        if not isinstance(self.rows, int) or self.rows < 1:
            raise InputError(f"collect: rows must be a positive integer, got {self.rows!r}")
        is_number = isinstance(self.temperature, int | float)
        if not (is_number and self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"collect: temperature must be positive, got {self.temperature!r}")

    @property
    def users_backward(self) -> BackwardPass | None:
        """What a backward pass of the user's own summed loss is worth: None for nothing."""
        return BackwardPass() if self.kind == "empirical" else None

    def settings(self) -> dict[str, Any]:
        """The options as plain values."""
        return asdict(self)


class BatchObjective:
    """The summed loss of one batch, and the backward passes that a curvature asks for.

    Args:
        curvature: the options.
        outputs: [N, K] (or [N, K, ...]), detached.
        targets: see :meth:`ccp_ext.statistics.Statistics.backward`.
        generator: for a device, the generator of the labels or signs drawn there.

    Attributes:
        loss: summed over the batch, a scalar tensor; NaN without targets.
    """

    def __init__(
        self,
        curvature: Curvature,
        outputs: Tensor,
        targets: Tensor | None,
        generator: Callable[[torch.device], torch.Generator],
    ) -> None:
        self.curvature = curvature
        self.outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        self.targets: Tensor | None = None
        self.hard = targets is not None and not targets.is_floating_point()
        self._cross_entropy = curvature.loss == "cross_entropy"
        self._generator = generator
        self._log_f = torch.log_softmax(self.outputs, 1) if self._cross_entropy else None
        if targets is not None:
            self._check_targets(targets)
            self.targets = targets.to(outputs.device, non_blocking=True)
        elif curvature.first_order or curvature.kind in ("empirical", "exact"):
            raise InputError(
                f"stats.backward: curvature={curvature.kind!r} with first_order="
                f"{curvature.first_order} needs targets, got None"
            )
        self.loss = self._summed_loss()

    def passes(self) -> Iterator[BackwardPass]:
        """The backward passes to run, in order."""
        kind = self.curvature.kind
        if kind == "empirical" or (kind == "exact" and self._cross_entropy and self.hard):
            yield BackwardPass(self._loss_gradient)
            return
        if self.curvature.first_order:
            yield BackwardPass(self._loss_gradient, gram=False, counts=False)
        if kind == "exact":
            yield from self._class_passes()
            return
        draw = self._projection if kind == "logits" else self._sampled_gradient
        for k in range(self.curvature.rows):
            yield BackwardPass(draw, first_order=False, counts=k == 0)

    def _class_passes(self) -> Iterator[BackwardPass]:
        """sigma_k grad f_k grad f_k' = y_k grad log f_k grad log f_k': no division by f."""
        if self.outputs.dim() != 2:
            raise InputError(
                "stats.backward: curvature='exact' needs outputs [N, K], got "
                f"{list(self.outputs.shape)}"
            )
        for k in range(self.outputs.shape[1]):
            sigma = self.targets[:, k].to(self.outputs) if self._cross_entropy else None
            seed = partial(self._class_gradient, k)
            yield BackwardPass(seed, sigma, first_order=False, counts=k == 0)

    def _class_gradient(self, k: int) -> Tensor:
        seed = -self._log_f.exp() if self._cross_entropy else torch.zeros_like(self.outputs)
        seed[:, k] += 1
        return seed

    def _loss_gradient(self) -> Tensor:
        if not self._cross_entropy:
            return self.outputs - self.targets.to(self.outputs)
        f = self._log_f.exp()
        if self.hard:
            return _minus_one_hot(f, self.targets)
        y = self.targets.to(f)
        return f * y.sum(1, keepdim=True) - y

    def _projection(self) -> Tensor:
        """Random signs e: E[(J'e)(J'e)'] = J'J. Scaled so that the rows average."""
        signs = torch.empty_like(self.outputs)
        signs.bernoulli_(0.5, generator=self._generator(signs.device))
        return (2 * signs - 1) / math.sqrt(self.curvature.rows)

    def _sampled_gradient(self) -> Tensor:
        """The gradient of the loss at targets drawn from the model's own distribution."""
        scale = 1 / math.sqrt(self.curvature.rows)
        generator = self._generator(self.outputs.device)
        if not self._cross_entropy:
            return scale * torch.empty_like(self.outputs).normal_(generator=generator)
        f = torch.softmax(self.outputs / self.curvature.temperature, 1)
        by_class = f.movedim(1, -1)
        labels = torch.multinomial(by_class.reshape(-1, f.shape[1]), 1, generator=generator)
        gradient = _minus_one_hot(f, labels.view(by_class.shape[:-1]))
        return gradient * (scale / self.curvature.temperature)

    def _summed_loss(self) -> Tensor:
        if self.targets is None:
            return self.outputs.new_full((), math.nan)
        if not self._cross_entropy:
            return 0.5 * (self.outputs - self.targets.to(self.outputs)).square().sum()
        if self.hard:
            return -self._log_f.gather(1, self.targets.unsqueeze(1)).sum()
        return -(self.targets.to(self._log_f) * self._log_f).sum()

    def _check_targets(self, targets: Tensor) -> None:
        shape, classes = list(self.outputs.shape), self.outputs.shape[1]
        if not (self.hard and self._cross_entropy):
            if list(targets.shape) != shape:
                raise InputError(
                    f"stats.backward: targets must have the outputs' shape {shape}, got "
                    f"{list(targets.shape)}"
                )
            return
        expected = [shape[0], *shape[2:]]
        if list(targets.shape) != expected or targets.dtype != torch.int64:
            raise InputError(
                f"stats.backward: targets must be int64 {expected} or probabilities {shape}, got "
                f"{targets.dtype} {list(targets.shape)}"
            )
        # Reading a value back from a GPU would make the host wait for it, once every batch.
        if targets.device.type == "cpu" and targets.numel():
            low, high = targets.min().item(), targets.max().item()
            if low < 0 or high >= classes:
                raise InputError(
                    f"stats.backward: targets must lie in 0..{classes - 1}, got "
                    f"{low if low < 0 else high}"
                )


def check_choice(option: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise InputError(f"collect: {option} must be one of {', '.join(accepted)}; got {value!r}")


def _minus_one_hot(f: Tensor, labels: Tensor) -> Tensor:
    index = labels.unsqueeze(1)
    return f.scatter_add(1, index, f.new_full((), -1.0).expand_as(index))
