"""How one module gives up channels: which tensors and attributes change."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ccp_ext.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Cut:
    """What stays of one module; None leaves that side as it is.

    Attributes:
        out: positions along dimension 0 of the weight, the bias and the running statistics, in
            increasing order.
        inputs: positions along dimension 1 of the weight, in increasing order.
        channel_padding: channels of zeros that the module adds before and after its input's.
    """

    out: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None
    channel_padding: tuple[int, int] | None = None


def is_depthwise(module: nn.Module) -> bool:
    """Whether each group of a convolution reads one channel, of several."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the sorted names and shapes of the parameters and buffers, in hexadecimal.

    Two models with equal fingerprints take the same plans.
    """
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def cut_tensors(path: str, module: nn.Module, cut: Cut) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, tensor, what stays of it) for every tensor of the module that gets smaller.

    Raises:
        InputError: the module cannot be cut so.
    """
    _check(path, module, cut)
    tensors = {**module._parameters, **module._buffers}
    for name, tensor in tensors.items():
        if tensor is None or tensor.dim() == 0:
            continue
        small = tensor.detach()
        if cut.out is not None:
            small = _take(small, 0, cut.out)
        if cut.inputs is not None and name == "weight":
            small = _take(small, 1, cut.inputs)
        if small.shape != tensor.shape:
            yield name, tensor, small


def cut_attributes(module: nn.Module, cut: Cut) -> dict[str, Any]:
    """The attributes of the module that follow from the cut, with their new values."""
    if cut.channel_padding is not None:
        return {"channel_padding": cut.channel_padding}
    if isinstance(module, _NormBase):
        return {"num_features": len(cut.out)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(cut.out)}
    if is_depthwise(module):
        groups = len(_outputs_by_input(module, cut.out))
        return {"out_channels": len(cut.out), "in_channels": groups, "groups": groups}
    unit = "features" if isinstance(module, nn.Linear) else "channels"
    sides = {f"out_{unit}": cut.out, f"in_{unit}": cut.inputs}
    return {name: len(positions) for name, positions in sides.items() if positions is not None}


def _take(tensor: Tensor, dim: int, positions: Sequence[int]) -> Tensor:
    """``tensor.index_select`` that keeps the order of the strides (channels_last stays so)."""
    index = torch.tensor(positions, dtype=torch.long, device=tensor.device)
    taken = tensor.index_select(dim, index)
    layout = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    result = torch.empty_permuted(taken.shape, layout, dtype=tensor.dtype, device=tensor.device)
    return result.copy_(taken)


def _check(path: str, module: nn.Module, cut: Cut) -> None:
    kind = type(module).__name__
    if cut.channel_padding is not None:
        if not hasattr(module, "channel_padding"):
            raise InputError(f"module {path!r} ({kind}) has no attribute channel_padding to cut")
        return
    is_layer = isinstance(module, (*CONVOLUTIONS, nn.Linear)) and not is_depthwise(module)
    if not is_layer and not is_depthwise(module) and not isinstance(module, _NormBase | nn.PReLU):
        raise InputError(f"module {path!r} ({kind}) is of no kind whose channels can be cut")
    if cut.inputs is not None and not is_layer:
        raise InputError(f"module {path!r} ({kind}) has no input channels of its own to cut")
    if is_layer and getattr(module, "groups", 1) != 1:
        raise InputError(f"module {path!r} is a grouped convolution, which cannot be cut")
    _check_positions(path, "out", cut.out, _out_size(module))
    if is_layer:
        _check_positions(path, "in", cut.inputs, module.weight.shape[1])
    if is_depthwise(module):
        _check_equal_blocks(path, module, cut.out)


def _out_size(module: nn.Module) -> int:
    if isinstance(module, _NormBase):
        return module.num_features
    return module.weight.shape[0]


def _check_positions(path: str, side: str, kept: Sequence[int] | None, size: int) -> None:
    if kept is not None and (not kept or kept[0] < 0 or kept[-1] >= size):
        raise InputError(f"module {path!r} has {size} positions along {side!r}; got {list(kept)}")


def _check_equal_blocks(path: str, module: nn.Module, kept: Sequence[int]) -> None:
    if len(set(_outputs_by_input(module, kept).values())) > 1:
        raise InputError(
            f"module {path!r} makes {module.out_channels // module.groups} channels of each input "
            f"channel, and must keep equally many of each that it still reads; got {list(kept)}"
        )


def _outputs_by_input(module: nn.Module, kept: Sequence[int]) -> Counter[int]:
    """How many of the kept outputs a depthwise convolution makes of each input channel."""
    return Counter(position // (module.out_channels // module.groups) for position in kept)
