"""What the project sets out to reach, as data, and what of it was measured.

    python -m benchmarks.targets results

Reads ``operators*.json`` and ``statistics*.json`` of a folder; nothing is run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks import sweep
from benchmarks.networks import NETWORKS
from benchmarks.statistics_methods import BASELINE, DEFAULT, KEEPING, PAPER, PER_SAMPLE
from benchmarks.sweep import COMPILED, YARDSTICK, Effort, key
from ccp_ext.report import table

Row = Mapping[str, Any]
Values = Callable[[Sequence[Row]], list[float]]
Choice = Callable[[Row], bool]


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        name: what is measured, in words.
        wanted: the least that is enough, or with ``most`` the most that is; None: not judged, but
            shown beside the target before it.
        values: the measured figures, from the rows of a results file; none if not measured.
        of: makes one of them: the worst, or their mean.
    """

    name: str
    wanted: float | None
    values: Values
    of: Callable[[Iterable[float]], float] = min
    most: bool = False

    def judged(self, rows: Sequence[Row]) -> dict[str, Any] | None:
        """A line of the table; None where nothing was measured."""
        values = self.values(rows)
        if not values:
            return None
        measured, cases = self.of(values), cases_of(self.values)
        return {
            "target": self.name,
            "wanted": self._wanted(),
            "measured": measured,
            "of cases": f"{len(values)}/{cases}",
            "met": self._met(measured, whole=len(values) >= cases),
        }

    def _wanted(self) -> str:
        if self.wanted is None:
            return ""
        return f"{'at most' if self.most else 'at least'} {self.wanted:g}"

    def _met(self, measured: float, whole: bool) -> str:
        if self.wanted is None:
            return "not judged"
        met = measured <= self.wanted if self.most else measured >= self.wanted
        return ("yes" if whole else "partly") if met else "no"


@dataclass(frozen=True)
class Share:
    """A column of our rows, over what else the case says."""

    operator: str
    column: str
    where: Choice
    over: Callable[[Row], float] = lambda _: 1

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        ours = (row for row in rows if row["candidate"] == "ours" and concerns(self, row))
        return [row[self.column] / self.over(row) for row in ours if self.column in row]


@dataclass(frozen=True)
class SpeedUp:
    """The time of the fastest of the rivals (None: of all) over ours, case by case."""

    operator: str
    rivals: Sequence[str] | None
    where: Choice

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        chosen = [row for row in rows if concerns(self, row) and self._is_rival(row)]
        cases = itertools.groupby(chosen, key)
        return [min(row["time over ours"] for row in of_case) for _, of_case in cases]

    def _is_rival(self, row: Row) -> bool:
        if self.rivals is None:
            return row["candidate"] not in ("ours", YARDSTICK)
        return row["candidate"] in self.rivals


def concerns(values: Share | SpeedUp, row: Row) -> bool:
    """Whether the figures are of the row's case."""
    return row["operator"] == values.operator and values.where(row)


def cases_of(values: Values) -> int:
    """How many the suite has for such figures on the machine that they are of."""
    if not isinstance(values, Share | SpeedUp):
        return 1
    return len({key(row) for row in suite_cases(values.operator) if concerns(values, row)})


@cache
def suite_cases(operator: str) -> list[Row]:
    """What rows of each of the suite's cases would say of it, on every machine."""
    from benchmarks.suite import OPERATIONS  # which imports this module

    return [
        sweep.of_case(OPERATIONS[operator], case, Effort(warm=warm))
        for device, warm in (("cuda", False), ("cpu", False), ("cpu", True))
        for name, network in NETWORKS.items()
        for case in sweep.cases(OPERATIONS[operator], name, device, network.batch_on(device))
    ]


def on_gpu(row: Row) -> bool:
    return row["device"] == "cuda"


def on_cpu(row: Row) -> bool:
    return row["device"] == "cpu" and row["inputs"] == "cold"


