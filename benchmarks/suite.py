"""Every operator on the feature maps of ResNet-50 and ResNet-56, beside its rivals.

    python -m benchmarks [operators] [--shapes resnet56] [--device cpu] [--quick] [--output folder]

Before anything is timed it is compared with the float64 reference; a wrong result of ours fails the
run at its end. Results are written as they are made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

import ccp_ext
from benchmarks import limits as machine
from benchmarks import plot, sweep, targets
from benchmarks.channel_dot import ChannelDot
from benchmarks.channel_moments import ChannelMoments
from benchmarks.common import RESULTS, environment, write_results
from benchmarks.limits import Limits, float32_precision
from benchmarks.map_similarity import MapSimilarity
from benchmarks.networks import NETWORKS
from benchmarks.operation import Case, Operation
from benchmarks.patch_gram import PatchGram
from benchmarks.sweep import Effort
from benchmarks.weighted_gram import WeightedGram
from benchmarks.weighted_grams import WeightedGrams
from ccp_ext.report import table

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        ChannelDot(),
        WeightedGrams(),
        MapSimilarity(),
        PatchGram(),
        ChannelMoments(),
        WeightedGram(),
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
    parser.add_argument(
        "--compile-seconds", type=float, default=120.0, help="after which a compilation is given up"
    )
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds for an operator; the cases that are left then are named and not measured",
    )
    parser.add_argument(
        "--within",
        type=float,
        help="seconds for all operators, each an equal share of what the ones before it left",
    )
    by_target = parser.add_mutually_exclusive_group()
    by_target.add_argument(
        "--for-targets",
        action="store_true",
        help="only cases that a target is about, those of several targets first",
    )
    by_target.add_argument(
        "--beyond-targets", action="store_true", help="only cases that no target is about"
    )
    parser.add_argument("--warm", action="store_true", help="small inputs come from the cache")
    parser.add_argument(
        "--add",
        action="store_true",
        help="to the rows that the file holds already, of the same device and --warm or not",
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
    begin = time.monotonic()
    operations = _chosen(options.operators)
    if options.device == "auto":
        options.device = ccp_ext.usable_devices()[-1]
    batches = {name: _batch(name, options) for name in options.shapes}
    effort = Effort(
        seconds=options.seconds,
        budget=options.budget,
        compiled=options.compile,
        compile_seconds=options.compile_seconds,
        warm=options.warm,
    )
    if options.quick:
        effort = replace(effort, seconds=0, compiled="none")
    limits = machine.measure(options.device, options.quick)
    print(limits.lines(), flush=True)
    settings = {
        "operators": [operation.name for operation in operations],
        "device": options.device,
        "batch sizes": batches,
        "smallest sizes only": options.quick,
        "seconds for all operators": options.within,
        "effort": asdict(effort),
    }
    this_run = {"environment": environment(), "settings": settings, "limits": asdict(limits)}
    record = Record(this_run, f"operators{options.tag}", options.output, options.add)
    with float32_precision("highest"):
        for k, operation in enumerate(operations):
            cases = [
                case
                for network, batch in batches.items()
                for case in sweep.cases(operation, network, options.device, batch, options.quick)
            ]
            if options.for_targets:
                cases = _of_targets(operation, cases, effort)
            elif options.beyond_targets:
                wanted = set(_of_targets(operation, cases, effort))
                cases = [case for case in cases if case not in wanted]
            if options.within:
                left = max(options.within - (time.monotonic() - begin), 0)
                effort = replace(effort, budget=left / (len(operations) - k))
            _sweep(operation, cases, limits, effort, record)
    path = record.write()
    print(table(record.content["summary"]))
    print(targets.lines(record.content["targets"]))
    print(path)
    picture = plot.draw(record.content["rows"], path.with_suffix(".png"))
    print(picture or plot.NO_PICTURE)
    now, before = record.failures()
    if before:
        print("\n".join(["failed in an earlier run, and not measured since:", *before]))
    if now:
        raise AssertionError("\n".join(now))
    return path


class Record:
    """What was measured so far, kept in a file.

    Attributes:
        content: of the file. ``runs`` says where, how and against which limits was measured; every
            entry of the other lists names by ``run`` the one that it is of, counted from 0.

    Args:
        this_run: its entry of ``runs``.
        name: of the file, without its suffix.
        folder: of the file.
        add: to what the file holds of earlier runs; what a case is measured to be replaces it.
    """

    SECONDS_BETWEEN_WRITES = 5.0

    def __init__(self, this_run: dict, name: str, folder: Path, add: bool) -> None:
        self.name, self.folder = name, folder
        path = folder / f"{name}.json"
        self.content = _kept(path) if add and path.exists() else {name: [] for name in LISTS}
        self.run = len(self.content["runs"])
        self.content["runs"].append(this_run)
        self._written = time.monotonic()

    def add(self, rows: list[dict], left_out: list[dict]) -> None:
        """The rows of one case, and the rivals left out."""
        case = rows[0]
        self._replace("rows", case, rows)
        self._replace("left out", case, left_out)
        self._replace("not measured", case, [])
        self._replace("failures", case, [])
        if time.monotonic() - self._written > self.SECONDS_BETWEEN_WRITES:
            self.write()

    def cut(self, case: dict) -> None:
        """A case that no time was left for; its rows of an earlier run stay."""
        self._replace("not measured", case, [case])

    def fail(self, case: dict, reason: str) -> None:
        """A case of which our result was wrong or not made; its rows of an earlier run stay."""
        self._replace("not measured", case, [])
        self._replace("failures", case, [case | {"reason": reason}])
        self.write()

    def failures(self) -> tuple[list[str], list[str]]:
        """Those of this run, and those of earlier ones whose cases were not measured since."""
        now, before = [], []
        for each in self.content["failures"]:
            line = f"{' '.join(sweep.key(each))}: {each['reason']}"
            (now if each["run"] == self.run else before).append(line)
        return now, before

    def write(self) -> Path:
        rows = self.content["rows"]
        self.content |= {"summary": sweep.summary(rows), "targets": targets.of_operators(rows)}
        path = write_results(self.name, self.content, self.folder)
        self._written = time.monotonic()
        return path

    def _replace(self, name: str, case: dict, new: list[dict]) -> None:
        """In a list, the entries of a case by those of this run."""
        kept = [each for each in self.content[name] if sweep.key(each) != sweep.key(case)]
        self.content[name] = kept + [each | {"run": self.run} for each in new]


LISTS = ("runs", "rows", "left out", "not measured", "failures")


def _kept(path: Path) -> dict:
    """The lists of a results file; one without ``runs`` was written by one run."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "runs" not in content:
        content["runs"] = [{name: content[name] for name in ("environment", "settings", "limits")}]
        content["failures"] = [_failure(line) for line in content["failures"]]
        for name in LISTS[1:]:
            content[name] = [each | {"run": 0} for each in content[name]]
        place = {"device": content["runs"][0]["settings"].get("device"), "inputs": "cold"}
        content["rows"] = [place | each for each in content["rows"]]
    return {name: content[name] for name in LISTS}


