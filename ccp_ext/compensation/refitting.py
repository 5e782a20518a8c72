"""Layers behind the cuts, solved anew by least squares in the order of the forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ccp_ext.activations import input_tap
from ccp_ext.compensation.layers import Layer, as_input, evaluating, find_layers
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.graph import Tap, addends
from ccp_ext.least_squares import Regression
from ccp_ext.passes import Tapped, Walk, tapped
from ccp_ext.patches import POSITIONS, Grid, as_maps

LAYERS = ("cut", "cut+classifier", "all")


def refit(
    model: nn.Module,
    slim: nn.Module,
    images: ImageSet,
    *,
    layers: str = "cut+classifier",
    residual: bool = True,
    ridge: float = 1e-3,
    positions: int | None = POSITIONS,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = True,
) -> dict[str, float]:
    """Solve layers of ``slim`` anew, so that they give the plain model's outputs again.

    Layer by layer in the order of the forward pass: the inputs are those that the slim model
    computes with the layers already refitted, the targets are the plain model's outputs of this
    layer (asymmetric reconstruction, He et al., ICCV 2017; OSSCAR, Meng et al., ICML 2024):

        min over W, b of ||Y - W X - b||^2 + lambda ||W - W_old||^2

    with lambda = ``ridge`` times the mean diagonal of XX'. The constant b goes where
    :func:`fold_means` puts it; that BatchNorm gets the plain model's statistics apart from the
    shift. Sums are kept in float64.

    Both models run over the images once: the passes halt at each layer until it is solved (see
    :mod:`ccp_ext.passes`). So the activations of all images at one depth, of both models, lie in
    memory together. A layer whose output is added to one computed after it costs one more pass
    through the block with both; one that runs several times, through all layers before it.

    Args:
        model: the plain model.
        slim: the pruned one, from :func:`ccp_ext.prune`; changed in place.
        images: training images.
        layers: "cut": those that lost inputs; "cut+classifier": and the last one, which reads what
            has changed; "all": every one from the first cut on. Grouped convolutions never.
        residual: where the output of a layer is added to another tensor, as to a block's shortcut,
            make up for the error of that tensor too: the target is what makes the sum the plain
            model's (see :func:`ccp_ext.graph.addends`).
        ridge: weight of the old values, at least 0.
        positions: at most so many output positions of each image count, on a grid that is drawn
            for each layer and batch; neighbours tell almost the same. None for all.
        seed: of the grids.

    Returns:
        By layer, the share of its targets' variance that the refit leaves unexplained.

    Raises:
        InputError: ``slim`` is not a pruned ``model``, or an option is out of range.
    """
    if layers not in LAYERS:
        raise InputError(f"refit: layers must be one of {', '.join(LAYERS)}; got {layers!r}")
    if not ridge >= 0:
        raise InputError(f"refit: ridge must be a number of 0 or more, got {ridge!r}")
    if positions is not None and positions < 1:
        raise InputError(f"refit: positions must be 1 or more, or None, got {positions!r}")
    chosen = _choose(find_layers(model, slim, images), layers)
    if residual and chosen:
        example = images.normalise(images.images[:1])
        others = addends(model, as_input(model, example))
        for layer in chosen:
            layer.addend = others.get(layer.path)
        _find_blocks(slim, chosen, as_input(slim, example))
    generator = torch.Generator().manual_seed(seed)
    draw = partial(Grid.draw, count=positions, generator=generator)
    unexplained: dict[str, float] = {}
    with _two_models(model, slim, chosen) as models, contextlib.ExitStack() as stack:
        batches = [
            stack.enter_context(contextlib.closing(_Batch(*models, chosen, x, draw)))
            for x, _ in images.batches(batch_size)
        ]
        for layer in tqdm(chosen, "refit", disable=not progress, leave=False):
            sums = Regression()
            for batch in batches:
                for x, target, at in batch.samples(layer):
                    sums.add(layer.slim, x, target, at)
            unexplained[layer.path] = _fit(layer, sums, ridge)
    return unexplained


def _choose(order: list[Layer], layers: str) -> list[Layer]:
    cuts = [k for k, layer in enumerate(order) if layer.cut]
    if not cuts:
        return []
    if layers == "all":
        return order[cuts[0] :]
    last = [len(order) - 1] if layers == "cut+classifier" else []
    return [order[k] for k in sorted({*cuts, *last})]


def _find_blocks(slim: nn.Module, layers: list[Layer], x: Tensor) -> None:
    """Set the block of each layer that runs before its addend is there, by a pass on x."""
    around = {layer.path: _around(layer) for layer in layers if layer.addend}
    entered: set[str] = set()
    late: set[str] = set()
    takes_one: dict[str, bool] = {}

    def enter_block(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        once = path not in takes_one
        takes_one[path] = once and not kwargs and len(args) == 1 and isinstance(args[0], Tensor)

    def receive(key: tuple[str, str], tensor: Tensor) -> None:
        kind, path = key
        if kind == "input":
            entered.add(path)
        elif path in entered:
            late.add(path)

    taps = {("addend", layer.path): layer.addend for layer in layers if layer.addend}
    taps |= {("input", layer.path): input_tap(layer.slim, layer.path) for layer in layers}
    with evaluating(slim), tapped(slim, taps) as model, contextlib.ExitStack() as stack:
        for path in {path for paths in around.values() for path in paths}:
            hook = partial(enter_block, path)
            block = slim.get_submodule(path)
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        model.receive = receive
        slim(x)
    for layer in layers:
        if layer.path in late:
            layer.block = next((p for p in around[layer.path] if takes_one[p]), None)


def _around(layer: Layer) -> list[str]:
    """The modules, but for the whole model, with the layer and its addend; the innermost first."""
    names = layer.path.split(".")
    paths = [".".join(names[:k]) for k in range(len(names) - 1, 0, -1)]
    return [path for path in paths if layer.addend.module.startswith(path + ".")]


def _fit(layer: Layer, sums: Regression, ridge: float) -> float:
    """Give the layer its new weight and constant; returns the share of variance not explained."""
    old = layer.slim.weight.detach().flatten(1).double()
    weight, constant, unexplained = sums.solve(old, ridge, layer.takes_constant)
    layer.slim.weight.data.copy_(weight.view_as(layer.slim.weight))
    if layer.takes_constant:
        layer.set_constant(constant, with_bias=True)
    return unexplained


@contextlib.contextmanager
def _two_models(
    model: nn.Module, slim: nn.Module, layers: list[Layer]
) -> Iterator[tuple[Tapped, Tapped]]:
    """Both models in eval mode, with taps at what the layers need; keys are (kind, path)."""
    added = {("addend", layer.path): layer.addend for layer in layers if layer.addend}
    blocks = {("block", layer.path): Tap(layer.block, "input") for layer in layers if layer.block}
    outputs = {("output", layer.path): Tap(layer.path) for layer in layers}
    inputs = {("input", layer.path): input_tap(layer.slim, layer.path) for layer in layers}
    with (
        evaluating(model),
        evaluating(slim),
        tapped(model, outputs | added) as plain,
        tapped(slim, blocks | inputs | added) as pruned,
    ):
        yield plain, pruned


class _Batch:
    """The passes of both models over one batch of images; they follow the order of the layers."""

    def __init__(
        self,
        model: Tapped,
        slim: Tapped,
        layers: list[Layer],
        x: Tensor,
        draw: Callable[[Sequence[int]], Grid],
    ) -> None:
        self._slim, self._x, self._draw = slim, x, draw
        self._left = {layer.path: layer for layer in layers}
        self._drawn: dict[tuple[str, Sequence[int]], Grid] = {}
        self._plain_walk = Walk(model, as_input(model.model, x), partial(self._keep, of_plain=True))
        self._slim_walk = Walk(slim, as_input(slim.model, x), self._keep)

    def samples(self, layer: Layer) -> Iterator[tuple[Tensor, Tensor, Grid]]:
        """Inputs, targets ``[N, O, ...]`` and output positions of each call of the layer."""
        entry, output, addend = ((kind, layer.path) for kind in ("input", "output", "addend"))
        plain, slim = self._plain_walk, self._slim_walk
        plain.until(output, layer.calls)
        slim.until(entry)
        with contextlib.ExitStack() as stack:
            if layer.calls > 1 or (layer.addend and addend not in slim.seen):
                # What is needed comes only after the layer, at which the pass has to wait.
                slim = stack.enter_context(contextlib.closing(self._again(layer)))
                slim.until(entry, layer.calls)
            targets = plain.seen[output]
            if layer.addend:
                plain.until(addend)
                slim.until(addend)
                ((target, at),) = targets
                error = plain.seen[addend][0][0] - slim.seen[addend][0][0]
                targets = [(target + layer.before_norm(error), at)]
            for x, (target, at) in zip(slim.seen[entry], targets, strict=True):
                yield x, target, at
        del self._left[layer.path]
        for walk in (self._plain_walk, self._slim_walk):
            for kind in ("block", "input", "output", "addend"):
                walk.seen.pop((kind, layer.path), None)

    def close(self) -> None:
        self._plain_walk.close()
        self._slim_walk.close()

    def _again(self, layer: Layer) -> Walk:
        """Another pass through the slim model, from the layer's block on if it has one."""
        model, keep = self._slim.model, partial(self._keep, copy=True)
        if layer.block is None:
            return Walk(self._slim, as_input(model, self._x), keep)
        (x,) = self._slim_walk.seen["block", layer.path]
        return Walk(self._slim, x, keep, model.get_submodule(layer.block))

    def _keep(
        self, key: tuple[str, str], tensor: Tensor, *, of_plain: bool = False, copy: bool = False
    ) -> Tensor | tuple[Tensor, Grid] | None:
        """Of a tensor at a tap what is needed: inputs whole, of the others the positions drawn."""
        kind, path = key
        layer = self._left.get(path)
        if layer is None:
            return None
        if kind == "block":
            return None if copy else tensor.clone()
        if kind == "input":
            return tensor.clone() if copy else tensor
        maps = as_maps(layer.slim, tensor)
        at = self._grid(path, maps.shape[2:])
        maps = at.of(maps)
        return maps[:, layer.outputs] if of_plain else maps.clone(), at

    def _grid(self, path: str, sizes: Sequence[int]) -> Grid:
        if (path, sizes) not in self._drawn:
            self._drawn[path, sizes] = self._draw(sizes)
        return self._drawn[path, sizes]
