"""Reading tensors inside a model in forward passes: no gradients, no copies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ccp_ext.cutting import CONVOLUTIONS
from ccp_ext.errors import InputError
from ccp_ext.evaluation import place, training_flags_kept
from ccp_ext.graph import Group, Tap

if TYPE_CHECKING:
    from ccp_ext.datasets.image_set import ImageSet

# Patches of about so many values are formed at a time.
_PATCH_VALUES = 1 << 24


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


# --- what a layer computes from patches ----------------------------------------------------------


def patches(layer: nn.Module, x: Tensor, at: Tensor | None = None) -> Tensor:
    """What each output position of a convolution or linear layer reads of its input.

    Args:
        layer: convolution (not grouped) or linear layer, with weight ``[O, I, *kernel]``.
        x: its input, ``[N, I, *positions]``, or ``[N, ..., I]`` of a linear layer; or some of the
            input's channels.
        at: int64 ``[P]``, output positions as in the flattened output; all by default.

    Returns:
        ``[N, P, F]`` with F = I * (size of the kernel), in the order of ``weight.flatten(1)``: the
        output at a position is the product of a row with the weight, plus the bias.
    """
    if not isinstance(layer, CONVOLUTIONS):
        x = x.reshape(len(x), -1, x.shape[-1])
        return x if at is None else x[:, at]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for k, size in enumerate(layer.kernel_size):
        dilation = layer.dilation[k]
        window = x.unfold(2 + k, dilation * (size - 1) + 1, layer.stride[k])
        x = window[..., ::dilation]
    dims = len(layer.kernel_size)
    if at is None:
        return x.movedim(1, 1 + dims).flatten(1, dims).flatten(2)  # [N, P, I, *kernel] flattened
    x = x.movedim(1, 1 + dims)
    return x[:, *torch.unravel_index(at, x.shape[1 : 1 + dims])].flatten(2)


def patch_gram(layer: nn.Module, x: Tensor) -> Tensor:
    """The sum over samples and output positions of p p', with p the :func:`patches`.

    Args:
        layer, x: as in :func:`patches`; x may hold fewer channels than the layer reads.

    Returns:
        float64 ``[F, F]``. Products are formed in float32, or float64 for float64 inputs.
    """
    total = x.new_zeros((), dtype=torch.float64)
    for samples in sample_blocks(layer, x):
        rows = _at_least_float32(patches(layer, x[samples])).flatten(0, 1)
        total = total + (rows.T @ rows).double()
    return total


def sample_blocks(layer: nn.Module, x: Tensor) -> Iterator[slice]:
    """Slices of the samples of a layer's input, few enough that their patches fit in memory."""
    step = max(1, _PATCH_VALUES // (x[0].numel() * math.prod(layer.weight.shape[2:])))
    return (slice(first, first + step) for first in range(0, len(x), step))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
