"""The main job from one end to the other, in a folder from which it can go on after a stop.

model + data -> graph -> allocation -> statistics -> selection -> plan -> surgery
             -> repair -> fine-tuning -> report
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ccp_ext import criteria, files, measure, repair, surgery
from ccp_ext.allocation.latency import LatencyTable
from ccp_ext.allocation.rounds import Schedule
from ccp_ext.auxiliary import AuxiliaryHeads, train_heads
from ccp_ext.compensation import MEMORY
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import evaluate
from ccp_ext.finetune import FinetuneConfig, finetune
from ccp_ext.graph import ChannelGraph, trace
from ccp_ext.joint import JointCost
from ccp_ext.plan import PruningPlan
from ccp_ext.planning import ALLOCATIONS, make_plan
from ccp_ext.report import snapshot
from ccp_ext.run_folder import RunFolder
from ccp_ext.statistics import Statistics, collect
from ccp_ext.subject import Inputs, in_scope, load_inputs, sample

BUDGETS = ("macs", "params", "activations", "latency", "ratio")
LATENCY_FILE, LATENCY_STEP = "latency.json", 8
HEADS_FILE = "heads.pt"
HEAD_IMAGES = 5_000  # that auxiliary heads are trained on before they take part in fine-tuning
COLUMNS = ("stage", "accuracy %", "loss", "MACs", "parameters", "latency ms")


@dataclass(frozen=True)
class PruneSettings:
    """Everything that decides the outcome of ``ccp prune``.

    Attributes:
        model, weights, data: see :mod:`ccp_ext.checkpoints` and :func:`ccp_ext.datasets.load`.
        mean, std: that the model's images are normalised by, in place of the data's own.
        macs, params, activations, latency, ratio: the budget, exactly one of them; see
            :func:`ccp_ext.allocation.allocate`.
        latency_table: file of a :class:`ccp_ext.LatencyTable`; None for one that is measured for a
            single image on the device of the run.
        allocation: "auto" (what the criterion says, see :class:`ccp_ext.criteria.Criterion`),
            "uniform", "optimal" or "joint"; see :func:`ccp_ext.make_plan`.
        multiple, minimum: of the counts kept.
        rounds: the budget is reached in so many steps, with statistics anew before each.
        scope: of the groups to prune; see :meth:`ccp_ext.graph.ChannelGraph.select_groups`.
        images: training images that the statistics are gathered from.
        repair: "none", or steps of :mod:`ccp_ext.repair` joined by "+", taken in every round; a
            refit is always one towards the plain model's outputs.
        repair_images: training images for the repair.
        repair_memory: GiB for a refit, which takes fewer of the images where they do not fit; see
            :func:`ccp_ext.refit`.
        finetune: the schedule, or None for no fine-tuning.
        distil: fine-tune with the plain model as teacher.
        auxiliary_heads: classifiers inside the network while it is fine-tuned; None for those of
            the criterion: ccp-ac has 3, the others none.
    """

    model: str
    weights: str
    data: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    macs: float | int | None = None
    params: float | int | None = None
    activations: float | int | None = None
    latency: float | str | None = None
    ratio: float | None = None
    latency_table: str | None = None
    allocation: str = "auto"
    multiple: int = 1
    minimum: int = 1
    rounds: int = 1
    criterion: str = "taylor"
    options: criteria.Options = field(default_factory=criteria.Options)
    scope: str = "inner"
    images: int = 10_000
    batch_size: int = 128
    repair: str = "refit"
    repair_images: int = 10_000
    repair_memory: float = MEMORY
    finetune: FinetuneConfig | None = None
    distil: bool = False
    auxiliary_heads: int | None = None
    seed: int = 0

    def budget(self) -> dict[str, float | int | str]:
        """The one budget that was given, as keywords of ``allocate`` and ``make_plan``."""
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) != 1:
            raise InputError(
                f"give exactly one budget of {', '.join(BUDGETS)}; got "
                + (", ".join(given) if given else "none")
            )
        return given

    def rules(self) -> dict[str, int]:
        """The rules on the counts, as keywords of ``allocate`` and ``make_plan``."""
        return {"multiple": self.multiple, "minimum": self.minimum}

    def __post_init__(self) -> None:
        self.budget()
        if self.allocation not in ALLOCATIONS:
            raise InputError(
                f"allocation must be one of {', '.join(ALLOCATIONS)}; got {self.allocation!r}"
            )
        if self.latency_table is not None and self.latency is None:
            raise InputError("latency_table is given, but the budget is not a latency")
        steps = repair.parse(self.repair)
        repair.check_memory(self.repair_memory)
        if self.rounds > 1 and "fold" in steps and any("refit" in step for step in steps):
            raise InputError("repair: fold after a refit of an earlier round has no meaning")
        if self.finetune is None and (self.distil or self.auxiliary_heads):
            option = "distil" if self.distil else "auxiliary_heads"
            raise InputError(f"{option} is given, but there is no fine-tuning (epochs)")
        lowest = {"images": 1, "batch_size": 1, "repair_images": 1, "rounds": 1, "seed": 0}
        if self.auxiliary_heads is not None:
            lowest["auxiliary_heads"] = 0
        for name, low in lowest.items():
            if not low <= getattr(self, name) < 2**63 - 1:
                raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}")


def run(
    settings: PruneSettings,
    output: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Prune, repair, evaluate and save; an interrupted run goes on where it stopped.

    Writes to the folder ``output``: ``settings.json``, ``plan.json``, ``slim.safetensors``,
    ``snapshot.safetensors`` (what the report's page shows of the statistics) and ``report.json``
    (last, so a report means that the rest is whole), ``latency.json`` if it measured a latency
    table, and while it runs ``stages.json``, ``forecast.json``, ``statistics.pt``, ``repaired.pt``,
    ``heads.pt`` and ``finetune.pt``, and with several rounds a plan of each.

    Returns:
        The report: {"stages": rows of accuracy, loss, MACs, parameters, latency, ..., "forecast":
        for each round what the criterion foresaw and what the loss on the images of the statistics
        became (empty for a criterion without gradient statistics), "refits": for each the stage
        and what :class:`ccp_ext.compensation.Refitted` says, such as the images of each layer,
        "repair options": by step what is not among the settings, such as the ridge of a refit; in
        the plan's record too}.

    Raises:
        InputError: anything in the settings or the data that the user can mend, and a folder that
            another process works in; nothing is written before the settings, the weights, the data
            and the budget were found good.
    """
    criterion = criteria.get(settings.criterion, settings.options)
    inputs = load_inputs(settings, device)
    graph = inputs.graph
    table = _latency_table(settings, inputs, Path(output))
    schedule = Schedule(graph, settings.rounds, settings.budget(), settings.rules(), table)
    if settings.latency is None or table is not None:
        schedule.check()
    check_statistics(inputs.model, graph, criterion, settings.allocation)

    contents = inputs.contents()
    if settings.latency_table is not None:
        contents["content of latency_table"] = table.digest()
    with RunFolder.opened(output, {**_plain(settings), **contents}) as folder:
        return _run(settings, criterion, inputs, schedule, folder, progress, say)


