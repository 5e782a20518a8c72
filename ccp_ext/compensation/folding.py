"""The means of what was removed, folded into the next layer."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor, nn

from ccp_ext.activations import input_tap, read_at
from ccp_ext.compensation.layers import Layer, as_input, evaluating, find_layers
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.progress import tqdm


def fold_means(
    model: nn.Module,
    slim: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 128,
    progress: bool = True,
) -> int:
    """Give each layer of ``slim`` behind a cut the mean of what the removed inputs contributed.

    The mean over images and output positions goes to the layer's bias, or where it has none, to
    the running mean of the BatchNorm that reads its output, and that nothing else should read.
    Exact for removed channels that are constant, except where a convolution pads them.

    Args:
        model: the plain model.
        slim: the pruned one, from :func:`ccp_ext.prune`; its weights behind the cuts are the plain
            model's.

    Returns:
        The number of layers that were changed; those with neither bias nor BatchNorm are not.

    Raises:
        InputError: ``slim`` is not a pruned ``model``.
    """
    layers = [
        layer for layer in find_layers(model, slim, images) if layer.cut and layer.takes_constant
    ]
    means = _lost_means(model, layers, images, batch_size, progress)
    for layer in layers:
        layer.set_constant(means[layer.path])
    return len(layers)


def _lost_means(
    model: nn.Module, layers: list[Layer], images: ImageSet, batch_size: int, progress: bool
) -> dict[str, Tensor]:
    """The mean, float64 ``[O]``, of what each layer's removed inputs contribute in ``model``."""
    sums = {layer.path: [0.0, 0] for layer in layers}

    def add(layer: Layer, x: Tensor) -> None:
        lost = layer.lost(x).transpose(0, 1).flatten(1)
        sums[layer.path][0] += lost.sum(1, dtype=torch.float64)
        sums[layer.path][1] += lost.shape[1]

    with contextlib.ExitStack() as stack:
        for layer in layers:
            tap = input_tap(layer.plain, layer.path)
            stack.callback(read_at(model, tap, partial(add, layer)).remove)
        stack.enter_context(evaluating(model))
        batches = images.batches(batch_size)
        total = images.num_batches(batch_size)
        for x, _ in tqdm(batches, "means", total, disable=not progress, leave=False):
            model(as_input(model, x))
    return {path: total / count for path, (total, count) in sums.items()}
