"""Repair of a pruned model without training.

:func:`fold_means` puts the means of what was removed into the next layer's bias; :func:`refit`
solves each layer behind a cut anew by least squares, the constant included; and
:func:`reestimate_batchnorm` measures the BatchNorm statistics again, after either of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ccp_ext.activations import Reader, input_tap, patch_cross, patch_gram, read_at
from ccp_ext.cutting import fingerprint
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import place, training_flags_kept
from ccp_ext.graph import Tap


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
    layers = [layer for layer in _cut_layers(model, slim, images) if layer.takes_constant]
    means = _lost_means(model, layers, images, batch_size, progress)
    for layer in layers:
        layer.set_constant(means[layer.path])
    return len(layers)


def refit(
    model: nn.Module,
    slim: nn.Module,
    images: ImageSet,
    *,
    ridge: float = 1e-3,
    together: int = 1,
    batch_size: int = 128,
    progress: bool = True,
) -> dict[str, float]:
    """Solve each layer of ``slim`` behind a cut anew, so that it gives the plain model's outputs.

    Layer by layer in the order of the forward pass: the inputs are those that the slim model
    computes with the layers already refitted, the targets are the plain model's outputs of this
    layer (asymmetric reconstruction, He et al., ICCV 2017; OSSCAR, Meng et al., ICML 2024):

        min over W, b of ||Y - W X - b||^2 + lambda ||W - W_old||^2

    with lambda = ``ridge`` times the mean diagonal of XX'. The constant b goes where
    :func:`fold_means` puts it; that BatchNorm gets the plain model's statistics apart from the
    shift. Every pass over the images ends at the layer that it is for. Sums are kept in float64.

    Args:
        model: the plain model.
        slim: the pruned one, from :func:`ccp_ext.prune`; changed in place.
        images: training images.
        ridge: weight of the old values, at least 0.
        together: layers that share a pass, at least 1. They do not see each other's refit: fewer
            passes, but errors add up again within them.

    Returns:
        By layer, the share of its outputs' variance that the refit leaves unexplained.

    Raises:
        InputError: ``slim`` is not a pruned ``model``, or an option is out of range.
    """
    if not ridge >= 0:
        raise InputError(f"refit: ridge must be a number of 0 or more, got {ridge!r}")
    if together < 1:
        raise InputError(f"refit: together must be an integer of 1 or more, got {together!r}")
    layers = _cut_layers(model, slim, images)
    unexplained: dict[str, float] = {}
    bar = tqdm(range(0, len(layers), together), "refit", disable=not progress, leave=False)
    for first in bar:
        some = layers[first : first + together]
        regressions = _regressions(model, slim, some, images, batch_size)
        for layer, sums in zip(some, regressions, strict=True):
            unexplained[layer.path] = _fit(layer, sums, ridge)
    return unexplained


@dataclasses.dataclass
class _CutLayer:
    """A convolution or linear layer that lost inputs.

    Attributes:
        plain, slim: the layer in both models.
        outputs, inputs: what stays of the plain one's.
        norms: by path the BatchNorm layers, in both models, that read the output.
        calls: in one forward pass.
    """

    path: str
    plain: nn.Module
    slim: nn.Module
    outputs: Tensor
    inputs: Tensor
    calls: int = 0
    norms: dict[str, tuple[_BatchNorm, _BatchNorm]] = dataclasses.field(default_factory=dict)

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
        if self.slim.bias is not None:
            own = 0.0 if with_bias else self.plain.bias.detach()[self.outputs]
            self.slim.bias.data.copy_(own + constant)
            return
        for plain, slim in self.norms.values():
            slim.running_mean.copy_(plain.running_mean[self.outputs] - constant)
            slim.running_var.copy_(plain.running_var[self.outputs])


def _cut_layers(model: nn.Module, slim: nn.Module, images: ImageSet) -> list[_CutLayer]:
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
    for path, cut in plan.modules.items():
        if cut.inputs is not None:
            plain = plain_modules[path]
            outputs = cut.out or range(len(plain.weight))
            index = (torch.tensor(list(p), device=device) for p in (outputs, cut.inputs))
            layers[path] = _CutLayer(path, plain, modules[path], *index)
    order: list[_CutLayer] = []
    made: dict[int, tuple[_CutLayer, Tensor]] = {}  # the tensors stay alive, so ids are unique

    def leave(layer: _CutLayer, output: Tensor) -> None:
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


def _lost_means(
    model: nn.Module, layers: list[_CutLayer], images: ImageSet, batch_size: int, progress: bool
) -> dict[str, Tensor]:
    """The mean, float64 ``[O]``, of what each layer's removed inputs contribute in ``model``."""
    sums = {layer.path: [0.0, 0] for layer in layers}

    def add(layer: _CutLayer, x: Tensor) -> None:
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


