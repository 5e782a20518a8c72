"""ResNet-56 / CIFAR-10 without gradient fine-tuning: 48.27% of the MACs go, and what stays?

    python -m benchmarks.no_finetuning_resnet56 --weights resnet56-4bfd9763.th --data data/cifar10

Inner channels are chosen by each criterion, with one common share for all groups or an optimal
allocation, and the network is repaired by least squares (:func:`ccp_ext.refit`), with and without
BatchNorm re-estimation afterwards. Statistics and repair use training images only. Options are to
be chosen by the first half of the test set; figures are those of the second. Rows are written as
they are done, and a second call continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping
from functools import lru_cache
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import RESULTS, write_results
from ccp_ext import criteria, datasets, models, surgery
from ccp_ext.checkpoints import load_model
from ccp_ext.compensation import LAYERS, reestimate_batchnorm, refit
from ccp_ext.criteria import gather
from ccp_ext.evaluation import evaluate
from ccp_ext.files import write_text
from ccp_ext.graph import trace
from ccp_ext.graph.channels import SCOPES
from ccp_ext.planning import make_plan
from ccp_ext.report import table

NAME = "no_finetuning_resnet56"
MACS_KEPT = 1 - 0.4827
CRITERIA = ("refit-loss", "ccp", "l1")
ALLOCATIONS = ("optimal", "uniform")
HALVES = {"first half": range(5000), "second half": range(5000, 10_000)}
# By these a row is known.
KEY = ("criterion", "allocation", "scope", "seed", "images", "refit images", "layers", "repair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--allocations", nargs="+", default=ALLOCATIONS, choices=ALLOCATIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the images drawn")
    parser.add_argument("--images", type=int, default=2_500, help="for the statistics")
    parser.add_argument("--refit-images", type=int, default=5_000)
    parser.add_argument("--layers", default="cut+classifier", choices=LAYERS)
    parser.add_argument("--scope", default="inner", choices=SCOPES)
    parser.add_argument("--no-reestimation", action="store_true", help="skip the second repair")
    options = parser.parse_args()

    rows = _Rows()
    subject = _Subject(options)
    if not rows.has({"criterion": "unpruned"}):
        rows.add({"criterion": "unpruned"}, subject.accuracies(subject.model))
    for seed in options.seeds:
        for criterion in options.criteria:
            for allocation in options.allocations:
                _measure(rows, subject, options, criterion, allocation, seed)
    rows.finish()


def _measure(rows, subject, options, criterion: str, allocation: str, seed: int) -> None:
    """The rows of one plan."""
    key = {
        "criterion": criterion,
        "allocation": allocation,
        "scope": options.scope,
        "seed": seed,
        "images": options.images,
        "refit images": options.refit_images,
        "layers": options.layers,
    }
    repairs = ["refit"] if options.no_reestimation else ["refit", "refit, BatchNorm re-estimated"]
    if all(rows.has({**key, "repair": repair}) for repair in repairs):
        return
    start = time.monotonic()
    costs = subject.costs(criterion, seed)
    plan = make_plan(subject.graph, costs, macs=MACS_KEPT, allocation=allocation)
    slim = surgery.prune(copy.deepcopy(subject.model), plan)
    images = subject.draw(seed, -options.refit_images)
    left = refit(subject.model, slim, images, layers=options.layers, seed=seed)
    for repair in repairs:
        if repair != "refit":
            reestimate_batchnorm(slim, images.batches(250))
        figures = {
            **subject.accuracies(slim),
            "MACs kept": plan.forecast["macs_after"] / plan.forecast["macs_before"],
            "unexplained, mean": mean(left.values()),
            "seconds": time.monotonic() - start,
            "kept": {name: len(choice.kept) for name, choice in plan.groups.items()},
        }
        rows.add({**key, "repair": repair}, figures)


class _Subject:
    """The model with its data, and the costs by criterion."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.train, self.test = (datasets.load(options.data, s) for s in ("train", "test"))
        self.model = load_model(lambda: models.create("resnet56"), options.weights).eval()
        example = self.train.normalise(self.train.images[:1])
        self.graph = trace(self.model, example).select_groups(options.scope)
        self.costs = lru_cache(maxsize=1)(self._costs)

    def draw(self, seed: int, count: int) -> datasets.ImageSet:
        """The first ``count`` training images in the seed's order, or the last ``-count``."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train.subset(order[:count] if count > 0 else order[count:])

    def _costs(self, name: str, seed: int) -> Mapping[str, Any]:
        criterion = criteria.get(name, criteria.Options(seed=seed))
        images = self.draw(seed, self.options.images)
        data = gather(self.model, self.graph, criterion, images, batch_size=250)
        return criterion.costs(self.model, self.graph, data)

    def accuracies(self, model: torch.nn.Module) -> dict[str, float]:
        halves = {k: evaluate(model, self.test.subset(part)).accuracy for k, part in HALVES.items()}
        return {**halves, "test": mean(halves.values())}


class _Rows:
    """Rows kept in a JSON file from the first to the last; each says with what it was made."""

    def __init__(self) -> None:
        path = RESULTS / f"{NAME}.json"
        self._rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []

    def has(self, key: Mapping[str, Any]) -> bool:
        return any(all(row.get(k) == key.get(k) for k in KEY) for row in self._rows)

    def add(self, key: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        self._rows.append({**key, **figures})
        print({k: v for k, v in self._rows[-1].items() if k != "kept"}, flush=True)
        write_results(NAME, {"MACs wanted": MACS_KEPT, "rows": self._rows})

    def finish(self) -> None:
        """Write the table: the mean over the seeds, best on the first half first."""
        unpruned = next(row for row in self._rows if row["criterion"] == "unpruned")
        by_arm: dict[tuple, list[dict[str, Any]]] = {}
        for row in self._rows:
            if row is not unpruned:
                arm = tuple(row[k] for k in KEY if k != "seed")
                by_arm.setdefault(arm, []).append(row)
        arms = sorted(by_arm.values(), key=lambda rows: -mean(r["first half"] for r in rows))
        text = (
            f"# ResNet-56 / CIFAR-10, {MACS_KEPT:.2%} of the MACs kept, no fine-tuning\n\n"
            f"Test accuracy in percent, mean over the seeds of the images drawn (and standard "
            f"deviation). Unpruned: {_accuracies([unpruned])}.\n\n"
            + table([_cells(rows) for rows in arms], markdown=True)
        )
        write_text(RESULTS / f"{NAME}.md", text + "\n")
        print(text)


def _cells(rows: list[dict[str, Any]]) -> dict[str, str]:
    named = {k: str(rows[0][k]) for k in KEY if k != "seed"}
    return {**named, "seeds": str(len(rows)), **_figures(rows)}


def _figures(rows: list[dict[str, Any]]) -> dict[str, str]:
    cells = {}
    for column in (*HALVES, "test"):
        values = [row[column] for row in rows]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        cells[column] = f"{mean(values):.2f}{spread}"
    return cells


def _accuracies(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{column} {value}" for column, value in _figures(rows).items())


if __name__ == "__main__":
    main()
