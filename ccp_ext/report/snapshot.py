"""The few tensors that a page shows: pairwise costs and feature maps of some groups."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ccp_ext import criteria, files
from ccp_ext.activations import View, map_views, observe
from ccp_ext.cost import Cost
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph, Group, Tap

FILE = "snapshot.safetensors"
GROUPS = 4
# For pairwise costs that are gathered for the page alone, and how many at a time: few, since the
# criterion that chose may be one that needs no backward pass.
IMAGES, BATCH_SIZE = 256, 32


@dataclass(frozen=True)
class Snapshot:
    """Tensors of some groups, by group.

    Attributes:
        image: uint8 ``[C, H, W]``, the sample that the maps are of.
        S, u: the terms of the groups' costs, where they have them; float32 ``[C, C]``, ``[C]``.
        maps: the groups' maps behind the activation, float32 ``[C, H, W]``, where they have such.
        note: what S and u are, or why there are none, where they are not the costs by which the
            channels were chosen; else empty.
    """

    image: Tensor
    S: Mapping[str, Tensor]
    u: Mapping[str, Tensor]
    maps: Mapping[str, Tensor]
    note: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        from safetensors.torch import save_file  # here: kernels are built and measured without it

        tensors = {"image": self.image.cpu().contiguous()}
        for kind in ("S", "u", "maps"):
            for group, tensor in getattr(self, kind).items():
                tensors[f"{kind} {group}"] = tensor.detach().float().cpu().contiguous()
        with files.atomic_path(path) as temporary:
            save_file(tensors, temporary, {"note": self.note})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(path), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                note = (file.metadata() or {}).get("note", "")
            image = tensors.pop("image")
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{os.fspath(path)} is not a readable snapshot: {error}") from error
        parts: dict[str, dict[str, Tensor]] = {"S": {}, "u": {}, "maps": {}}
        for name, tensor in tensors.items():
            kind, _, group = name.partition(" ")
            parts[kind][group] = tensor
        return cls(image, **parts, note=note)


def take(
    model: nn.Module,
    graph: ChannelGraph,
    images: ImageSet,
    costs: Mapping[str, Cost] | None = None,
    *,
    progress: bool = True,
) -> Snapshot:
    """Of groups evenly spread over the plain ``model``, with the maps of the first image.

    Args:
        images: training images in random order.
        costs: by which the channels are chosen. Without them, or where they are not pairwise, those
            of ccp are gathered from a few of the images.
    """
    groups, note = _spread(graph.groups), ""
    names = [group.name for group in groups]
    shown = {} if costs is None else {name: costs[name] for name in names}
    if all(cost.S is None for cost in shown.values()):
        shown, note = _pairwise_costs(model, graph.select_groups(names), images, progress)
    if note and costs is not None:
        note = f"The criterion scores each channel by itself. {note}"
    return Snapshot(
        image=images.images[0],
        S={name: cost.S for name, cost in shown.items() if cost.S is not None},
        u={name: cost.u for name, cost in shown.items() if cost.u is not None},
        maps=_maps(model, groups, images.normalise(images.images[:1])),
        note=note,
    )


def _pairwise_costs(
    model: nn.Module, graph: ChannelGraph, images: ImageSet, progress: bool
) -> tuple[Mapping[str, Cost], str]:
    """Those of ccp, and what to say of them."""
    ccp, few = criteria.get("ccp"), images.subset(range(min(IMAGES, len(images))))
    try:
        stats = criteria.gather(model, graph, ccp, few, batch_size=BATCH_SIZE, progress=progress)
    except (ValueError, RuntimeError) as error:  # an InputError is a ValueError
        # No reason to stop: the criterion that chooses may need no derivatives.
        return {}, f"The pairwise costs of ccp could not be gathered from this model: {error}."
    note = (
        f"These are the pairwise costs of ccp, gathered from {len(few):,} training images for this "
        "page; no channel was chosen by them."
    )
    return ccp.costs(model, graph, stats), note


def _spread(groups: tuple[Group, ...]) -> list[Group]:
    count = min(GROUPS, len(groups))
    return [groups[round(k * (len(groups) - 1) / max(1, count - 1))] for k in range(count)]


def _maps(model: nn.Module, groups: list[Group], x: Tensor) -> dict[str, Tensor]:
    readers = {group.name: _Maps(map_views(model, group)[0]) for group in groups}
    observe(model, readers, [x], progress=False)
    return {name: reader.maps for name, reader in readers.items() if reader.maps.ndim == 3}


@dataclass
class _Maps:
    """Keeps the maps of the first sample."""

    view: View
    maps: Tensor | None = None

    def readers(self) -> list[tuple[Tap, Callable[[Tensor], None]]]:
        return [(self.view.tap, self._receive)]

    def _receive(self, tensor: Tensor) -> None:
        self.maps = self.view.maps(tensor)[0].clone()
