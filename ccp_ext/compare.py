"""Criteria side by side at equal cost: the same images, budgets, repairs and test for each.

A row is one model: an arm's choice of channels at one budget, with the images and random numbers of
one seed, after one repair. Rows are kept as they are done, and an interrupted comparison goes on.

The test images in their official order are cut in two: whatever is chosen by looking at results
(an arm, a repair, an option) is to be chosen on the first half, "selection"; the second, "report",
is for the figures that are then quoted.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ccp_ext import allocation, criteria, files, measure, surgery
from ccp_ext.compensation import reestimate_batchnorm
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import Evaluation, evaluate
from ccp_ext.finetune import FinetuneConfig, finetune
from ccp_ext.graph import ChannelGraph
from ccp_ext.pipeline import Inputs, RunFolder, check_statistics, gather, load_inputs, sample
from ccp_ext.plan import PruningPlan
from ccp_ext.planning import make_plan
from ccp_ext.report import table

CONTROL = "random"
NO_REPAIR = "none"
STEPS = ("batchnorm", "finetune")
PARTS = ("selection", "report", "all")
COSTS = ("statistics", "choice", "repair")


@dataclass(frozen=True)
class Arm:
    """One way to choose channels: a criterion with its options.

    Attributes:
        label: the text that it was read from.
    """

    label: str
    criterion: str
    options: criteria.Options

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``criterion:option=value:...``, such as ``ccp:curvature=sampled:diagonal``.

        An option is a field of :class:`ccp_ext.criteria.Options` other than the seed, which the
        comparison sets; one without a value is true.

        Raises:
            InputError: an unknown criterion or option, or a value that is out of range.
        """
        name, *settings = text.split(":")
        known = [f.name for f in dataclasses.fields(criteria.Options) if f.name != "seed"]
        options = {}
        for setting in settings:
            option, given, value = setting.partition("=")
            if option not in known:
                raise InputError(
                    f"criteria: {text!r} sets {option!r}; an option must be one of "
                    f"{', '.join(known)}"
                )
            options[option] = _value(value) if given else True
        criteria.get(name)
        return cls(text, name, criteria.Options(**options))

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
        repair: "none", or steps joined by "+", in their order: "batchnorm" (re-estimation of the
            statistics), "finetune" (the schedule).
        scope: of the groups to prune; see :meth:`ccp_ext.graph.ChannelGraph.select_groups`.
        images, reestimate_images: training images for the statistics and for the repair.
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
    multiple: int = 1
    scope: str = "inner"
    images: int = 10_000
    batch_size: int = 128
    reestimate_images: int = 10_000
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
        for option in ("images", "batch_size", "reestimate_images"):
            if getattr(self, option) < 1:
                raise InputError(f"{option} must be at least 1, got {getattr(self, option)}")
        if min(self.seeds) < 0:
            raise InputError(f"seeds must be at least 0, got {min(self.seeds)}")
        self.arms()
        for repair in self.repair:
            self._check_repair(repair)

    def arms(self) -> list[Arm]:
        return [Arm.parse(text) for text in self.criteria]

    def budgets(self) -> list[tuple[str, float | int]]:
        """(kind, value) of every budget."""
        return [(kind, value) for kind in ("macs", "params") for value in getattr(self, kind)]

    def _check_repair(self, repair: str) -> None:
        steps = repair_steps(repair)
        in_order = [step for step in STEPS if step in steps]
        if steps != in_order:
            raise InputError(
                f"repair must be {NO_REPAIR}, or steps of {', '.join(STEPS)} in this order joined "
                f"by +; got {repair!r}"
            )
        if "finetune" in steps and self.finetune is None:
            raise InputError(f"repair {repair!r} needs a schedule of fine-tuning (epochs)")


def repair_steps(repair: str) -> list[str]:
    return [] if repair == NO_REPAIR else repair.split("+")


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
        {"settings", "plain", "rows", "summary"}: see :func:`summarise`; a row has the columns of
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
    }
    folder.write("comparison.json", result)
    files.write_text(folder.path / "comparison.csv", _csv(rows))
    files.write_text(folder.path / "comparison.md", markdown(result))
    return result


