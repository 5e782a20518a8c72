"""Repair of a pruned model without training.

:func:`fold_means` puts the means of what was removed into the next layer's bias; :func:`refit`
solves each layer behind a cut anew by least squares, the constant included; and
:func:`reestimate_batchnorm` measures the BatchNorm statistics again, after either of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ccp_ext.activations import input_tap, read_at
from ccp_ext.branches import Branch, norm_factor
from ccp_ext.cutting import CONVOLUTIONS, Cut, fingerprint
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import place, training_flags_kept
from ccp_ext.graph import Feeder, Tap, addends, feeders
from ccp_ext.least_squares import Regression
from ccp_ext.passes import Tapped, Walk, tapped
from ccp_ext.patches import POSITIONS, Grid, as_maps

LAYERS = ("cut", "cut+classifier", "all")

# Output positions that determine a Gauss-Newton step; about so many, of all images together.
_JOINT_POSITIONS = 1 << 16


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    *,
    progress: bool = True,
) -> int:
    """Replace the running mean and variance of every BatchNorm layer by those of ``batches``.

    batches: inputs ``[B, ...]``, or tuples that begin with them; use training images. They are
    moved to the model's device. The caller may hold torch.autocast around the call.

    One pass over the data. During it the BatchNorm layers, and no others, work in training mode:
    each normalises by the statistics of the current batch, as in usual practice, so that a layer
    sees inputs already normalised by the layers before it and not by their outdated averages. The
    new statistics are the exact mean and unbiased variance of each channel over all samples and
    positions of the pass, whatever the sizes of the batches, pooled in float64 with the update of
    Chan, Golub and LeVeque (1983). Nothing else changes: momentum, num_batches_tracked, training
    flags and parameters stay. The layers are written only when the whole pass has succeeded.

    Returns the number of layers that got new statistics: 0 for a model without BatchNorm layers,
    or when the pass reached none of them.
    Raises InputError when ``batches`` is empty, when a layer gets fewer than two values of a
    channel in one batch, or when its input is not finite.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not layers:
        return 0
    device = place(model, None)
    seen = 0
    with _recorded_moments(model, layers) as moments, torch.no_grad():
        for batch in tqdm(
            batches, "BatchNorm", _length(batches), disable=not progress, leave=False
        ):
            x = batch if isinstance(batch, Tensor) else batch[0]
            model(x.to(device))
            seen += len(x)
    if not seen:
        raise InputError("reestimate_batchnorm: batches is empty; give at least one batch")
    _check_finite(moments)
    for name, moment in moments.items():
        layers[name].running_mean.copy_(moment.mean)
        layers[name].running_var.copy_(moment.variance())
    return len(moments)


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
    layers = [layer for layer in _layers(model, slim, images) if layer.cut and layer.takes_constant]
    means = _lost_means(model, layers, images, batch_size, progress)
    for layer in layers:
        layer.set_constant(means[layer.path])
    return len(layers)


def refit(
    model: nn.Module,
    slim: nn.Module,
    images: ImageSet,
    *,
    layers: str = "cut+classifier",
    residual: bool = True,
    ridge: float = 1e-3,
    positions: int | None = POSITIONS,
    joint: int = 4,
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
    :mod:`ccp_ext.gauss_newton`; the nonlinear reconstruction of Zhang et al., TPAMI 2016, extended
    to the layer before). No labels and no loss of the network enter.

    Both models run over the images once: the passes halt at each layer until it is solved (see
    :mod:`ccp_ext.passes`). So the activations of all images at one depth, of both models, lie in
    memory together; a layer that runs several times, or whose output is added to one computed
    after it, costs one more pass through the layers before it, or two for a step.

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
    chosen = _choose(_layers(model, slim, images), layers)
    example = _example(model, images.normalise(images.images[:1]))
    if residual and chosen:
        others = addends(model, example)
        for layer in chosen:
            layer.addend = others.get(layer.path)
    if joint and any(layer.cut for layer in chosen):
        found = feeders(model, example)
        for layer in chosen:
            layer.branch = _branch(slim, layer, found.get(layer.path))
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


