"""The passes of both models over one batch of images, which halt at the layers to refit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ccp_ext.activations import input_tap
from ccp_ext.compensation.layers import Layer, as_input, evaluating
from ccp_ext.graph import Tap
from ccp_ext.passes import Context, Keep, Tapped, Walk, tapped
from ccp_ext.patches import Grid, as_maps


@contextlib.contextmanager
def two_models(
    model: nn.Module, slim: nn.Module, layers: list[Layer]
) -> Iterator[tuple[Tapped, Tapped]]:
    """Both models in eval mode, with taps at what the layers need; keys are (kind, path)."""
    added = {("addend", layer.path): layer.addend for layer in layers if layer.addend}
    blocks = {("block", layer.path): Tap(layer.block, "input") for layer in layers if layer.block}
    outputs = {("output", layer.path): Tap(layer.path) for layer in layers}
    inputs = {("input", layer.path): input_tap(layer.slim, layer.path) for layer in layers}
    feeds = {("feed", layer.path): layer.entry for layer in layers if layer.branch}
    with (
        evaluating(model),
        evaluating(slim),
        tapped(model, outputs | added) as plain,
        tapped(slim, blocks | added | feeds | inputs) as pruned,
    ):
        yield plain, pruned


class Seen(NamedTuple):
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


class Batch:
    """The passes of both models over one batch of images; they follow the order of the layers."""

    def __init__(
        self,
        model: Tapped,
        slim: Tapped,
        layers: list[Layer],
        x: Tensor,
        draw: Callable[[Sequence[int]], Grid],
        positions: Mapping[str, int],
        within: Context = contextlib.nullcontext,
        after_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            positions: by layer, how many of them, in all of the batch's images, the step of its
                branch needs.
            within: context of the passes.
            after_turn: called when the passes have gone on, before another batch's turn.
        """
        self._slim, self._x, self._draw, self._positions = slim, x, draw, positions
        self._within, self._after_turn = within, after_turn
        self._left = {layer.path: layer for layer in layers}
        self._drawn: dict[tuple[str, Sequence[int]], Grid] = {}
        self._plain_walk = self._walk(model, x, partial(self._keep, of_plain=True))
        self._slim_walk = self._walk(slim, x, self._keep)

    def __len__(self) -> int:
        return len(self._x)

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
        """End the passes, whose tensors are then free at once."""
        self._plain_walk.close()
        self._slim_walk.close()
        del self._plain_walk, self._slim_walk  # they refer to the batch

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
        self._after_turn()

    def _again(self, layer: Layer) -> Walk:
        """Another pass through the slim model, from the layer's block on if it has one."""
        keep = partial(self._keep, copy=True)
        if layer.block is None:
            return self._walk(self._slim, self._x, keep)
        (x,) = self._slim_walk.seen["block", layer.path]
        return self._walk(self._slim, x, keep, self._slim.model.get_submodule(layer.block))

    def _walk(self, model: Tapped, x: Tensor, keep: Keep, module: nn.Module | None = None) -> Walk:
        return Walk(model, as_input(model.model, x), keep, module, within=self._within)

    def _keep(
        self, key: tuple[str, str], tensor: Tensor, *, of_plain: bool = False, copy: bool = False
    ) -> Tensor | Seen | None:
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
        images = 0
        if layer.branch:
            images = math.ceil(self._positions[path] / maps.shape[2:].numel())
        return Seen(at.of(maps)[:, outputs].clone(), at, maps[:images, outputs].clone())

    def _grid(self, path: str, sizes: Sequence[int]) -> Grid:
        if (path, sizes) not in self._drawn:
            self._drawn[path, sizes] = self._draw(sizes)
        return self._drawn[path, sizes]
