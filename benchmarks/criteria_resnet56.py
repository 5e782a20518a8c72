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
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
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
from ccp_ext.statistics import Statistics

NAME = "criteria_resnet56"
RATIOS = (0.2, 0.5)
RANDOM_SEEDS = range(5)
PAPER = "ccp-paper (weight site)"
CURVATURES: dict[str, criteria.Options] = {
    "logits": criteria.Options(curvature="logits", first_order=True),
    "sampled": criteria.Options(curvature="sampled", first_order=True),
    "sampled, T=4": criteria.Options(curvature="sampled", temperature=4.0, first_order=True),
    "empirical": criteria.Options(curvature="empirical", first_order=True),
    "exact": criteria.Options(curvature="exact", first_order=True),
}


Costs = Mapping[str, Cost]  # by group


def selections(model, graph, train, batch_size: int) -> dict[str, Callable[[], Costs]]:
    """All compared ways to choose channels; statistics are gathered when they are first needed."""

    @lru_cache(maxsize=1)
    def statistics(label: str) -> Statistics:
        criterion = (
            criteria.get("ccp-paper") if label == PAPER else criteria.get("ccp", CURVATURES[label])
        )
        return gather(model, graph, criterion, train, batch_size=batch_size)

    def score(name: str, seed: int = 0, label: str | None = None) -> Costs:
        stats = None if label is None else statistics(label)
        return criteria.get(name, criteria.Options(seed=seed)).costs(model, graph, stats)

    def pairwise(label: str, first_order: bool) -> Costs:
        return statistics(label).costs(first_order)

    def diagonal(label: str) -> Costs:
        return {group: cost.diagonal() for group, cost in pairwise(label, False).items()}

    chosen: dict[str, Callable[[], Costs]] = {name: partial(score, name) for name in ("l1", "l2")}
    for seed in RANDOM_SEEDS:
        chosen[f"random, seed {seed}"] = partial(score, "random", seed)
    for label in CURVATURES:
        chosen[f"ccp, {label}, without u"] = partial(pairwise, label, False)
        chosen[f"ccp, {label}, without u, diagonal only"] = partial(diagonal, label)
        chosen[f"ccp, {label}, with u"] = partial(pairwise, label, True)
        if label == "empirical":  # the statistics that these two criteria ask for
            for name in ("taylor", "fisher"):
                chosen[name] = partial(score, name, label=label)
    chosen[PAPER] = partial(pairwise, PAPER, True)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=10_000, help="for the statistics")
    parser.add_argument("--reestimate-images", type=int, default=2_500)
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
    compared = selections(model, graph, train.subset(order[: options.images]), options.batch_size)
    for label, costs in compared.items():
        for ratio in RATIOS:
            if results.has(label, ratio):
                continue
            plan = make_plan(graph, costs(), ratio=ratio)
            slim = surgery.prune(copy.deepcopy(model), plan)
            before = evaluate(slim, test, batch_size=options.batch_size)
            reestimate_batchnorm(slim, reestimation.batches(options.batch_size))
            after = evaluate(slim, test, batch_size=options.batch_size)
            kept = plan.forecast["macs_after"] / plan.forecast["macs_before"]
            results.add(label, ratio, kept, before, after)
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
        text = [
            "# ResNet-56 / CIFAR-10: test accuracy by selection, no fine-tuning\n",
            f"Statistics from {self.settings['images']:,} training images, BatchNorm re-estimation "
            f"from {self.settings['reestimate_images']:,} others, drawn with seed "
            f"{self.settings['seed']}; 10,000 test images (standard error about 0.3). For class "
            "indices the exact curvature is the empirical one.\n",
        ]
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
