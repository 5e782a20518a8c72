"""The main job on an embedded default: train, prune half of the MACs, fine-tune, save, compare."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from ccp_ext import criteria, datasets, measure, models, surgery
from ccp_ext.compensation import reestimate_batchnorm
from ccp_ext.datasets import ImageSet
from ccp_ext.evaluation import evaluate
from ccp_ext.finetune import FinetuneConfig, finetune
from ccp_ext.graph import trace
from ccp_ext.planning import make_plan
from ccp_ext.report import table

MODEL = "resnet20"
TRAINING = FinetuneConfig(epochs=15, batch_size=64, learning_rate=0.1, warmup_epochs=1)
RECOVERY = FinetuneConfig(epochs=3, batch_size=64, learning_rate=0.02)
BUDGET = 0.5  # of the MACs
RANDOM_SEEDS = (0, 1, 2)


def run(
    output: str | os.PathLike[str], *, progress: bool = True, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Run the demonstration on scikit-learn's digits; returns the rows of its table.

    Writes ``slim.safetensors`` and ``plan.json`` to the folder ``output``.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train, test = datasets.load("digits", "train"), datasets.load("digits", "test")
    say(f"{len(train)} training and {len(test)} test images of scikit-learn's digits; {MODEL}")
    plain = models.create(MODEL, num_classes=train.num_classes, in_channels=1)
    finetune(plain, train, TRAINING, progress=progress)
    bench = _Bench(train, test, progress)
    rows = [bench.row("plain", plain)]

    slim, plan, before = bench.pruned(plain, "ccp", seed=0)
    rows.append({**bench.row("CCP", slim), "before fine-tuning %": before})
    plan.save(folder / "plan.json")
    surgery.save(slim, folder / "slim.safetensors")

    controls = []
    for seed in RANDOM_SEEDS:
        control, _, before = bench.pruned(plain, "random", seed=seed)
        controls.append({**bench.row("random", control), "before fine-tuning %": before})
    rows.append(_average(f"random ({len(RANDOM_SEEDS)} seeds, mean)", controls))

    reloaded = surgery.load(
        folder / "slim.safetensors",
        lambda: models.create(MODEL, num_classes=train.num_classes, in_channels=1),
    ).eval()
    with torch.no_grad():
        same = torch.equal(reloaded(bench.batch), slim.eval()(bench.batch))
    if not same:
        raise RuntimeError("the reloaded slim model does not give the saved one's outputs")
    say("\n" + table(rows))
    say(f"\nsaved {folder / 'slim.safetensors'} (reloaded: equal outputs) and its plan.json")
    return rows


class _Bench:
    """The same images, budget, repair and measurements for every criterion."""

    def __init__(self, train: ImageSet, test: ImageSet, progress: bool) -> None:
        self.train, self.test, self.progress = train, test, progress
        self.batch = test.normalise(test.images[:64])

    def pruned(self, plain: nn.Module, criterion: str, seed: int) -> tuple[nn.Module, Any, float]:
        """A pruned and fine-tuned copy, its plan, and its accuracy before fine-tuning."""
        model = copy.deepcopy(plain)
        graph = trace(model, self.batch[:1]).inner
        chosen = criteria.get(criterion, criteria.Options(seed=seed))
        stats = criteria.gather(model, graph, chosen, self.train, progress=self.progress)
        costs = chosen.costs(model, graph, stats)
        plan = make_plan(graph, costs, macs=BUDGET, allocation=chosen.allocation)
        surgery.prune(model, plan)
        reestimate_batchnorm(model, self.train.batches(128), progress=self.progress)
        before = evaluate(model, self.test, progress=self.progress).accuracy
        finetune(model, self.train, RECOVERY, seed=seed, progress=self.progress)
        return model, plan, before

    def row(self, name: str, model: nn.Module) -> dict[str, Any]:
        return {
            "model": name,
            "before fine-tuning %": None,
            "accuracy %": evaluate(model, self.test, progress=self.progress).accuracy,
            "parameters": measure.parameters(model),
            "MACs": measure.macs(model, self.batch[:1]),
            "latency ms (64 images)": measure.latency(model, self.batch).median,
        }


def _average(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {key: [row[key] for row in rows] for key in rows[0] if key != "model"}
    averages = {
        key: values[0] if len(set(values)) == 1 else float(mean(values))
        for key, values in numbers.items()
    }
    return {"model": name, **averages}
