"""How long each layer takes at each width."""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ccp_ext.allocation.latency import LatencyTable, LayerTimes
from ccp_ext.counting import as_arguments, inference
from ccp_ext.cutting import CONVOLUTIONS, Cut, cut_attributes, cut_tensors, is_depthwise
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph
from ccp_ext.measure.timing import latency

# A layer of 32 by 32 widths takes a thousand timings.
MOST_STEPS = 32


def latency_table(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Tensor | Sequence[Tensor],
    widths: int | Sequence[int] | Mapping[str, Sequence[int]] = 32,
    *,
    repeats: int = 10,
    warmup: int = 3,
    timer: Callable[[nn.Module, tuple[Tensor, ...]], float] | None = None,
) -> LatencyTable:
    """Time every layer of the graph by itself at many widths, on the device of the inputs.

    Each layer is built with fewer channels and run on an input of the shape that it has in the
    model. Latency is a staircase in the widths, with steps where tiles of 8, 16 or 32 channels
    begin; ``widths`` says where to measure, and the table takes the next wider measurement for
    what lies between. Equal layers (same kind, shape and settings) are timed once.

    Args:
        model: the plain model.
        graph: from :func:`ccp_ext.trace` of it; sides of layers that belong to no group of it are
            measured at their full width only.
        example_inputs: a tensor, or the tensors of the positional arguments, on the model's device;
            the batch size and dtype that the pruned model will run with.
        widths: the sizes of each side of a layer to measure beside the full one: a step (doubled
            while it gives a side more than ``MOST_STEPS``), or a list, or a list for each layer by
            path (layers without an entry at full width only).
        repeats, warmup: of each timing, see :func:`latency`.
        timer: what times a module on its arguments, in milliseconds; None is the median of
            :func:`latency`.

    Raises:
        InputError: a bad width, an unknown layer, ``repeats`` or ``warmup`` out of range, or a
            layer that the example inputs do not reach.
    """
    arguments = as_arguments(example_inputs)
    timer = timer or (lambda m, x: latency(m, x, repeats, warmup).median)
    sides = graph.sides()
    if isinstance(widths, Mapping) and (unknown := [p for p in widths if p not in sides]):
        raise InputError(f"latency_table: widths names unknown layers {unknown}")
    seen = _layer_inputs(model, arguments, list(sides))
    device = arguments[0].device
    known: dict[str, LayerTimes] = {}
    layers = {}
    for layer in graph.layers:
        module, x = model.get_submodule(layer.module), seen[layer.module]
        asked = widths.get(layer.module, ()) if isinstance(widths, Mapping) else widths
        out, inputs = (
            _measured_widths(asked, full, side.constant if side.weights else full)
            for full, side in zip((layer.out, layer.inputs), sides[layer.module], strict=True)
        )
        if is_depthwise(module):
            out = _whole_channels(out, module)
        # The text of a convolution or linear layer tells all that its time depends on.
        key = f"{module} {tuple(x.shape)} {x.dtype} {x.stride()} {out} {inputs}"
        if key not in known:
            grid = tuple(
                tuple(timer(*_cut_layer(module, x, device, o, i)) for i in inputs) for o in out
            )
            known[key] = LayerTimes(out, inputs, grid)
        layers[layer.module] = known[key]
    return LatencyTable(
        layers=layers,
        milliseconds=timer(model, arguments),
        device=_device_name(arguments[0]),
        torch=torch.__version__,
        dtype=str(arguments[0].dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        shapes=tuple(tuple(x.shape) for x in arguments),
    )


def _layer_inputs(
    model: nn.Module, arguments: tuple[Tensor, ...], paths: Sequence[str]
) -> dict[str, Tensor]:
    """For each layer a tensor without storage like the one it reads, the first of several."""
    seen: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:

            def note(module, args, kwargs, path=path):
                x = next(iter((*args, *kwargs.values())))
                seen.setdefault(path, x.detach().to("meta"))  # shape, dtype and strides

            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        with inference(model):
            model(*arguments)
    if missing := [path for path in paths if path not in seen]:
        raise InputError(f"latency_table: the example inputs do not reach the layers {missing}")
    return seen


def _measured_widths(asked: int | Sequence[int], full: int, least: int) -> tuple[int, ...]:
    """The full width and those asked for that the side can have, which is more than ``least``."""
    if isinstance(asked, int):
        if asked < 1:
            raise InputError(f"latency_table: the step of the widths must be >= 1; got {asked!r}")
        step = asked
        while full > MOST_STEPS * step:
            step *= 2
        asked = range(step, full, step)
    for width in asked:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise InputError(f"latency_table: widths must be integers >= 1; got {width!r}")
    return tuple(sorted({width for width in asked if least < width < full} | {full}))


def _whole_channels(out: Sequence[int], module: nn.Module) -> tuple[int, ...]:
    """Widths of a depthwise convolution that are multiples of its outputs per channel."""
    each = module.out_channels // module.groups
    return tuple(sorted({-(-width // each) * each for width in out}))


def _cut_layer(
    module: nn.Module, like: Tensor, device: torch.device, out: int, inputs: int
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The layer with its first ``out`` outputs and ``inputs`` inputs, and an input that fits."""
    is_dense = isinstance(module, (*CONVOLUTIONS, nn.Linear)) and not is_depthwise(module)
    small = copy.deepcopy(module)
    x = torch.empty_like(like, device=device)
    if not is_dense or module.weight.shape[:2] != (out, inputs):
        cut = Cut(tuple(range(out)), tuple(range(inputs)) if is_dense else None)
        for name, _, tensor in cut_tensors("", module, cut):
            is_parameter = name in small._parameters
            setattr(small, name, nn.Parameter(tensor, False) if is_parameter else tensor)
        for name, value in cut_attributes(module, cut).items():
            setattr(small, name, value)
        dim, read = _channels_read(small, x, out)
        layout = sorted(range(x.dim()), key=lambda d: -x.stride(d))
        shape = [read if d == dim else size for d, size in enumerate(x.shape)]
        x = torch.empty_permuted(shape, layout, dtype=x.dtype, device=device)
    return small, (x.fill_(0.5),)


def _channels_read(layer: nn.Module, x: Tensor, out: int) -> tuple[int, int]:
    """The dimension of the layer's input that holds the channels, and how many it takes."""
    if isinstance(layer, nn.Linear):
        return x.dim() - 1, layer.in_features
    if isinstance(layer, CONVOLUTIONS):
        return x.dim() - layer.weight.dim() + 1, layer.in_channels
    return 1, out


def _device_name(x: Tensor) -> str:
    if x.is_cuda:
        return torch.cuda.get_device_name(x.device)
    return platform.processor() or platform.machine()
