"""Criteria side by side at equal cost: the same images, budgets, repairs and test for each.

A row is one model: an arm's choice of channels at one budget, with the images and random numbers of
one seed, after one repair. Rows are kept as they are done, and an interrupted comparison goes on.

The test images in their official order are cut in two: whatever is chosen by looking at results
(an arm, a repair, an option) is to be chosen on the first half, "selection"; the second, "report",
is for the figures that are then quoted.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ccp_ext import allocation, criteria, files, measure, repair, surgery
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import Evaluation, evaluate
from ccp_ext.finetune import FinetuneConfig, finetune
from ccp_ext.graph import ChannelGraph
from ccp_ext.pipeline import (
    Inputs,
    RunFolder,
    check_statistics,
    joint_cost,
    load_inputs,
    sample,
)
from ccp_ext.plan import PruningPlan
from ccp_ext.planning import ALLOCATIONS, make_plan
from ccp_ext.report.summary import COSTS, PARTS, as_csv, as_markdown, rank, summarise

CONTROL = "random"
FINETUNE = "finetune"


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
        model, weights, data: see :mod:`ccp_ext.checkpoints` and :func:`ccp_ext.datasets.load`.
        criteria: the arms, see :meth:`Arm.parse`; the random control is added if it is missing.
        macs, params: budgets, of one kind; see :func:`ccp_ext.allocation.allocate`.
        seeds: each draws the images of the statistics and of the repair, the random numbers of the
            criterion, and the order of fine-tuning, as the seed of ``ccp prune`` does.
        repair: "none", or steps joined by "+", in their order: "fold" (removed means into the next
            layer), "refit" (least squares), "batchnorm" (re-estimation), "finetune" (the schedule);
            see :mod:`ccp_ext.compensation`.
        allocation: "uniform", "optimal" or "auto" (what each criterion says, see
            :class:`ccp_ext.criteria.Criterion`), for all arms that do not bring their own ("joint"
            is for single arms); see :func:`ccp_ext.make_plan`.
        scope: of the groups to prune; see :meth:`ccp_ext.graph.ChannelGraph.select_groups`.
        images, repair_images: training images for the statistics and for the repair.
        finetune: the schedule of the step "finetune"; its seed is the row's.

    Raises:
        InputError: an option is out of range, or given twice.
    """

    model: str
    weights: str
    data: str
    criteria: tuple[str, ...] = ("ccp", "l1")
    macs: tuple[float | int, ...] = ()
    params: tuple[float | int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    repair: tuple[str, ...] = ("batchnorm",)
    allocation: str = "auto"
    multiple: int = 1
    scope: str = "inner"
    images: int = 10_000
    batch_size: int = 128
    repair_images: int = 10_000
    finetune: FinetuneConfig | None = None

    def __post_init__(self) -> None:
        if CONTROL not in self.criteria:
            object.__setattr__(self, "criteria", (*self.criteria, CONTROL))
        if bool(self.macs) == bool(self.params):
            raise InputError("give budgets of exactly one kind, macs or params")
        for option in ("criteria", "macs", "params", "seeds", "repair"):
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
        _check_allocation(self.allocation)
        self.arms()
        for text in self.repair:
            self._check_repair(text)

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


@dataclass(frozen=True)
class Job:
    """What makes a row: the names of its first columns, in their order."""

    criterion: str
    kind: str
    budget: float | int
    repair: str
    seed: int

    @property
    def file(self) -> str:
        name = "--".join(str(value) for value in dataclasses.astuple(self))
        return f"rows/{re.sub(r'[^A-Za-z0-9._+-]', '_', name)}.json"


def compare(
    settings: CompareSettings,
    output: str | os.PathLike[str],
    *,
    devices: Sequence[str] = ("cpu",),
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make every row that the folder lacks, and the tables.

    Writes to the folder ``output``: ``settings.json``, ``plain.json``, a file for each row in
    ``rows``, and at the end ``comparison.json``, ``comparison.csv`` and ``comparison.md``.

    Args:
        devices: one process each, if there are several (a device may be named more than once);
            each makes a run of consecutive rows, so that almost all statistics are gathered once.
        say: gets a line for each row; must be a module's function if there are several devices.

    Returns:
        {"settings", "plain", "rows", "summary", "ranks"}; a row has the columns of
        :class:`Job`, MACs, parameters and their shares that are kept, the forecast objective,
        accuracy (percent) and loss on the halves of the test set and on the whole, and the seconds
        and peak memory (MiB) of statistics, choice and repair.

    Raises:
        InputError: anything in the settings or the data that the user can mend; nothing is written
            before the inputs, the options and the budgets were found good.
    """
    inputs = load_inputs(settings, devices[0])
    _check(settings, inputs)
    folder = RunFolder(output, {**dataclasses.asdict(settings), **inputs.contents()})
    (folder.path / "rows").mkdir(exist_ok=True)
    jobs = _jobs(settings)
    missing = [job for job in jobs if _read_row(folder, job) is None]
    if len(missing) < len(jobs):
        say(f"{len(jobs) - len(missing)} of {len(jobs)} rows are there")
    plain = folder.read("plain.json", dict)
    if plain is None:
        plain = _Bench(settings, inputs, folder, progress).plain()
        folder.write("plain.json", plain)
    if len(devices) == 1:
        _make_rows(_Bench(settings, inputs, folder, progress), missing, say)
    elif missing:
        _make_rows_in_parallel(settings, folder, missing, devices, say)
    rows = [_read_row(folder, job) for job in jobs]
    result = {
        "settings": dataclasses.asdict(settings),
        "plain": plain,
        "rows": rows,
        "summary": summarise(rows),
        "ranks": rank(rows),
    }
    folder.write("comparison.json", result)
    files.write_text(folder.path / "comparison.csv", as_csv(rows))
    files.write_text(folder.path / "comparison.md", as_markdown(result))
    return result


# --- making rows ---------------------------------------------------------------------------------


def _check(settings: CompareSettings, inputs: Inputs) -> None:
    """Find what would fail later on."""
    for kind, value in settings.budgets():
        allocation.allocate(inputs.graph, **{kind: value}, multiple=settings.multiple)
    for arm in settings.arms():
        criterion = arm.with_seed(settings.seeds[0])
        check_statistics(inputs.model, inputs.graph, criterion, settings.allocation_of(arm))
    if len(inputs.test) < 2:
        raise InputError("compare: the test set holds 1 image; it takes 2 to have two halves")


def _jobs(settings: CompareSettings) -> list[Job]:
    """All rows, those that share statistics together."""
    return [
        Job(arm.label, kind, value, steps, seed)
        for seed in settings.seeds
        for arm in _sharing_together(settings.arms(), seed)
        for kind, value in settings.budgets()
        for steps in settings.repair
    ]


def _sharing_together(arms: Sequence[Arm], seed: int) -> list[Arm]:
    keys = [_statistics_key(arm, seed) for arm in arms]
    return [arm for _, arm in sorted(zip(keys, arms, strict=True), key=lambda p: keys.index(p[0]))]


def _statistics_key(arm: Arm, seed: int) -> str:
    """Equal for arms whose statistics are equal."""
    needed = arm.with_seed(seed).statistics()
    if needed is None:
        return f"{arm.criterion} {arm.options}"
    return json.dumps(needed, sort_keys=True)


@dataclass
class _Bench:
    """Makes rows on one device; the last statistics and the last plan are kept for the next row."""

    settings: CompareSettings
    inputs: Inputs
    folder: RunFolder
    progress: bool
    _last: dict[str, tuple[Any, Any, measure.Resources]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.inputs.example.device

    def plain(self) -> dict[str, Any]:
        """The unpruned model, and how many images the halves hold."""
        images = len(self.inputs.test)
        halves = {"selection images": images // 2, "report images": images - images // 2}
        return self._size(self.inputs.model) | self._evaluations(self.inputs.model) | halves

    def row(self, job: Job) -> dict[str, Any]:
        plan, gathering, choosing = self._plan(job)
        model = surgery.prune(copy.deepcopy(self.inputs.model), plan)
        repairing = self._repair(model, job)
        row = dataclasses.asdict(job) | self._size(model)
        row["objective"] = plan.record["allocation"]["objective"]
        row |= self._evaluations(model)
        for name, used in zip(COSTS, (gathering, choosing, repairing), strict=True):
            row[f"{name} seconds"] = used.seconds
            row[f"{name} MiB"] = used.mebibytes
        return row | {"memory": measure.memory_kind(self.device), "device": str(self.device)}

    def _plan(self, job: Job) -> tuple[PruningPlan, measure.Resources, measure.Resources]:
        arm = Arm.parse(job.criterion)
        criterion, method = arm.with_seed(job.seed), self.settings.allocation_of(arm)

        def gathered() -> Any:
            images = sample(self.inputs.train, self.settings.images, job.seed, "statistics")
            return criteria.gather(
                self.inputs.model,
                self.inputs.graph,
                criterion,
                images,
                batch_size=self.settings.batch_size,
                keep_rows=method == "joint",
                progress=self.progress,
            )

        def chosen() -> PruningPlan:
            costs = criterion.costs(self.inputs.model, self.inputs.graph, stats)
            return make_plan(
                self.inputs.graph,
                costs,
                **{job.kind: job.budget},
                allocation=method,
                joint=joint_cost(method, criterion, stats),
                multiple=self.settings.multiple,
                progress=self.progress,
            )

        key = (_statistics_key(arm, job.seed), job.seed, method == "joint")
        stats, gathering = self._once("statistics", key, gathered)
        key = dataclasses.replace(job, repair="")
        plan, choosing = self._once("plan", key, chosen)
        return plan, gathering, choosing

    def _once(self, what: str, key: Any, make: Callable[[], Any]) -> tuple[Any, measure.Resources]:
        """What ``make`` returns and takes, kept until another key is asked for."""
        if what not in self._last or self._last[what][0] != key:
            self._last.pop(what, None)  # so that two are never in memory
            with measure.resources(self.device) as used:
                value = make()
            self._last[what] = (key, value, used)
        return self._last[what][1:]

    def _repair(self, slim: nn.Module, job: Job) -> measure.Resources:
        images = sample(self.inputs.train, self.settings.repair_images, job.seed, "repair")
        total = measure.Resources(0.0, 0.0)
        for step in repair_steps(job.repair):
            if step == FINETUNE:
                used = self._finetune(slim, job)
            else:
                with measure.resources(self.device) as used:
                    repair.apply(
                        step,
                        self.inputs.model,
                        slim,
                        images,
                        batch_size=self.settings.batch_size,
                        progress=self.progress,
                    )
            total = total.then(used)
        return total

    def _finetune(self, slim: nn.Module, job: Job) -> measure.Resources:
        checkpoint = (self.folder.path / job.file).with_suffix(".pt")
        with measure.resources(self.device) as used:
            history = finetune(
                slim,
                self.inputs.train,
                self.settings.finetune,
                seed=job.seed,
                checkpoint=checkpoint,
                progress=self.progress,
            )
        checkpoint.unlink(missing_ok=True)
        # Of all epochs: some may have run before an interruption.
        return measure.Resources(sum(epoch.seconds for epoch in history), used.mebibytes)

    def _size(self, model: nn.Module) -> dict[str, Any]:
        macs, parameters = measure.macs(model, self.inputs.example), measure.parameters(model)
        graph: ChannelGraph = self.inputs.graph
        return {
            "MACs": macs,
            "MACs kept": macs / graph.macs(),
            "parameters": parameters,
            "parameters kept": parameters / graph.parameters(),
        }

    def _evaluations(self, model: nn.Module) -> dict[str, float]:
        test = self.inputs.test
        first, second = (self._evaluate(model, test.subset(part)) for part in _halves(test))
        results = dict(zip(PARTS, (first, second, _together(first, second)), strict=True))
        return {
            f"{part} {name}": getattr(result, name)
            for part, result in results.items()
            for name in ("accuracy", "loss")
        }

    def _evaluate(self, model: nn.Module, images: ImageSet) -> Evaluation:
        return evaluate(model, images, batch_size=self.settings.batch_size, progress=self.progress)


def _halves(test: ImageSet) -> tuple[range, range]:
    """The first half of the test set and the second.

    Of one that is sorted by class, where these would hold other classes, every second image.
    """
    count, half = len(test), len(test) // 2
    if bool((test.labels.diff() >= 0).all()):
        return range(1, count, 2), range(0, count, 2)
    return range(half), range(half, count)


def _together(first: Evaluation, second: Evaluation) -> Evaluation:
    count = first.count + second.count

    def mean(name: str) -> float:
        parts = (first, second)
        return sum(getattr(part, name) * part.count for part in parts) / count

    return Evaluation(mean("accuracy"), mean("loss"), count)


def _make_rows(bench: _Bench, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    for done, job in enumerate(jobs, 1):
        row = bench.row(job)
        bench.folder.write(job.file, row)
        say(
            f"{done}/{len(jobs)} {job.criterion}, {job.kind} {job.budget}, {job.repair}, seed "
            f"{job.seed}: {row['all accuracy']:.2f} % on {bench.device}"
        )


def _make_rows_in_parallel(
    settings: CompareSettings,
    folder: RunFolder,
    jobs: Sequence[Job],
    devices: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """One process a device; if one fails, the others finish their rows first."""
    ends = [len(jobs) * k // len(devices) for k in range(len(devices) + 1)]
    threads = max(1, torch.get_num_threads() // len(devices))
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(devices), context) as pool:
        running = [
            pool.submit(_worker, settings, folder, jobs[start:end], device, threads, say)
            for device, (start, end) in zip(devices, itertools.pairwise(ends), strict=True)
            if start < end
        ]
        for process in running:
            process.result()


def _worker(
    settings: CompareSettings,
    folder: RunFolder,
    jobs: Sequence[Job],
    device: str,
    threads: int,
    say: Callable[[str], None],
) -> None:
    torch.set_num_threads(threads)
    # Bars of several processes would overwrite one another.
    _make_rows(_Bench(settings, load_inputs(settings, device), folder, False), jobs, say)


def _read_row(folder: RunFolder, job: Job) -> dict[str, Any] | None:
    row = folder.read(job.file, dict)
    if row is not None and any(row.get(k) != v for k, v in dataclasses.asdict(job).items()):
        raise InputError(f"{folder.path / job.file} is damaged; remove it to go on")
    return row


def _value(text: str) -> Any:
    """A number or truth value where the text is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text
