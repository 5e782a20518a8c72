"""Criteria on ResNet-56 / CIFAR-10 at equal cost, without fine-tuning.

    python -m benchmarks.criteria_resnet56 --weights resnet56-4bfd9763.th --data data/cifar10

Every inner group loses the same share of its channels. Statistics and BatchNorm re-estimation use
training images only; the test set is looked at once for each row. Rows are written as they are
done, and a second call continues.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import RESULTS, write_results
from ccp_ext import criteria, datasets, models, surgery
from ccp_ext.checkpoints import load_model
from ccp_ext.compensation import reestimate_batchnorm
from ccp_ext.cost import Cost
from ccp_ext.evaluation import evaluate
from ccp_ext.files import write_text
from ccp_ext.graph import trace
from ccp_ext.pipeline import gather
from ccp_ext.planning import make_plan
from ccp_ext.report import table

NAME = "criteria_resnet56"
RATIOS = (0.2, 0.5)
RANDOM_SEEDS = range(5)
CURVATURES: dict[str, criteria.Options] = {
    "logits": criteria.Options(curvature="logits", first_order=True),
    "sampled": criteria.Options(curvature="sampled", first_order=True),
    "sampled, T=4": criteria.Options(curvature="sampled", temperature=4.0, first_order=True),
    "empirical": criteria.Options(curvature="empirical", first_order=True),
    "exact": criteria.Options(curvature="exact", first_order=True),
}


@dataclass(frozen=True)
class Entry:
    """One way to choose channels: a label and the cost of every group."""

    label: str
    costs: Mapping[str, Cost]


def entries(model, graph, train, batch_size: int) -> Iterator[Entry]:
    """All compared selections; statistics are gathered once for each curvature."""
    for name in ("l1", "l2"):
        yield Entry(name, criteria.get(name).costs(model, graph, None))
    for seed in RANDOM_SEEDS:
        control = criteria.get("random", criteria.Options(seed=seed))
        yield Entry(f"random, seed {seed}", control.costs(model, graph, None))
    for label, options in CURVATURES.items():
        stats = gather(model, graph, criteria.get("ccp", options), train, batch_size=batch_size)
        for first_order in (False, True):
            suffix = "with u" if first_order else "without u"
            costs = stats.costs(first_order)
            yield Entry(f"ccp, {label}, {suffix}", costs)
            if not first_order:
                diagonal = {group: cost.diagonal() for group, cost in costs.items()}
                yield Entry(f"ccp, {label}, {suffix}, diagonal only", diagonal)
        if label == "empirical":  # the statistics that these two criteria ask for
            for name in ("taylor", "fisher"):
                yield Entry(name, criteria.get(name).costs(model, graph, stats))
    paper = criteria.get("ccp-paper")
    stats = gather(model, graph, paper, train, batch_size=batch_size)
    yield Entry("ccp-paper (weight site)", paper.costs(model, graph, stats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=10_000, help="for the statistics")
    parser.add_argument("--reestimate-images", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0, help="of the images drawn")
    options = parser.parse_args()

    train, test = (datasets.load(options.data, split) for split in ("train", "test"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))
    model = load_model(lambda: models.create("resnet56"), options.weights)
    graph = trace(model, train.normalise(train.images[:1])).inner
    results = _Results(vars(options))

    if not results.has("plain", 0.0):
        plain = evaluate(model, test, batch_size=options.batch_size)
        results.add("plain", 0.0, 1.0, plain, plain)
    reestimation = train.subset(order[-options.reestimate_images :])
    for entry in entries(model, graph, train.subset(order[: options.images]), options.batch_size):
        for ratio in RATIOS:
            if results.has(entry.label, ratio):
                continue
            plan = make_plan(graph, entry.costs, ratio=ratio)
            slim = surgery.prune(copy.deepcopy(model), plan)
            before = evaluate(slim, test, batch_size=options.batch_size)
            reestimate_batchnorm(slim, reestimation.batches(options.batch_size))
            after = evaluate(slim, test, batch_size=options.batch_size)
            kept = plan.forecast["macs_after"] / plan.forecast["macs_before"]
            results.add(entry.label, ratio, kept, before, after)
    results.finish()


class _Results:
    """Rows kept in a JSON file from the first to the last."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {k: v for k, v in settings.items() if k not in ("weights", "data")}
        path = RESULTS / f"{NAME}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.rows = found["rows"] if found.get("settings") == self.settings else []

    def has(self, label: str, ratio: float) -> bool:
        return any(row["selection"] == label and row["removed"] == ratio for row in self.rows)

    def add(self, label: str, ratio: float, macs: float, before, after) -> None:
        self.rows.append(
            {
                "selection": label,
                "removed": ratio,
                "MACs kept": macs,
                "accuracy": before.accuracy,
                "loss": before.loss,
                "accuracy, re-estimated": after.accuracy,
                "loss, re-estimated": after.loss,
            }
        )
        print(self.rows[-1], flush=True)
        write_results(NAME, {"settings": self.settings, "rows": self.rows})

    def finish(self) -> None:
        """Write the table: best first at the larger ratio, the random seeds drawn together."""
        text = ["# ResNet-56 / CIFAR-10: test accuracy by selection, no fine-tuning\n"]
        for ratio in RATIOS:
            rows = [row for row in self.rows if row["removed"] == ratio]
            rows.sort(key=lambda row: -row["accuracy, re-estimated"])
            plain = next(row for row in self.rows if row["selection"] == "plain")
            text.append(
                f"\n{ratio:.0%} of the inner channels removed ({rows[0]['MACs kept']:.1%} of the "
                f"MACs kept); unpruned {plain['accuracy']:.2f} %.\n"
            )
            text.append(table([_cells(row) for row in _joined(rows)], markdown=True))
        write_text(RESULTS / f"{NAME}.md", "\n".join(text) + "\n")
        print("\n".join(text))


def _joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the seeds of the random control replaced by their mean and spread."""
    controls = [row for row in rows if row["selection"].startswith("random")]
    joined = [row for row in rows if row not in controls]
    summary: dict[str, Any] = {"selection": f"random, {len(controls)} seeds (mean, std)"}
    for key in ("accuracy", "loss", "accuracy, re-estimated", "loss, re-estimated"):
        values = [row[key] for row in controls]
        summary[key] = mean(values)
        summary[f"{key} std"] = stdev(values)
    joined.append(summary)
    return sorted(joined, key=lambda row: -row["accuracy, re-estimated"])


def _cells(row: dict[str, Any]) -> dict[str, str]:
    cells = {"selection": row["selection"]}
    for key in ("accuracy", "accuracy, re-estimated", "loss, re-estimated"):
        spread = row.get(f"{key} std")
        cells[key] = f"{row[key]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
    return cells


if __name__ == "__main__":
    main()
