"""Reading tensors inside a model in forward passes: no gradients, no copies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ccp_ext.cutting import CONVOLUTIONS
from ccp_ext.errors import InputError
from ccp_ext.evaluation import place, training_flags_kept
from ccp_ext.graph import Group, Tap
from ccp_ext.progress import tqdm

if TYPE_CHECKING:
    from ccp_ext.datasets.image_set import ImageSet


@dataclass(frozen=True)
class View:
    """Where the maps of a group's channels can be read.

    Attributes:
        tap: the tensor.
        positions: group channel i is made of the tensor's channels ``positions[i]`` (several where
            maps were flattened before a linear layer); None: it is channel i.
    """

    tap: Tap
    positions: tuple[tuple[int, ...], ...] | None = None

    def maps(self, tensor: Tensor) -> Tensor:
        """The group's maps ``[N, C, ...]`` in the tensor, ``[N, C]`` of single positions."""
        maps = tensor.detach().movedim(self.tap.channel_dim, 1)
        if self.positions is None:
            return maps
        index = torch.tensor(self.positions, device=maps.device)
        owned = maps.index_select(1, index.flatten()).unflatten(1, index.shape)
        return owned.squeeze(2) if index.shape[1] == 1 else owned


Reader = tuple[Tap, Callable[[Tensor], None]]


class Accumulator(Protocol):
    """Sums up what it sees of one group."""

    def readers(self) -> Iterable[Reader]:
        """The tensors to see, each with the function that gets it in every forward pass."""
        ...


def map_views(model: nn.Module, group: Group) -> tuple[View, ...]:
    """Where a group's maps are read after their activation.

    The gates, if one module makes the channels. The gates of coupled channels lie before the
    addition and so before its activation; these channels are read where the consumers read them.
    """
    if not group.coupled:
        indices = [
            None if t.index is None else tuple((i,) for i in t.index) for t in group.gate_taps
        ]
        return tuple(map(View, group.gate_taps, indices))
    return tuple(
        View(input_tap(model.get_submodule(part.module), part.module), part.index)
        for part in group.consumers
    )


def input_tap(layer: nn.Module, path: str) -> Tap:
    """The input of a convolution or linear layer, with its channels."""
    return Tap(path, "input", 1 if isinstance(layer, CONVOLUTIONS) else -1)


class Activations(Mapping):
    """Hands tensors to accumulators while the model runs; use it with ``with``.

    Inside the block the model is in eval mode.

    Args:
        model: the network.
        accumulators: by group.

    Raises:
        InputError: the model lacks a module that an accumulator wants to see.
    """

    def __init__(self, model: nn.Module, accumulators: Mapping[str, Accumulator]) -> None:
        self.model = model
        self._accumulators = dict(accumulators)
        self._exit = contextlib.ExitStack()

    def __getitem__(self, group: str) -> Any:
        return self._accumulators[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._accumulators)

    def __len__(self) -> int:
        return len(self._accumulators)

    def prepare(self, images: ImageSet, *, batch_size: int, progress: bool) -> None:
        """Nothing to do: one pass is all."""

    def __enter__(self) -> Activations:
        with contextlib.ExitStack() as stack:
            stack.enter_context(training_flags_kept(self.model))
            self.model.eval()
            for accumulator in self._accumulators.values():
                for tap, receive in accumulator.readers():
                    stack.callback(read_at(self.model, tap, receive).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Run the model on a batch; labels are not needed."""
        with torch.no_grad():
            self.model(x)


def observe(
    model: nn.Module,
    accumulators: Mapping[str, Accumulator],
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    *,
    progress: bool = True,
) -> Activations:
    """One forward pass over ``batches`` (inputs, or tuples that begin with them).

    Returns:
        The accumulators, by group.
    """
    device = place(model, None)
    with Activations(model, accumulators) as seen:
        for batch in tqdm(batches, "activations", disable=not progress, leave=False):
            x = batch if isinstance(batch, Tensor) else batch[0]
            seen.update(x.to(device))
    return seen


def read_at(
    model: nn.Module, tap: Tap, receive: Callable[[Tensor], None]
) -> torch.utils.hooks.RemovableHandle:
    """Let ``receive`` have the tensor at ``tap`` in every forward pass, before others change it.

    Raises:
        InputError: the model lacks the module.
    """
    module = dict(model.named_modules()).get(tap.module)
    if module is None:
        raise InputError(f"the model has no module {tap.module!r} whose {tap.port} could be read")
    if tap.port == "input":

        def read_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            receive(args[0] if args else next(iter(kwargs.values())))

        return module.register_forward_pre_hook(read_input, with_kwargs=True)

    def read_output(module: nn.Module, args: tuple, output: Tensor) -> None:
        receive(output)

    return module.register_forward_hook(read_output)