def warm_on_cpu(row: Row) -> bool:
    return row["device"] == "cpu" and row["inputs"] == "warm"


def in_type(dtype: str, where: Choice) -> Choice:
    return lambda row: row["dtype"] == dtype and where(row)


def of_resnet50(row: Row) -> bool:
    return on_gpu(row) and row["network"] == "resnet50"


def large(row: Row) -> bool:
    return on_gpu(row) and row["MB"] >= 64


def all_convolutions(row: Row) -> bool:
    return (
        of_resnet50(row)
        and row["dtype"] == "float32"
        and row["shape"][0] == 256
        and row["size"].endswith("53 layers")
    )


def wide_bfloat16(row: Row) -> bool:
    return on_gpu(row) and row["dtype"] == "bfloat16" and row["shape"][1] >= 256


def wide_large_bfloat16(row: Row) -> bool:
    return wide_bfloat16(row) and row["shape"][2] >= 28


def wide_small_bfloat16(row: Row) -> bool:
    return wide_bfloat16(row) and row["shape"][2] < 28


def wide_windows_of_three(row: Row) -> bool:
    return on_gpu(row) and " k3 " in row["size"] and row["shape"][1] >= 128


def mebibytes_of_pairs(row: Row) -> float:
    """Those of [C, C] in float32."""
    return 4 * row["shape"][1] ** 2 / 2**20


TYPES = ("float32", "bfloat16")
TORCH = ("eager", "einsum", COMPILED)
OPERATORS = (
    Target("channel_dot, 64 MB and more: % of copy, worst", 92,
           Share("channel_dot", "% of copy", large)),
    Target("channel_dot, ResNet-50: % of copy, mean", 85,
           Share("channel_dot", "% of copy", of_resnet50), geometric_mean),
    *(Target(f"channel_dot, {dtype}: {rival} over ours, mean", wanted,
             SpeedUp("channel_dot", [rival], in_type(dtype, on_gpu)), geometric_mean)
      for rival, wanted in (("eager", 2.5), (COMPILED, 1.15)) for dtype in TYPES),
    Target("channel_dot: fastest rival over ours, worst", 1,
           SpeedUp("channel_dot", None, on_gpu)),
    Target("weighted_grams_, 53 layers, float32: cuBLAS layer by layer over ours", 3,
           SpeedUp("weighted_grams_", ["eager"], all_convolutions)),
    Target("map_similarity, bfloat16, C >= 256, 28x28 and more: % of matrix rate, worst", 60,
           Share("map_similarity", "% of matrix rate", wide_large_bfloat16)),
    Target("map_similarity, bfloat16, C >= 256, smaller maps: % of limit, worst", 60,
           Share("map_similarity", "% of limit", wide_small_bfloat16)),
    Target("map_similarity, bfloat16, C >= 256: best torch expression over ours, mean", 5,
           SpeedUp("map_similarity", TORCH, wide_bfloat16), geometric_mean),
    # A quarter of what the pairs of all 256 samples would take.
    Target("map_similarity, bfloat16, C >= 256: memory beyond the maps over [C, C], worst", 64,
           Share("map_similarity", "extra MiB", wide_bfloat16, mebibytes_of_pairs), max, most=True),
    Target("patch_gram_, 3x3, C >= 128: % of matrix rate, operations needed, worst", 50,
           Share("patch_gram_", "% of matrix rate", wide_windows_of_three)),
    Target("patch_gram_, 3x3, C >= 128: the same, operations by patches", None,
           Share("patch_gram_", "% of matrix rate, by patches", wide_windows_of_three)),
    Target("patch_gram_, 3x3, C >= 128: unfold and product over ours, mean", 3,
           SpeedUp("patch_gram_", ["eager"], wide_windows_of_three), geometric_mean),
    Target("channel_dot on a CPU: a read of the same two inputs over ours, mean", 0.9,
           SpeedUp("channel_dot", [YARDSTICK], on_cpu), geometric_mean),
    Target("channel_dot on a CPU: % of two-stream read, mean", 90,
           Share("channel_dot", "% of two-stream read", on_cpu), geometric_mean),
    *(Target(f"channel_dot on a CPU, {dtype}, {place}: eager over ours, mean", 2,
             SpeedUp("channel_dot", ["eager"], in_type(dtype, where)), geometric_mean)
      for place, where in (("from memory", on_cpu), ("cached", warm_on_cpu)) for dtype in TYPES),
)  # fmt: skip