def _run(
    settings: PruneSettings,
    criterion: criteria.Criterion,
    inputs: Inputs,
    schedule: Schedule,
    folder: RunFolder,
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    model = inputs.model
    finished = folder.read("report.json", dict)
    if finished is not None:
        if not isinstance(finished.get("stages"), list):
            raise _damaged(folder.path / "report.json")
        say(f"{folder.path} already holds this run's result")
        _tidy(folder, settings.rounds)
        return finished
    if settings.latency is not None and settings.latency_table is None:
        schedule = _by_kept_table(schedule, folder)
    recorder = _Recorder(folder, inputs.test, inputs.example, settings.batch_size, progress, say)
    recorder.record("plain", model)

    rounds = _Rounds(settings, criterion, inputs, schedule, folder, recorder, progress)
    for number in range(1, settings.rounds + 1):
        rounds.run(number)
    if settings.rounds > 1:
        rounds.plan.save(folder.path / "plan.json")
    if settings.finetune is not None:
        heads = settings.auxiliary_heads
        heads = criterion.auxiliary_heads if heads is None else heads
        finetune(
            model,
            inputs.train,
            settings.finetune,
            teacher=rounds.plain if settings.distil else None,
            auxiliary=auxiliary_heads(
                model, inputs, heads, settings.seed, folder.path / HEADS_FILE, progress=progress
            ),
            checkpoint=folder.path / "finetune.pt",
            log=folder.path / "finetune.csv",
            progress=progress,
        )
        recorder.record("fine-tuned", model)
    surgery.save(model, folder.path / "slim.safetensors")
    report = {
        "settings": _plain(settings),
        "stages": recorder.rows,
        "forecast": rounds.forecast,
        "refits": rounds.refits,
        "repair options": repair.options(settings.repair),
    }
    folder.write("report.json", report)
    _tidy(folder, settings.rounds)
    return report


def _tidy(folder: RunFolder, rounds: int) -> None:
    """Remove what is of no use when the run is over."""
    folder.remove("stages.json", "forecast.json", "finetune.pt", HEADS_FILE)
    for number in range(1, rounds + 1):
        for stem in ("statistics", "repaired"):
            folder.remove(_round_file(stem, number, rounds, "pt"))
        if rounds > 1:
            folder.remove(_round_file("plan", number, rounds, "json"))


def _round_file(stem: str, number: int, rounds: int, suffix: str) -> str:
    """A file of a round; of the only round, without its number."""
    return f"{stem}{'' if rounds == 1 else number}.{suffix}"


def auxiliary_heads(
    model: nn.Module, inputs: Inputs, count: int, seed: int, file: Path, *, progress: bool
) -> AuxiliaryHeads | None:
    """So many heads for a model of the subject, pruned or not; None for 0.

    They are trained on the model as it is: the gradients of heads with random weights would undo
    more of it than a short schedule mends.

    Args:
        file: where the trained ones are kept for a run that is interrupted afterwards.

    Raises:
        InputError: the file is there, but does not hold such heads.
    """
    if not count:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        graph = trace(model, inputs.example)
        heads = AuxiliaryHeads.spread(model, graph, inputs.train.num_classes, count=count)
    if file.exists():
        _load_heads(heads, file)
        return heads
    images = sample(inputs.train, HEAD_IMAGES, seed, "auxiliary heads")
    train_heads(model, heads, images, seed=seed, progress=progress)
    with files.atomic_path(file) as temporary:
        torch.save(heads.state_dict(), temporary)
    return heads


def _load_heads(heads: AuxiliaryHeads, file: Path) -> None:
    state = files.load_tensors(file)
    try:
        heads.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise _damaged(file) from error
    heads.eval()


def _damaged(file: Path) -> InputError:
    return InputError(f"{file} is damaged; remove it to go on")


@dataclass
class _Rounds:
    """The rounds of a run: statistics, plan, surgery and repair of each.

    Attributes:
        plan: what the rounds so far do to the plain model.
        forecast: a row for each round.
        refits: a row for each.
    """

    settings: PruneSettings
    criterion: criteria.Criterion
    inputs: Inputs
    schedule: Schedule
    folder: RunFolder
    recorder: _Recorder
    progress: bool
    plan: PruningPlan | None = None

    def __post_init__(self) -> None:
        self.forecast: list[dict[str, Any]] = self.folder.read("forecast.json", list) or []
        self.images = sample(
            self.inputs.train, self.settings.images, self.settings.seed, "statistics"
        )
        self.refits: list[dict[str, Any]] = []
        self.plain = copy.deepcopy(self.inputs.model)

    def run(self, number: int) -> None:
        settings, model = self.settings, self.inputs.model
        name = self._file("plan", number, "json")
        plan = self.folder.plan(name)
        if plan is None:
            plan = self._make_plan(number)
            plan.save(self.folder.path / name)
        with self._forecast(number, plan):
            surgery.prune(model, plan)
        self.plan = plan if self.plan is None else self.plan.then(plan)
        last = "" if number == settings.rounds else f", round {number}"
        self.recorder.record(f"pruned{last}", model)
        self._repair(number, last)

    def _repair(self, number: int, last: str) -> None:
        """Take the steps of the repair but for those that were taken before a stop."""
        settings, model = self.settings, self.inputs.model
        file = self.folder.path / self._file("repaired", number, "pt")
        taken = self._load_repaired(file)
        images = sample(self.inputs.train, settings.repair_images, settings.seed, "repair")
        for count, step in enumerate(repair.parse(settings.repair), 1):
            stage = f"{repair.STEPS[step]}{last}"
            if count > taken:
                refitted = repair.apply(
                    step,
                    self.plain,
                    model,
                    images,
                    batch_size=settings.batch_size,
                    memory=settings.repair_memory,
                    progress=self.progress,
                )
                if refitted is not None:
                    row = {"stage": stage, "summary": str(refitted)}
                    self.refits.append(row | dataclasses.asdict(refitted))
                    self.recorder.say(f"{stage}: {refitted}")
                state = {"taken": count, "refits": self.refits, "model": model.state_dict()}
                with files.atomic_path(file) as temporary:
                    torch.save(state, temporary)
            self.recorder.record(stage, model)

    def _load_repaired(self, file: Path) -> int:
        """Make the model what it was at a stop; returns how many steps had been taken."""
        if not file.exists():
            return 0
        state = files.load_tensors(file)
        try:
            self.inputs.model.load_state_dict(state["model"])
            self.refits = state["refits"]
            return state["taken"]
        except (RuntimeError, TypeError, KeyError) as error:
            raise _damaged(file) from error

    def _make_plan(self, number: int) -> PruningPlan:
        settings, model = self.settings, self.inputs.model
        graph = self.inputs.graph
        if number > 1:
            graph = in_scope(trace(model, self.inputs.example), settings.scope)
        data = criteria.gather(
            model,
            graph,
            self.criterion,
            self.images,
            batch_size=settings.batch_size,
            checkpoint=self.folder.path / self._file("statistics", number, "pt"),
            keep_rows=settings.allocation == "joint",
            progress=self.progress,
        )
        costs = self.criterion.costs(model, graph, data)
        if number == 1:
            shown = snapshot.take(model, graph, self.images, costs, progress=self.progress)
            shown.save(self.folder.path / snapshot.FILE)
        chosen = settings.allocation
        return make_plan(
            graph,
            costs,
            **self.schedule.at(number, graph, self.plan),
            allocation=self.criterion.allocation if chosen == "auto" else chosen,
            joint=joint_cost(settings.allocation, self.criterion, data),
            **settings.rules(),
            record={
                **_plain(settings),
                "statistics": _settings_of(data),
                "repair options": repair.options(settings.repair),
            },
            progress=self.progress,
        )

    @contextlib.contextmanager
    def _forecast(self, number: int, plan: PruningPlan) -> Iterator[None]:
        """Note the criterion's objective of the surgery within, and what the loss does.

        Their units agree only for a criterion that foresees the loss; ccp's objective is half the
        mean squared change of the logits.
        """
        known = any(row["round"] == number for row in self.forecast)
        if known or self.criterion.statistics() is None:
            yield
            return
        before = self._loss()
        yield
        after = self._loss()
        self.forecast.append(
            {
                "round": number,
                "objective": plan.record["allocation"]["objective"],
                "loss before": before,
                "loss after": after,
                "loss change": after - before,
            }
        )
        self.folder.write("forecast.json", self.forecast)

    def _loss(self) -> float:
        return evaluate(
            self.inputs.model,
            self.images,
            batch_size=self.settings.batch_size,
            progress=self.progress,
        ).loss

    def _file(self, stem: str, number: int, suffix: str) -> str:
        return _round_file(stem, number, self.settings.rounds, suffix)


def _latency_table(settings: PruneSettings, inputs: Inputs, output: Path) -> LatencyTable | None:
    """The table asked for or a new one; None if there is no need, or one from before a stop.

    That one is read later, when no other process can be writing it.
    """
    if settings.latency is None:
        return None
    if settings.latency_table is not None:
        return LatencyTable.load(settings.latency_table)
    if (output / LATENCY_FILE).exists():
        return None
    return measure.latency_table(inputs.model, inputs.graph, inputs.example, LATENCY_STEP)


def _by_kept_table(schedule: Schedule, folder: RunFolder) -> Schedule:
    """By the table that the folder holds by now, else by the new one, which is kept."""
    file = folder.path / LATENCY_FILE
    if schedule.latency_table is not None and not file.exists():
        schedule.latency_table.save(file)
        return schedule
    schedule = dataclasses.replace(schedule, latency_table=LatencyTable.load(file))
    schedule.check()
    return schedule


def check_statistics(
    model: nn.Module, graph: ChannelGraph, criterion: criteria.Criterion, allocation: str
) -> None:
    """Raise InputError for a criterion whose options or whose needs are not met."""
    needed = criterion.statistics()
    if needed is not None:
        collect(model, graph, **needed)  # nothing is observed yet
    else:
        criterion.observation(model, graph)
    if allocation == "joint" and "first_order" not in (needed or {}):
        raise InputError(
            "allocation='joint' needs a criterion of the second order, ccp or ccp-paper; got "
            f"{criterion.name!r}"
        )


def joint_cost(allocation: str, criterion: criteria.Criterion, data: Any) -> JointCost | None:
    """The cost that ``make_plan`` needs for the allocation "joint"; None for another."""
    if allocation != "joint":
        return None
    return JointCost.of(data, first_order=criterion.statistics()["first_order"])


@dataclass
class _Recorder:
    """Measures the model at each stage; a stage that was measured before a stop is not again."""

    folder: RunFolder
    test: ImageSet
    example: torch.Tensor
    batch_size: int
    progress: bool
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = self.folder.read("stages.json", list) or []
        if not all(isinstance(row, dict) and tuple(row) == COLUMNS for row in self.rows):
            raise InputError(
                f"{self.folder.path / 'stages.json'} is damaged; remove it or choose another folder"
            )

    def record(self, stage: str, model: nn.Module) -> None:
        if any(row["stage"] == stage for row in self.rows):
            return
        result = evaluate(model, self.test, batch_size=self.batch_size, progress=self.progress)
        values = (
            stage,
            result.accuracy,
            result.loss,
            measure.macs(model, self.example),
            measure.parameters(model),
            measure.latency(model, self.example).median,
        )
        self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        self.folder.write("stages.json", self.rows)
        self.say(f"{stage}: test accuracy {result.accuracy:.2f} %, loss {result.loss:.4f}")


def _settings_of(data: Any) -> dict[str, Any] | None:
    return data.settings() if isinstance(data, Statistics) else None


def _plain(settings: PruneSettings) -> dict[str, Any]:
    return dataclasses.asdict(settings)
