"""A network by name, with weights from whatever file the user has."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ccp_ext import models, surgery
from ccp_ext.errors import InputError
from ccp_ext.files import load_tensors


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
    except Exception as error:  # importing runs the user's code
        raise InputError(f"model {name!r} cannot be imported: {error}") from error


def load_model(factory: Callable[[], nn.Module], weights: str | os.PathLike[str]) -> nn.Module:
    """Build a model and fill it, in eval mode.

    Args:
        factory: constructor of the plain model.
        weights: a file of :func:`ccp_ext.save` (plain or pruned, ``.safetensors``), or a PyTorch
            checkpoint: a state dict, alone or under ``state_dict`` or ``model``, whose names may
            carry the prefix ``module.`` of DataParallel.

    Raises:
        InputError: the file is missing or unreadable, belongs to another model, or holds NaN or
            infinity; or the constructor fails.
    """
    path = Path(weights)
    if not path.is_file():
        raise InputError(f"weights {os.fspath(path)!r}: no such file")
    if path.suffix == ".safetensors":
        return _check_finite(surgery.load(path, lambda: _build(factory)), path).eval()
    model = _build(factory)
    try:
        model.load_state_dict(_read_state_dict(path))
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines() if line.strip()][1:2]
        raise InputError(
            f"weights {os.fspath(path)!r} do not fit {type(model).__name__}: {' '.join(first)}"
        ) from error
    return _check_finite(model, path).eval()


def _read_state_dict(path: Path) -> Mapping[str, Any]:
    content = load_tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(torch.is_tensor(v) for v in content.values()):
        raise InputError(f"weights {os.fspath(path)!r} holds no state dict (names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _build(factory: Callable[[], nn.Module]) -> nn.Module:
    """Call a constructor that may be the user's."""
    try:
        model = factory()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the model's constructor fails: {error!r}") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model's constructor must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def _check_finite(model: nn.Module, path: Path) -> nn.Module:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"weights {os.fspath(path)!r}: {name} is not finite")
    return model
