"""The main job from one end to the other, in a folder from which it can go on after a stop.

model + data -> graph -> allocation -> statistics -> selection -> plan -> surgery
             -> BatchNorm re-estimation -> fine-tuning -> report
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from ccp_ext import allocation, criteria, datasets, files, measure, snapshot, surgery
from ccp_ext.checkpoints import load_model, model_factory
from ccp_ext.compensation import reestimate_batchnorm
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import evaluate, place
from ccp_ext.finetune import FinetuneConfig, finetune
from ccp_ext.graph import ChannelGraph, trace
from ccp_ext.plan import PruningPlan
from ccp_ext.planning import make_plan
from ccp_ext.statistics import Statistics, collect

SECONDS_BETWEEN_CHECKPOINTS = 20.0
COLUMNS = ("stage", "accuracy %", "loss", "MACs", "parameters", "latency ms")


@dataclass(frozen=True)
class PruneSettings:
    """Everything that decides the outcome of ``ccp prune``.

    Attributes:
        model, weights, data: see :mod:`ccp_ext.checkpoints` and :func:`ccp_ext.datasets.load`.
        macs, params, ratio: the budget, exactly one of them; see
            :func:`ccp_ext.allocation.allocate`.
        scope: of the groups to prune; see :meth:`ccp_ext.graph.ChannelGraph.select_groups`.
        images: training images that the statistics are gathered from.
        reestimate_images: training images for the BatchNorm re-estimation; 0 leaves it out.
        finetune: the schedule, or None for no fine-tuning.
    """

    model: str
    weights: str
    data: str
    macs: float | int | None = None
    params: float | int | None = None
    ratio: float | None = None
    multiple: int = 1
    criterion: str = "ccp"
    options: criteria.Options = field(default_factory=criteria.Options)
    scope: str = "inner"
    images: int = 10_000
    batch_size: int = 128
    reestimate_images: int = 10_000
    finetune: FinetuneConfig | None = None
    seed: int = 0

    def budget(self) -> dict[str, float | int]:
        """The one budget that was given, as keywords of ``allocate`` and ``make_plan``."""
        given = {
            name: getattr(self, name)
            for name in ("macs", "params", "ratio")
            if getattr(self, name) is not None
        }
        if len(given) != 1:
            raise InputError(
                "give exactly one budget of macs, params, ratio; got "
                + (", ".join(given) if given else "none")
            )
        return given

    def __post_init__(self) -> None:
        self.budget()
        for name, low in (("images", 1), ("batch_size", 1), ("reestimate_images", 0), ("seed", 0)):
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
    ``snapshot.safetensors`` (what :mod:`ccp_ext.page` shows of the statistics) and ``report.json``
    (last, so a report means that the rest is whole), and while it runs ``stages.json``,
    ``statistics.pt`` and ``finetune.pt``.

    Returns:
        The report: {"stages": rows of accuracy, loss, MACs, parameters, latency, ...}.

    Raises:
        InputError: anything in the settings or the data that the user can mend; nothing is written
            before the settings, the weights, the data and the budget were found good.
    """
    criterion = criteria.get(settings.criterion, settings.options)
    inputs = load_inputs(settings, device)
    model, graph, train = inputs.model, inputs.graph, inputs.train
    allocation.allocate(graph, **settings.budget(), multiple=settings.multiple)
    check_statistics(model, graph, criterion)

    folder = RunFolder(output, {**_plain(settings), **inputs.contents()})
    finished = folder.read("report.json", dict)
    if finished is not None:
        if not isinstance(finished.get("stages"), list):
            raise InputError(f"{folder.path / 'report.json'} is damaged; remove it to go on")
        say(f"{folder.path} already holds this run's result")
        return finished
    recorder = _Recorder(folder, inputs.test, inputs.example, settings.batch_size, progress, say)
    recorder.record("plain", model)

    plan = folder.plan()
    if plan is None:
        stats = gather(
            model,
            graph,
            criterion,
            sample(train, settings.images, settings.seed),
            batch_size=settings.batch_size,
            checkpoint=folder.path / "statistics.pt",
            progress=progress,
        )
        costs = criterion.costs(model, graph, stats)
        snapshot.take(model, graph, costs, train).save(folder.path / "snapshot.safetensors")
        record = {**_plain(settings), "statistics": stats and stats.settings()}
        plan = make_plan(
            graph, costs, **settings.budget(), multiple=settings.multiple, record=record
        )
        plan.save(folder.path / "plan.json")
    surgery.prune(model, plan)
    recorder.record("pruned", model)
    if settings.reestimate_images:
        images = sample(train, settings.reestimate_images, settings.seed + 1)
        reestimate_batchnorm(model, images.batches(settings.batch_size), progress=progress)
        recorder.record("re-estimated", model)
    if settings.finetune is not None:
        finetune(
            model,
            train,
            settings.finetune,
            device=device,
            checkpoint=folder.path / "finetune.pt",
            log=folder.path / "finetune.csv",
            progress=progress,
        )
        recorder.record("fine-tuned", model)
    surgery.save(model, folder.path / "slim.safetensors")
    report = {"settings": _plain(settings), "stages": recorder.rows}
    folder.write("report.json", report)
    folder.remove("stages.json", "statistics.pt", "finetune.pt")
    return report


class Subject(Protocol):
    """What settings name: see :class:`PruneSettings`."""

    model: str
    weights: str
    data: str
    scope: str


