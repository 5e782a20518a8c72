"""Layers behind the cuts, solved anew by least squares in the order of the forward pass."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ccp_ext.activations import input_tap
from ccp_ext.compensation.batches import Batch, two_models
from ccp_ext.compensation.branches import Branch, norm_factor
from ccp_ext.compensation.holding import GIBIBYTE, MOST_BATCHES, hold, too_wide
from ccp_ext.compensation.layers import Layer, as_input, evaluating, find_layers
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.graph import Feeder, addends, feeders
from ccp_ext.least_squares import ConstantError, Regression
from ccp_ext.memory import Ceiling
from ccp_ext.passes import tapped
from ccp_ext.patches import POSITIONS, Grid
from ccp_ext.progress import tqdm

LAYERS = ("cut", "cut+classifier", "all")

# Output positions that determine a Gauss-Newton step; about so many, of all images together.
_JOINT_POSITIONS = 1 << 18

# GiB for the images that wait at a layer, and for its equations.
MEMORY = 4.0


@dataclass(frozen=True)
class Refitted:
    """What a refit did, by layer in the order of the forward pass.

    Attributes:
        unexplained: share of the variance of the layer's targets that is left.
        images: how many took part.
        too_wide: paths of layers that got a new constant only.
        available: how many images were given.
        memory: GiB that were allowed.
        batch_size: images that went from layer to layer together; 0 if no layer lost inputs.
    """

    unexplained: dict[str, float]
    images: dict[str, int]
    too_wide: list[str]
    available: int
    memory: float
    batch_size: int

    def __str__(self) -> str:
        if not self.images:
            return "no layer lost inputs"
        fewest, most = min(self.images.values()), max(self.images.values())
        text = f"all {fewest:,} images for every layer"
        if fewest < self.available:
            number = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
            limits = " and ".join(self._limits(fewest, most))
            text = f"{number} of {self.available:,} images for a layer, as fit into {limits}"
        if self.too_wide:
            layers = ", ".join(self.too_wide)
            text += f"; too wide for {self.memory:g} GiB, a constant only: {layers}"
        return text

    def _limits(self, fewest: int, most: int) -> Iterator[str]:
        """What kept images out, where the layers had from the ``fewest`` to the ``most``."""
        in_batches = MOST_BATCHES * self.batch_size
        if fewest < in_batches:
            yield f"{self.memory:g} GiB"
        if most == in_batches < self.available:
            yield f"{MOST_BATCHES} batches of {self.batch_size}"


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
    memory: float = MEMORY,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = True,
) -> Refitted:
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
    :mod:`ccp_ext.passes`), so that the activations of many images at one depth, of both models,
    lie in memory together. ``memory`` bounds them: a pass of one image shows what it takes to wait
    at each layer, and where not all images fit the layer has fewer of them; more join where the
    maps get smaller. An image gives as many rows to a regression as its maps have positions, up to
    ``positions``. A layer whose output is added to one computed after it costs one more pass
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
        memory: GiB, about, for what is kept between the layers and for a layer's normal equations.
            A layer whose equations alone take more than half of it gets a new constant only.
        seed: of the grids.
        batch_size: images that go from layer to layer together, at most; fewer where the memory
            is small. No more than 256 batches wait at a layer.

    Raises:
        InputError: ``slim`` is not a pruned ``model``, an option is out of range, or the memory
            does not suffice for a few images.
    """
    if layers not in LAYERS:
        raise InputError(f"refit: layers must be one of {', '.join(LAYERS)}; got {layers!r}")
    if not ridge >= 0:
        raise InputError(f"refit: ridge must be a number of 0 or more, got {ridge!r}")
    if positions is not None and positions < 1:
        raise InputError(f"refit: positions must be 1 or more, or None, got {positions!r}")
    if joint < 0:
        raise InputError(f"refit: joint must be a number of iterations, 0 or more, got {joint!r}")
    if not 0 < memory < math.inf:
        raise InputError(f"refit: memory must be a positive number of GiB, got {memory!r}")
    chosen = _choose(find_layers(model, slim, images), layers)
    if not chosen:
        return Refitted({}, {}, [], len(images), memory, batch_size=0)
    for layer in chosen:
        layer.only_constant = too_wide(layer.features, memory * GIBIBYTE)
    _find_surroundings(model, slim, chosen, images, residual, joint, memory * GIBIBYTE)
    draw = partial(Grid.draw, count=positions, generator=torch.Generator().manual_seed(seed))
    waiting: list[Batch] = []
    # Every batch has threads of its own, which do not reuse what those of others have freed.
    ceiling = Ceiling(memory * GIBIBYTE)
    with two_models(model, slim, chosen) as models, contextlib.ExitStack() as stack:
        holding = hold(models, chosen, images, positions, batch_size, memory * GIBIBYTE)
        stack.callback(_dismiss, waiting, 0)
        result = Refitted({}, {}, [], len(images), memory, holding.batch_size)
        share = {p: math.ceil(_JOINT_POSITIONS / count) for p, count in holding.batches.items()}
        for k, layer in enumerate(tqdm(chosen, "refit", disable=not progress, leave=False)):
            count = holding.batches[layer.path]
            _dismiss(waiting, count)
            with contextlib.closing(images.batches(holding.batch_size, start=len(waiting))) as more:
                for x, _ in itertools.islice(more, count - len(waiting)):
                    one = Batch(*models, chosen[k:], x, draw, share, after_turn=ceiling.keep)
                    waiting.append(one)
            if layer.branch:
                layer.branch.improve((batch.branch(layer) for batch in waiting), ridge, joint)
            result.unexplained[layer.path] = _fit(layer, waiting, ridge)
            result.images[layer.path] = sum(map(len, waiting))
            if layer.only_constant:
                result.too_wide.append(layer.path)
    return result


