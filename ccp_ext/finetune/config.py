"""The schedule of a fine-tuning."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

from ccp_ext.datasets.image_set import AUGMENTATIONS
from ccp_ext.errors import InputError

SCHEDULES = ("cosine", "step")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides the result of a run, apart from the model, the data and the teacher.

    learning_rate: the peak. schedule: after ``warmup_epochs`` of linear growth, "cosine" falls to 0
    at the end of the last epoch (Loshchilov and Hutter 2017, without restarts); "step" multiplies
    by ``step_factor`` each time that a fraction in ``step_at`` of all epochs has passed.
    weight_decay: spares normalisation layers and biases (every parameter of one dimension) unless
    ``decay_norm_and_bias``. augment: None, "crop_flip" or, for photos, "resized_crop_flip"; see
    :meth:`ccp_ext.datasets.ImageSet.batches`.
    distillation_weight, temperature: with a teacher the loss is (1 - weight) * cross-entropy +
    weight * temperature^2 * KL(teacher || model), both softened by the temperature (Hinton,
    Vinyals and Dean 2015); without one they have no effect.
    auxiliary_weight: with auxiliary heads their cross-entropies, times this, are added to the
    model's loss, distilled or not (Zhuang et al. 2018); without them it has no effect.
    mixup: 0 for none, or alpha: each batch is blended with itself in another order, images and
    losses by one share drawn from Beta(alpha, alpha) (Zhang et al. 2018); train_accuracy then
    counts hits of the label with the larger share.
    ema_decay: 0 for none, or the decay a step of an exponential moving average of weights and
    buffers, which is what is validated and what the model holds at the end.
    freeze_batchnorm: BatchNorm normalises by its running statistics, as in eval mode, and keeps
    them; its scale and shift are trained all the same. After a least-squares refit, whose layers
    were fitted to these statistics, those of the batches would first undo part of the repair.
    amp: forward pass in bfloat16 autocast. channels_last: memory format of model and images.

    Raises InputError naming the option for a value out of range.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = False
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    step_at: tuple[float, ...] = (0.5, 0.75)
    step_factor: float = 0.1
    label_smoothing: float = 0.0
    distillation_weight: float = 0.5
    temperature: float = 4.0
    auxiliary_weight: float = 1.0
    mixup: float = 0.0
    ema_decay: float = 0.0
    freeze_batchnorm: bool = False
    augment: str | None = None
    seed: int = 0
    channels_last: bool = False
    amp: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.step_at, list):
            object.__setattr__(self, "step_at", tuple(self.step_at))
        for option, (accepted, fits) in _ACCEPTED.items():
            try:
                good = fits(self)
            except TypeError:
                good = False
            if not good:
                raise InputError(f"{option} must be {accepted}, got {getattr(self, option)!r}")

    def learning_rate_at(self, epoch: float) -> float:
        """The learning rate when ``epoch`` epochs (a real number below ``epochs``) have passed."""
        if epoch < self.warmup_epochs:
            return self.learning_rate * epoch / self.warmup_epochs
        if self.schedule == "step":
            passed = sum(epoch >= fraction * self.epochs for fraction in self.step_at)
            return self.learning_rate * self.step_factor**passed
        share = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# What each option accepts, in words and as a test; a TypeError in the test is a refusal too.
_ACCEPTED: dict[str, tuple[str, Callable[[FinetuneConfig], bool]]] = {
    "epochs": ("an integer of at least 1", lambda c: _is_integer(c.epochs) and c.epochs >= 1),
    "batch_size": (
        "an integer of at least 1",
        lambda c: _is_integer(c.batch_size) and c.batch_size >= 1,
    ),
    "learning_rate": ("a finite number above 0", lambda c: 0 < c.learning_rate < math.inf),
    "momentum": ("at least 0 and below 1", lambda c: 0 <= c.momentum < 1),
    "nesterov": ("False when momentum is 0", lambda c: not c.nesterov or c.momentum > 0),
    "weight_decay": ("a finite number of at least 0", lambda c: 0 <= c.weight_decay < math.inf),
    "schedule": (f"one of {', '.join(SCHEDULES)}", lambda c: c.schedule in SCHEDULES),
    "warmup_epochs": ("at least 0 and below epochs", lambda c: 0 <= c.warmup_epochs < c.epochs),
    "step_at": (
        "rising fractions between 0 and 1",
        lambda c: all(a < b for a, b in itertools.pairwise((0, *c.step_at, 1))),
    ),
    "step_factor": ("above 0 and at most 1", lambda c: 0 < c.step_factor <= 1),
    "label_smoothing": ("at least 0 and below 1", lambda c: 0 <= c.label_smoothing < 1),
    "distillation_weight": ("between 0 and 1", lambda c: 0 <= c.distillation_weight <= 1),
    "temperature": ("a finite number above 0", lambda c: 0 < c.temperature < math.inf),
    "auxiliary_weight": (
        "a finite number of at least 0",
        lambda c: 0 <= c.auxiliary_weight < math.inf,
    ),
    "mixup": ("a finite number of at least 0", lambda c: 0 <= c.mixup < math.inf),
    "ema_decay": ("at least 0 and below 1", lambda c: 0 <= c.ema_decay < 1),
    "augment": (
        f"None or {' or '.join(AUGMENTATIONS)}",
        lambda c: c.augment in (None, *AUGMENTATIONS),
    ),
    "seed": ("an integer of at least 0", lambda c: _is_integer(c.seed) and c.seed >= 0),
}
