"""ResNet-56 / CIFAR-10 without gradient fine-tuning: 48.27% of the MACs go, and what stays?

    python -m benchmarks.no_finetuning_resnet56 --weights resnet56-4bfd9763.th --data data/cifar10

Inner channels are chosen by each criterion, with one common share for all groups or an optimal
allocation, and the network is repaired by least squares (:func:`ccp_ext.refit`). With
``--module-iterations`` whole stages are fitted to the plain model's after that
(:func:`ccp_ext.refit_modules`). BatchNorm re-estimation follows, unless left out. Statistics and
repair use training images only. Options are to be chosen by the first half of the test set; figures
are those of the second. Rows are written as they are done, and a second call continues.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from functools import lru_cache
from statistics import mean
from typing import Any

from benchmarks.evidence import REFIT_MEMORY, UNPRUNED, Rows, Subject, accuracies, add_arguments
from ccp_ext import criteria, surgery
from ccp_ext.compensation import LAYERS, reestimate_batchnorm, refit, refit_modules
from ccp_ext.criteria import gather
from ccp_ext.graph.channels import SCOPES
from ccp_ext.planning import make_plan

NAME = "no_finetuning_resnet56"
MACS_KEPT = 1 - 0.4827
CRITERIA = ("refit-loss", "ccp", "l1")
ALLOCATIONS = ("optimal", "uniform")
# By these a row is known.
KEY = (
    "criterion",
    "allocation",
    "scope",
    "seed",
    "images",
    "refit images",
    "layers",
    "joint",
    "stages",
    "repair",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--allocations", nargs="+", default=ALLOCATIONS, choices=ALLOCATIONS)
    parser.add_argument("--images", type=int, default=2_500, help="for the statistics")
    parser.add_argument("--refit-images", type=int, default=5_000)
    parser.add_argument("--layers", default="cut+classifier", choices=LAYERS)
    parser.add_argument("--joint", type=int, default=8, help="iterations of the Gauss-Newton steps")
    parser.add_argument("--module-images", type=int, default=10_000)
    parser.add_argument("--module-steps", type=int, default=2)
    parser.add_argument(
        "--module-iterations", type=int, default=0, help="of each step of the stages; 0: no step"
    )
    parser.add_argument("--scope", default="inner", choices=SCOPES)
    parser.add_argument("--no-reestimation", action="store_true", help="skip the second repair")
    options = parser.parse_args()

    rows = Rows(NAME, KEY, {"MACs wanted": MACS_KEPT})
    subject = _Subject(options)
    if not rows.has({"criterion": UNPRUNED}):
        rows.add({"criterion": UNPRUNED}, subject.accuracies(subject.model))
    for seed in options.seeds:
        for criterion in options.criteria:
            for allocation in options.allocations:
                _measure(rows, subject, options, criterion, allocation, seed)
    _finish(rows)


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
        "joint": options.joint,
        "stages": _stages(options),
    }
    repairs = ["refit"] if options.no_reestimation else ["refit", "refit, BatchNorm re-estimated"]
    if all(rows.has({**key, "repair": repair}) for repair in repairs):
        return
    start = time.monotonic()
    costs = subject.costs(criterion, seed)
    plan = make_plan(subject.graph, costs, macs=MACS_KEPT, allocation=allocation)
    slim = surgery.prune(copy.deepcopy(subject.model), plan)
    images = subject.draw(seed, -options.refit_images)
    settings = {"layers": options.layers, "joint": options.joint, "memory": REFIT_MEMORY}
    left = refit(subject.model, slim, images, **settings, seed=seed)
    if options.module_iterations:
        refit_modules(
            subject.model,
            slim,
            subject.draw(seed, -options.module_images),
            steps=options.module_steps,
            iterations=options.module_iterations,
            seed=seed,
        )
    for repair in repairs:
        if repair != "refit":
            reestimate_batchnorm(slim, images.batches(250))
        figures = {
            **subject.accuracies(slim),
            "MACs kept": plan.forecast["macs_after"] / plan.forecast["macs_before"],
            "unexplained, mean": mean(left.unexplained.values()),
            "seconds": time.monotonic() - start,
            "kept": {name: len(choice.kept) for name, choice in plan.groups.items()},
        }
        rows.add({**key, "repair": repair}, figures)


def _stages(options: argparse.Namespace) -> str:
    if not options.module_iterations:
        return "-"
    fit = f"{options.module_steps} x {options.module_iterations}, {options.module_images} images"
    return f"{fit}, classifier"


class _Subject(Subject):
    """The network with its data, and the costs by criterion."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.weights, options.data, options.scope)
        self.images = options.images
        self.costs = lru_cache(maxsize=1)(self._costs)

    def _costs(self, name: str, seed: int) -> Mapping[str, Any]:
        criterion = criteria.get(name, criteria.Options(seed=seed))
        data = gather(
            self.model, self.graph, criterion, self.draw(seed, self.images), batch_size=250
        )
        return criterion.costs(self.model, self.graph, data)


def _finish(rows: Rows) -> None:
    arms = rows.arms()
    plain = next(arm for arm in arms if arm[0]["criterion"] == UNPRUNED)
    unpruned = ", ".join(f"{column} {value}" for column, value in accuracies(plain).items())
    rows.write_table(
        f"ResNet-56 / CIFAR-10, {MACS_KEPT:.2%} of the MACs kept, no fine-tuning",
        "Test accuracy in percent, mean over the seeds of the images drawn (and standard "
        f"deviation). Unpruned: {unpruned}.",
        [arm for arm in arms if arm is not plain],
    )


if __name__ == "__main__":
    main()
