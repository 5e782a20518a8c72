"""What a model's layers take at many widths, and from that what a pruned model will take."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ccp_ext import files
from ccp_ext.allocation.resource import Resource, Table, Width
from ccp_ext.errors import InputError

if TYPE_CHECKING:
    from ccp_ext.graph import ChannelGraph

VERSION = 1


@dataclass(frozen=True)
class LayerTimes:
    """Times of one layer, in milliseconds.

    Attributes:
        out, inputs: the widths measured, increasing; the last ones are the plain layer's. A layer
            without input channels of its own, such as a normalisation, has ``inputs`` (0,).
        milliseconds: ``[out][inputs]``.
    """

    out: tuple[int, ...]
    inputs: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        grid = np.array(self.milliseconds, dtype=np.float64)
        increasing = all(
            list(widths) == sorted(set(widths)) and widths for widths in (self.out, self.inputs)
        )
        shape = (len(self.out), len(self.inputs))
        if not increasing or grid.shape != shape or not (np.isfinite(grid) & (grid >= 0)).all():
            raise InputError(
                "latency table: a layer needs increasing widths and a time of 0 or more for every "
                f"pair; got out={self.out}, inputs={self.inputs} and times of shape {grid.shape}"
            )


@dataclass(frozen=True)
class LatencyTable:
    """Times of the layers of a model, by path, and of the whole model.

    Between the widths measured the time is that of the next wider one: kernels work in tiles, and
    a tile that is not full takes as long as a full one. What runs outside of the layers
    (activations, additions, pooling) is taken to shrink as the layers do: the sum over the layers
    is scaled so that it is ``milliseconds`` for the plain model.

    Attributes:
        layers: {path: times}.
        milliseconds: of the plain model.
        device, torch, dtype, threads: what the times were measured with.
        shapes: of the example inputs, the batch among it.
    """

    layers: Mapping[str, LayerTimes]
    milliseconds: float
    device: str
    torch: str
    dtype: str
    threads: int
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.milliseconds) and self.milliseconds > 0 and self.layers):
            raise InputError(
                "latency table: needs layers and a positive time of the whole model; got "
                f"{len(self.layers)} layers and {self.milliseconds!r} ms"
            )

    def predict(self, graph: ChannelGraph, keep: Mapping[str, int] | None = None) -> float:
        """Milliseconds of the model pruned to ``keep`` channels in each group.

        Args:
            graph: of the measured model, or of a model pruned from it.
            keep: {group name: channels that stay}; all stay in a group without an entry.

        Raises:
            InputError: the graph has layers, or widths, that were not measured; an unknown group,
                or a count outside of 1 to its channels.
        """
        return self.resource(graph)(graph.counts(keep))

    def resource(self, graph: ChannelGraph) -> Resource:
        """The prediction as a cost for an elimination; errors as in :meth:`predict`."""
        sides = graph.sides()
        whole = graph.counts()
        scale = self.milliseconds / sum(
            times.milliseconds[-1][-1] for times in self.layers.values()
        )
        constant, tables = 0.0, []
        for path, (out, inputs) in sides.items():
            times = self.layers.get(path)
            if times is None:
                raise InputError(f"latency table: layer {path!r} of the graph was not measured")
            for side, measured in (("out", times.out), ("inputs", times.inputs)):
                width = (out if side == "out" else inputs)(whole)
                if width > measured[-1]:
                    raise InputError(
                        f"latency table: layer {path!r} was measured up to {side} width "
                        f"{measured[-1]}; the graph's has {width}"
                    )
            staircase = _Staircase(times, scale)
            if out.weights or inputs.weights:
                steps = (staircase.out_step, staircase.input_step)
                tables.append(Table(out, inputs, staircase, staircase.at_least, steps))
            else:
                constant += float(staircase(out(whole), inputs(whole)))
        return Resource(constant, tables=tuple(tables))

    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            files.write_text(path, self._to_json() + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"latency table {os.fspath(path)!r}: {reason}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table from a file.

        Raises:
            InputError: the file cannot be read or is malformed.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls._from_json(content)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"latency table {os.fspath(path)!r}: {reason}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"latency table {os.fspath(path)!r} is malformed: {error}") from error

    def _to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> LatencyTable:
        if content.pop("version") != VERSION:
            raise ValueError(f"its version is not {VERSION}")
        layers = {
            path: LayerTimes(
                tuple(map(int, times["out"])),
                tuple(map(int, times["inputs"])),
                tuple(tuple(map(float, row)) for row in times["milliseconds"]),
            )
            for path, times in content.pop("layers").items()
        }
        shapes = tuple(tuple(map(int, shape)) for shape in content.pop("shapes"))
        return cls(layers=layers, shapes=shapes, **content)


class _Staircase:
    """The times of a layer at any widths up to the plain ones."""

    def __init__(self, times: LayerTimes, scale: float) -> None:
        self._out, self._inputs = np.array(times.out), np.array(times.inputs)
        self._grid = scale * np.array(times.milliseconds)
        suffix = np.minimum.accumulate(self._grid[::-1], axis=0)[::-1]
        self._least = np.minimum.accumulate(suffix[:, ::-1], axis=1)[:, ::-1]

    def __call__(self, out: Width, inputs: Width) -> np.ndarray:
        return self._grid[self.out_step(out), self.input_step(inputs)]

    def at_least(self, out: Width, inputs: Width) -> np.ndarray:
        return self._least[self.out_step(out), self.input_step(inputs)]

    def out_step(self, width: Width) -> np.ndarray:
        """The position of the next measured width."""
        return np.searchsorted(self._out, width)

    def input_step(self, width: Width) -> np.ndarray:
        return np.searchsorted(self._inputs, width)
