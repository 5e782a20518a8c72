"""The curves of fine-tuning: what the logs say by epoch, averaged over the seeds."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccp_ext.compare.jobs import Job
from ccp_ext.compare.settings import FINETUNE
from ccp_ext.report.summary import UNPRUNED
from ccp_ext.report.svg import Series


@dataclass(frozen=True)
class Chart:
    """What one chart shows.

    Attributes:
        unit: what stands beside its vertical axis.
        digits: behind the point of its values.
        series: by epoch; empty where no log has the values.
        note: what the values are.
        left_out: a sentence on the logs that are not in it, or empty.
    """

    title: str
    unit: str
    digits: int
    series: list[Series]
    note: str
    left_out: str


@dataclass(frozen=True)
class _Quantity:
    """A column of a log and how to show it."""

    column: str
    name: str
    unit: str
    digits: int
    note: str


_VALIDATION = _Quantity(
    "validation_accuracy",
    "Validation accuracy",
    "validation accuracy, %",
    2,
    "Accuracy on the validation images at the end of each epoch.",
)
_TRAINING = _Quantity(
    "train_accuracy",
    "Training accuracy",
    "training accuracy, %",
    2,
    "Accuracy on the training batches, as augmented; that on test images is in the tables.",
)
_LOSS = _Quantity(
    "train_loss",
    "Training loss",
    "training loss, nats",
    4,
    "Mean loss of the training batches, with the shares of a teacher and of auxiliary heads where "
    "there are such.",
)


@dataclass(frozen=True)
class _Log:
    """A log by column, those without a number for each epoch left out.

    Attributes:
        of: the criterion, or what else its line is named.
        fault: why there are no columns, or empty.
    """

    of: str
    seed: int
    columns: Mapping[str, list[float]]
    fault: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike[str], epochs: int, of: str, seed: int) -> _Log:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        except FileNotFoundError:
            return cls(of, seed, {}, "no log")
        except (OSError, UnicodeDecodeError, csv.Error):
            return cls(of, seed, {}, "a damaged log")
        names = rows[0] if rows else ()
        columns = {name: _numbers(row.get(name) for row in rows) for name in names}
        if columns.get("epoch") != list(range(1, epochs + 1)):
            return cls(of, seed, {}, f"a log without the epochs 1 to {epochs}")
        return cls(of, seed, {name: values for name, values in columns.items() if values})

    def lacks(self, column: str) -> str:
        """Why the log has no such column, or an empty text where it has."""
        return "" if column in self.columns else self.fault or f"no numbers {column} in the log"


def of_comparison(
    folder: Path, result: Mapping[str, Any], places: Mapping[str, int]
) -> list[Chart]:
    """Accuracy and loss for each budget and repair that ends in fine-tuning.

    Args:
        folder: of the comparison, for its logs.
        places: the style of each criterion's line.
    """
    cells: dict[tuple[str, float | int, str], list[_Log]] = {}
    control: list[_Log] = []
    for row in result["rows"]:
        if FINETUNE in row["repair"].split("+"):
            job = Job(**{field.name: row[field.name] for field in dataclasses.fields(Job)})
            epochs = result["settings"]["finetune"]["epochs"]
            log = _Log.read(folder / job.log, epochs, job.criterion, job.seed)
            if job.criterion == UNPRUNED:
                control.append(log)
            else:
                cells.setdefault((job.kind, job.budget, job.repair), []).append(log)
    charts = []
    for (kind, budget, repair), logs in cells.items():
        about = f"Budget: {kind} {budget}. Repair: {repair}."
        where = f", {kind} {budget}, repair: {repair}"
        charts += _charts([*logs, *control], places, where, about)
    return charts


def of_run(folder: Path, settings: Mapping[str, Any]) -> list[Chart]:
    """Accuracy and loss of the fine-tuning, if there was one."""
    schedule = settings.get("finetune")
    if schedule is None:
        return []
    name = settings["criterion"]
    log = _Log.read(folder / "finetune.csv", schedule["epochs"], name, settings["seed"])
    return _charts([log], {name: 0})


def _charts(
    logs: Sequence[_Log], places: Mapping[str, int], where: str = "", about: str = ""
) -> list[Chart]:
    validated = any(_VALIDATION.column in log.columns for log in logs)
    return [
        _chart(quantity, logs, places, where, about)
        for quantity in (_VALIDATION if validated else _TRAINING, _LOSS)
    ]


def _chart(
    quantity: _Quantity, logs: Sequence[_Log], places: Mapping[str, int], where: str, about: str
) -> Chart:
    lines: dict[str, list[list[float]]] = {}
    for log in logs:
        if quantity.column in log.columns:
            lines.setdefault(log.of, []).append(log.columns[quantity.column])
    series = [Series(name, _mean(runs), places.get(name)) for name, runs in lines.items()]
    # So that the legend reads as the lines end.
    series.sort(key=lambda line: -line.points[-1][1])
    seeds = any(len(runs) > 1 for runs in lines.values())
    spread = "Mean over the seeds, with one standard deviation to each side." if seeds else ""
    return Chart(
        quantity.name + where,
        quantity.unit,
        quantity.digits,
        series,
        " ".join(filter(None, (about, quantity.note, spread))),
        _left_out(logs, quantity.column),
    )


def _mean(runs: Sequence[Sequence[float]]) -> list[tuple[float, float, float | None]]:
    return [
        (epoch, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
        for epoch, values in enumerate(zip(*runs, strict=True), 1)
    ]


def _left_out(logs: Sequence[_Log], column: str) -> str:
    faults: dict[str, dict[str, list[str]]] = {}
    for log in logs:
        if fault := log.lacks(column):
            faults.setdefault(fault, {}).setdefault(log.of, []).append(str(log.seed))
    parts = []
    for fault, of in faults.items():
        names = [
            f"{name} (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})"
            for name, seeds in of.items()
        ]
        parts.append(f"{', '.join(names)}: {fault}")
    return f"Left out: {'; '.join(parts)}." if parts else ""


def _numbers(texts: Iterable[str | None]) -> list[float]:
    """Those that the texts stand for; none if one of them is no finite number."""
    try:
        values = [float(text) for text in texts]
    except (TypeError, ValueError):
        return []
    return values if all(map(math.isfinite, values)) else []
