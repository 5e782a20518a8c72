"""How many images a refit can hold at each layer, in a given amount of memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccp_ext.compensation.batches import Batch
from ccp_ext.compensation.layers import Layer
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.passes import Tapped
from ccp_ext.patches import Grid

GIBIBYTE = 2**30
# Share of the memory, at most, that one batch takes on its way from layer to layer.
_IN_PASSING = 0.25
# Share of the memory, at most, that a layer's normal equations take.
_EQUATIONS = 0.5
# Bytes for each element of a matrix of normal equations: it, its copies and factor, in float64.
_EQUATION_BYTES = 40
# Every batch has two threads.
MOST_BATCHES = 256


class Ledger:
    """Bytes of the tensors that are made while it is kept and still alive.

    Attributes:
        now: at this moment.
        most: at any time.
    """

    def __init__(self) -> None:
        self.now = self.most = 0
        self._storages: set[int] = set()

    def keep(self) -> contextlib.AbstractContextManager[Any]:
        """Inside the context the tensors of this thread count."""
        return _Watch(self._count)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._storages:
            self._storages.add(id(storage))
            weakref.finalize(storage, self._forget, id(storage), storage.nbytes()).atexit = False
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def _forget(self, storage: int, size: int) -> None:
        self._storages.remove(storage)
        self.now -= size


class _Watch(TorchDispatchMode):
    """Shows the storages of what operators return, but for those of their arguments."""

    def __init__(self, show: Callable[[torch.UntypedStorage], None]) -> None:
        super().__init__()
        self._show = show

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in given:
                self._show(storage)
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]


@dataclass(frozen=True)
class Holding:
    """What of the images is in memory.

    Attributes:
        batch_size: images that go from layer to layer together.
        batches: how many of these wait at each layer, by its path.
    """

    batch_size: int
    batches: dict[str, int]


def too_wide(features: int, memory: float) -> bool:
    """Whether normal equations of that side do not fit into ``memory`` bytes."""
    return _EQUATION_BYTES * features**2 > _EQUATIONS * memory


def hold(
    models: tuple[Tapped, Tapped],
    layers: Sequence[Layer],
    images: ImageSet,
    positions: int | None,
    batch_size: int,
    memory: float,
) -> Holding:
    """As many images at each layer as fit, by passes of one image.

    Args:
        models: plain and slim.
        positions: of each image that a refit looks at.
        batch_size: the largest.
        memory: bytes.

    Raises:
        InputError: the memory does not suffice for one image.
    """
    waiting, passing = bytes_of_one(models, layers, images, positions)
    size = min(batch_size, len(images), int(_IN_PASSING * memory / passing))
    if not size:
        raise InputError(
            f"refit: memory must be at least {passing / _IN_PASSING / GIBIBYTE:.3g} GiB for images "
            f"of shape {tuple(images.images.shape[1:])}, got {memory / GIBIBYTE:.3g}"
        )
    batches = {}
    for layer in layers:
        room = memory - size * passing - _EQUATION_BYTES * layer.widest**2
        fitting = int(room / (size * waiting[layer.path]))
        batches[layer.path] = max(1, min(fitting, images.num_batches(size), MOST_BATCHES))
    return Holding(size, batches)


def bytes_of_one(
    models: tuple[Tapped, Tapped], layers: Sequence[Layer], images: ImageSet, positions: int | None
) -> tuple[dict[str, int], int]:
    """What one image takes while it waits at each layer for others, and at most at any time."""
    ledger, waiting = Ledger(), {}
    draw = partial(Grid.draw, count=positions, generator=torch.Generator())
    whole = dict.fromkeys((layer.path for layer in layers), 1)
    with ledger.keep(), contextlib.ExitStack() as stack:
        x = images.normalise(images.images[:1])
        one = Batch(*models, layers, x, draw, whole, within=ledger.keep)
        stack.enter_context(contextlib.closing(one))
        for layer in layers:
            before = ledger.now
            step = one.branch(layer) if layer.branch else None
            during = ledger.now
            del step
            for _ in one.samples(layer):
                pass
            waiting[layer.path] = max(before, during, ledger.now)
    return waiting, ledger.most
