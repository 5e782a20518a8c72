"""A network by name, with weights from whatever file the user has."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ccp_ext import models, surgery
from ccp_ext.errors import InputError


def model_factory(name: str, num_classes: int, in_channels: int) -> Callable[[], nn.Module]:
    """The constructor of a plain model.

    Args:
        name: one of :func:`ccp_ext.models.names`, or ``module:function``, a callable without
            arguments in an importable module of the user's.

    Raises:
        InputError: no such model, or the module or function cannot be imported.
    """
    if ":" not in name:
        return partial(models.create, name, num_classes=num_classes, in_channels=in_channels)
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"model {name!r} cannot be imported: {error}") from error


def load_model(factory: Callable[[], nn.Module], weights: str | os.PathLike[str]) -> nn.Module:
    """Build a model and fill it, in eval mode.

    Args:
        factory: constructor of the plain model.
        weights: a file of :func:`ccp_ext.save` (plain or pruned, ``.safetensors``), or a PyTorch
            checkpoint: a state dict, alone or under ``state_dict`` or ``model``, whose names may
            carry the prefix ``module.`` of DataParallel.

    Raises:
        InputError: the file is missing or unreadable, or belongs to another model.
    """
    path = Path(weights)
    if not path.is_file():
        raise InputError(f"weights {os.fspath(path)!r}: no such file")
    if path.suffix == ".safetensors":
        return surgery.load(path, factory).eval()
    model = factory()
    try:
        model.load_state_dict(_read_state_dict(path))
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines() if line.strip()][1:2]
        raise InputError(
            f"weights {os.fspath(path)!r} do not fit {type(model).__name__}: {' '.join(first)}"
        ) from error
    return model.eval()


def _read_state_dict(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"weights {os.fspath(path)!r} is not a readable PyTorch checkpoint: {reason}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(torch.is_tensor(v) for v in content.values()):
        raise InputError(f"weights {os.fspath(path)!r} holds no state dict (names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
