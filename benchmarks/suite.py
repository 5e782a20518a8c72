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
from benchmarks.channel_moments import ChannelMoments
from benchmarks.common import RESULTS, write_results
from benchmarks.limits import Limits, float32_precision
from benchmarks.map_similarity import MapSimilarity
from benchmarks.networks import NETWORKS
from benchmarks.operation import Operation
from benchmarks.patch_gram import PatchGram
from benchmarks.sweep import Effort
from benchmarks.weighted_gram import WeightedGram
from benchmarks.weighted_grams import WeightedGrams
from ccp_ext.report import table

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        ChannelDot(),
        ChannelMoments(),
        WeightedGram(),
        WeightedGrams(),
        MapSimilarity(),
        PatchGram(),
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m benchmarks``."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    add_arguments(parser)
    run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`run`, also for another command line."""
    parser.add_argument("operators", nargs="*", metavar="operator", help=", ".join(OPERATIONS))
    parser.add_argument(
        "--shapes", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="networks"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default auto)")
    parser.add_argument("--batch-size", type=int, help="default: see benchmarks/networks.py")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed calls a case, about")
    parser.add_argument(
        "--compile",
        choices=("all", "some", "none"),
        default="some",
        help="sizes that torch.compile takes part in; some: each operator's first (default)",
    )
    parser.add_argument("--quick", action="store_true", help="a trial: smallest sizes, few rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tag", default="", help="added to the name of the results file")


def run(options: argparse.Namespace) -> Path:
    """Measure, print, and write ``operators.json`` and a picture; returns the JSON's path.

    Raises:
        InputError: an unknown operator.
        AssertionError: some of our results were wrong or not made; the others are written.
    """
    operations = _chosen(options.operators)
    if options.device == "auto":
        options.device = ccp_ext.usable_devices()[-1]
    batches = {name: _batch(name, options) for name in options.shapes}
    effort = Effort(options.seconds, compiled=options.compile)
    if options.quick:
        effort = Effort(seconds=0, compiled="none")
    limits = machine.measure(options.device, options.quick)
    print(limits.lines(), flush=True)
    settings = {
        "device": options.device,
        "batch sizes": batches,
        "smallest sizes only": options.quick,
        "effort": asdict(effort),
    }
    content = {"settings": settings, "limits": asdict(limits)}
    content |= {"rows": [], "left out": [], "failures": []}
    with float32_precision("highest"):
        for operation in operations:
            for network, batch in batches.items():
                first = network == options.shapes[0]
                found = _sweep(operation, network, batch, options, limits, effort, first)
                for name, values in found.items():
                    content[name] += values
            # After each operator, so that a run cut short leaves what it has.
            content["summary"] = sweep.summary(content["rows"])
            path = write_results(f"operators{options.tag}", content, options.output)
    print(table(content["summary"]))
    print(path)
    picture = plot.draw(content["rows"], path.with_suffix(".png"))
    print(picture or "no picture: nothing was measured, or matplotlib is not installed")
    if content["failures"]:
        raise AssertionError("\n".join(content["failures"]))
    return path


def _chosen(names: Sequence[str]) -> list[Operation]:
    unknown = sorted(set(names) - set(OPERATIONS))
    if unknown:
        raise ccp_ext.InputError(
            f"benchmarks: operators must be of {', '.join(OPERATIONS)}; got {', '.join(unknown)}"
        )
    return [OPERATIONS[name] for name in names or OPERATIONS]


def _batch(network: str, options: argparse.Namespace) -> int:
    return 2 if options.quick else options.batch_size or NETWORKS[network].batch_on(options.device)


def _sweep(
    operation: Operation,
    network: str,
    batch: int,
    options: argparse.Namespace,
    limits: Limits,
    effort: Effort,
    first_network: bool,
) -> dict[str, list]:
    """Measure an operator on one network's sizes and print it."""
    cases = list(sweep.cases(operation, network, options.device, batch, options.quick))
    some = {cases[0].label} if first_network else set()
    compiled = {"all": {case.label for case in cases}, "some": some, "none": set()}
    found = {"rows": [], "left out": [], "failures": []}
    for case in cases:
        with_compile = case.label in compiled[effort.compiled]
        try:
            rows, reasons = sweep.measure(operation, case, limits, effort, with_compile)
        except (AssertionError, RuntimeError) as error:  # the other cases are still worth a run
            found["failures"].append(f"{operation.name}, {case.label}: {error}")
            continue
        found["rows"] += rows
        found["left out"] += [
            {"operator": operation.name, "size": case.label, "candidate": name, "reason": reason}
            for name, reason in reasons.items()
        ]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"\n{operation.name}, {network}\n{table(sweep.overview(found['rows']))}", flush=True)
    return found
