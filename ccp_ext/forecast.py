"""What a choice of channels was forecast to do, beside what it does.

The quadratic cost is a forecast of what setting the removed channels to zero does to the model
before any repair: with the curvature of the loss and the linear term, the change of the mean loss;
with the curvature of the logits alone, half the mean squared change of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import check_logits, place, training_flags_kept
from ccp_ext.plan import PruningPlan
from ccp_ext.progress import tqdm


@dataclass(frozen=True)
class Effect:
    """What a change of the model did on labelled images, without any repair.

    Attributes:
        loss: change of the mean cross-entropy in nats.
        logits: half the mean squared distance of the logits [N, K], summed over the classes.
    """

    loss: float
    logits: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor, labels: Tensor) -> Effect:
        """Of logits [N, K] before and after, and class indices int64 [N].

        Raises:
            InputError: the logits have different shapes.
        """
        if before.shape != after.shape:
            raise InputError(
                "Effect.between: the logits before and after must have the same shape, got "
                f"{list(before.shape)} and {list(after.shape)}"
            )
        before, after = before.double(), after.double()
        losses = [nn.functional.cross_entropy(z, labels).item() for z in (before, after)]
        distance = 0.5 * (after - before).square().sum(1).mean().item()
        return cls(losses[1] - losses[0], distance)


def logits(
    model: nn.Module, images: ImageSet, *, batch_size: int = 256, progress: bool = True
) -> Tensor:
    """The outputs [N, K] in eval mode, on the CPU; hold :func:`ccp_ext.masked` around the call for
    those of a plan.

    Raises:
        InputError: the outputs are not logits [B, K] with K above every label.
    """
    device, parts = place(model, None), []
    batches, total = images.batches(batch_size, device=device), images.num_batches(batch_size)
    with training_flags_kept(model), torch.no_grad():
        model.eval()
        for x, _ in tqdm(batches, "logits", total, disable=not progress, leave=False):
            z = model(x)
            check_logits(z, x, images)
            parts.append(z.float().cpu())
    return torch.cat(parts)


def removed_masks(plan: PruningPlan) -> dict[str, Tensor]:
    """By group the bool mask [C] of the channels that the plan removes."""
    masks: Mapping[str, Tensor] = {
        name: torch.ones(group.channels, dtype=torch.bool) for name, group in plan.groups.items()
    }
    for name, group in plan.groups.items():
        masks[name][list(group.kept)] = False
    return dict(masks)