# --- making rows ---------------------------------------------------------------------------------


def _check(settings: CompareSettings, inputs: Inputs) -> None:
    """Find what would fail later on."""
    for kind, value in settings.budgets():
        allocation.allocate(inputs.graph, **{kind: value}, multiple=settings.multiple)
    for arm in settings.arms():
        check_statistics(inputs.model, inputs.graph, arm.with_seed(settings.seeds[0]))
    if len(inputs.test) < 2:
        raise InputError("compare: the test set holds 1 image; it takes 2 to have two halves")


def _jobs(settings: CompareSettings) -> list[Job]:
    """All rows, those that share statistics together."""
    return [
        Job(arm.label, kind, value, repair, seed)
        for seed in settings.seeds
        for arm in _sharing_together(settings.arms(), seed)
        for kind, value in settings.budgets()
        for repair in settings.repair
    ]


def _sharing_together(arms: Sequence[Arm], seed: int) -> list[Arm]:
    keys = [_statistics_key(arm, seed) for arm in arms]
    return [arm for _, arm in sorted(zip(keys, arms, strict=True), key=lambda p: keys.index(p[0]))]


def _statistics_key(arm: Arm, seed: int) -> str:
    """Equal for arms whose statistics are equal."""
    needed = arm.with_seed(seed).statistics()
    return arm.label if needed is None else json.dumps(needed, sort_keys=True)


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
        return self._size(self.inputs.model) | self._evaluations(self.inputs.model)

    def row(self, job: Job) -> dict[str, Any]:
        plan, gathering, choosing = self._plan(job)
        model = surgery.prune(copy.deepcopy(self.inputs.model), plan)
        repairing = self._repair(model, job)
        row = dataclasses.asdict(job) | self._size(model)
        row["objective"] = math.fsum(plan.record["objective"].values())
        row |= self._evaluations(model)
        for name, used in zip(COSTS, (gathering, choosing, repairing), strict=True):
            row[f"{name} seconds"] = used.seconds
            row[f"{name} MiB"] = used.mebibytes
        return row | {"memory": measure.memory_kind(self.device), "device": str(self.device)}

    def _plan(self, job: Job) -> tuple[PruningPlan, measure.Resources, measure.Resources]:
        arm = Arm.parse(job.criterion)
        criterion = arm.with_seed(job.seed)

        def gathered() -> Any:
            images = sample(self.inputs.train, self.settings.images, job.seed)
            return gather(
                self.inputs.model,
                self.inputs.graph,
                criterion,
                images,
                batch_size=self.settings.batch_size,
                progress=self.progress,
            )

        def chosen() -> PruningPlan:
            graph = self.inputs.graph
            costs = criterion.costs(self.inputs.model, graph, stats)
            budget = {job.kind: job.budget}
            return make_plan(graph, costs, **budget, multiple=self.settings.multiple)

        key = (_statistics_key(arm, job.seed), job.seed)
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

    def _repair(self, model: nn.Module, job: Job) -> measure.Resources:
        steps, settings = repair_steps(job.repair), self.settings
        images = sample(self.inputs.train, settings.reestimate_images, job.seed + 1)
        with measure.resources(self.device) as used:
            if "batchnorm" in steps:
                batches = images.batches(settings.batch_size)
                reestimate_batchnorm(model, batches, progress=self.progress)
        if "finetune" in steps:
            used = used.then(self._finetune(model, job))
        return used

    def _finetune(self, model: nn.Module, job: Job) -> measure.Resources:
        checkpoint = (self.folder.path / job.file).with_suffix(".pt")
        with measure.resources(self.device) as used:
            history = finetune(
                model,
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
        test, half = self.inputs.test, len(self.inputs.test) // 2
        first, second = (
            self._evaluate(model, test.subset(part))
            for part in (range(half), range(half, len(test)))
        )
        results = dict(zip(PARTS, (first, second, _together(first, second)), strict=True))
        return {
            f"{part} {name}": getattr(result, name)
            for part, result in results.items()
            for name in ("accuracy", "loss")
        }

    def _evaluate(self, model: nn.Module, images: ImageSet) -> Evaluation:
        return evaluate(model, images, batch_size=self.settings.batch_size, progress=self.progress)


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


# --- tables --------------------------------------------------------------------------------------


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each budget, repair and arm: means and standard deviations over the seeds.

    Every number of a row appears as its mean, and the accuracies and losses also as their sample
    standard deviation under "... spread" (None for a single seed). "mark" is "best" for the
    highest mean accuracy on the report half at that budget and repair, "close" where the
    difference to it is at most the larger of the two spreads, and "" for the others. Within a
    budget and repair the best come first.
    """
    cells: dict[tuple, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        cell = cells.setdefault((row["kind"], row["budget"], row["repair"]), {})
        cell.setdefault(row["criterion"], []).append(row)
    return [entry for cell in cells.values() for entry in _ranked(cell)]


def _ranked(cell: Mapping[str, list[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    entries = sorted(
        (_average(rows) for rows in cell.values()), key=lambda e: -e["report accuracy"]
    )
    best = entries[0]
    for entry in entries:
        spread = max(e["report accuracy spread"] or 0.0 for e in (best, entry))
        close = best["report accuracy"] - entry["report accuracy"] <= spread
        entry["mark"] = "best" if entry is best else "close" if close else ""
    return entries


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if name == "seed":
            entry["seeds"] = len(values)
        elif name == "budget" or not isinstance(first, int | float):
            entry[name] = first
        else:
            entry[name] = statistics.fmean(values)
        if name.endswith(("accuracy", "loss")):
            entry[f"{name} spread"] = statistics.stdev(values) if len(values) > 1 else None
    return entry


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows to show) for each budget and repair."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for entry in result["summary"]:
        title = (
            f"{entry['kind']} {entry['budget']}, repair: {entry['repair']} "
            f"({entry['MACs kept']:.1%} of the MACs and {entry['parameters kept']:.1%} of the "
            "parameters kept)"
        )
        shown.setdefault(title, []).append(_cells(entry))
    return list(shown.items())


def _cells(entry: Mapping[str, Any]) -> dict[str, Any]:
    cells = {"criterion": entry["criterion"], "": entry["mark"]}
    for part in PARTS:
        cells[f"{part} %"] = with_spread(entry, f"{part} accuracy")
    cells["report loss"] = with_spread(entry, "report loss", 4)
    cells["objective"] = f"{entry['objective']:.4g}"
    for name in COSTS:
        cells[f"{name} s"] = f"{entry[f'{name} seconds']:.2f}"
    peaks = [entry[f"{name} MiB"] for name in COSTS]
    cells["peak MiB"] = None if None in peaks else f"{max(peaks):.0f}"
    return cells


def with_spread(entry: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """The mean of a column of the summary, with its spread if there is one."""
    spread = entry[f"{name} spread"]
    return f"{entry[name]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def explanation(result: Mapping[str, Any]) -> str:
    """What the tables show, in a few sentences."""
    settings, plain = result["settings"], result["plain"]
    seeds, memory = len(settings["seeds"]), result["rows"][0]["memory"]
    return (
        f"{settings['model']}: {settings['images']:,} training images for the statistics, "
        f"{settings['reestimate_images']:,} for the re-estimation, {seeds} "
        f"seed{'s' if seeds > 1 else ''} (mean ± standard deviation). The unpruned model has "
        f"{plain['selection accuracy']:.2f} % on the first half of the test images (selection), "
        f"{plain['report accuracy']:.2f} % on the second (report) and {plain['all accuracy']:.2f} "
        "% on all. best: the highest mean on the report half; close: within the larger of the two "
        f"spreads of the best. Memory: {memory}."
    )


def markdown(result: Mapping[str, Any]) -> str:
    parts = [f"# Comparison on {result['settings']['model']}", explanation(result)]
    for title, rows in tables(result):
        parts += [f"## {title}", table(rows, markdown=True)]
    return "\n\n".join(parts) + "\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _value(text: str) -> Any:
    """A number or truth value where the text is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text