@dataclass(frozen=True)
class Inputs:
    """What a subject's names stand for, loaded; the model, on its device, in eval mode.

    Attributes:
        graph: with the groups that may be pruned.
        example: one normalised training image [1, C, H, W] on the device.
    """

    model: nn.Module
    graph: ChannelGraph
    train: ImageSet
    test: ImageSet
    example: torch.Tensor

    def contents(self) -> dict[str, str]:
        """Digests by which inputs that changed under their names are known."""
        images = (t for s in (self.train, self.test) for t in (s.images, s.labels))
        return {
            "content of model": self.graph.fingerprint,
            "content of weights": _digest(*self.model.state_dict().values()),
            "content of data": _digest(*images),
        }


def load_inputs(subject: Subject, device: torch.device | str) -> Inputs:
    """Load what the names stand for.

    Raises:
        InputError: something is missing, unreadable or does not fit, the device cannot be used, or
            no group is in the scope.
    """
    train, test = (datasets.load(subject.data, split) for split in ("train", "test"))
    factory = model_factory(subject.model, train.num_classes, train.images.shape[1])
    model = load_model(factory, subject.weights)
    example = train.normalise(train.images[:1]).to(place(model, device))
    return Inputs(model, in_scope(trace(model, example), subject.scope), train, test, example)


def check_statistics(model: nn.Module, graph: ChannelGraph, criterion: criteria.Criterion) -> None:
    """Raise InputError for a criterion whose options or whose needs of the model are not met."""
    if (needed := criterion.statistics()) is not None:
        collect(model, graph, **needed)  # nothing is observed yet
    else:
        criterion.observation(model, graph)


def gather(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: criteria.Criterion,
    images: ImageSet,
    *,
    batch_size: int = 128,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Statistics | None:
    """The statistics that a criterion asks for, or None if it needs no data.

    Args:
        checkpoint: where the sums so far are kept every few seconds, and read at the start.

    Raises:
        InputError: the loss is not finite.
    """
    options = criterion.statistics()
    if options is None:
        return None
    device = next(model.parameters()).device
    with collect(model, graph, **options) as stats:
        start = _resume_statistics(stats, checkpoint)
        saved, total_loss = time.monotonic(), torch.zeros((), device=device)
        batches = images.batches(batch_size, device=device, start=start)
        bar = tqdm(
            batches,
            "statistics",
            images.num_batches(batch_size),
            initial=start,
            disable=not progress,
            leave=False,
        )
        for done, (x, y) in enumerate(bar, start + 1):
            total_loss += stats.backward(model(x), y)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _require_finite(total_loss, done * batch_size)
                _save_statistics(stats, checkpoint, done)
                saved = time.monotonic()
        _require_finite(total_loss, len(images))
        _save_statistics(stats, checkpoint, images.num_batches(batch_size))
    return stats


def in_scope(graph: ChannelGraph, scope: str) -> ChannelGraph:
    """The graph with the groups that may be pruned.

    Raises:
        InputError: an unknown scope, or no group is left.
    """
    chosen = graph.select_groups(scope)
    if not chosen.groups:
        reasons = "; ".join(f"{what}: {why}" for what, why in graph.fixed[:3])
        raise InputError(f"the model has no {scope} channels that can be removed ({reasons})")
    return chosen


class RunFolder:
    """The files of one run; made for one set of settings and inputs, refused for another.

    Raises:
        InputError: the folder holds a run with other settings or inputs (the first that differs
            is named), or a damaged file, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        mine = json.loads(json.dumps(settings))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            theirs = self.read("settings.json", dict)
            if theirs is None:
                self.write("settings.json", mine)
        except OSError as error:
            raise InputError(f"output {os.fspath(path)!r} cannot be written: {error}") from error
        if theirs is not None and theirs != mine:
            name = next(k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k))
            raise InputError(
                f"output {os.fspath(path)!r} holds a run with {name}={theirs.get(name)!r}, not "
                f"{mine.get(name)!r}; choose another folder or remove this one"
            )

    def read(self, name: str, kind: type) -> Any:
        """The content of a JSON file, or None if there is none."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not readable JSON: {error}") from error
        if not isinstance(content, kind):
            raise InputError(f"{file} is damaged; remove it or choose another folder")
        return content

    def write(self, name: str, content: Any) -> None:
        files.write_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def plan(self) -> PruningPlan | None:
        file = self.path / "plan.json"
        return PruningPlan.load(file) if file.exists() else None

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)


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


def sample(images: ImageSet, count: int, seed: int) -> ImageSet:
    """``count`` images drawn without replacement (all of them, shuffled, if there are fewer)."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[:count])


def _resume_statistics(stats: Statistics, checkpoint: Path | None) -> int:
    """Load the sums so far; returns the number of batches they hold."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    state = files.load_tensors(checkpoint)
    try:
        stats.load_state_dict(state["statistics"])
        return state["batches"]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise InputError(
            f"{checkpoint} is damaged or of another run ({error}); remove it to start anew"
        ) from error


def _save_statistics(stats: Statistics, checkpoint: Path | None, batches: int) -> None:
    if checkpoint is not None:
        with files.atomic_path(checkpoint) as temporary:
            torch.save({"statistics": stats.state_dict(), "batches": batches}, temporary)


def _require_finite(total_loss: torch.Tensor, images: int) -> None:
    # Without targets there is no loss to look at, and none of the criteria goes without them.
    if not torch.isfinite(total_loss):
        raise InputError(
            f"statistics: the loss is {total_loss.item()} within the first {images} images; check "
            "the weights, the data and their normalisation"
        )


def _digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of the values, by which a file that changed under its name is known."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(settings: PruneSettings) -> dict[str, Any]:
    return dataclasses.asdict(settings)
