"""Recovery of a pruned model by training, with distillation if wanted, resumable bit for bit."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ccp_ext.auxiliary import AuxiliaryHeads
from ccp_ext.datasets.image_set import AUGMENTATIONS, ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import Evaluation, check_logits, evaluate, place, training_flags_kept
from ccp_ext.files import atomic_path, load_tensors

SCHEDULES = ("cosine", "step")
CHECKPOINT_FORMAT = "ccp_ext.finetune/1"

# Shares that add up to 1, each with the labels [B] it stands for.
Blend = tuple[tuple[float, Tensor], ...]
Validation = ImageSet | Callable[[nn.Module], Evaluation | float]


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides the result of a run, apart from the model, the data and the teacher.

    learning_rate: the peak. schedule: after ``warmup_epochs`` of linear growth, "cosine" falls to 0
    at the end of the last epoch (Loshchilov and Hutter 2017, without restarts); "step" multiplies
    by ``step_factor`` each time that a fraction in ``step_at`` of all epochs has passed.
    weight_decay: spares normalisation layers and biases (every parameter of one dimension) unless
    ``decay_norm_and_bias``. augment: None or "crop_flip".
    distillation_weight, temperature: with a teacher the loss is (1 - weight) * cross-entropy +
    weight * temperature^2 * KL(teacher || model), both softened by the temperature (Hinton,
    Vinyals and Dean 2015); without one they have no effect.
    auxiliary_weight: with auxiliary heads their cross-entropies, times this, are added to the
    model's (Zhuang et al. 2018); without them it has no effect.
    mixup: 0 for none, or alpha: each batch is blended with itself in another order, images and
    losses by one share drawn from Beta(alpha, alpha) (Zhang et al. 2018); train_accuracy then
    counts hits of the label with the larger share.
    ema_decay: 0 for none, or the decay a step of an exponential moving average of weights and
    buffers, which is what is validated and what the model holds at the end.
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
    "augment": ("None or crop_flip", lambda c: c.augment in (None, *AUGMENTATIONS)),
    "seed": ("an integer of at least 0", lambda c: _is_integer(c.seed) and c.seed >= 0),
}


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One epoch, counted from 1.

    learning_rate: of its last step. train_loss, train_accuracy (percent): means over the epoch's
    batches as trained on, in nats. validation_*: at its end, None where not measured.
    seconds: time of training and validation.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float


History = list[EpochRecord]


def finetune(
    model: nn.Module,
    train_set: ImageSet,
    config: FinetuneConfig | None = None,
    *,
    device: torch.device | str | None = None,
    teacher: nn.Module | None = None,
    auxiliary: AuxiliaryHeads | None = None,
    validate: Validation | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> History:
    """Train ``model`` in place by SGD on the cross-entropy, and return one record an epoch.

    model: maps float32 ``[B, C, H, W]`` to logits ``[B, K]``; moved to ``device`` if one is given.
    config, settings: a FinetuneConfig, by default the plain one, and fields to replace in it:
    ``finetune(model, data, epochs=40, learning_rate=0.02)``.
    teacher: a classifier of the same classes to distil from, used in eval mode.
    auxiliary: heads that read the model, trained along with it and of no use afterwards.
    validate: after each epoch, an image set to evaluate on or a function of the model that returns
    an Evaluation or an accuracy in percent.
    checkpoint: a file written at the end of each epoch, whole at any moment. Where it exists, the
    run continues from it and ends with the same weights, to the bit, as a run never interrupted.
    log: a CSV file with a row for each epoch, written as it ends.

    The data's order, the augmentation and dropout are functions of the seed and the epoch; the
    global random state is left alone. The training flags of all modules are as before at the end.

    Raises InputError for an option out of range, for a checkpoint of another run (other settings,
    data, teacher, layer shapes or starting weights), and when loss or weights stop being finite;
    the last checkpoint then remains.
    """
    config = dataclasses.replace(config or FinetuneConfig(), **settings)
    for option, path in (("checkpoint", checkpoint), ("log", log)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InputError(f"{option}: the folder of {os.fspath(path)} does not exist")
    if teacher is model:
        raise InputError("the teacher is the model itself; give a copy made before it was pruned")
    device = place(model, device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if auxiliary is not None:
        auxiliary.to(device)
    trained = nn.ModuleList([model] if auxiliary is None else [model, auxiliary])
    optimizer = _optimizer(trained, config)
    run = _Run(model, optimizer, train_set, config, device, teacher, progress, auxiliary)
    identity = run.identity() if checkpoint is not None else {}
    history = _resume(checkpoint, identity, run)
    with (
        training_flags_kept(model),
        _teacher_ready(teacher, device),
        _reproducible(device),
        _epoch_log(log, history) as write_row,
    ):
        for epoch in range(len(history), config.epochs):
            begin = time.perf_counter()
            rate, loss, accuracy = run.train_epoch(epoch)
            validation = _validate(run.outcome, validate, config, device, progress)
            seconds = time.perf_counter() - begin
            history.append(EpochRecord(epoch + 1, rate, loss, accuracy, *validation, seconds))
            if checkpoint is not None:
                _save(checkpoint, identity, run, history)
            write_row(history[-1])
    if run.outcome is not model:
        model.load_state_dict(run.outcome.state_dict())
    return history


@dataclasses.dataclass
class _Run:
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
        self.model.train()
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
        config = self.config
        loss = self._cross_entropy(logits, blend)
        if self.auxiliary is not None:
            heads = sum(self._cross_entropy(z.float(), blend) for z in self.auxiliary())
            loss = loss + config.auxiliary_weight * heads
        if taught is None:
            return loss
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

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued; norms only nearly."""
        data = self.train_set
        return {
            "settings": {**dataclasses.asdict(self.config), "step_at": list(self.config.step_at)},
            "data": {
                "name": data.name,
                "split": data.split,
                "count": len(data),
                "labels": zlib.crc32(data.labels.cpu().numpy().tobytes()),
            },
            "model": _shapes(self.model),
            "start": _norms(self.model),
            "teacher": _norms(self.teacher) if self.teacher is not None else {},
            "auxiliary": _norms(self.auxiliary) if self.auxiliary is not None else {},
        }