def over_plain(method: str, column: str) -> Values:
    """A column of one of our methods over that of forward and backward."""

    def values(rows: Sequence[Row]) -> list[float]:
        of = {row["method"]: row for row in rows}
        return [of[method][column] / of[BASELINE][column]] if method in of else []

    return values


def per_sample_over_ours(method: str, column: str, beyond: bool) -> Values:
    """That of the best way to per-sample gradients over ours; or what each adds to a plain pass.

    Of the latter, less than a thousandth of the plain pass counts as so much.
    """

    def values(rows: Sequence[Row]) -> list[float]:
        of = {row["method"]: row[column] for row in rows}
        rivals = [of[name] for name in PER_SAMPLE if name in of]
        if method not in of or not rivals:
            return []
        start = of[BASELINE] if beyond else 0
        return [(min(rivals) - start) / max(of[method] - start, 1e-3 * of[BASELINE])]

    return values


PASSES = tuple(
    target
    for method in (DEFAULT, KEEPING)
    for target in (
        Target(f"{method}: time over forward and backward", 1.05, over_plain(method, "ms"),
               max, most=True),
        Target(f"{method}: peak memory over forward and backward", 1.05,
               over_plain(method, "peak MiB"), max, most=True),
    )
)  # fmt: skip
PER_SAMPLE_GRADIENTS = (
    Target(f"{PAPER}: best per-sample gradients over it, whole pass", 50,
           per_sample_over_ours(PAPER, "ms", beyond=False)),
    Target(f"{KEEPING}: best per-sample gradients over it, time added to a plain pass", 50,
           per_sample_over_ours(KEEPING, "ms", beyond=True)),
    Target(f"{KEEPING}: best per-sample gradients over it, memory added to a plain pass", 20,
           per_sample_over_ours(KEEPING, "peak MiB", beyond=True)),
)  # fmt: skip


def of_statistics(settings: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the rows of ``statistics_cost`` say of the targets, which are those of ResNet-50.

    The plain pass is one in bfloat16, channels-last, of 256 images.
    """
    if settings["network"] != "resnet50" or settings["device"] == "cpu":
        return []
    like_training = settings["autocast"] and settings["channels_last"]
    whole = PASSES if like_training and settings["batch_size"] == 256 else ()
    judged = (target.judged(rows) for target in (*whole, *PER_SAMPLE_GRADIENTS))
    return [line for line in judged if line]


def of_operators(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the suite's rows say of the targets."""
    judged = (target.judged(rows) for target in OPERATORS)
    return [line for line in judged if line]


def count(of_case: Row) -> int:
    """How many targets a case of the suite is about; see ``sweep.of_case``."""
    return sum(concerns(target.values, of_case) for target in OPERATORS)


def lines(judged: Sequence[dict[str, Any]]) -> str:
    """The table for the terminal."""
    return "targets\n" + (table(judged) if judged else "none was measured")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    judged = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        judged += [line | {"file": path.name} for line in of_file(content)]
    print(lines(judged))


def of_file(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a results file says of the targets; nothing, where they are not about such a file."""
    rows, settings = content.get("rows", []), content.get("settings", {})
    if rows and "operator" in rows[0]:
        # Rows of older files leave to the settings where they were measured, all from memory.
        place = {"device": settings.get("device"), "inputs": "cold"}
        return of_operators([place | row for row in rows])
    if rows and "method" in rows[0] and "autocast" in settings:
        return of_statistics(settings, rows)
    return []


if __name__ == "__main__":
    main()
