"""What the experiments on a trained network share: the network with its data, and rows of results.

The test images are cut in two in their official order: whatever is chosen by looking at accuracies
is chosen on the first half, and figures are those of the second half and of the whole.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, write_results
from ccp_ext import datasets, models
from ccp_ext.checkpoints import load_model
from ccp_ext.evaluation import evaluate
from ccp_ext.files import write_text
from ccp_ext.graph import trace
from ccp_ext.report import table

HALVES = {"first half": range(5000), "second half": range(5000, 10_000)}
ACCURACIES = (*HALVES, "test")
UNPRUNED = "unpruned"
REFIT_MEMORY = 16  # GiB: every layer of ResNet-56 has all of 5,000 images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the network and the data are, and which random draws are made."""
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the images drawn")


class Subject:
    """ResNet-56 with its CIFAR-10 images and the groups of a scope."""

    def __init__(self, weights: str, data: str, scope: str = "inner") -> None:
        self.train, self.test = (datasets.load(data, split) for split in ("train", "test"))
        self.model = load_model(lambda: models.create("resnet56"), weights).eval()
        self.example = self.train.normalise(self.train.images[:1])
        self.graph = trace(self.model, self.example).select_groups(scope)

    def draw(self, seed: int, count: int) -> datasets.ImageSet:
        """The first ``count`` training images in the seed's order, or the last ``-count``."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train.subset(order[:count] if count > 0 else order[count:])

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """Percent, of the halves of the test set and of the whole."""
        halves = {k: evaluate(model, self.test.subset(part)).accuracy for k, part in HALVES.items()}
        return {**halves, "test": mean(halves.values())}


class Rows:
    """Rows of an experiment, kept in a JSON file from the first to the last.

    Args:
        name: of the files in the results.
        key: the columns by which a row is known; "seed" is one of them.
        head: what the file says besides the rows.
    """

    def __init__(self, name: str, key: Sequence[str], head: Mapping[str, Any]) -> None:
        self.name, self.key, self.head = name, tuple(key), dict(head)
        path = RESULTS / f"{name}.json"
        self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []

    def has(self, key: Mapping[str, Any]) -> bool:
        return any(all(row.get(k) == key.get(k) for k in self.key) for row in self.rows)

    def add(self, key: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        self.rows.append({**key, **figures})
        print({k: v for k, v in self.rows[-1].items() if k != "kept"}, flush=True)
        write_results(self.name, {**self.head, "rows": self.rows})

    def arms(self) -> list[list[dict[str, Any]]]:
        """Rows that differ in their seed alone, together; the best on the first half first."""
        found: dict[tuple, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(tuple(row.get(k) for k in self.key if k != "seed"), []).append(row)
        return sorted(found.values(), key=lambda rows: -mean(r["first half"] for r in rows))

    def write_table(self, title: str, text: str, arms: Sequence[list[dict[str, Any]]]) -> None:
        """A Markdown file of the means over the seeds."""
        named = [k for k in self.key if k != "seed"]
        cells = [
            {k: str(rows[0].get(k)) for k in named} | {"seeds": str(len(rows))} | accuracies(rows)
            for rows in arms
        ]
        written = f"# {title}\n\n{text}\n\n{table(cells, markdown=True)}\n"
        write_text(RESULTS / f"{self.name}.md", written)
        print(written)


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Mean and sample standard deviation of each accuracy."""
    return {column: with_spread([row[column] for row in rows]) for column in ACCURACIES}


def with_spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"
