"""The few tensors of a run that its page shows: pairwise costs and feature maps of some groups."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ccp_ext import files
from ccp_ext.activations import View, map_views, observe
from ccp_ext.cost import Cost
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.graph import ChannelGraph, Group, Tap

GROUPS = 4


@dataclass(frozen=True)
class Snapshot:
    """Tensors of some groups, by group.

    Attributes:
        image: uint8 ``[C, H, W]``, the sample that the maps are of.
        S, u: the terms of the groups' costs, where they have them; float32 ``[C, C]``, ``[C]``.
        maps: the groups' maps behind the activation, float32 ``[C, H, W]``, where they have such.
    """

    image: Tensor
    S: Mapping[str, Tensor]
    u: Mapping[str, Tensor]
    maps: Mapping[str, Tensor]

    def save(self, path: str | os.PathLike[str]) -> None:
        tensors = {"image": self.image.cpu().contiguous()}
        for kind in ("S", "u", "maps"):
            for group, tensor in getattr(self, kind).items():
                tensors[f"{kind} {group}"] = tensor.detach().float().cpu().contiguous()
        with files.atomic_path(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            tensors = load_file(Path(path))
            image = tensors.pop("image")
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{os.fspath(path)} is not a readable snapshot: {error}") from error
        parts: dict[str, dict[str, Tensor]] = {"S": {}, "u": {}, "maps": {}}
        for name, tensor in tensors.items():
            kind, _, group = name.partition(" ")
            parts[kind][group] = tensor
        return cls(image, **parts)


def take(
    model: nn.Module, graph: ChannelGraph, costs: Mapping[str, Cost], images: ImageSet
) -> Snapshot:
    """Of groups evenly spread over the plain ``model``, with the maps of the first image."""
    groups = _spread(graph.groups)
    chosen = {group.name: costs[group.name] for group in groups}
    return Snapshot(
        image=images.images[0],
        S={name: cost.S for name, cost in chosen.items() if cost.S is not None},
        u={name: cost.u for name, cost in chosen.items() if cost.u is not None},
        maps=_maps(model, groups, images.normalise(images.images[:1])),
    )


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
