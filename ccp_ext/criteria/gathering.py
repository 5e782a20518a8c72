"""One pass over images fills what a criterion asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ccp_ext import files
from ccp_ext.criteria.base import Criterion
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.progress import tqdm
from ccp_ext.statistics import collect

if TYPE_CHECKING:
    from ccp_ext.graph import ChannelGraph

SECONDS_BETWEEN_CHECKPOINTS = 20.0
# At least so many times as long as the last writing took.
_WRITING = 20


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
        checkpoint: where the sums so far are kept now and then, and read at the start: those of
            the gradient statistics, and of an observation that has a ``state_dict``.
        keep_rows: of the gradient statistics; see :func:`ccp_ext.collect`.

    Raises:
        InputError: the loss is not finite, or the checkpoint is damaged.
    """
    options = criterion.statistics()
    if options is not None:
        stats = collect(model, graph, **options, keep_rows=keep_rows)
        total_loss = torch.zeros((), device=next(model.parameters()).device)

        def add(x: Tensor, y: Tensor) -> None:
            total_loss.add_(stats.backward(model(x), y))

        kept = _Checkpoint(checkpoint, stats, partial(_require_finite, total_loss))
        return _pass(model, stats, add, images, batch_size, kept, "statistics", progress)
    observation = criterion.observation(model, graph)
    if observation is None:
        return None
    observation.prepare(images, batch_size=batch_size, progress=progress)
    kept = _Checkpoint(checkpoint if hasattr(observation, "state_dict") else None, observation)
    update = observation.update
    return _pass(model, observation, update, images, batch_size, kept, criterion.name, progress)


def _pass(
    model: nn.Module,
    target: Any,
    add: Callable[[Tensor, Tensor], None],
    images: ImageSet,
    batch_size: int,
    kept: _Checkpoint,
    name: str,
    progress: bool,
) -> Any:
    """``target`` after the batches that its checkpoint lacks."""
    total = images.num_batches(batch_size)
    with target:
        start = kept.load()
        device = next(model.parameters()).device
        batches = images.batches(batch_size, device=device, start=start)
        bar = tqdm(batches, name, total, initial=start, disable=not progress, leave=False)
        for done, (x, y) in enumerate(bar, start + 1):
            add(x, y)
            if done == total or kept.is_due():
                kept.save(done, min(done * batch_size, len(images)))
    return target


class _Checkpoint:
    """The file of a pass's sums.

    Args:
        path: None for none.
        check: called before each writing with the number of images so far.
    """

    def __init__(
        self, path: Path | None, target: Any, check: Callable[[int], None] = lambda images: None
    ) -> None:
        self.path, self._target, self._check = path, target, check
        self._next = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS

    def load(self) -> int:
        """Give the target its sums so far; returns the number of batches they hold."""
        if self.path is None or not self.path.exists():
            return 0
        state = files.load_tensors(self.path)
        try:
            self._target.load_state_dict(state["sums"])
            return state["batches"]
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise InputError(
                f"{self.path} is damaged or of another run ({error}); remove it to start anew"
            ) from error

    def is_due(self) -> bool:
        return time.monotonic() > self._next

    def save(self, batches: int, images: int) -> None:
        self._check(images)
        begin = time.monotonic()
        if self.path is not None:
            with files.atomic_path(self.path) as temporary:
                torch.save({"sums": self._target.state_dict(), "batches": batches}, temporary)
        # Large sums are written less often.
        pause = max(SECONDS_BETWEEN_CHECKPOINTS, _WRITING * (time.monotonic() - begin))
        self._next = time.monotonic() + pause


def _require_finite(total_loss: Tensor, images: int) -> None:
    # Without targets there is no loss to look at, and none of the criteria goes without them.
    if not torch.isfinite(total_loss):
        raise InputError(
            f"statistics: the loss is {total_loss.item()} within the first {images} images; check "
            "the weights, the data and their normalisation"
        )
