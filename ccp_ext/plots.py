"""Figures of plans, matrices and results, as PNG or SVG files; needs matplotlib.

Every figure is made on a canvas of its own: no backend is chosen and no setting of matplotlib is
changed, so that it can be used beside a program's own plots, with or without a display.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ccp_ext import files
from ccp_ext.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ccp_ext.plan import PruningPlan

SUFFIXES = (".png", ".svg")
_DOTS_PER_INCH = 150
# Okabe and Ito's palette, told apart with any colour vision; markers tell curves apart in grey.
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_COLOURS = (_BLUE, "#D55E00", "#009E73", "#CC79A7", _ORANGE, "#56B4E9", "#000000")
_MARKERS = "osD^vP*"


def plan_figure(plan: PruningPlan, path: str | os.PathLike[str]) -> None:
    """Kept and removed channels of every group, in the order of the forward pass.

    Above as counts, below as the share that stays. Readable up to about 60 groups.

    Args:
        path: ends in ".png" or ".svg".

    Raises:
        InputError: another ending, matplotlib is not installed, the plan has no groups, or the
            file cannot be written.
    """
    if not plan.groups:
        raise InputError("plot: the plan has no groups")
    kept = np.array([len(group.kept) for group in plan.groups.values()])
    channels = np.array([group.channels for group in plan.groups.values()])
    figure = _figure(path, (max(6.0, 1.6 + 0.2 * len(kept)), 6.0))
    counts, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    position = np.arange(len(kept))
    counts.bar(position, kept, 0.8, color=_BLUE, label="kept")
    counts.bar(position, channels - kept, 0.8, bottom=kept, color=_ORANGE, label="removed")
    counts.set_ylabel("channels")
    # Outside of the axes: wide late layers would leave no free corner.
    counts.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    counts.set_title(_summary(plan), loc="left", fontsize="medium")
    shares.bar(position, 100 * kept / channels, 0.8, color=_BLUE)
    share = 100 * kept.sum() / channels.sum()
    shares.axhline(share, color="black", linewidth=0.8, linestyle="--", label="all groups")
    shares.legend(loc="lower right", bbox_to_anchor=(1, 0.96), frameon=False)
    shares.set_ylabel("kept, %")
    shares.set_ylim(0, 100)
    shares.set_xticks(position, list(plan.groups), rotation=90, fontsize="x-small")
    shares.set_xlim(-0.6, len(kept) - 0.4)
    _without_box(counts, shares)
    _save(figure, path)


def matrix_figure(
    matrix: Tensor | np.ndarray,
    removed: Tensor | np.ndarray,
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """A matrix over the channels of a group, such as ``stats[group].s_hat()``, by the choice.

    The removed channels come first; lines part them from those that stay. Colours are centred at
    zero, and reach the 99% quantile of the absolute values, since the largest stand alone.

    Args:
        matrix: [C, C].
        removed: bool [C].
        path: ends in ".png" or ".svg".

    Raises:
        InputError: another ending, shapes that do not fit, values that are not finite, matplotlib
            is not installed, or the file cannot be written.
    """
    values = torch.as_tensor(matrix).detach().cpu().double().numpy()
    mask = torch.as_tensor(removed).cpu().numpy()
    if mask.dtype != bool or mask.ndim != 1 or values.shape != (len(mask), len(mask)):
        raise InputError(
            f"plot: matrix must be [C, C] and removed bool [C], got {list(values.shape)} and "
            f"{mask.dtype} {list(mask.shape)}"
        )
    if not mask.size or not np.isfinite(values).all():
        raise InputError("plot: matrix must not be empty and must be finite")
    order = np.argsort(~mask, kind="stable")
    limit = np.quantile(np.abs(values), 0.99) or np.abs(values).max() or 1.0
    figure = _figure(path, (6.4, 5.6))
    axes = figure.subplots()
    image = axes.imshow(
        values[np.ix_(order, order)],
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    figure.colorbar(image, ax=axes, extend="both", shrink=0.85)
    edge, last = mask.sum() - 0.5, len(mask) - 0.5
    axes.axhline(edge, color="black", linewidth=1)
    axes.axvline(edge, color="black", linewidth=1)
    parts = [("removed", -0.5, edge), ("kept", edge, last)]
    shown = [(f"{name} ({round(b - a)})", (a + b) / 2) for name, a, b in parts if b > a]
    names, centres = zip(*shown, strict=True)
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.set_title(title)
    _save(figure, path)


def tradeoff_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    x: str = "MACs",
    y: str = "loss",
) -> None:
    """One result against another, such as the loss against the MACs, a line a method.

    Args:
        curves: by label the results: mappings, each with the keys ``x`` and ``y``, such as the
            rows of a report's "stages". Those without either, or None, are left out.
        path: ends in ".png" or ".svg".
        x, y: keys of the results, which are the axes' labels too.

    Raises:
        InputError: another ending, no result with both keys, matplotlib is not installed, or the
            file cannot be written.
    """
    figure = _figure(path, (6.4, 4.4))
    axes = figure.subplots()
    for k, (label, results) in enumerate(curves.items()):
        points = sorted(
            (row[x], row[y]) for row in results if row.get(x) is not None and row.get(y) is not None
        )
        if points:
            colour, marker = _COLOURS[k % len(_COLOURS)], _MARKERS[k % len(_MARKERS)]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    if not axes.lines:
        raise InputError(f"plot: no result has both {x!r} and {y!r}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    _without_box(axes)
    _save(figure, path)


def _summary(plan: PruningPlan) -> str:
    shares = (
        f"{plan.forecast[f'{name}_after'] / plan.forecast[f'{name}_before']:.1%} of the {label}"
        for name, label in (("macs", "MACs"), ("parameters", "parameters"))
    )
    return f"{plan.model}: {', '.join(shares)} kept"


def _figure(path: str | os.PathLike[str], inches: tuple[float, float]) -> Figure:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"plot: the file must end in {' or '.join(SUFFIXES)}, got {os.fspath(path)!r}"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plots need matplotlib, which is not installed; pip install 'ccp_ext[plots]'"
        ) from error
    return Figure(figsize=inches, layout="constrained")


def _without_box(*every: Axes) -> None:
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    kind = Path(path).suffix.lower().removeprefix(".")
    try:
        with files.atomic_path(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=_DOTS_PER_INCH)
    except OSError as error:
        raise InputError(
            f"plot: {os.fspath(path)!r} cannot be written: {error.strerror or error}"
        ) from error