@dataclasses.dataclass
class _Layer:
    """A convolution or linear layer in both models.

    Attributes:
        outputs, inputs: what stays of the plain one's.
        cut: whether it lost inputs.
        norms: by path the BatchNorm layers, in both models, that read the output.
        addend: where to read what the output is added to.
        branch: it and the convolution that feeds it, if both take a step together.
        calls: in one forward pass.
    """

    path: str
    plain: nn.Module
    slim: nn.Module
    outputs: Tensor
    inputs: Tensor
    cut: bool
    calls: int = 0
    norms: dict[str, tuple[_BatchNorm, _BatchNorm]] = dataclasses.field(default_factory=dict)
    addend: Tap | None = None
    branch: Branch | None = None

    @property
    def takes_constant(self) -> bool:
        return self.slim.bias is not None or bool(self.norms)

    def lost(self, x: Tensor) -> Tensor:
        """Of the plain input x, what the removed channels contribute to the outputs that stay."""
        gone = torch.ones(self.plain.weight.shape[1], dtype=torch.bool, device=x.device)
        gone[self.inputs] = False
        weight = self.plain.weight[self.outputs][:, gone]
        if isinstance(self.plain, nn.Linear):
            return nn.functional.linear(x[..., gone], weight).movedim(-1, 1)
        return self.plain._conv_forward(x[:, gone], weight, None)

    def set_constant(self, constant: Tensor, *, with_bias: bool = False) -> None:
        """Let the layer add ``constant`` [O]; ``with_bias``: the plain bias is in it already."""
        shift: Tensor | float = constant
        if self.slim.bias is not None:
            own = 0.0 if with_bias else self.plain.bias.detach()[self.outputs]
            self.slim.bias.data.copy_(own + constant)
            shift = 0.0
        for plain, slim in self.norms.values():
            slim.running_mean.copy_(plain.running_mean[self.outputs] - shift)
            slim.running_var.copy_(plain.running_var[self.outputs])

    def before_norm(self, addend: Tensor) -> Tensor:
        """What the layer must give so that its BatchNorm, if any, gives the addend [N, O, ...].

        Zero where the BatchNorm's factor is: nothing that the layer does changes that channel.
        """
        for plain, _ in self.norms.values():
            factor = norm_factor(plain)[self.outputs].view(-1, *[1] * (addend.dim() - 2))
            addend = torch.where(factor == 0, 0.0, addend / factor)
        return addend


def _branch(slim: nn.Module, layer: _Layer, feeder: Feeder | None) -> Branch | None:
    """None if the layer was not cut or has no place for a constant."""
    if feeder is None or not layer.cut or not layer.takes_constant:
        return None
    factor = torch.ones_like(layer.outputs, dtype=layer.slim.weight.dtype)
    for plain, _ in layer.norms.values():
        factor = norm_factor(plain)[layer.outputs]
    return Branch.of(slim, feeder, layer.slim, factor)


def _layers(model: nn.Module, slim: nn.Module, images: ImageSet) -> list[_Layer]:
    """In the order of the forward pass; found by running the slim model on one image."""
    plan = getattr(slim, "ccp_plan", None)
    if plan is None or plan.fingerprint != fingerprint(model):
        raise InputError("compensation: slim must be the given model after ccp_ext.prune")
    if place(slim, None) != place(model, None):
        raise InputError(
            f"compensation: the model is on {place(model, None)}, slim on {place(slim, None)}; put "
            "both on one device"
        )
    modules, plain_modules = dict(slim.named_modules()), dict(model.named_modules())
    device = place(slim, None)
    layers = {}
    for path, module in modules.items():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and getattr(module, "groups", 1) == 1:
            plain, cut = plain_modules[path], plan.modules.get(path, Cut())
            outputs, inputs = map(range, plain.weight.shape[:2])
            index = (
                torch.tensor(list(p), device=device)
                for p in (cut.out or outputs, cut.inputs or inputs)
            )
            layers[path] = _Layer(path, plain, module, *index, cut=cut.inputs is not None)
    order: list[_Layer] = []
    made: dict[int, tuple[_Layer, Tensor]] = {}  # the tensors stay alive, so ids are unique

    def leave(layer: _Layer, output: Tensor) -> None:
        layer.calls += 1
        made[id(output)] = layer, output
        if layer.calls == 1:
            order.append(layer)

    def enter(path: str, x: Tensor) -> None:
        if id(x) in made:
            made[id(x)][0].norms[path] = plain_modules[path], modules[path]

    with contextlib.ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(read_at(slim, Tap(path), partial(leave, layer)).remove)
        for path, module in modules.items():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                stack.callback(read_at(slim, Tap(path, "input"), partial(enter, path)).remove)
        with _evaluating(slim):
            slim(_example(slim, images.normalise(images.images[:1])))
    return order


