"""Layers behind the cuts, solved anew by least squares in the order of the forward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ccp_ext.activations import input_tap
from ccp_ext.compensation.branches import Branch, norm_factor
from ccp_ext.compensation.layers import Layer, as_input, evaluating, find_layers
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.graph import Feeder, Tap, addends, feeders
from ccp_ext.least_squares import Regression
from ccp_ext.passes import Tapped, Walk, tapped
from ccp_ext.patches import POSITIONS, Grid, as_maps

LAYERS = ("cut", "cut+classifier", "all")

# Output positions that determine a Gauss-Newton step; about so many, of all images together.
_JOINT_POSITIONS = 1 << 18


def refit(
    model: nn.Module,
    slim: nn.Module,
    images: ImageSet,
    *,
    layers: str = "cut+classifier",
    residual: bool = True,
    ridge: float = 1e-3,
    positions: int | None = POSITIONS,
    joint: int = 8,
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

    Where a convolution that lost inputs reads relu(BatchNorm(convolution)), what that other one
    computes is no longer the best for the channels that are left: before the layer is solved, both
    take a Gauss-Newton step together toward the layer's targets (see
    :mod:`ccp_ext.compensation.gauss_newton`; the nonlinear reconstruction of Zhang et al., TPAMI
    2016, extended to the layer before). No labels and no loss of the network enter.

    Both models run over the images once: the passes halt at each layer until it is solved (see
    :mod:`ccp_ext.passes`). So the activations of all images at one depth, of both models, lie in
    memory together. A layer whose output is added to one computed after it costs one more pass
    through the block with both, or two for a step; one that runs several times, through all layers
    before it.

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
        joint: iterations of the conjugate gradients that solve for the Gauss-Newton step, at
            least 0, which leaves it out. Some images of every batch take part.
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
    if joint < 0:
        raise InputError(f"refit: joint must be a number of iterations, 0 or more, got {joint!r}")
    chosen = _choose(find_layers(model, slim, images), layers)
    example = images.normalise(images.images[:1])
    if joint and any(layer.cut for layer in chosen):
        found = feeders(model, as_input(model, example))
        for layer in chosen:
            layer.branch = _branch(slim, layer, found.get(layer.path))
    if any(layer.branch for layer in chosen):
        _drop_crossed_branches(slim, chosen, as_input(slim, example))
    if residual and chosen:
        others = addends(model, as_input(model, example))
        for layer in chosen:
            layer.addend = others.get(layer.path)
        _find_blocks(slim, chosen, as_input(slim, example))
    generator = torch.Generator().manual_seed(seed)
    share = math.ceil(_JOINT_POSITIONS / images.num_batches(batch_size))
    draw = partial(Grid.draw, count=positions, generator=generator)
    unexplained: dict[str, float] = {}
    with _two_models(model, slim, chosen) as models, contextlib.ExitStack() as stack:
        batches = [
            stack.enter_context(contextlib.closing(_Batch(*models, chosen, x, draw, share)))
            for x, _ in images.batches(batch_size)
        ]
        for layer in tqdm(chosen, "refit", disable=not progress, leave=False):
            if layer.branch:
                layer.branch.improve([batch.branch(layer) for batch in batches], ridge, joint)
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


def _branch(slim: nn.Module, layer: Layer, feeder: Feeder | None) -> Branch | None:
    """None if the layer was not cut or has no place for a constant."""
    if feeder is None or not layer.cut or not layer.takes_constant:
        return None
    factor = torch.ones_like(layer.outputs, dtype=layer.slim.weight.dtype)
    for plain, _ in layer.norms.values():
        factor = norm_factor(plain)[layer.outputs]
    return Branch.of(slim, feeder, layer.slim, factor)


def _drop_crossed_branches(slim: nn.Module, layers: list[Layer], x: Tensor) -> None:
    """Leave out branches inside of which another layer of these runs, by a pass on x.

    For that one's sake the pass has gone beyond the branch's first convolution before its turn.
    """
    order: list[tuple[str, str]] = []
    taps = {("feed", layer.path): _entry(layer) for layer in layers if layer.branch}
    taps |= {("input", layer.path): input_tap(layer.slim, layer.path) for layer in layers}
    with evaluating(slim), tapped(slim, taps) as model:
        model.receive = lambda key, _: order.append(key)
        slim(x)
    for layer in layers:
        if layer.branch:
            within = order[order.index(("feed", layer.path)) : order.index(("input", layer.path))]
            if any(kind == "input" for kind, _ in within):
                layer.branch = None


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
    taps |= {("input", layer.path): _entry(layer) for layer in layers}
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
    """The modules, but for the whole model, with the layer, its branch and its addend; the
    innermost first."""
    names = layer.path.split(".")
    paths = [".".join(names[:k]) for k in range(len(names) - 1, 0, -1)]
    inner = [layer.addend.module, _entry(layer).module]
    return [path for path in paths if all(module.startswith(path + ".") for module in inner)]


def _entry(layer: Layer) -> Tap:
    """Where the pass halts first for the layer: before its branch, or itself."""
    if layer.branch:
        return Tap(layer.branch.path, "input")
    return input_tap(layer.slim, layer.path)


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
    feeds = {("feed", layer.path): _entry(layer) for layer in layers if layer.branch}
    with (
        evaluating(model),
        evaluating(slim),
        tapped(model, outputs | added) as plain,
        tapped(slim, blocks | added | feeds | inputs) as pruned,
    ):
        yield plain, pruned


class _Seen(NamedTuple):
    """What stays of a layer's output, or of what it is added to.

    Attributes:
        maps, at: at the positions drawn, of all images.
        whole: at all positions, of as many images as a branch's step needs.
    """

    maps: Tensor
    at: Grid
    whole: Tensor


def _keys(layer: Layer) -> tuple[tuple[str, str], ...]:
    """Of a layer's input, its output, what that is added to, its branch's and block's inputs."""
    return tuple((kind, layer.path) for kind in ("input", "output", "addend", "feed", "block"))


