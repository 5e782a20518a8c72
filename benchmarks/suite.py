"""Every operator on the feature maps of ResNet-50 and ResNet-56, beside its rivals.

    python -m benchmarks [operators] [--shapes resnet56] [--device cpu] [--quick] [--output folder]

Before anything is timed it is compared with the float64 reference; a wrong result stops the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import ccp_ext
from benchmarks import limits as machine
from benchmarks import plot, sweep
from benchmarks.channel_dot import ChannelDot
from benchmarks.common import RESULTS, write_results
from benchmarks.limits import float32_precision
from benchmarks.map_similarity import MapSimilarity
from benchmarks.networks import NETWORKS
from benchmarks.operation import Case, Operation
from benchmarks.weighted_gram import WeightedGram
from benchmarks.weighted_grams import WeightedGrams
from ccp_ext.report import table

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (ChannelDot(), WeightedGram(), WeightedGrams(), MapSimilarity())
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m benchmarks``; ``ccp bench`` calls it with the same arguments."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    add_arguments(parser)
    run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operators", nargs="*", metavar="operator", help=", ".join(OPERATIONS))
    parser.add_argument(
        "--shapes", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="networks"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default auto)")
    parser.add_argument("--batch-size", type=int, help="default: see benchmarks/networks.py")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed calls a case, about")
    parser.add_argument("--compile", choices=("all", "some", "none"), default="some")
    parser.add_argument(
        "--quick", action="store_true", help="a trial: the smallest sizes, one timing"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of operators.json")


def run(options: argparse.Namespace) -> Path:
    """Measure, print and write ``operators.json``; returns its path."""
    unknown = sorted(set(options.operators) - set(OPERATIONS))
    if unknown:
        raise ccp_ext.InputError(
            f"benchmarks: operators must be of {', '.join(OPERATIONS)}; got {', '.join(unknown)}"
        )
    chosen = [OPERATIONS[name] for name in options.operators or OPERATIONS]
    device = ccp_ext.usable_devices()[-1] if options.device == "auto" else options.device
    batches = {
        name: 2 if options.quick else options.batch_size or NETWORKS[name].batch_on(device)
        for name in options.shapes
    }
    effort = sweep.Effort(options.seconds, compiled=options.compile)
    if options.quick:
        effort = sweep.Effort(seconds=0, compiled="none")
    limits = machine.measure(device, options.quick)
    print(limits.lines(), flush=True)

    content = {
        "settings": {
            "device": device,
            "batch sizes": batches,
            "smallest sizes only": options.quick,
            "effort": asdict(effort),
        },
        "limits": limits.settings(),
        "rows": [],
        "left out": [],
    }
    path = None
    with float32_precision("highest"):
        for operation in chosen:
            for network, batch in batches.items():
                cases = list(sweep.cases(operation, network, device, batch, options.quick))
                print(f"\n{operation.name}, {network}", flush=True)
                _sweep(operation, cases, limits, effort, content)
            # After each operator, so that a run cut short leaves what it has.
            content["summary"] = sweep.summary(content["rows"])
            path = write_results("operators", content, options.output)
    print(table(content["summary"]))
    print(path)
    drawn = plot.draw(content["rows"], options.output / "operators.png")
    print(drawn or "no plot: matplotlib is not installed")
    return path


def _sweep(
    operation: Operation,
    cases: list[Case],
    limits: machine.Limits,
    effort: sweep.Effort,
    content: dict,
) -> None:
    """Measure an operator on one network's cases; add them to ``content`` and print them."""
    rows = []
    for case in cases:
        first = case.label == cases[0].label
        compiled = effort.compiled == "all" or (effort.compiled == "some" and first)
        measured, notes = sweep.measure(operation, case, limits, effort, compiled)
        rows += measured
        content["left out"] += [
            {"operator": operation.name, "size": case.label, "candidate": name, "reason": reason}
            for name, reason in notes.items()
        ]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    content["rows"] += rows
    print(table(sweep.overview(rows)), flush=True)