def _choose(order: list[_Layer], layers: str) -> list[_Layer]:
    cuts = [k for k, layer in enumerate(order) if layer.cut]
    if not cuts:
        return []
    if layers == "all":
        return order[cuts[0] :]
    last = [len(order) - 1] if layers == "cut+classifier" else []
    return [order[k] for k in sorted({*cuts, *last})]


def _lost_means(
    model: nn.Module, layers: list[_Layer], images: ImageSet, batch_size: int, progress: bool
) -> dict[str, Tensor]:
    """The mean, float64 ``[O]``, of what each layer's removed inputs contribute in ``model``."""
    sums = {layer.path: [0.0, 0] for layer in layers}

    def add(layer: _Layer, x: Tensor) -> None:
        lost = layer.lost(x).transpose(0, 1).flatten(1)
        sums[layer.path][0] += lost.sum(1, dtype=torch.float64)
        sums[layer.path][1] += lost.shape[1]

    with contextlib.ExitStack() as stack:
        for layer in layers:
            tap = input_tap(layer.plain, layer.path)
            stack.callback(read_at(model, tap, partial(add, layer)).remove)
        stack.enter_context(_evaluating(model))
        batches = images.batches(batch_size)
        total = images.num_batches(batch_size)
        for x, _ in tqdm(batches, "means", total, disable=not progress, leave=False):
            model(_example(model, x))
    return {path: total / count for path, (total, count) in sums.items()}


def _fit(layer: _Layer, sums: Regression, ridge: float) -> float:
    """Give the layer its new weight and constant; returns the share of variance not explained."""
    old = layer.slim.weight.detach().flatten(1).double()
    weight, constant, unexplained = sums.solve(old, ridge, layer.takes_constant)
    layer.slim.weight.data.copy_(weight.view_as(layer.slim.weight))
    if layer.takes_constant:
        layer.set_constant(constant, with_bias=True)
    return unexplained


@contextlib.contextmanager
def _two_models(
    model: nn.Module, slim: nn.Module, layers: list[_Layer]
) -> Iterator[tuple[Tapped, Tapped]]:
    """Both models in eval mode, with taps at what the layers need; keys are (kind, path)."""
    added = {("addend", layer.path): layer.addend for layer in layers if layer.addend}
    outputs = {("output", layer.path): Tap(layer.path) for layer in layers}
    inputs = {("input", layer.path): input_tap(layer.slim, layer.path) for layer in layers}
    feeds = {
        ("feed", layer.path): Tap(layer.branch.path, "input") for layer in layers if layer.branch
    }
    with (
        _evaluating(model),
        _evaluating(slim),
        tapped(model, outputs | added) as plain,
        tapped(slim, added | feeds | inputs) as pruned,
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


def _keys(layer: _Layer) -> tuple[tuple[str, str], ...]:
    """Of the layer's input, its output, what that is added to, and the input of its branch."""
    return tuple((kind, layer.path) for kind in ("input", "output", "addend", "feed"))


class _Batch:
    """The passes of both models over one batch of images; they follow the order of the layers."""

    def __init__(
        self,
        model: Tapped,
        slim: Tapped,
        layers: list[_Layer],
        x: Tensor,
        draw: Callable[[Sequence[int]], Grid],
        share: int,
    ) -> None:
        """``share``: positions, of all the batch's images, that a branch's step needs."""
        self._slim, self._x, self._draw, self._share = slim, x, draw, share
        self._left = {layer.path: layer for layer in layers}
        self._drawn: dict[tuple[str, Sequence[int]], Grid] = {}
        self._plain_walk = Walk(model, _example(model.model, x), partial(self._keep, of_plain=True))
        self._slim_walk = self._walk_slim()

    def branch(self, layer: _Layer) -> tuple[Tensor, Tensor]:
        """Of some images the input of the layer's branch and the layer's targets, whole maps."""
        _, output, addend, feed = _keys(layer)
        with self._reached(layer, feed) as (plain, slim):
            target = plain[output][0].whole
            if layer.addend:
                target = target + layer.before_norm(plain[addend][0].whole - slim[addend][0].whole)
            return slim[feed][0][: len(target)], target

    def samples(self, layer: _Layer) -> Iterator[tuple[Tensor, Tensor, Grid]]:
        """Inputs, targets ``[N, O, ...]`` and output positions of each call of the layer."""
        entry, output, addend, _ = _keys(layer)
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
        self, layer: _Layer, key: tuple[str, str]
    ) -> Iterator[tuple[dict[Any, list[Any]], dict[Any, list[Any]]]]:
        """What both passes have seen once the slim one is at ``key`` and the targets are known."""
        _, output, addend, _ = _keys(layer)
        plain, slim = self._plain_walk, self._slim_walk
        plain.until(output, layer.calls)
        slim.until(key)
        with contextlib.ExitStack() as stack:
            if layer.calls > 1 or (layer.addend and addend not in slim.seen):
                # What is needed comes only after the layer, at which the pass has to wait.
                slim = stack.enter_context(contextlib.closing(self._walk_slim(copy=True)))
                slim.until(key, layer.calls)
            if layer.addend:
                plain.until(addend)
                slim.until(addend)
            yield plain.seen, slim.seen

    def _walk_slim(self, copy: bool = False) -> Walk:
        return Walk(self._slim, _example(self._slim.model, self._x), partial(self._keep, copy=copy))

    def _keep(
        self, key: tuple[str, str], tensor: Tensor, *, of_plain: bool = False, copy: bool = False
    ) -> Tensor | _Seen | None:
        """Of a tensor at a tap what is needed: inputs whole, of the others the positions drawn."""
        kind, path = key
        layer = self._left.get(path)
        if layer is None:
            return None
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


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    with training_flags_kept(model), torch.no_grad():
        model.eval()
        yield


