"""Epochs and steps of a fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ccp_ext.auxiliary import AuxiliaryHeads
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import check_logits
from ccp_ext.finetune.config import FinetuneConfig
from ccp_ext.progress import tqdm

# Shares that add up to 1, each with the labels [B] it stands for.
Blend = tuple[tuple[float, Tensor], ...]


@dataclasses.dataclass
class Run:
    """The state of a fine-tuning, and its steps."""

    model: nn.Module
    optimizer: torch.optim.SGD
    train_set: ImageSet
    config: FinetuneConfig
    device: torch.device
    teacher: nn.Module | None
    progress: bool
    auxiliary: AuxiliaryHeads | None = None

    def __post_init__(self) -> None:
        self.average: AveragedModel | None = None
        if self.config.ema_decay:
            average = get_ema_multi_avg_fn(self.config.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    @property
    def outcome(self) -> nn.Module:
        """What the run has made so far: the averaged model if there is one."""
        return self.model if self.average is None else self.average.module

    def train_epoch(self, epoch: int) -> tuple[float, float, float]:
        """Returns (last learning rate, mean loss, accuracy in percent)."""
        config, count = self.config, len(self.train_set)
        seed = _epoch_seed(config.seed, epoch)
        # Seeding each epoch anew makes dropout after a resumption that of an unbroken run.
        _seed_generators(seed, self.device)
        self._set_training_flags()
        batches = self.train_set.batches(
            config.batch_size, shuffle=True, seed=seed, augment=config.augment, device=self.device
        )
        steps = self.train_set.num_batches(config.batch_size)
        title = f"epoch {epoch + 1}/{config.epochs}"
        loss_sum, correct = 0.0, 0
        with self._heads_attached(), tqdm(batches, title, steps, disable=not self.progress) as bar:
            for step, (x, y) in enumerate(bar):
                if len(x) < 2 <= count:  # BatchNorm needs two values
                    count -= 1
                    continue
                rate = self._set_learning_rate(epoch, step, steps)
                loss, hits = self._step(x, y)
                if not math.isfinite(loss):
                    raise InputError(
                        f"the loss became {loss} in epoch {epoch + 1}, step {step + 1} of {steps}, "
                        f"at learning rate {rate:.3g}; a lower learning_rate or some "
                        f"warmup_epochs may help"
                    )
                loss_sum += loss * len(x)
                correct += hits
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._check_weights(epoch, rate)
        return rate, loss_sum / count, 100 * correct / count

    def _set_training_flags(self) -> None:
        self.model.train()
        if self.config.freeze_batchnorm:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _heads_attached(self) -> contextlib.AbstractContextManager[None]:
        if self.auxiliary is None:
            return contextlib.nullcontext()
        self.auxiliary.train()
        return self.auxiliary.attached(self.model)

    def _set_learning_rate(self, epoch: int, step: int, steps: int) -> float:
        # In the middle of the step, so that neither a warm-up nor a one-step epoch trains at 0.
        rate = self.config.learning_rate_at(epoch + (step + 0.5) / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _step(self, x: Tensor, y: Tensor) -> tuple[float, int]:
        """One update; returns the loss and the number of right answers."""
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x, blend = self._mixed(x, y)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            logits = self.model(x)
            check_logits(logits, x, self.train_set)
            with torch.no_grad():
                taught = self.teacher(x) if self.teacher is not None else None
        logits = logits.float()
        loss = self._loss(logits, blend, taught)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        _, likeliest = max(blend, key=lambda part: part[0])
        return loss.item(), int((logits.argmax(dim=1) == likeliest).sum())

    def _mixed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Blend]:
        alpha = self.config.mixup
        if not alpha:
            return x, ((1.0, y),)
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        order = torch.randperm(len(x)).to(x.device)
        return torch.lerp(x[order], x, share), ((share, y), (1 - share, y[order]))

    def _loss(self, logits: Tensor, blend: Blend, taught: Tensor | None) -> Tensor:
        loss = self._cross_entropy(logits, blend)
        if taught is not None:
            loss = self._distilled(loss, logits, taught)
        if self.auxiliary is not None:
            heads = sum(self._cross_entropy(z.float(), blend) for z in self.auxiliary())
            loss = loss + self.config.auxiliary_weight * heads
        return loss

    def _distilled(self, loss: Tensor, logits: Tensor, taught: Tensor) -> Tensor:
        config = self.config
        if taught.shape != logits.shape:
            raise InputError(
                f"the teacher's logits have shape {tuple(taught.shape)}, the model's "
                f"{tuple(logits.shape)}; both need the same classes"
            )
        softened = (log_softmax(z.float() / config.temperature, 1) for z in (logits, taught))
        divergence = kl_div(*softened, reduction="batchmean", log_target=True)
        weight = config.distillation_weight
        return (1 - weight) * loss + weight * config.temperature**2 * divergence

    def _cross_entropy(self, logits: Tensor, blend: Blend) -> Tensor:
        smoothing = self.config.label_smoothing
        return sum(
            share * cross_entropy(logits, y, label_smoothing=smoothing) for share, y in blend
        )

    def _check_weights(self, epoch: int, rate: float) -> None:
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise InputError(
                    f"{name} is no longer finite at the end of epoch {epoch + 1}, at learning "
                    f"rate {rate:.3g}; a lower learning_rate or some warmup_epochs may help"
                )


def optimizer_of(model: nn.Module, config: FinetuneConfig) -> torch.optim.SGD:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError("the model has no parameter that requires a gradient: nothing to train")
    decayed = [p for p in trained if p.ndim > 1 or config.decay_norm_and_bias]
    spared = [p for p in trained if p.ndim <= 1 and not config.decay_norm_and_bias]
    return torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that this run draws from, and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _epoch_seed(seed: int, epoch: int) -> int:
    """A hash, so that run ``seed`` at epoch 1 does not repeat run ``seed + 1`` at epoch 0."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
