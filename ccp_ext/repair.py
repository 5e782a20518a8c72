"""Repair of a pruned model without training, as steps that a user names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ccp_ext.compensation import (
    MEMORY,
    Refitted,
    fold_means,
    reestimate_batchnorm,
    refit,
    refit_modules,
)
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError

NONE = "none"
# In the order in which they make sense, and what the model is after each.
STEPS = {
    "fold": "folded",
    "refit-linear": "refitted linearly",
    "refit": "refitted",
    "refit-modules": "modules refitted",
    "batchnorm": "re-estimated",
}
# By the name of a refit its keywords; "refit" takes Gauss-Newton steps.
REFITS: dict[str, dict[str, int]] = {"refit-linear": {"joint": 0}, "refit": {}}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fold": fold_means,
    **dict.fromkeys(REFITS, refit),
    "refit-modules": refit_modules,
    "batchnorm": reestimate_batchnorm,
}
# What :func:`apply` passes on, or a refit itself reports.
_PASSED = {"memory", "batch_size", "progress"}


def parse(text: str, further: Sequence[str] = ()) -> tuple[str, ...]:
    """The steps in a text such as "refit+batchnorm"; "none" has none.

    Args:
        further: steps beside :data:`STEPS` that the caller knows, to follow these.

    Raises:
        InputError: an unknown step, or steps that are not in their order.
    """
    steps = () if text == NONE else tuple(text.split("+"))
    known = (*STEPS, *further)
    if list(steps) != [step for step in known if step in steps]:
        raise InputError(
            f"repair must be {NONE}, or steps of {', '.join(known)} in this order joined by +; "
            f"got {text!r}"
        )
    return steps


def options(text: str, further: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """By step the options that :func:`apply` leaves at their defaults or sets by itself.

    Args:
        further: as of :func:`parse`; such steps are left out.
    """
    return {
        step: _defaults(_FUNCTIONS[step]) | REFITS.get(step, {})
        for step in parse(text, further)
        if step in STEPS
    }


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _PASSED
    }


def check_memory(memory: float) -> None:
    """Raise InputError unless it is a number of GiB."""
    if not 0 < memory < math.inf:
        raise InputError(f"repair_memory must be a positive number of GiB, got {memory!r}")


def apply(
    step: str,
    plain: nn.Module,
    slim: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 128,
    memory: float = MEMORY,
    progress: bool = True,
) -> Refitted | None:
    """Take one of :data:`STEPS` on ``slim``, in place; a refit tells what it did.

    Args:
        plain: the model before it was pruned; not needed for "batchnorm".
        images: training images.
        batch_size: of all steps but "refit" and "refit-linear".
        memory: GiB, of a refit; see :func:`ccp_ext.refit` and :func:`ccp_ext.refit_modules`.
    """
    if step in REFITS:
        return refit(plain, slim, images, memory=memory, progress=progress, **REFITS[step])
    if step == "refit-modules":
        refit_modules(plain, slim, images, memory=memory, batch_size=batch_size, progress=progress)
    elif step == "fold":
        fold_means(plain, slim, images, batch_size=batch_size, progress=progress)
    else:
        reestimate_batchnorm(slim, images.batches(batch_size), progress=progress)
    return None