def _find_surroundings(
    model: nn.Module,
    slim: nn.Module,
    chosen: list[Layer],
    images: ImageSet,
    residual: bool,
    joint: int,
    memory: float,
) -> None:
    """Set the branch, the addend and the block of each layer; ``memory`` in bytes."""
    example = images.normalise(images.images[:1])
    if joint and any(layer.cut for layer in chosen):
        found = feeders(model, as_input(model, example))
        for layer in chosen:
            layer.branch = _branch(slim, layer, found.get(layer.path))
            if layer.branch and too_wide(layer.widest, memory):
                layer.branch = None
    if any(layer.branch for layer in chosen):
        _drop_crossed_branches(slim, chosen, as_input(slim, example))
    if residual:
        others = addends(model, as_input(model, example))
        for layer in chosen:
            layer.addend = others.get(layer.path)
        _find_blocks(slim, chosen, as_input(slim, example))


def _choose(order: list[Layer], layers: str) -> list[Layer]:
    cuts = [k for k, layer in enumerate(order) if layer.cut]
    if not cuts:
        return []
    if layers == "all":
        return order[cuts[0] :]
    last = [len(order) - 1] if layers == "cut+classifier" else []
    return [order[k] for k in sorted({*cuts, *last})]


def _branch(slim: nn.Module, layer: Layer, feeder: Feeder | None) -> Branch | None:
    """None if the layer was not cut, is not solved or has no place for a constant."""
    if feeder is None or not layer.cut or layer.only_constant or not layer.takes_constant:
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
    taps = {("feed", layer.path): layer.entry for layer in layers if layer.branch}
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
    taps |= {("input", layer.path): layer.entry for layer in layers}
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
    inner = [layer.addend.module, layer.entry.module]
    return [path for path in paths if all(module.startswith(path + ".") for module in inner)]


def _dismiss(batches: list[Batch], left: int) -> None:
    """Close all but the first so many."""
    while len(batches) > left:
        batches.pop().close()


def _fit(layer: Layer, batches: Sequence[Batch], ridge: float) -> float:
    """Give the layer its new weight and constant; returns the share of variance not explained."""
    sums = ConstantError() if layer.only_constant else Regression()
    for batch in batches:
        for x, target, at in batch.samples(layer):
            sums.add(layer.slim, x, target, at)
    if layer.only_constant:
        constant, unexplained = sums.solve(layer.takes_constant)
        if layer.slim.bias is not None:
            constant = constant + layer.slim.bias.detach()
    else:
        old = layer.slim.weight.detach().flatten(1).double()
        weight, constant, unexplained = sums.solve(old, ridge, layer.takes_constant)
        layer.slim.weight.data.copy_(weight.view_as(layer.slim.weight))
    if layer.takes_constant:
        layer.set_constant(constant, with_bias=True)
    return unexplained
