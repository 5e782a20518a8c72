"""What a criterion is, and the registry of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from ccp_ext.cost import Cost
from ccp_ext.errors import InputError

if TYPE_CHECKING:
    from ccp_ext.datasets.image_set import ImageSet
    from ccp_ext.graph import ChannelGraph


@dataclass(frozen=True)
class Options:
    """What a user may set; a field that is None leaves it to the criterion.

    Attributes:
        site, curvature, rows, temperature: see :func:`ccp_ext.collect`.
        first_order: use the linear term u as well as S.
        diagonal: drop the interactions between channels.
        normalise: divide the scores of a group by what one of its channels costs: "memory",
            "macs" or "none" (group-fisher).
        greedy: choose as the publication does instead of by the solver (qsfm).
        ridge: added to the Gram matrices, in units of their mean diagonal (osscar, refit,
            refit-loss, gate-refit).
        seed: of what the criterion draws at random.
    """

    site: str | None = None
    curvature: str | None = None
    rows: int | None = None
    temperature: float | None = None
    first_order: bool | None = None
    diagonal: bool = False
    normalise: str | None = None
    greedy: bool = False
    ridge: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ridge is not None and not self.ridge >= 0:
            raise InputError(f"ridge must be a number of 0 or more, got {self.ridge!r}")


class Observation(Protocol):
    """What a criterion sees of the images; see :func:`ccp_ext.criteria.gathering.gather`."""

    def prepare(self, images: ImageSet, *, batch_size: int, progress: bool) -> None:
        """Called once, before the pass."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: object) -> None: ...

    def update(self, x: Tensor, y: Tensor) -> None:
        """Called for each batch of images [N, C, H, W] and labels int64 [N], inside ``with``."""


class Criterion:
    """Base class: a name, where it was published, one line about it, and its costs.

    Attributes:
        note: what the published description leaves open, and what was chosen here.
        auxiliary_heads: classifiers inside the network that its fine-tuning is published with.
        uses: the fields of :class:`Options` that it reads, besides the seed.
        allocation: what the allocation "auto" means for it: "optimal" if the costs of all groups
            are in one unit (the change of the loss or of the logits), so that they can be added,
            or if its source ranks the channels of all groups together; else "uniform".
    """

    name: ClassVar[str]
    source: ClassVar[str]
    summary: ClassVar[str]
    note: ClassVar[str] = ""
    auxiliary_heads: ClassVar[int] = 0
    uses: ClassVar[tuple[str, ...]] = ()
    allocation: str = "uniform"

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self._check_options()

    def _check_options(self) -> None:
        for field in fields(Options):
            value = getattr(self.options, field.name)
            if value != field.default and field.name not in (*self.uses, "seed"):
                raise InputError(
                    f"criterion {self.name!r} has no {field.name} to set, got {value!r}; it takes "
                    f"{', '.join(self.uses) or 'no options'}"
                )

    def statistics(self) -> dict[str, Any] | None:
        """Keyword arguments for :func:`ccp_ext.collect`, or None if it is not needed."""
        return None

    def observation(self, model: nn.Module, graph: ChannelGraph) -> Observation | None:
        """What else to see of the images, or None; not both this and ``statistics``."""
        return None

    def costs(self, model: nn.Module, graph: ChannelGraph, data: Any) -> Mapping[str, Cost]:
        """The cost of removing channels, for every group of the graph by name.

        Args:
            data: what :func:`ccp_ext.criteria.gathering.gather` returned: the statistics, the
                observation after its pass, or None.
        """
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
        InputError: no criterion has that name, or an option is set that it does not use.
    """
    if name not in _REGISTRY:
        raise InputError(f"criterion must be one of {', '.join(names())}; got {name!r}")
    return _REGISTRY[name](options)
