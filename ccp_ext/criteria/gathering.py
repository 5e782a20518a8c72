"""One pass over images fills what a criterion asks for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ccp_ext import files
from ccp_ext.criteria.base import Criterion
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.statistics import Statistics, collect

if TYPE_CHECKING:
    from ccp_ext.graph import ChannelGraph

SECONDS_BETWEEN_CHECKPOINTS = 20.0


def gather(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: Criterion,
    images: ImageSet,
    *,
    batch_size: int = 128,
    checkpoint: Path | None = None,
    keep_rows: bool = False,
    progress: bool = True,
) -> Any:
    """What a criterion's ``costs`` takes as its third argument.

    The gradient statistics if it has ``statistics()``, else its ``observation``, filled by one
    pass; None if it needs no data. The model stays where it is, and batches go there.

    Args:
        checkpoint: where gradient statistics are kept every few seconds, and read at the start;
            an observation begins anew.
        keep_rows: of the gradient statistics; see :func:`ccp_ext.collect`.

    Raises:
        InputError: the loss is not finite.
    """
    options = criterion.statistics()
    if options is not None:
        options = {**options, "keep_rows": keep_rows}
        return _statistics(model, graph, options, images, batch_size, checkpoint, progress)
    observation = criterion.observation(model, graph)
    if observation is None:
        return None
    device = next(model.parameters()).device
    observation.prepare(images, batch_size=batch_size, progress=progress)
    batches = images.batches(batch_size, device=device)
    total = images.num_batches(batch_size)
    with observation:
        for x, y in tqdm(batches, criterion.name, total, disable=not progress, leave=False):
            observation.update(x, y)
    return observation


def _statistics(
    model: nn.Module,
    graph: ChannelGraph,
    options: dict[str, Any],
    images: ImageSet,
    batch_size: int,
    checkpoint: Path | None,
    progress: bool,
) -> Statistics:
    device = next(model.parameters()).device
    with collect(model, graph, **options) as stats:
        start = _resume(stats, checkpoint)
        saved, total_loss = time.monotonic(), torch.zeros((), device=device)
        batches = images.batches(batch_size, device=device, start=start)
        bar = tqdm(
            batches,
            "statistics",
            images.num_batches(batch_size),
            initial=start,
            disable=not progress,
            leave=False,
        )
        for done, (x, y) in enumerate(bar, start + 1):
            total_loss += stats.backward(model(x), y)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _require_finite(total_loss, done * batch_size)
                _save(stats, checkpoint, done)
                saved = time.monotonic()
        _require_finite(total_loss, len(images))
        _save(stats, checkpoint, images.num_batches(batch_size))
    return stats


def _resume(stats: Statistics, checkpoint: Path | None) -> int:
    """Load the sums so far; returns the number of batches they hold."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    state = files.load_tensors(checkpoint)
    try:
        stats.load_state_dict(state["statistics"])
        return state["batches"]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise InputError(
            f"{checkpoint} is damaged or of another run ({error}); remove it to start anew"
        ) from error


def _save(stats: Statistics, checkpoint: Path | None, batches: int) -> None:
    if checkpoint is not None:
        with files.atomic_path(checkpoint) as temporary:
            torch.save({"statistics": stats.state_dict(), "batches": batches}, temporary)


def _require_finite(total_loss: Tensor, images: int) -> None:
    # Without targets there is no loss to look at, and none of the criteria goes without them.
    if not torch.isfinite(total_loss):
        raise InputError(
            f"statistics: the loss is {total_loss.item()} within the first {images} images; check "
            "the weights, the data and their normalisation"
        )
