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
KEY = ("criterion", "diagonal", "repair", "rounds", "images", "repair images", "seed")
ARMS = (("ccp", False), ("ccp", True), ("taylor", False), ("random", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    known = list(dict.fromkeys(name for name, _ in ARMS))
    parser.add_argument("--criteria", nargs="+", default=known, choices=known)
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--repair", default="batchnorm", choices=["batchnorm", "refit"])
    parser.add_argument("--images", type=int, default=2_500, help="for the statistics of a round")
    parser.add_argument("--repair-images", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=250)
    options = parser.parse_args()

    subject = Subject(options.weights, options.data, SCOPE)
    if min(options.rounds) < 1:
        parser.error(f"--rounds must be at least 1; got {min(options.rounds)}")
    rows = Rows(NAME, KEY, {"MACs kept": BUDGET})
    for seed in options.seeds:
        for criterion, diagonal in ARMS:
            for rounds in options.rounds if criterion in options.criteria else ():
                images = (options.images, options.repair_images)
                values = (criterion, diagonal, options.repair, rounds, *images, seed)
                key = dict(zip(KEY, values, strict=True))
                if not rows.has(key):
                    rows.add(key, _measure(subject, options.batch_size, key))
    text = (
        f"Inner groups, {BUDGET:.0%} of the MACs kept, training images for the statistics of each "
        "round and for the repair behind it, no fine-tuning; each criterion with its own "
        "allocation. Test accuracy in percent, mean over the seeds of the images drawn (and "
        "standard deviation)."
    )
    rows.write_table("ResNet-56 / CIFAR-10, one shot or iterative", text, rows.arms())


def _measure(subject: Subject, batch_size: int, key: Mapping[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    slim = _pruned(subject, batch_size, key)
    return {"seconds": time.monotonic() - start} | subject.accuracies(slim)


def _pruned(subject: Subject, batch_size: int, key: Mapping[str, Any]) -> nn.Module:
    seed, rounds = key["seed"], key["rounds"]
    options = criteria.Options(diagonal=key["diagonal"], seed=seed)
    criterion = criteria.get(key["criterion"], options)
    images = subject.draw(seed, key["images"])
    repair_images = subject.draw(seed, -key["repair images"])
    model, sizes = copy.deepcopy(subject.model), {"batch_size": batch_size, "progress": False}
    schedule = Schedule(subject.graph, rounds, {"macs": BUDGET}, {})
    for number in range(1, rounds + 1):
        graph = trace(model, subject.example).select_groups(SCOPE)
        data = criteria.gather(model, graph, criterion, images, **sizes)
        costs = criterion.costs(model, graph, data)
        budget = schedule.at(number, graph, None)
        surgery.prune(model, make_plan(graph, costs, **budget, allocation=criterion.allocation))
        repair.apply(key["repair"], subject.model, model, repair_images, **sizes)
    return model


if __name__ == "__main__":
    main()
