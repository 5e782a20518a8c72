"""The fine-tuning from its first epoch or its checkpoint to the last."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ccp_ext.auxiliary import AuxiliaryHeads
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import Evaluation, evaluate, place, training_flags_kept
from ccp_ext.finetune.checkpoint import identity_of, resume, save
from ccp_ext.finetune.config import FinetuneConfig
from ccp_ext.finetune.history import EpochRecord, History, epoch_log
from ccp_ext.finetune.run import Run, optimizer_of

Validation = ImageSet | Callable[[nn.Module], Evaluation | float]


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
    optimizer = optimizer_of(trained, config)
    run = Run(model, optimizer, train_set, config, device, teacher, progress, auxiliary)
    identity = identity_of(run) if checkpoint is not None else {}
    history = resume(checkpoint, identity, run)
    with (
        training_flags_kept(model),
        _teacher_ready(teacher, device),
        _reproducible(device),
        epoch_log(log, history) as write_row,
    ):
        for epoch in range(len(history), config.epochs):
            begin = time.perf_counter()
            rate, loss, accuracy = run.train_epoch(epoch)
            validation = _validate(run.outcome, validate, config, device, progress)
            seconds = time.perf_counter() - begin
            history.append(EpochRecord(epoch + 1, rate, loss, accuracy, *validation, seconds))
            if checkpoint is not None:
                save(checkpoint, identity, run, history)
            write_row(history[-1])
    if run.outcome is not model:
        model.load_state_dict(run.outcome.state_dict())
    return history


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
