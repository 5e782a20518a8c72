"""The whole of ResNet-56 / CIFAR-10 as one problem, at half the MACs, without fine-tuning.

    python -m benchmarks.joint_resnet56 --weights resnet56-4bfd9763.th --data data/cifar10

Ways to spend one budget: the same share of every group, the best allocation for the groups' own
costs, and the joint descent from there; L1 and random selection with the counts of the first two.
Each seed draws other training images for the statistics, and others again for the re-estimation of
BatchNorm; the test set is looked at once for each row. Rows are written as they are done, and a
second call continues.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, write_results
from benchmarks.evidence import with_spread
from ccp_ext import collect, criteria, datasets, models, surgery
from ccp_ext.checkpoints import load_model
from ccp_ext.compensation import reestimate_batchnorm
from ccp_ext.datasets import ImageSet
from ccp_ext.evaluation import evaluate
from ccp_ext.files import atomic_path, load_tensors, write_text
from ccp_ext.forecast import Effect, logits, removed_masks
from ccp_ext.graph import ChannelGraph, trace
from ccp_ext.joint import JointCost, Refinement, refine
from ccp_ext.plan import PruningPlan
from ccp_ext.planning import make_plan
from ccp_ext.report import table
from ccp_ext.statistics import Statistics

NAME = "joint_resnet56"
BUDGET = 0.5
ACCURACY, LOSS = "test accuracy", "test loss"
WITHIN, JOINT = "forecast within groups", "forecast joint"
LOGITS, CHANGE = "measured", "training loss change"
MEASURED = (ACCURACY, LOSS, WITHIN, JOINT, LOGITS, CHANGE)


class Draw:
    """One seed: its images, their statistics, and the plans that are compared."""

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, train: ImageSet, seed: int, options: Any
    ) -> None:
        self.model, self.graph, self.seed, self.options = model, graph, seed, options
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        self.images = train.subset(order[: options.images])
        self.watched = train.subset(order[: options.effect_images])
        self.reestimation = train.subset(order[-options.reestimate_images :])

    def plans(self) -> dict[str, Callable[[], PruningPlan]]:
        optimal = self.optimal.groups
        counts = {name: len(group.kept) for name, group in optimal.items()}
        plans: dict[str, Callable[[], PruningPlan]] = {
            "ccp, uniform": partial(make_plan, self.graph, self.statistics, macs=BUDGET),
            "ccp, optimal": lambda: self.optimal,
            "ccp, joint exchanges": partial(self.refined),
            "ccp, joint": partial(
                self.refined,
                resource=self.graph.resource("macs"),
                budget=self.optimal.record["allocation"]["budget"],
            ),
        }
        for name in ("l1", "random"):
            options = criteria.Options(seed=self.seed)
            costs = criteria.get(name, options).costs(self.model, self.graph, None)
            plans[f"{name}, uniform"] = partial(make_plan, self.graph, costs, macs=BUDGET)
            plans[f"{name}, optimal's counts"] = partial(
                make_plan, self.graph, costs, per_group=counts
            )
        return plans

    @cached_property
    def statistics(self) -> Statistics:
        """With their rows; from the cache if an earlier run left them there."""
        file = Path(self.options.cache) / f"{NAME}-{self.options.images}-{self.seed}.pt"
        kept = {"curvature": "logits", "seed": self.seed, "keep_rows": True}
        with collect(self.model, self.graph, **kept) as stats:
            if file.exists():
                stats.load_state_dict(load_tensors(file))
                return stats
            for x, y in self.images.batches(self.options.batch_size):
                stats.backward(self.model(x), y)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            torch.save(stats.state_dict(), temporary)
        return stats

    @cached_property
    def cost(self) -> JointCost:
        return JointCost.of(self.statistics)

    @cached_property
    def optimal(self) -> PruningPlan:
        return make_plan(self.graph, self.statistics, macs=BUDGET, allocation="optimal")

    @cached_property
    def plain_logits(self) -> Tensor:
        return logits(self.model, self.watched, batch_size=self.options.batch_size)

    def refined(self, **budget: Any) -> PruningPlan:
        found: Refinement = refine(self.graph, self.cost, removed_masks(self.optimal), **budget)
        print(
            f"seed {self.seed}: {found.start:.3f} -> {found.objective:.3f}, {found.exchanges} "
            f"exchanges, {found.transfers} transfers, {found.chains} chains: {found.status}"
        )
        return PruningPlan.from_kept(self.graph, {n: ~mask for n, mask in found.removed.items()})

    def row(self, label: str, plan: PruningPlan, test: ImageSet) -> dict[str, Any]:
        """Forecast and effect on images of the statistics, then the test after the repair."""
        batch_size, masks = self.options.batch_size, removed_masks(plan)
        with surgery.masked(self.model, plan):
            pruned = logits(self.model, self.watched, batch_size=batch_size)
        effect = Effect.between(self.plain_logits, pruned, self.watched.labels)
        slim = surgery.prune(copy.deepcopy(self.model), plan)
        reestimate_batchnorm(slim, self.reestimation.batches(batch_size))
        after = evaluate(slim, test, batch_size=batch_size)
        return {
            "selection": label,
            "seed": self.seed,
            "MACs kept": plan.forecast["macs_after"] / plan.forecast["macs_before"],
            WITHIN: self.cost.within_groups(masks),
            JOINT: self.cost.objective(masks),
            LOGITS: effect.logits,
            CHANGE: effect.loss,
            ACCURACY: after.accuracy,
            LOSS: after.loss,
            "kept": {name: len(group.kept) for name, group in plan.groups.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=10_000, help="for the statistics")
    parser.add_argument("--effect-images", type=int, default=2_500, help="to measure the effect on")
    parser.add_argument("--reestimate-images", type=int, default=2_500)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--cache", default="build/statistics", help="folder for the statistics")
    options = parser.parse_args()

    train, test = (datasets.load(options.data, split) for split in ("train", "test"))
    model = load_model(lambda: models.create("resnet56"), options.weights)
    graph = trace(model, train.normalise(train.images[:1])).inner
    results = _Results(options)
    for seed in range(options.seeds):
        draw = Draw(model, graph, train, seed, options)
        for label, plan in draw.plans().items():
            if not results.has(label, seed):
                results.add(draw.row(label, plan(), test))
    results.finish()


class _Results:
    """Rows kept in a JSON file from the first to the last."""

    def __init__(self, options: argparse.Namespace) -> None:
        names = ("images", "effect_images", "reestimate_images", "batch_size")
        self.settings = {name: getattr(options, name) for name in names}
        path = RESULTS / f"{NAME}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.rows = found["rows"] if found.get("settings") == self.settings else []

    def has(self, label: str, seed: int) -> bool:
        return any((row["selection"], row["seed"]) == (label, seed) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        print({name: value for name, value in row.items() if name != "kept"}, flush=True)
        write_results(NAME, {"settings": self.settings, "rows": self.rows})

    def finish(self) -> None:
        """Write the table of the means over the seeds."""
        seeds = len({row["seed"] for row in self.rows})
        kept = mean(row["MACs kept"] for row in self.rows)
        text = [
            "# ResNet-56 / CIFAR-10 at half the MACs: groups alone and all together\n",
            f"Inner groups, {kept:.1%} of the MACs kept, no fine-tuning. Mean ± standard deviation "
            f"over {seeds} seeds, each with its own {self.settings['images']:,} training images "
            f"for the statistics (curvature of the logits, no linear term) and "
            f"{self.settings['reestimate_images']:,} others for the re-estimation of BatchNorm; "
            "10,000 test images (standard error of one accuracy about 0.4). The forecast is half "
            "the mean squared change of the logits, within the groups and with the curvature "
            "between them; it and the training loss (nats) are measured on "
            f"{self.settings['effect_images']:,} images of the statistics, with the removed "
            "channels at zero and nothing repaired.\n",
            table([_cells(label, rows) for label, rows in self._by_selection()], markdown=True),
        ]
        write_text(RESULTS / f"{NAME}.md", "\n".join(text) + "\n")
        print("\n".join(text))

    def _by_selection(self) -> list[tuple[str, list[dict[str, Any]]]]:
        labels = dict.fromkeys(row["selection"] for row in self.rows)
        return [(name, [r for r in self.rows if r["selection"] == name]) for name in labels]


def _cells(label: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    cells = {"selection": label}
    for key in MEASURED:
        cells[key] = with_spread([row[key] for row in rows])
    return cells


if __name__ == "__main__":
    main()
