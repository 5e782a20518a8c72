"""BatchNorm statistics measured again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sized

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ccp_ext.errors import InputError
from ccp_ext.evaluation import place, training_flags_kept
from ccp_ext.progress import tqdm


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
