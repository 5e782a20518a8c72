"""The file from which an interrupted fine-tuning goes on."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ccp_ext.errors import InputError
from ccp_ext.files import atomic_path, load_tensors
from ccp_ext.finetune.history import EpochRecord, History
from ccp_ext.finetune.run import Run

FORMAT = "ccp_ext.finetune/1"


def identity_of(run: Run) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued; norms only nearly."""
    data = run.train_set
    return {
        "settings": {**dataclasses.asdict(run.config), "step_at": list(run.config.step_at)},
        "data": {
            "name": data.name,
            "split": data.split,
            "count": len(data),
            "labels": zlib.crc32(data.labels.cpu().numpy().tobytes()),
        },
        "model": _shapes(run.model),
        "start": _norms(run.model),
        "teacher": _norms(run.teacher) if run.teacher is not None else {},
        "auxiliary": _norms(run.auxiliary) if run.auxiliary is not None else {},
    }


def save(
    path: str | os.PathLike[str], identity: dict[str, Any], run: Run, history: History
) -> None:
    content = {
        "format": FORMAT,
        "identity": identity,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "auxiliary": None if run.auxiliary is None else run.auxiliary.state_dict(),
        "average": None if run.average is None else run.average.state_dict(),
        "history": [dataclasses.asdict(record) for record in history],
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def resume(path: str | os.PathLike[str] | None, identity: dict[str, Any], run: Run) -> History:
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
    if not isinstance(content, dict) or content.get("format") != FORMAT:
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