def _failure(line: str) -> dict:
    """What a line such as ``patch_gram_ resnet56 2x64x8x8 k3 s1 NCHW float32: why`` says."""
    words, _, reason = line.partition(": ")
    operator, network, *size, layout, dtype = words.split(" ")
    names = ("operator", "network", "size", "layout", "dtype", "reason")
    values = (operator, network, " ".join(size), layout, dtype, reason)
    return dict(zip(names, values, strict=True))


def _chosen(names: Sequence[str]) -> list[Operation]:
    unknown = sorted(set(names) - set(OPERATIONS))
    if unknown:
        raise ccp_ext.InputError(
            f"benchmarks: operators must be of {', '.join(OPERATIONS)}; got {', '.join(unknown)}"
        )
    return [OPERATIONS[name] for name in names or OPERATIONS]


def _batch(network: str, options: argparse.Namespace) -> int:
    return 2 if options.quick else options.batch_size or NETWORKS[network].batch_on(options.device)


def _of_targets(operation: Operation, cases: Sequence[Case], effort: Effort) -> list[Case]:
    """Those that a target is about, those of the most targets first."""
    wanted = {case: targets.count(sweep.of_case(operation, case, effort)) for case in cases}
    return sorted((case for case in cases if wanted[case]), key=lambda case: -wanted[case])


def _sweep(
    operation: Operation, cases: Sequence[Case], limits: Limits, effort: Effort, record: Record
) -> None:
    """Measure an operator's cases in turn until its budget is spent, and print them."""
    labels = [case.label for case in cases]
    compiled = {"all": set(labels), "some": set(labels[:1]), "none": set()}
    measured, cut = [], []
    deadline = math.inf if effort.budget is None else time.monotonic() + effort.budget
    for case in cases:
        of_case = case.description(operation.name)
        if time.monotonic() > deadline:
            cut.append(of_case)
            record.cut(of_case)
            continue
        try:
            rows, reasons = sweep.measure(
                operation, case, limits, effort, case.label in compiled[effort.compiled]
            )
        except (AssertionError, RuntimeError) as error:  # the other cases are still worth a run
            record.fail(of_case, str(error))
            continue
        record.add(rows, [of_case | {"candidate": c, "reason": r} for c, r in reasons.items()])
        measured += rows
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for network, rows in itertools.groupby(measured, key=lambda row: row["network"]):
        print(f"\n{operation.name}, {network}\n{table(sweep.overview(rows))}", flush=True)
    if cut:
        sizes = ", ".join(dict.fromkeys(f"{case['network']} {case['size']}" for case in cut))
        print(f"{operation.name}: {effort.budget:g} s are over; not measured, or in part: {sizes}")
