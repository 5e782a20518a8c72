"""Repair of a pruned model without training, as steps that a user names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ccp_ext.compensation import fold_means, reestimate_batchnorm, refit
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError

NONE = "none"
# In the order in which they make sense, and what the model is after each.
STEPS = {"fold": "folded", "refit": "refitted", "batchnorm": "re-estimated"}


def parse(text: str, further: Sequence[str] = ()) -> tuple[str, ...]:
    """The steps in a text such as "refit+batchnorm"; "none" has none.

    Args:
        further: steps beside :data:`STEPS` that the caller knows, to follow these.

    Raises:
        InputError: an unknown step, or steps that are not in their order.
    """
    steps = () if text == NONE else tuple(text.split("+"))
    known = (*STEPS, *further)
    if list(steps) != [step for step in known if step in steps]:
        raise InputError(
            f"repair must be {NONE}, or steps of {', '.join(known)} in this order joined by +; "
            f"got {text!r}"
        )
    return steps


def apply(
    step: str,
    plain: nn.Module,
    slim: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 128,
    progress: bool = True,
) -> None:
    """Take one of :data:`STEPS` on ``slim``, in place.

    Args:
        plain: the model before it was pruned; not needed for "batchnorm".
        images: training images.
        batch_size: of "fold" and "batchnorm".
    """
    if step == "refit":
        refit(plain, slim, images, progress=progress)
    elif step == "fold":
        fold_means(plain, slim, images, batch_size=batch_size, progress=progress)
    else:
        reestimate_batchnorm(slim, images.batches(batch_size), progress=progress)
