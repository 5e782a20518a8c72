"""Accuracy and loss of a classifier on an image set."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.progress import tqdm


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """accuracy: top-1, in percent; loss: mean cross-entropy in nats; count: images seen."""

    accuracy: float
    loss: float
    count: int


def evaluate(
    model: nn.Module,
    image_set: ImageSet,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate ``model`` in eval mode; the training flags of its modules are then as before.

    model: maps float32 ``[B, C, H, W]`` to logits ``[B, K]`` with K above every label.
    device: the model is moved there and stays; by default it is used where it is. A caller may
    hold torch.autocast around the call.

    Raises InputError when the outputs are not such logits, or are not finite.
    """
    device = place(model, device)
    correct, loss = 0, 0.0
    batches = image_set.batches(batch_size, device=device)
    total = image_set.num_batches(batch_size)
    with training_flags_kept(model), torch.no_grad():
        model.eval()
        for x, y in tqdm(batches, "evaluate", total, disable=not progress, leave=False):
            logits = model(x)
            check_logits(logits, x, image_set)
            logits = logits.float()
            if not torch.isfinite(logits).all():
                raise InputError(
                    "evaluate: the model's outputs are not finite (NaN or infinity), so it has no "
                    "accuracy"
                )
            correct += int((logits.argmax(dim=1) == y).sum())
            loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
    count = len(image_set)
    return Evaluation(100 * correct / count, loss / count, count)


def check_logits(logits: object, x: Tensor, image_set: ImageSet) -> None:
    """Raise InputError unless ``logits`` are ``[B, K]`` for the batch ``x``, K classes or more."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model must return logits of shape ({len(x)}, K), got {shape}")
    highest = int(image_set.labels.max())
    if highest >= logits.shape[1]:
        raise InputError(
            f"the model returns {logits.shape[1]} logits, but {image_set.name} has the label "
            f"{highest}"
        )


def place(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Move ``model`` to ``device``, or find where it is; returns the device.

    Raises InputError for a device that this machine or this build of torch does not have.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        # A build without CUDA raises AssertionError.
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"device {str(device)!r} cannot be used: {reason}") from error
        model.to(device)
        return torch.device(device)
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


@contextlib.contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its own ``training`` flag back at the end, whatever happened."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
