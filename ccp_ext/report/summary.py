"""What the rows of a comparison say: means and spreads over the seeds, the best, ranks, tables."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ccp_ext.tables import table

PARTS = ("selection", "report", "all")
COSTS = ("statistics", "choice", "repair")
# In place of a criterion: the model that nothing was removed from, fine-tuned as the others.
UNPRUNED = "unpruned"


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each budget, repair and arm: means and standard deviations over the seeds.

    Every number of a row appears as its mean, by group those of the channels kept, and the
    accuracies and losses also as their sample standard deviation under "... spread" (None for a
    single seed). "mark" is "best" for the highest mean accuracy on the selection half at that
    budget and repair, "close" where the difference to it is at most the larger of the two spreads,
    and "" for the others. Within a budget and repair the best come first. The unpruned control is
    left out.
    """
    cells: dict[tuple, dict[str, list[Mapping[str, Any]]]] = {}
    for row in _of_arms(rows):
        cell = cells.setdefault((row["kind"], row["budget"], row["repair"]), {})
        cell.setdefault(row["criterion"], []).append(row)
    return [entry for cell in cells.values() for entry in _ranked(cell)]


def control(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The entry of the unpruned model after fine-tuning; None where there was none.

    Its "repair" is the step alone; it belongs beside the arms whose repair holds that step.
    """
    mine = [row for row in rows if row["criterion"] == UNPRUNED]
    return {**_average(mine), "mark": "control"} if mine else None


def control_of(result: Mapping[str, Any], repair: str) -> dict[str, Any] | None:
    """The control that belongs beside the arms with this repair, or None."""
    entry = result.get("control")
    return entry if entry is not None and entry["repair"] in repair.split("+") else None


def _of_arms(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (row for row in rows if row["criterion"] != UNPRUNED)


def _ranked(cell: Mapping[str, list[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    entries = sorted(
        (_average(rows) for rows in cell.values()), key=lambda e: -e["selection accuracy"]
    )
    best = entries[0]
    for entry in entries:
        spread = max(e["selection accuracy spread"] or 0.0 for e in (best, entry))
        close = best["selection accuracy"] - entry["selection accuracy"] <= spread
        entry["mark"] = "best" if entry is best else "close" if close else ""
    return entries


def rank(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where each arm stands among the others, 1 the best, by its accuracy on the selection half.

    Arms are ranked anew for each budget, repair and seed; equal accuracies share their mean rank.
    The unpruned control has none.

    Returns:
        [{"criterion", "mean rank", "spread", "best rank", "worst rank"}], the best mean first; the
        spread is the standard deviation, None for a single rank.
    """
    races: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in _of_arms(rows):
        race = (row["kind"], row["budget"], row["repair"], row["seed"])
        races.setdefault(race, []).append(row)
    ranks: dict[str, list[float]] = {}
    for race in races.values():
        accuracies = [row["selection accuracy"] for row in race]
        for row, mine in zip(race, accuracies, strict=True):
            better, equal = sum(a > mine for a in accuracies), accuracies.count(mine)
            ranks.setdefault(row["criterion"], []).append(better + (equal + 1) / 2)
    entries = [
        {
            "criterion": name,
            "mean rank": statistics.fmean(found),
            "spread": statistics.stdev(found) if len(found) > 1 else None,
            "best rank": min(found),
            "worst rank": max(found),
        }
        for name, found in ranks.items()
    ]
    return sorted(entries, key=lambda entry: entry["mean rank"])


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for name, first in rows[0].items():
        if name == "repair options":  # those of each row, and rows of earlier versions have none
            continue
        values = [row[name] for row in rows]
        if name == "seed":
            entry["seeds"] = len(values)
        elif isinstance(first, Mapping):
            entry[name] = {k: statistics.fmean(value[k] for value in values) for k in first}
        elif name == "budget" or not isinstance(first, int | float | None):
            entry[name] = first
        elif None in values:
            entry[name] = None
        else:
            entry[name] = statistics.fmean(values)
        if name.endswith(("accuracy", "loss")):
            entry[f"{name} spread"] = statistics.stdev(values) if len(values) > 1 else None
    return entry


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows to show) for each budget and repair; the control, if it has one, last."""
    shown: dict[tuple[str, float | int, str], list[dict[str, Any]]] = {}
    for entry in result["summary"]:
        key = entry["kind"], entry["budget"], entry["repair"]
        shown.setdefault(key, []).append(_cells(entry))
    found = []
    for (kind, budget, repair), rows in shown.items():
        beside = control_of(result, repair)
        rows += [_cells(beside)] if beside else []
        found.append((f"{kind} {budget}, repair: {repair}", rows))
    return found


def _cells(entry: Mapping[str, Any]) -> dict[str, Any]:
    cells = {"criterion": entry["criterion"], "": entry["mark"]}
    cells["allocation"] = entry.get("allocation")  # files of earlier versions have none
    for part in PARTS:
        cells[f"{part} %"] = with_spread(entry, f"{part} accuracy")
    cells["report loss"] = with_spread(entry, "report loss", 4)
    for head, name in (("MACs %", "MACs"), ("params %", "parameters")):
        cells[head] = f"{100 * entry[f'{name} kept']:.1f}"
    objective = entry["objective"]
    cells["objective"] = None if objective is None else f"{objective:.4g}"
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
    seeds, report_images = len(settings["seeds"]), plain["report images"]
    memory = "; ".join(dict.fromkeys(row["memory"] for row in result["rows"]))
    first, second = "the first half of the test images", "the second"
    if plain.get("halves") == "alternating":
        first, second = "every second test image, which are sorted by class", "the others"
    return (
        f"{settings['model']}: {settings['images']:,} training images for the statistics, "
        f"{settings['repair_images']:,} for the repair, {seeds} "
        f"seed{'s' if seeds > 1 else ''} (mean ± standard deviation). The unpruned model has "
        f"{plain['selection accuracy']:.2f} % on {first} (selection), "
        f"{plain['report accuracy']:.2f} % on {second} (report) and {plain['all accuracy']:.2f} "
        f"% on all.{_about_finetuning(settings)} best: the highest mean on the selection half; "
        "close: behind it by no more than the larger of the two spreads"
        f"{_about_control(result)}. The spread is that of the seeds; the {report_images:,} report "
        "images themselves leave a standard error of about "
        f"{_standard_error(result):.1f} points. peak MiB, the largest of statistics, choice and "
        f"repair: {memory}."
    )


def _about_finetuning(settings: Mapping[str, Any]) -> str:
    if not any("finetune" in repair.split("+") for repair in settings["repair"]):
        return ""
    schedule = settings["finetune"]
    epochs = schedule["epochs"]
    text = f" Fine-tuning takes {epochs} epoch{'s' if epochs > 1 else ''}"
    if settings.get("distil"):  # files of earlier versions have none
        text += (
            ", of every model, the unpruned one too, with the unpruned model's outputs as targets "
            f"beside the labels (weight {schedule['distillation_weight']:g}, temperature "
            f"{schedule['temperature']:g})"
        )
    return text + "."


def _about_control(result: Mapping[str, Any]) -> str:
    if result.get("control") is None:
        return ""
    return "; control: the unpruned model after the same fine-tuning, which is not ranked"


def _standard_error(result: Mapping[str, Any]) -> float:
    """Of the best report accuracy, in points, as that of a binomial share."""
    best = max(entry["report accuracy"] for entry in result["summary"])
    return math.sqrt(best * (100 - best) / result["plain"]["report images"])


def as_markdown(result: Mapping[str, Any]) -> str:
    """The explanation, the tables and the ranks."""
    parts = [f"# Comparison on {result['settings']['model']}", explanation(result)]
    for title, rows in tables(result):
        parts += [f"## {title}", table(rows, markdown=True)]
    parts += ["## Ranks over budgets, repairs and seeds", table(result["ranks"], markdown=True)]
    return "\n\n".join(parts) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, one a line under the names of their columns but for those by group."""
    columns = [name for name, value in rows[0].items() if not isinstance(value, Mapping)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