def _optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.SGD:
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


def _validate(
    model: nn.Module,
    validate: Validation | None,
    config: FinetuneConfig,
    device: torch.device,
    progress: bool,
) -> tuple[float | None, float | None]:
    """Returns (loss, accuracy in percent), None for what is not measured."""
    if validate is None:
        return None, None
    if isinstance(validate, ImageSet):
        result = evaluate(
            model, validate, batch_size=config.batch_size, device=device, progress=progress
        )
    else:
        with training_flags_kept(model), torch.no_grad():
            result = validate(model.eval())
    if isinstance(result, Evaluation):
        return result.loss, result.accuracy
    return None, float(result)


@contextlib.contextmanager
def _teacher_ready(teacher: nn.Module | None, device: torch.device) -> Iterator[None]:
    if teacher is None:
        yield
        return
    place(teacher, device)
    with training_flags_kept(teacher):
        teacher.eval()
        yield


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Keep the global random state, and let cuDNN use deterministic algorithms only."""
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = flags


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


def _save(
    path: str | os.PathLike[str], identity: dict[str, Any], run: _Run, history: History
) -> None:
    content = {
        "format": CHECKPOINT_FORMAT,
        "identity": identity,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "auxiliary": None if run.auxiliary is None else run.auxiliary.state_dict(),
        "average": None if run.average is None else run.average.state_dict(),
        "history": [dataclasses.asdict(record) for record in history],
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def _resume(path: str | os.PathLike[str] | None, identity: dict[str, Any], run: _Run) -> History:
    """Bring ``run`` to the state in ``path``; an empty history where there is no such file."""
    if path is None or not Path(path).exists():
        return []
    content = _read_checkpoint(path)
    _check_same_run(path, content["identity"], identity)
    run.model.load_state_dict(content["model"])
    run.optimizer.load_state_dict(content["optimizer"])
    if run.auxiliary is not None:
        run.auxiliary.load_state_dict(content["auxiliary"])
    if run.average is not None:
        run.average.load_state_dict(content["average"])
    return [EpochRecord(**record) for record in content["history"]]


def _read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"checkpoint {os.fspath(path)} was not written by finetune")
    return content


def _check_same_run(
    path: str | os.PathLike[str], there: dict[str, Any], here: dict[str, Any]
) -> None:
    """Raise InputError naming the first difference between two identities."""

    def refuse(difference: str) -> None:
        raise InputError(
            f"checkpoint {os.fspath(path)} belongs to another run ({difference}); give the same "
            f"inputs as then, another file name, or delete it"
        )

    for part in ("settings", "data", "model"):
        for key in here[part] | there[part]:
            then, now = there[part].get(key), here[part].get(key)
            if then != now:
                refuse(f"{part}: {key} is {then} there and {now} here")
    for part, what in (
        ("teacher", "the teacher"),
        ("auxiliary", "the auxiliary heads that the run began with"),
        ("start", "the model the run began with"),
    ):
        # Nearly, not exactly: what is computed on a GPU before may differ in the last bits.
        if there[part].keys() != here[part].keys() or not all(
            math.isclose(there[part][name], norm, rel_tol=1e-3) for name, norm in here[part].items()
        ):
            refuse(f"{what} had other weights")


def _shapes(model: nn.Module) -> dict[str, str]:
    return {
        name: f"{value.dtype} {list(value.shape)}" for name, value in model.state_dict().items()
    }


def _norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norm of each floating-point tensor in the state."""
    return {
        name: float(torch.linalg.vector_norm(value.double()))
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }


@contextlib.contextmanager
def _epoch_log(
    path: str | os.PathLike[str] | None, past: History
) -> Iterator[Callable[[EpochRecord], None]]:
    """Yield a function that writes a row to the CSV file ``path``; without a path it does nothing.

    The file begins anew with ``past``: rows after the checkpoint are about to be trained again.
    """
    if path is None:
        yield lambda record: None
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)

        def write(*records: EpochRecord) -> None:
            writer.writerows(map(dataclasses.astuple, records))
            file.flush()

        writer.writerow(field.name for field in dataclasses.fields(EpochRecord))
        write(*past)
        yield write
