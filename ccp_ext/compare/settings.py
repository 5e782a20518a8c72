"""What to compare: arms, budgets, repairs and seeds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ccp_ext import criteria, repair
from ccp_ext.compensation import MEMORY
from ccp_ext.errors import InputError
from ccp_ext.finetune import FinetuneConfig
from ccp_ext.planning import ALLOCATIONS

CONTROL = "random"
FINETUNE = "finetune"
# What distinguishes the rows of a comparison; all else in its settings they share.
AXES = ("criteria", "macs", "params", "seeds", "repair")


@dataclass(frozen=True)
class Arm:
    """One way to choose channels: a criterion with its options.

    Attributes:
        label: the text that it was read from.
        allocation: in place of the comparison's, or None.
    """

    label: str
    criterion: str
    options: criteria.Options
    allocation: str | None = None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``criterion:option=value:...``, such as ``ccp:curvature=sampled:diagonal``.

        An option is ``allocation`` or a field of :class:`ccp_ext.criteria.Options` other than the
        seed, which the comparison sets; one without a value is true.

        Raises:
            InputError: an unknown criterion or option, or a value that is out of range.
        """
        name, *settings = text.split(":")
        known = {f.name: f.type for f in dataclasses.fields(criteria.Options) if f.name != "seed"}
        known["allocation"] = "str"
        options = {}
        for setting in settings:
            option, given, value = setting.partition("=")
            if option not in known:
                raise InputError(
                    f"criteria: {text!r} sets {option!r}; an option must be one of "
                    f"{', '.join(known)}"
                )
            options[option] = _value(value) if given else True
            accepted = known[option].replace("float", "float | int").split(" | ")
            if type(options[option]).__name__ not in accepted:
                raise InputError(f"criteria: {text!r} sets {option}, which takes {known[option]}")
        criteria.get(name)
        own = options.pop("allocation", None)
        if own is not None:
            _check_allocation(own)
        return cls(text, name, criteria.Options(**options), own)

    def with_seed(self, seed: int) -> criteria.Criterion:
        return criteria.get(self.criterion, dataclasses.replace(self.options, seed=seed))


@dataclass(frozen=True)
class CompareSettings:
    """Everything that decides the outcome of ``ccp compare``.

    Attributes:
        model, weights, data, mean, std: as of :class:`ccp_ext.pipeline.PruneSettings`.
        criteria: the arms, see :meth:`Arm.parse`; the random control is added if it is missing.
        macs, params: budgets, of one kind; see :func:`ccp_ext.allocation.allocate`.
        seeds: each draws the images of the statistics and of the repair, the random numbers of the
            criterion, and the order of fine-tuning, as the seed of ``ccp prune`` does.
        repair: "none", or steps joined by "+", in their order: "fold" (removed means into the next
            layer), "refit-linear" (least squares), "refit" (with Gauss-Newton steps as well),
            "refit-modules" (whole modules, after one of them), "batchnorm" (re-estimation),
            "finetune" (the schedule); see :mod:`ccp_ext.compensation`.
        allocation: "uniform", "optimal" or "auto" (what each criterion says, see
            :class:`ccp_ext.criteria.Criterion`), for all arms that do not bring their own ("joint"
            is for single arms); see :func:`ccp_ext.make_plan`.
        scope: of the groups to prune; see :meth:`ccp_ext.graph.ChannelGraph.select_groups`.
        images, repair_images: training images for the statistics and for the repair.
        repair_memory: as of :class:`ccp_ext.pipeline.PruneSettings`.
        finetune: the schedule of the step "finetune"; its seed is the row's. An arm of a criterion
            with auxiliary heads, ccp-ac, is fine-tuned with them.
        distil: fine-tune with the plain model as teacher, all arms and the unpruned control.

    Raises:
        InputError: an option is out of range, or given twice.
    """

    model: str
    weights: str
    data: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    criteria: tuple[str, ...] = ("taylor", "refit-loss", "ccp", "l1")
    macs: tuple[float | int, ...] = ()
    params: tuple[float | int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    repair: tuple[str, ...] = ("refit-linear",)
    allocation: str = "auto"
    multiple: int = 1
    scope: str = "inner"
    images: int = 10_000
    batch_size: int = 128
    repair_images: int = 10_000
    repair_memory: float = MEMORY
    finetune: FinetuneConfig | None = None
    distil: bool = False

    def __post_init__(self) -> None:
        if CONTROL not in self.criteria:
            object.__setattr__(self, "criteria", (*self.criteria, CONTROL))
        if bool(self.macs) == bool(self.params):
            raise InputError("give budgets of exactly one kind, macs or params")
        for option in AXES:
            values = getattr(self, option)
            if len(set(values)) < len(values):
                raise InputError(f"{option} holds a value twice: {', '.join(map(str, values))}")
        for option in ("seeds", "repair"):
            if not getattr(self, option):
                raise InputError(f"{option} must hold one value or more")
        for option in ("images", "batch_size", "repair_images"):
            if getattr(self, option) < 1:
                raise InputError(f"{option} must be at least 1, got {getattr(self, option)}")
        if min(self.seeds) < 0:
            raise InputError(f"seeds must be at least 0, got {min(self.seeds)}")
        repair.check_memory(self.repair_memory)
        if self.distil and self.finetune is None:
            raise InputError("distil is given, but there is no fine-tuning (epochs)")
        _check_allocation(self.allocation)
        self.arms()
        for text in self.repair:
            self._check_repair(text)
        if self.finetune is not None and not any(
            FINETUNE in text.split("+") for text in self.repair
        ):
            raise InputError(
                f"epochs is given, but no repair ends in {FINETUNE}; got {', '.join(self.repair)}"
            )

    def shared(self) -> dict[str, Any]:
        """All that a row depends on beside its own columns."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in AXES}

    def arms(self) -> list[Arm]:
        return [Arm.parse(text) for text in self.criteria]

    def allocation_of(self, arm: Arm) -> str:
        chosen = arm.allocation or self.allocation
        return arm.with_seed(self.seeds[0]).allocation if chosen == "auto" else chosen

    def budgets(self) -> list[tuple[str, float | int]]:
        """(kind, value) of every budget."""
        return [(kind, value) for kind in ("macs", "params") for value in getattr(self, kind)]

    def _check_repair(self, text: str) -> None:
        if FINETUNE in repair_steps(text) and self.finetune is None:
            raise InputError(f"repair {text!r} needs a schedule of fine-tuning (epochs)")


def _check_allocation(name: Any) -> None:
    if name not in ALLOCATIONS:
        raise InputError(f"allocation must be one of {', '.join(ALLOCATIONS)}; got {name!r}")


def repair_steps(text: str) -> tuple[str, ...]:
    return repair.parse(text, [FINETUNE])


def _value(text: str) -> Any:
    """A number or truth value where the text is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text