def _example(model: nn.Module, x: Tensor) -> Tensor:
    parameter = next(model.parameters())
    return x.to(parameter.device, parameter.dtype)


@dataclasses.dataclass
class _Moments:
    """Count, mean ``[C]`` and sum of squared deviations ``[C]``, float64, of all values so far."""

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Moments:
        """Moments of each channel of ``[N, C, ...]``; needs two values a channel."""
        x = x if x.dtype == torch.float64 else x.float()
        count = x.numel() // x.shape[1]
        dimensions = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x, dimensions, correction=0)
        return cls(count, mean.double(), variance.double() * count)

    def merge(self, other: _Moments) -> None:
        total = self.count + other.count
        shift = other.mean - self.mean
        self.deviation += other.deviation + shift**2 * (self.count * other.count / total)
        self.mean += shift * (other.count / total)
        self.count = total

    def variance(self) -> Tensor:
        """Unbiased, as BatchNorm's own running variance."""
        return self.deviation / (self.count - 1)


@contextlib.contextmanager
def _recorded_moments(
    model: nn.Module, layers: dict[str, _BatchNorm]
) -> Iterator[dict[str, _Moments]]:
    """Let ``layers`` normalise by batch statistics, recording the moments of their inputs."""
    moments: dict[str, _Moments] = {}

    def record(name: str, x: Tensor) -> None:
        if x.numel() < 2 * x.shape[1]:
            raise InputError(
                f"reestimate_batchnorm: the BatchNorm layer {name} gets one value a channel from a "
                f"batch of shape {tuple(x.shape)}; give batches of two images or more"
            )
        batch = _Moments.of(x)
        if name in moments:
            moments[name].merge(batch)
        else:
            moments[name] = batch

    tracking = {name: layer.track_running_stats for name, layer in layers.items()}
    hooks = []
    with training_flags_kept(model):
        try:
            model.eval()
            for name, layer in layers.items():
                layer.training = True
                # In training mode this flag alone decides whether the running averages move.
                layer.track_running_stats = False
                hooks.append(
                    layer.register_forward_pre_hook(
                        lambda _, inputs, name=name: record(name, inputs[0])
                    )
                )
            yield moments
        finally:
            for hook in hooks:
                hook.remove()
            for name, layer in layers.items():
                layer.track_running_stats = tracking[name]


def _check_finite(moments: dict[str, _Moments]) -> None:
    for name, moment in moments.items():
        if not (torch.isfinite(moment.mean) & torch.isfinite(moment.deviation)).all():
            raise InputError(
                f"reestimate_batchnorm: the input of the BatchNorm layer {name} is not finite (NaN "
                f"or infinity); the old statistics are kept"
            )


def _length(batches: Iterable[object]) -> int | None:
    return len(batches) if isinstance(batches, Sized) else None
