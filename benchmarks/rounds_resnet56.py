"""ResNet-56 / CIFAR-10 at half the MACs, pruned at once or in rounds with statistics anew in each.

    python -m benchmarks.rounds_resnet56 --weights resnet56-4bfd9763.th --data data/cifar10

Every round ends in the repair, so that the next one's statistics are of a network that works. The
diagonal of S stands beside the whole, random selection beside both. Rows are written as they are
done, and a second call continues.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from benchmarks.evidence import Rows, Subject, add_arguments
from ccp_ext import criteria, repair, surgery
from ccp_ext.allocation.rounds import Schedule
from ccp_ext.graph import trace
from ccp_ext.planning import make_plan

NAME = "rounds_resnet56"
BUDGET, SCOPE = 0.5, "inner"
KEY = ("criterion", "diagonal", "repair", "rounds", "seed")
ARMS = (("ccp", False), ("ccp", True), ("taylor", False), ("random", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--criteria", nargs="+", default=["ccp", "taylor", "random"])
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--repair", default="batchnorm", choices=["batchnorm", "refit"])
    parser.add_argument("--images", type=int, default=2_500, help="for the statistics of a round")
    parser.add_argument("--repair-images", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=250)
    options = parser.parse_args()

    subject = Subject(options.weights, options.data, SCOPE)
    head = {"images": options.images, "repair images": options.repair_images, "MACs kept": BUDGET}
    rows = Rows(NAME, KEY, head)
    for seed in options.seeds:
        for criterion, diagonal in ARMS:
            for rounds in options.rounds if criterion in options.criteria else ():
                values = (criterion, diagonal, options.repair, rounds, seed)
                key = dict(zip(KEY, values, strict=True))
                if not rows.has(key):
                    rows.add(key, _measure(subject, options, key))
    text = (
        f"Inner groups, {BUDGET:.0%} of the MACs kept, {options.images:,} training images for the "
        f"statistics of each round, {options.repair_images:,} for the repair behind it, no "
        "fine-tuning; each criterion with its own allocation. Test accuracy in "
        "percent, mean over the seeds of the images drawn (and standard deviation)."
    )
    rows.write_table("ResNet-56 / CIFAR-10, one shot or iterative", text, rows.arms())


def _measure(
    subject: Subject, options: argparse.Namespace, key: Mapping[str, Any]
) -> dict[str, Any]:
    start = time.monotonic()
    slim = _pruned(subject, options, *key.values())
    return {"seconds": time.monotonic() - start} | subject.accuracies(slim)


def _pruned(
    subject: Subject,
    options: argparse.Namespace,
    name: str,
    diagonal: bool,
    step: str,
    rounds: int,
    seed: int,
) -> nn.Module:
    criterion = criteria.get(name, criteria.Options(diagonal=diagonal, seed=seed))
    images = subject.draw(seed, options.images)
    repair_images = subject.draw(seed, -options.repair_images)
    model, size = copy.deepcopy(subject.model), options.batch_size
    schedule = Schedule(subject.graph, rounds, {"macs": BUDGET}, {})
    for number in range(1, rounds + 1):
        graph = trace(model, subject.example).select_groups(SCOPE)
        data = criteria.gather(model, graph, criterion, images, batch_size=size, progress=False)
        costs = criterion.costs(model, graph, data)
        budget = schedule.at(number, graph, None)
        surgery.prune(model, make_plan(graph, costs, **budget, allocation=criterion.allocation))
        repair.apply(step, subject.model, model, repair_images, batch_size=size, progress=False)
    return model


if __name__ == "__main__":
    main()
