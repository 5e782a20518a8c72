"""ResNet-56 / CIFAR-10 with fine-tuning: CCP at 52.6% and CCP-AC at 47.0% fewer MACs, and controls.

    python -m benchmarks.finetuning_resnet56 --weights resnet56-4bfd9763.th --data data/cifar10

Each network is pruned, repaired by least squares and trained by one schedule, which may distil
from the unpruned network. The controls are random channels and the unpruned network with the same
schedule: what it gains, pruning did not.
The budgets are those of CCP's published table (Peng et al., ICML 2019). Rows are written as they
are done, and a second call continues; an interrupted training goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.evidence import REFIT_MEMORY, UNPRUNED, Rows, Subject, add_arguments
from ccp_ext import criteria, surgery
from ccp_ext.auxiliary import AuxiliaryHeads, train_heads
from ccp_ext.compensation import refit
from ccp_ext.criteria import gather
from ccp_ext.finetune import FinetuneConfig, finetune
from ccp_ext.graph import trace
from ccp_ext.planning import make_plan

NAME = "finetuning_resnet56"
KEY = (
    "criterion",
    "MACs kept",
    "allocation",
    "joint",
    "stage",
    "epochs",
    "learning rate",
    "distillation",
    "heads' weight",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A criterion with the share of the MACs that it keeps."""

    criterion: str
    macs: float = 1.0
    allocation: str = "uniform"

    @property
    def auxiliary_heads(self) -> int:
        return 0 if self.criterion == UNPRUNED else criteria.get(self.criterion).auxiliary_heads

    @property
    def columns(self) -> dict[str, Any]:
        return {
            "criterion": self.criterion,
            "MACs kept": f"{self.macs:.1%}",
            "allocation": self.allocation if self.macs < 1 else None,
        }


ARMS = (
    Arm("taylor", 0.474, "optimal"),
    Arm("refit-loss", 0.474, "optimal"),
    Arm(UNPRUNED),
    Arm("ccp-ac", 0.53, "optimal"),
    Arm("ccp", 0.474, "optimal"),
    Arm("random", 0.474),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--images", type=int, default=2_500, help="for the statistics")
    parser.add_argument("--refit-images", type=int, default=5_000)
    parser.add_argument("--joint", type=int, default=8, help="Gauss-Newton iterations of the refit")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--distillation", type=float, default=0.9, help="its weight in the loss")
    parser.add_argument("--arms", nargs="+", help="criteria (default all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoints", default="build/finetuning", help="folder")
    options = parser.parse_args()

    subject = Subject(options.weights, options.data)
    rows = Rows(NAME, KEY, {"images": options.images})
    before = Arm(UNPRUNED).columns | {"stage": "as given"}
    if not rows.has(before):
        rows.add(before, subject.accuracies(subject.model))
    for seed in options.seeds:
        for arm in ARMS:
            if not options.arms or arm.criterion in options.arms:
                _measure(rows, subject, options, arm, seed)
    _finish(rows, options)


def _measure(rows: Rows, subject: Subject, options: Any, arm: Arm, seed: int) -> None:
    """The rows of one network, before its training and after."""
    schedule = {
        "epochs": options.epochs,
        "learning rate": options.learning_rate,
        "distillation": options.distillation,
        "heads' weight": FinetuneConfig().auxiliary_weight if arm.auxiliary_heads else None,
    }
    key = {**arm.columns, "seed": seed, "joint": options.joint if arm.macs < 1 else None}
    tuned = {**key, **schedule, "stage": "fine-tuned"}
    if rows.has(tuned):
        return
    start = time.monotonic()
    model, repaired = copy.deepcopy(subject.model), {**key, "stage": "refitted"}
    if arm.criterion != UNPRUNED:
        model = _pruned(subject, options, arm, seed)
        if not rows.has(repaired):
            figures = {"refit images": options.refit_images, "seconds": time.monotonic() - start}
            rows.add(repaired, subject.accuracies(model) | figures)
    start = time.monotonic()
    _train(model, subject, options, arm, seed)
    rows.add(tuned, subject.accuracies(model) | {"seconds": time.monotonic() - start})


def _pruned(subject: Subject, options: Any, arm: Arm, seed: int) -> nn.Module:
    """Pruned and refitted; made again, to the same bits, when an interrupted training goes on."""
    criterion = criteria.get(arm.criterion, criteria.Options(seed=seed))
    images = subject.draw(seed, options.images)
    data = gather(subject.model, subject.graph, criterion, images, batch_size=250, progress=False)
    costs = criterion.costs(subject.model, subject.graph, data)
    plan = make_plan(subject.graph, costs, macs=arm.macs, allocation=arm.allocation)
    model = surgery.prune(copy.deepcopy(subject.model), plan)
    images = subject.draw(seed, -options.refit_images)
    repair = {"joint": options.joint, "memory": REFIT_MEMORY, "seed": seed, "progress": False}
    refit(subject.model, model, images, **repair)
    return model


def _train(model: nn.Module, subject: Subject, options: Any, arm: Arm, seed: int) -> None:
    config = FinetuneConfig(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        distillation_weight=options.distillation,
        augment="crop_flip",
        channels_last=True,
        amp=True,
        seed=seed,
    )
    heads, count = None, arm.auxiliary_heads
    if count:
        torch.manual_seed(seed)
        graph = trace(model, subject.train.normalise(subject.train.images[:1]))
        heads = AuxiliaryHeads.spread(model, graph, subject.train.num_classes, count=count)
        train_heads(model, heads, subject.draw(seed, options.images), seed=seed, progress=False)
    folder = Path(options.checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    named = (arm.criterion, arm.macs, options.epochs, options.learning_rate, options.distillation)
    checkpoint = folder / f"{'-'.join(map(str, (*named, seed)))}.pt"
    teacher = copy.deepcopy(subject.model).to(memory_format=torch.channels_last)
    finetune(
        model,
        subject.train,
        config,
        device=options.device,
        teacher=teacher if options.distillation else None,
        auxiliary=heads,
        checkpoint=checkpoint,
        progress=False,
    )
    model.to("cpu", memory_format=torch.contiguous_format)


def _finish(rows: Rows, options: Any) -> None:
    rows.write_table(
        "ResNet-56 / CIFAR-10 with fine-tuning",
        "Test accuracy in percent, mean over the seeds (and standard deviation). "
        f"{options.images:,} training images for the statistics, 5,000 for the refit (2,500 "
        "without Gauss-Newton steps); then all 50,000 with random crops and flips: SGD with "
        "Nesterov momentum, cosine schedule, bfloat16 autocast, the unpruned network's outputs "
        "(temperature 4) with the weight `distillation`. The unpruned network has the same "
        "schedule.",
        rows.arms(),
    )


if __name__ == "__main__":
    main()