class _Batch:
    """The passes of both models over one batch of images; they follow the order of the layers."""

    def __init__(
        self,
        model: Tapped,
        slim: Tapped,
        layers: list[Layer],
        x: Tensor,
        draw: Callable[[Sequence[int]], Grid],
        share: int,
    ) -> None:
        """``share``: positions, of all the batch's images, that a branch's step needs."""
        self._slim, self._x, self._draw, self._share = slim, x, draw, share
        self._left = {layer.path: layer for layer in layers}
        self._drawn: dict[tuple[str, Sequence[int]], Grid] = {}
        self._plain_walk = Walk(model, as_input(model.model, x), partial(self._keep, of_plain=True))
        self._slim_walk = Walk(slim, as_input(slim.model, x), self._keep)

    def branch(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Of some images the input of the layer's branch and the layer's targets, whole maps."""
        _, output, addend, feed, _ = _keys(layer)
        with self._reached(layer, feed) as (plain, slim):
            target = plain[output][0].whole
            if layer.addend:
                target = target + layer.before_norm(plain[addend][0].whole - slim[addend][0].whole)
            return slim[feed][0][: len(target)], target

    def samples(self, layer: Layer) -> Iterator[tuple[Tensor, Tensor, Grid]]:
        """Inputs, targets ``[N, O, ...]`` and output positions of each call of the layer."""
        entry, output, addend, *_ = _keys(layer)
        with self._reached(layer, entry) as (plain, slim):
            targets = [(seen.maps, seen.at) for seen in plain[output]]
            if layer.addend:
                ((target, at),) = targets
                error = plain[addend][0].maps - slim[addend][0].maps
                targets = [(target + layer.before_norm(error), at)]
            for x, (target, at) in zip(slim[entry], targets, strict=True):
                yield x, target, at
        del self._left[layer.path]
        for walk in (self._plain_walk, self._slim_walk):
            for key in _keys(layer):
                walk.seen.pop(key, None)

    def close(self) -> None:
        self._plain_walk.close()
        self._slim_walk.close()

    @contextlib.contextmanager
    def _reached(
        self, layer: Layer, key: tuple[str, str]
    ) -> Iterator[tuple[dict[Any, list[Any]], dict[Any, list[Any]]]]:
        """What both passes have seen once the slim one is at ``key`` and the targets are known."""
        _, output, addend, *_ = _keys(layer)
        plain, slim = self._plain_walk, self._slim_walk
        plain.until(output, layer.calls)
        slim.until(key)
        with contextlib.ExitStack() as stack:
            if layer.calls > 1 or (layer.addend and addend not in slim.seen):
                # What is needed comes only after the layer, at which the pass has to wait.
                slim = stack.enter_context(contextlib.closing(self._again(layer)))
                slim.until(key, layer.calls)
            if layer.addend:
                plain.until(addend)
                slim.until(addend)
            yield plain.seen, slim.seen

    def _again(self, layer: Layer) -> Walk:
        """Another pass through the slim model, from the layer's block on if it has one."""
        model, keep = self._slim.model, partial(self._keep, copy=True)
        if layer.block is None:
            return Walk(self._slim, as_input(model, self._x), keep)
        (x,) = self._slim_walk.seen["block", layer.path]
        return Walk(self._slim, x, keep, model.get_submodule(layer.block))

    def _keep(
        self, key: tuple[str, str], tensor: Tensor, *, of_plain: bool = False, copy: bool = False
    ) -> Tensor | _Seen | None:
        """Of a tensor at a tap what is needed: inputs whole, of the others the positions drawn."""
        kind, path = key
        layer = self._left.get(path)
        if layer is None:
            return None
        if kind == "block":
            return None if copy else tensor.clone()
        if kind in ("input", "feed"):
            return tensor.clone() if copy else tensor
        maps = as_maps(layer.slim, tensor)
        at = self._grid(path, maps.shape[2:])
        outputs = layer.outputs if of_plain else slice(None)
        images = math.ceil(self._share / maps.shape[2:].numel()) if layer.branch else 0
        return _Seen(at.of(maps)[:, outputs].clone(), at, maps[:images, outputs].clone())

    def _grid(self, path: str, sizes: Sequence[int]) -> Grid:
        if (path, sizes) not in self._drawn:
            self._drawn[path, sizes] = self._draw(sizes)
        return self._drawn[path, sizes]