def _regressions(
    model: nn.Module, slim: nn.Module, layers: list[_CutLayer], images: ImageSet, batch_size: int
) -> list[_Regression]:
    """Of each layer, the sums over the images of its slim inputs and plain outputs."""
    sums = [_Regression() for _ in layers]
    targets: list[list[Tensor]] = [[] for _ in layers]  # of the calls in one pass

    def keep(k: int, output: Tensor) -> None:
        layer = layers[k]
        channel = input_tap(layer.plain, layer.path).channel_dim
        targets[k].append(output.index_select(channel, layer.outputs))

    def add(k: int, x: Tensor) -> None:
        sums[k].add(layers[k].slim, x, targets[k].pop(0))

    calls = sum(layer.calls for layer in layers)
    outputs = [(Tap(layer.path), partial(keep, k)) for k, layer in enumerate(layers)]
    inputs = [
        (input_tap(layer.slim, layer.path), partial(add, k)) for k, layer in enumerate(layers)
    ]
    with _read(model, outputs, calls) as run_plain, _read(slim, inputs, calls) as run_slim:
        for x, _ in images.batches(batch_size):
            run_plain(x)
            run_slim(x)
    return sums


def _fit(layer: _CutLayer, sums: _Regression, ridge: float) -> float:
    """Give the layer its new weight and constant; returns the share of variance not explained."""
    old = layer.slim.weight.detach().flatten(1).double()
    weight, constant, unexplained = sums.solve(old, ridge, layer.takes_constant)
    layer.slim.weight.data.copy_(weight.view_as(layer.slim.weight))
    if layer.takes_constant:
        layer.set_constant(constant, with_bias=True)
    return unexplained


class _Regression:
    """Sums, in float64, for the least squares of a layer's outputs y on its input patches x."""

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = self.xx = self.xy = self.yy = 0.0

    def add(self, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        """y: the wanted output of the layer for the input x."""
        channel = input_tap(layer, "").channel_dim % y.dim()
        ones = torch.ones_like(y.narrow(channel, 0, 1))
        others = [d for d in range(y.dim()) if d != channel]
        self.count += ones.numel()
        self.x = self.x + patch_cross(layer, x, ones).squeeze(1)
        self.y = self.y + y.sum(others, dtype=torch.float64)
        self.xx = self.xx + patch_gram(layer, x)
        self.xy = self.xy + patch_cross(layer, x, y)
        self.yy = self.yy + y.square().sum(others, dtype=torch.float64)

    def solve(self, old: Tensor, ridge: float, constant: bool) -> tuple[Tensor, Tensor, float]:
        """Weight ``[O, F]``, constant ``[O]``, and the share of y's variance not explained."""
        x, y = (self.x / self.count, self.y / self.count) if constant else (0 * self.x, 0 * self.y)
        xx = self.xx - self.count * x.outer(x)
        xy = self.xy - self.count * x.outer(y)
        level = ridge * xx.diagonal().mean()
        ridged = xx + level * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        weight = _solve(ridged, xy + level * old.T).T
        variance = (self.yy - self.count * y.square()).sum()
        left = variance - 2 * (weight * xy.T).sum() + ((weight @ xx) * weight).sum()
        share = (left / variance).item() if variance > 0 else 0.0
        return weight, y - weight @ x, max(0.0, share)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for a semidefinite matrix; the least solution if it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    negligible = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal().max()
    if not failed and pivots.min() > negligible:
        return torch.cholesky_solve(right, factor)
    solution = torch.linalg.lstsq(matrix.cpu(), right.cpu(), driver="gelsd").solution
    return solution.to(matrix.device)


class _Reached(Exception):
    """All tensors were read; the rest of the forward pass is not needed."""


@contextlib.contextmanager
def _read(
    model: nn.Module, readers: list[Reader], calls: int
) -> Iterator[Callable[[Tensor], None]]:
    """A function that runs the model on images until ``calls`` tensors were read."""
    left = 0

    def read(receive: Callable[[Tensor], None], tensor: Tensor) -> None:
        nonlocal left
        receive(tensor)
        left -= 1
        if not left:
            raise _Reached

    def run(x: Tensor) -> None:
        nonlocal left
        left = calls
        with contextlib.suppress(_Reached):
            model(_example(model, x))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for tap, receive in readers:
            stack.callback(read_at(model, tap, partial(read, receive)).remove)
        yield run


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
