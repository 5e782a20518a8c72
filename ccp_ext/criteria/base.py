"""What a criterion is, and the registry of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ccp_ext.cost import Cost
from ccp_ext.errors import InputError

if TYPE_CHECKING:
    from ccp_ext.graph import ChannelGraph
    from ccp_ext.statistics import Statistics


@dataclass(frozen=True)
class Options:
    """What a user may set; a field that is None leaves it to the criterion.

    Attributes:
        site, curvature, rows, temperature: see :func:`ccp_ext.collect`.
        first_order: use the linear term u as well as S.
        diagonal: drop the interactions between channels.
        seed: of what the criterion draws at random.
    """

    site: str | None = None
    curvature: str | None = None
    rows: int | None = None
    temperature: float | None = None
    first_order: bool | None = None
    diagonal: bool = False
    seed: int = 0


class Criterion:
    """Base class: a name, where it was published, one line about it, and its costs."""

    name: ClassVar[str]
    source: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()

    def statistics(self) -> dict[str, Any] | None:
        """Keyword arguments for :func:`ccp_ext.collect`, or None if no data is needed."""
        return None

    def costs(
        self, model: nn.Module, graph: ChannelGraph, stats: Statistics | None
    ) -> Mapping[str, Cost]:
        """The cost of removing channels, for every group of the graph by name."""
        raise TypeError(f"criterion {self.name!r} does not define its costs")


_REGISTRY: dict[str, type[Criterion]] = {}


def register(criterion: type[Criterion]) -> type[Criterion]:
    """Class decorator: make the criterion known by its name."""
    _REGISTRY[criterion.name] = criterion
    return criterion


def names() -> list[str]:
    """The registered criteria, in alphabetical order."""
    return sorted(_REGISTRY)


def get(name: str, options: Options | None = None) -> Criterion:
    """The criterion of that name.

    Raises:
        InputError: no criterion has that name.
    """
    if name not in _REGISTRY:
        raise InputError(f"criterion must be one of {', '.join(names())}; got {name!r}")
    return _REGISTRY[name](options)
