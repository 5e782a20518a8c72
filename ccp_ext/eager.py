"""The module behind a compiled one."""

from __future__ import annotations

from torch import nn


def eager(model: nn.Module) -> nn.Module:
    """The module that was given to ``torch.compile``, or the model itself.

    Graphs, statistics and plans name modules by their paths in the plain model. The compiled one
    shares its parameters and hooks: it may be called all the same. It runs eagerly while statistics
    are gathered, and is compiled again where its parameters have changed.
    """
    return getattr(model, "_orig_mod", model)
