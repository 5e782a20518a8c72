"""The benchmarks run, check what they time, and write results of the promised form."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import (
    check,
    common,
    floors,
    latency,
    needs,
    networks,
    patch_gram,
    scaling,
    selection,
    statistics_cost,
    statistics_methods,
    suite,
    sweep,
    targets,
    train_cifar10,
)
from benchmarks.limits import Limits
from benchmarks.operation import Case, Work
from benchmarks.resnet50 import ResNet50
from benchmarks.statistics_methods import BASELINE, DEFAULT, KEEPING, PAPER
from ccp_ext import InputError, models, ops

ROW = {
    "operator": str,
    "network": str,
    "size": str,
    "layout": str,
    "dtype": str,
    "candidate": str,
    "us": float,
    "us 10%": float,
    "us 90%": float,
    "rounds": int,
    "MB": float,
    "GB/s": float,
    "TFLOP/s": float,
    "bound by": str,
    "% of limit": float,
    "% of matrix rate": float,
    "% of copy": float,
    "% of two-stream read": float,
    "time over ours": float,
}
BY_PATCHES = "% of matrix rate, by patches"


def test_selection_is_measured_briefly_and_at_length(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(selection, "LONG", {20: 0.5})
    monkeypatch.setattr(selection, "SEEDS", {20: 2})
    arguments = "selection --channels 16 20 --rounds 1 --time-limit 0.5 --long"
    monkeypatch.setattr(sys, "argv", arguments.split())
    selection.main()
    written = json.loads((tmp_path / "selection.json").read_text())
    assert [row["channels"] for row in written["rows"]] == [16, 20]
    assert [row["instance"] for row in written["long"]] == [
        "generated_c20",
        "generated_c20, seed 1",
    ]
    assert {row["status"] for row in written["rows"] + written["long"]} == {"optimal"}
    assert written["rows"][1]["objective"] == written["long"][0]["objective"]


def test_predicted_latencies_stand_beside_measured_ones(tmp_path, monkeypatch) -> None:
    small = networks.Network(lambda: models.create("resnet8"), 16, 10, batch=2, cpu_batch=2)
    monkeypatch.setattr(latency, "NETWORKS", {"resnet56": small})
    monkeypatch.setattr(
        latency, "write_results", lambda name, content: written.update(content) or name
    )
    written: dict = {}
    arguments = ["latency", "--networks", "resnet56", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    latency.main()
    rows = {row["plan"]: row for row in written["rows"]}
    assert rows["all"]["predicted"] == pytest.approx(1.0) and rows["all"]["MACs kept"] == 1
    assert 0.4 < rows["macs 0.5"]["MACs kept"] <= 0.5
    for row in rows.values():
        assert row["error %"] == pytest.approx(100 * (row["predicted"] / row["measured"] - 1))
        assert row["measured 10%"] <= row["measured"] <= row["measured 90%"]


def run_quick(folder: Path, *arguments: str) -> dict:
    suite.main([*arguments, "--quick", "--device", "cpu", "--output", str(folder)])
    return json.loads((folder / "operators.json").read_text())


@pytest.mark.parametrize("operator", suite.OPERATIONS)
def test_every_operator_is_measured_beside_its_rivals(operator: str, tmp_path: Path) -> None:
    content = run_quick(tmp_path, operator, "--shapes", "resnet56")
    assert {"cpu", "torch", "commit"} <= content["environment"].keys()
    [this_run] = content["runs"]
    assert all(this_run["limits"][name] > 0 for name in ("copy", "read", "read_two"))
    assert this_run["settings"]["operators"] == [operator]
    assert this_run["environment"] == content["environment"]
    operation = suite.OPERATIONS[operator]
    cases = {(r["layout"], r["dtype"]) for r in content["rows"]}
    assert cases == {(la, d) for la in operation.layouts for d in ("float32", "bfloat16")}
    rivals = {"eager"} if operator == "channel_moments" else {"eager", "einsum"}
    assert {"ours", *rivals} <= {row["candidate"] for row in content["rows"]}
    for row in content["rows"]:
        assert row["operator"] == operator and row["network"] == "resnet56"
        assert all(isinstance(row[name], kind) for name, kind in ROW.items())
        assert 0 < row["us 10%"] <= row["us"] <= row["us 90%"] and row["% of limit"] > 0
        assert (BY_PATCHES in row) == (operator == "patch_gram_")
        assert "extra MiB" not in row  # of a GPU's allocator
        if row["candidate"] == "ours":
            assert row["time over ours"] == 1 and row["error"] < 1e-5


def test_a_wrong_result_fails_the_run(monkeypatch, tmp_path: Path) -> None:
    correct = ops.channel_dot
    monkeypatch.setattr(ops, "channel_dot", lambda x, g: correct(x, g) * (1 + 1e-4))
    with pytest.raises(AssertionError, match="channel_dot: ours is wrong on 2x64x8x8"):
        run_quick(tmp_path, "channel_dot", "--shapes", "resnet56")
    content = json.loads((tmp_path / "operators.json").read_text())
    assert content["rows"] == [] and len(content["failures"]) == 4  # two layouts, two types


def test_a_wrong_rival_is_left_out(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "einsum", lambda _, x, g: torch.zeros(x.shape[:2]))
    content = run_quick(tmp_path, "channel_dot", "--shapes", "resnet56")
    assert "einsum" not in {row["candidate"] for row in content["rows"]}
    reasons = [r["reason"] for r in content["left out"] if r["candidate"] == "einsum"]
    assert len(reasons) == 4 and "einsum is wrong" in reasons[0]


def test_nan_is_wrong(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "channel_dot", lambda x, g: (x * g).sum((2, 3)).float() * math.nan)
    with pytest.raises(AssertionError, match="error inf"):
        run_quick(tmp_path, "channel_dot", "--shapes", "resnet56")


def test_what_no_time_is_left_for_is_named(tmp_path: Path, capsys) -> None:
    content = run_quick(tmp_path, "channel_dot", "--shapes", "resnet56", "--budget", "1e-9")
    assert content["rows"] == [] and len(content["not measured"]) == 4
    assert content["not measured"][0]["size"] == "2x64x8x8"
    assert "not measured, or in part: resnet56 2x64x8x8\n" in capsys.readouterr().out


def test_cases_are_added_and_replaced(tmp_path: Path) -> None:
    first = run_quick(tmp_path, "channel_dot", "--shapes", "resnet56")
    run_quick(tmp_path, "weighted_gram_", "--shapes", "resnet56", "--add")
    both = run_quick(tmp_path, "channel_dot", "--shapes", "resnet56", "--add")["rows"]
    assert {row["operator"] for row in both} == {"channel_dot", "weighted_gram_"}
    # Of ours: a rival that is not exact enough on a run's inputs is left out of it.
    before, after = (
        [row for row in rows if (row["operator"], row["candidate"]) == ("channel_dot", "ours")]
        for rows in (first["rows"], both)
    )
    assert len(before) == len(after) == 4 and before != after


def test_what_earlier_runs_found_stays_until_it_is_measured_again(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patched, pytest.raises(AssertionError, match="is wrong on"):
        patched.setattr(ops, "channel_dot", lambda x, g: torch.zeros(x.shape[:2]))
        run_quick(tmp_path, "channel_dot", "--shapes", "resnet56")
    run_quick(tmp_path, "map_similarity", "--shapes", "resnet56", "--add", "--budget", "1e-9")
    capsys.readouterr()
    both = run_quick(tmp_path, "weighted_gram_", "--shapes", "resnet56", "--add")
    assert [(f["operator"], f["run"]) for f in both["failures"]] == [("channel_dot", 0)] * 4
    assert {(c["operator"], c["run"]) for c in both["not measured"]} == {("map_similarity", 1)}
    assert {(row["operator"], row["run"]) for row in both["rows"]} == {("weighted_gram_", 2)}
    assert [run["settings"]["effort"]["budget"] for run in both["runs"]] == [None, 1e-9, None]
    printed = capsys.readouterr().out
    assert "not measured since:\nchannel_dot resnet56 2x64x8x8 NCHW float32: " in printed
    again = run_quick(tmp_path, "channel_dot", "map_similarity", "--shapes", "resnet56", "--add")
    assert again["failures"] == again["not measured"] == []
    assert {(row["operator"], row["run"]) for row in again["rows"]} == {
        ("channel_dot", 3), ("map_similarity", 3), ("weighted_gram_", 2),
    }  # fmt: skip


def test_a_file_without_its_runs_is_added_to(tmp_path: Path) -> None:
    content = run_quick(tmp_path, "channel_dot", "--shapes", "resnet56")
    [of_all] = content.pop("runs")
    del of_all["settings"]["operators"]
    for row in content["rows"] + content["left out"]:
        del row["run"]
    content["failures"] = ["patch_gram_ resnet56 2x64x8x8 k3 s1 NCHW bfloat16: ours: is wrong"]
    (tmp_path / "operators.json").write_text(json.dumps(content | of_all))
    both = run_quick(tmp_path, "weighted_gram_", "--shapes", "resnet56", "--add")
    assert both["runs"][0] == of_all and len(both["runs"]) == 2
    assert {(row["operator"], row["run"]) for row in both["rows"]} == {
        ("channel_dot", 0), ("weighted_gram_", 1),
    }  # fmt: skip
    [failure] = both["failures"]
    assert failure == {
        "operator": "patch_gram_",
        "network": "resnet56",
        "size": "2x64x8x8 k3 s1",
        "layout": "NCHW",
        "dtype": "bfloat16",
        "reason": "ours: is wrong",
        "run": 0,
    }


def test_a_compilation_without_end_is_given_up(monkeypatch, tmp_path: Path) -> None:
    def compiled(function, **_):
        return lambda *_: time.sleep(60)

    monkeypatch.setattr(torch, "compile", compiled)
    operation = suite.OPERATIONS["channel_dot"]
    case = next(sweep.cases(operation, "resnet56", "cpu", 2, smallest=True))
    effort = sweep.Effort(seconds=0, compile_seconds=0.1)
    limits = Limits(1e9, 1e9, 1e9, {"fma": 1e9, "fp32": 1e9})
    rows, left_out = sweep.measure(operation, case, limits, effort, compiled=True)
    assert left_out["compile"] == "took longer than 0.1 s"
    assert {"ours", "eager"} <= {row["candidate"] for row in rows}


@pytest.mark.parametrize(
    "needed, spent, starts",
    [
        (1, 1e-4, [18]),
        (1 << 21, 1e-4, [18, 20, 22]),
        (1 << 40, 1e-4, [18, 20, 22, 24, 25]),  # more than the queue holds: bounded
        (1 << 40, 1.0, [18]),  # the GPU is busy long enough
    ],
)
def test_head_start_grows_until_the_host_is_ahead(monkeypatch, needed, spent, starts) -> None:
    tried = []

    def queued(function, arguments, head_start):
        tried.append(head_start)
        return spent * len(arguments), head_start >= needed

    monkeypatch.setattr(common, "_queued", queued)
    timer = common._CudaTimer()
    assert timer(print, lambda: [()] * 4) == pytest.approx(spent)
    assert tried == [1 << power for power in starts]
    timer(print, lambda: [()])
    assert tried[-1] == tried[-2] or len(starts) == 1  # what was found is kept


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="operators must be of channel_dot, .*; got chanel_dot"):
        run_quick(tmp_path, "chanel_dot")


def test_limits_hold_work_against_its_slowest_side() -> None:
    limits = Limits(copy=1e9, read=2e9, read_two=4e9, rates={"fp32": 1e12, "fma": 1e10})
    assert limits.floor(Work(bytes=4_000, streams=1)) == (2e-6, "memory")
    assert limits.floor(Work(bytes=4_000, streams=2)) == (1e-6, "memory")
    assert limits.floor(Work(4_000, products=5_000_000)) == (5e-6, "matrix products")
    assert limits.floor(Work(4_000, 5_000_000, scalar=90_000)) == (9e-6, "scalar arithmetic")
    split = Limits(1e9, 2e9, 4e9, {"fma": 1e12, "fp32": 1e12, "tf32": 6e12, "bf16": 9e12})
    assert (split.rate("fp32"), split.rate("fma"), split.rate("bf16")) == (2e12, 1e12, 9e12)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "by_patches", "needed"),
    [
        (56, 1, 1, 127008, 37538),
        (28, 1, 1, 31752, 8978),
        (14, 1, 1, 7938, 2048),
        (7, 1, 1, 1985, 421),
        (56, 1, 0, 118098, 37538),
        (56, 2, 1, 31752, 24200),
    ],
)
def test_products_that_patches_share_are_counted_once(
    size: int, stride: int, padding: int, by_patches: int, needed: int
) -> None:
    c, window = 4096, networks.Window(3, stride, padding)  # so many that C (C + 1) / C^2 is 1
    case = Case("none", (1, c, size, size), torch.float32, "NCHW", "cpu", window)
    work = suite.OPERATIONS["patch_gram_"].work(case)
    assert work.products / 2 / c**2 == pytest.approx(needed, abs=0.6)
    assert work.by_patches / 2 / c**2 == pytest.approx(by_patches, abs=5)


def test_products_that_patches_need_are_those_of_their_gram_matrix() -> None:
    size, window = (5, 4), networks.Window(3, 2, 1)
    numbers = torch.arange(1.0, 41).view(1, 2, *size)  # zero is padding
    patches = torch.nn.functional.unfold(numbers, 3, padding=1, stride=2)[0].long().T.tolist()
    met = {tuple(sorted((a, b))) for patch in patches for a in patch for b in patch if a and b}
    assert patch_gram.distinct_products(2, size, window) == len(met)


def test_floors_of_patches_are_of_the_operations_needed() -> None:
    rows = floors.floors("patch_gram_", "resnet50")
    wide = {(row["size"], row["dtype"]): row["predicted least us"] for row in rows}
    assert wide["256x128x28x28 k3 s1", "float32"] == pytest.approx(457.5, abs=0.1)
    assert wide["256x128x28x28 k3 s1", "bfloat16"] == pytest.approx(76.2, abs=0.1)
    operation = suite.OPERATIONS["patch_gram_"]
    for case in sweep.cases(operation, "resnet50", "cuda", 256):
        work = operation.work(case)
        assert (work.products < work.by_patches) == (case.window.kernel_size > 1)


def test_the_share_of_the_matrix_rate_is_of_the_operations_needed(monkeypatch) -> None:
    operation = suite.OPERATIONS["patch_gram_"]
    case = Case("none", (1, 3, 6, 6), torch.float32, "NCHW", "cpu", networks.Window(3, 1, 1))
    monkeypatch.setattr(sweep, "_times", lambda *of: {"ours": [1e-6, 1e-6]})
    limits = Limits(1e9, 1e9, 1e9, {"fma": 1e9, "fp32": 1e9})
    rows, _ = sweep.measure(operation, case, limits, sweep.Effort(), compiled=False)
    work = operation.work(case)
    assert rows[0]["% of matrix rate"] == pytest.approx(work.products / 10)
    assert rows[0][BY_PATCHES] == pytest.approx(work.by_patches / 10)
    assert rows[0]["% of limit"] >= rows[0]["% of matrix rate"]


def test_extra_memory_is_the_peak_of_the_call_beyond_what_was_held(monkeypatch) -> None:
    held = SimpleNamespace(now=100, peak=900)  # the peak of an earlier call

    def call(more: int) -> None:
        held.peak = max(held.peak, held.now + more)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held.peak)
    reset = lambda: setattr(held, "peak", held.now)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert sweep._extra_bytes(call, (40,)) == 40


def test_resnet50_is_the_published_one() -> None:
    with torch.device("meta"):
        model = ResNet50()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_shapes_are_those_of_the_networks() -> None:
    assert networks.feature_maps("resnet56") == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert len(networks.feature_maps("resnet50")) == 12
    assert ((64, 56, 56), networks.Window(3, 1, 1)) in networks.convolution_inputs("resnet50")
    assert networks.group_widths("resnet56") == (16,) * 9 + (32,) * 9 + (64,) * 9


def gpu_row(operator: str, shape: list[int], candidate: str = "ours", **figures) -> dict:
    of_case = {
        "operator": operator,
        "network": "resnet50",
        "size": "x".join(map(str, shape)),
        "shape": shape,
        "layout": "NCHW",
        "dtype": "bfloat16",
        "device": "cuda",
        "candidate": candidate,
        "MB": 100,
    }
    return of_case | figures


def judged(rows: list[dict], monkeypatch) -> dict[str, tuple[float, str]]:
    """As if the suite had no other cases."""
    monkeypatch.setattr(targets, "cases_of", lambda _: 1)
    return {t["target"]: (t["measured"], t["met"]) for t in targets.of_operators(rows)}


def test_targets_of_channel_dot_are_judged(monkeypatch) -> None:
    rows = []
    for side, share, eager, compiled in ((112, 95, 4, 1.1), (7, 80, 2, 1.3)):
        shape = [256, 64, side, side]
        rows += [
            gpu_row("channel_dot", shape, **{"% of copy": share, "MB": side}),
            gpu_row("channel_dot", shape, "eager", **{"time over ours": eager}),
            gpu_row("channel_dot", shape, "compile", **{"time over ours": compiled}),
            gpu_row("channel_dot", shape, "read", **{"time over ours": 0.9}),
        ]
    assert judged(rows, monkeypatch) == {
        "channel_dot, 64 MB and more: % of copy, worst": (95, "yes"),
        "channel_dot, ResNet-50: % of copy, mean": (pytest.approx(math.sqrt(95 * 80)), "yes"),
        "channel_dot, bfloat16: eager over ours, mean": (pytest.approx(math.sqrt(8)), "yes"),
        "channel_dot, bfloat16: compile over ours, mean": (pytest.approx(math.sqrt(1.43)), "yes"),
        "channel_dot: fastest rival over ours, worst": (1.1, "yes"),
    }
    slower = gpu_row("channel_dot", [1, 2, 3, 3], "einsum", **{"time over ours": 0.99})
    worst = judged([*rows, slower], monkeypatch)["channel_dot: fastest rival over ours, worst"]
    assert worst == (0.99, "no")


def test_targets_of_matrix_products_are_judged_where_they_hold(monkeypatch) -> None:
    narrow = {"time over ours": 1, "extra MiB": 1000}
    rows = [
        gpu_row("map_similarity", [256, 64, 56, 56], **{"% of matrix rate": 10}),  # too narrow
        gpu_row("map_similarity", [256, 64, 56, 56], "eager", **narrow),
        gpu_row("map_similarity", [256, 256, 56, 56], **{"% of matrix rate": 61, "extra MiB": 2}),
        gpu_row("map_similarity", [256, 512, 7, 7], **{"% of limit": 59, "extra MiB": 65}),
        gpu_row("map_similarity", [256, 512, 7, 7], "eager", **{"time over ours": 7}),
        gpu_row("map_similarity", [256, 512, 7, 7], "einsum", **{"time over ours": 6}),
        gpu_row("map_similarity", [256, 512, 7, 7], "eager", **narrow) | {"dtype": "float32"},
        gpu_row("patch_gram_", [256, 128, 28, 28], **{"% of matrix rate": 51, "size": "... k3 s1"})
        | {BY_PATCHES: 180},
        gpu_row("patch_gram_", [256, 128, 28, 28], "eager", **{"time over ours": 4})
        | {"size": "... k3 s1"},
        gpu_row("patch_gram_", [256, 128, 28, 28], **{"% of matrix rate": 1, "size": "... k1 s1"}),
        gpu_row("patch_gram_", [256, 64, 56, 56], **{"% of matrix rate": 1, "size": "... k3 s1"}),
        gpu_row("patch_gram_", [256, 64, 56, 56], "eager", **{"time over ours": 1})
        | {"size": "... k3 s1"},
        gpu_row("weighted_grams_", [256, 26560], "eager", **{"time over ours": 2.9})
        | {"dtype": "float32", "size": "256x26560 53 layers"},
    ]
    wide, windows = "map_similarity, bfloat16, C >= 256", "patch_gram_, 3x3, C >= 128: "
    assert judged(rows, monkeypatch) == {
        wide + ", 28x28 and more: % of matrix rate, worst": (61, "yes"),
        wide + ", smaller maps: % of limit, worst": (59, "no"),
        wide + ": best torch expression over ours, mean": (pytest.approx(6), "yes"),
        wide + ": memory beyond the maps over [C, C], worst": (65, "no"),
        windows + "% of matrix rate, operations needed, worst": (51, "yes"),
        windows + "the same, operations by patches": (180, "not judged"),
        windows + "unfold and product over ours, mean": (pytest.approx(4), "yes"),
        "weighted_grams_, 53 layers, float32: cuBLAS layer by layer over ours": (2.9, "no"),
    }


def test_targets_of_the_cpu_are_apart(monkeypatch) -> None:
    row = gpu_row("channel_dot", [4, 64, 56, 56], **{"% of two-stream read": 90.5})
    eager = gpu_row("channel_dot", [4, 64, 56, 56], "eager", **{"time over ours": 1.9})
    read = gpu_row("channel_dot", [4, 64, 56, 56], "read", **{"time over ours": 0.95})
    cold, warm = ({"device": "cpu", "inputs": inputs} for inputs in ("cold", "warm"))
    assert judged([row | cold, eager | cold, read | cold], monkeypatch) == {
        "channel_dot on a CPU: a read of the same two inputs over ours, mean": (0.95, "yes"),
        "channel_dot on a CPU: % of two-stream read, mean": (pytest.approx(90.5), "yes"),
        "channel_dot on a CPU, bfloat16, from memory: eager over ours, mean": (1.9, "no"),
    }
    assert judged([row | warm, eager | warm], monkeypatch) == {
        "channel_dot on a CPU, bfloat16, cached: eager over ours, mean": (1.9, "no"),
    }


def test_a_target_is_met_in_part_where_cases_are_missing() -> None:
    rows = []
    for case in sweep.cases(suite.OPERATIONS["patch_gram_"], "resnet50", "cuda", 256):
        of_case = sweep.of_case(suite.OPERATIONS["patch_gram_"], case, sweep.Effort())
        rows.append(of_case | {"candidate": "ours", "% of matrix rate": 51.0})
    [all_of_them] = targets.of_operators(rows)
    measured = [row for row in rows if targets.wide_windows_of_three(row)]
    # 3x3 of 128 (two strides), 256 (two), 512 (two): in two layouts and two types.
    assert (all_of_them["of cases"], all_of_them["met"]) == ("24/24", "yes")
    [most] = targets.of_operators(measured[1:])
    assert (most["of cases"], most["met"]) == ("23/24", "partly")
    [slow] = targets.of_operators([measured[0] | {"% of matrix rate": 49.0}])
    assert (slow["of cases"], slow["met"]) == ("1/24", "no")


def test_targets_of_the_pass_are_judged() -> None:
    rows = [
        {"method": BASELINE, "ms": 100.0, "peak MiB": 1000.0},
        {"method": DEFAULT, "ms": 90.0, "peak MiB": 1060.0},
        {"method": PAPER, "ms": 80.0, "peak MiB": 1000.0},
        {"method": KEEPING, "ms": 102.0, "peak MiB": 1010.0},
        {"method": "vmap", "ms": 200.0, "peak MiB": 3000.0},
        {"method": "Opacus", "ms": 240.0, "peak MiB": 1100.0},
    ]
    settings = {"network": "resnet50", "device": "cuda", "batch_size": 256}
    like_training = settings | {"autocast": True, "channels_last": True}
    figures = {t["target"]: t["measured"] for t in targets.of_statistics(like_training, rows)}
    assert figures == {
        f"{DEFAULT}: time over forward and backward": 0.9,
        f"{DEFAULT}: peak memory over forward and backward": 1.06,
        f"{KEEPING}: time over forward and backward": 1.02,
        f"{KEEPING}: peak memory over forward and backward": 1.01,
        f"{PAPER}: best per-sample gradients over it, whole pass": 2.5,
        f"{KEEPING}: best per-sample gradients over it, time added to a plain pass": 50,
        f"{KEEPING}: best per-sample gradients over it, memory added to a plain pass": 10,
    }
    assert [t["met"] for t in targets.of_statistics(like_training, rows)] == [
        "yes", "no", "yes", "yes", "no", "yes", "no",
    ]  # fmt: skip
    rivals = settings | {"autocast": False, "channels_last": False}
    assert len(targets.of_statistics(rivals, rows)) == 3
    assert targets.of_statistics(settings | {"device": "cpu"}, rows) == []


def test_targets_are_read_from_the_files_of_a_run(tmp_path: Path, capsys) -> None:
    ours = gpu_row("channel_dot", [256, 64, 112, 112], **{"% of copy": 95.5})
    eager = gpu_row("channel_dot", [256, 64, 112, 112], "eager", **{"time over ours": 3.25})
    passes = [{"method": BASELINE, "ms": 100.0, "peak MiB": 1000.0}]
    passes += [{"method": DEFAULT, "ms": 90.0, "peak MiB": 1060.0}]
    like_training = {"autocast": True, "channels_last": True, "batch_size": 256}
    files = {
        "operators": {"rows": [ours, eager]},
        "statistics": {
            "settings": {"network": "resnet50", "device": "cuda"} | like_training,
            "rows": passes,
        },
        "scaling": {"measured": []},
        "latency": {"rows": [{"plan": "all"}]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    targets.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"worst +at least 92 +95.50 +1/\d+ +partly +operators.json", printed)
    assert re.search(r"eager over ours, mean +at least 2.5 +3.25 +1/\d+ +partly", printed)
    assert re.search(r"peak memory over .* +at most 1.05 +1.06 +1/1 +no +statistics.json", printed)


def test_targets_are_judged_of_rows_that_leave_the_device_to_the_settings() -> None:
    row = gpu_row("channel_dot", [4, 64, 56, 56], **{"% of two-stream read": 90.5})
    del row["device"]
    [line] = targets.of_file({"settings": {"device": "cpu"}, "rows": [row]})
    assert line["target"] == "channel_dot on a CPU: % of two-stream read, mean"


def test_cases_of_several_targets_are_measured_first() -> None:
    operation, effort = suite.OPERATIONS["map_similarity"], sweep.Effort()
    cases = list(sweep.cases(operation, "resnet50", "cuda", 256))
    chosen = suite._of_targets(operation, cases, effort)
    wide = [c for c in cases if c.dtype == torch.bfloat16 and c.shape[1] >= 256]
    assert 0 < len(wide) < len(cases) and set(chosen) == set(wide)
    operation = suite.OPERATIONS["channel_dot"]
    cases = list(sweep.cases(operation, "resnet50", "cuda", 256))
    chosen = suite._of_targets(operation, cases, effort)
    large = [c for c in cases if sweep.of_case(operation, c, effort)["MB"] >= 64]
    assert set(chosen) == set(cases) and set(chosen[: len(large)]) == set(large)
    assert 0 < len(large) < len(cases)
    operation = suite.OPERATIONS["patch_gram_"]
    cases = list(sweep.cases(operation, "resnet50", "cuda", 256))
    chosen = suite._of_targets(operation, cases, effort)
    assert {c.window.kernel_size for c in chosen} == {3}
    assert min(c.shape[1] for c in chosen) == 128
    operation = suite.OPERATIONS["channel_moments"]  # no target is about it
    cases = list(sweep.cases(operation, "resnet50", "cuda", 256))
    assert suite._of_targets(operation, cases, effort) == []


def test_cases_are_those_of_targets_or_the_others(monkeypatch, tmp_path: Path) -> None:
    chosen = []
    monkeypatch.setattr(suite, "_sweep", lambda operation, cases, *_: chosen.extend(cases))
    monkeypatch.setattr(targets, "count", lambda of_case: of_case["dtype"] == "bfloat16")
    for option in ("--for-targets", "--beyond-targets"):
        run_quick(tmp_path, "channel_dot", "--shapes", "resnet56", option)
    assert [case.dtype_name for case in chosen] == ["bfloat16"] * 2 + ["float32"] * 2


def test_operators_share_the_time_they_are_given(monkeypatch, tmp_path: Path) -> None:
    clock = iter([100.0, 110.0, 150.0])  # the first operator takes 40 of 90 s
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(suite, "Record", lambda *_: SimpleNamespace(write=lambda: 1 / 0))
    budgets = []
    monkeypatch.setattr(suite, "_sweep", lambda *of: budgets.append(of[3].budget))
    arguments = ("channel_dot", "weighted_gram_", "--shapes", "resnet56", "--within", "100")
    with pytest.raises(ZeroDivisionError):
        run_quick(tmp_path, *arguments)
    assert budgets == [45, 50]


TINY = ("--image-size", "8", "--batch-size", "2", "--rounds", "3", "--device", "cpu")


def test_statistics_cost_compares_time_memory_and_results(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        statistics_cost, "_peak", lambda name, _: {BASELINE: 60.0, PAPER: 70.0}[name]
    )
    statistics_cost.main([*TINY, "--methods", BASELINE, PAPER, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "statistics_resnet56.json").read_text())
    plain, ours = content["rows"]
    assert (plain["method"], ours["method"]) == (BASELINE, PAPER)
    assert plain["over forward and backward"] == 1 and plain["error of S"] is None
    assert 0 < ours["error of S"] < 1e-5
    assert ours["more than forward and backward, MiB"] == 10
    assert content["channel_dot inside the pass"]["speed-up"] > 0


def test_bfloat16_is_compared_with_the_same_pass(monkeypatch) -> None:
    options = statistics_cost._options([*TINY, "--autocast", "--methods", PAPER, "vmap"])
    errors, left_out = statistics_cost._check(options)
    assert errors.keys() == {PAPER, "vmap"} and max(errors.values()) < 1e-5 and not left_out
    correct = ops.channel_dot
    monkeypatch.setattr(ops, "channel_dot", lambda *of: 1.1 * correct(*of))
    with pytest.raises(AssertionError, match="is off by 2.1e-01"):
        statistics_cost._check(options)


def test_methods_of_the_same_quantity_share_a_reference(monkeypatch) -> None:
    made, make = [], statistics_cost._expected
    monkeypatch.setattr(statistics_cost, "_expected", lambda *of: made.append(of[1]) or make(*of))
    monkeypatch.setitem(statistics_cost.METHODS, "BackPACK", statistics_cost.METHODS["vmap"])
    options = statistics_cost._options(
        [*TINY, "--autocast", "--methods", PAPER, "vmap", "BackPACK"]
    )
    errors, left_out = statistics_cost._check(options)
    assert errors.keys() == {PAPER, "vmap", "BackPACK"} and not left_out
    assert made == [True, False]  # of the same pass, and of per-sample gradients


def test_the_rivals_run_in_the_setting_of_training() -> None:
    options = statistics_cost._options([*TINY, "--autocast", "--channels-last"])
    S = {
        name: statistics_methods.METHODS[name](statistics_cost._setting(options))()
        for name in (PAPER, "vmap")
    }
    for group, matrix in S[PAPER].items():
        assert 0 < (matrix - S["vmap"][group]).norm() < 0.1 * matrix.norm()


def test_a_method_without_end_is_given_up(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(statistics_cost.METHODS, "vmap", lambda _: lambda: time.sleep(60))
    monkeypatch.setattr(statistics_cost, "SAME_AS_PAPER", (PAPER,))
    monkeypatch.setattr(statistics_cost, "_peak", lambda *_: 1.0)
    limits = ("--give-up-after", "0.2", "--output", str(tmp_path))
    statistics_cost.main([*TINY, "--methods", "vmap", *limits])
    content = json.loads((tmp_path / "statistics_resnet56.json").read_text())
    assert content["left out"] == {"vmap": "OutOfTime: took longer than 0.2 s"}


def test_peak_memory_is_that_of_the_process(capsys) -> None:
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("the peak of a process is read from /proc")
    statistics_cost.main([*TINY, "--peak-of", PAPER])
    now = int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert 0.5 * now < float(capsys.readouterr().out) < 2 * now


def test_a_failing_library_is_named_and_left_out(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)  # its import fails
    monkeypatch.setattr(statistics_cost, "_peak", lambda *_: 1.0)
    statistics_cost.main([*TINY, "--methods", PAPER, "Opacus", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "statistics_resnet56.json").read_text())
    assert [row["method"] for row in content["rows"]] == [BASELINE, PAPER]
    assert content["left out"]["Opacus"].startswith("ModuleNotFoundError")


def test_all_reduce_time_is_that_of_a_ring() -> None:
    assert scaling.ring_seconds(8_000, gpus=1, link=1e3) == 0
    assert scaling.ring_seconds(8_000, gpus=8, link=1e3) == 14


def test_bytes_of_sums_count_every_group() -> None:
    inner = 9 * sum(4 * (c * c + 2 * c) + 16 for c in (16, 32, 64))
    streams = sum(4 * (c * c + 2 * c) + 16 for c in (16, 16, 32))  # 64 = 16 + 16 + 32 coupled
    assert scaling.bytes_of_sums("resnet56") == inner + streams


def test_projection_divides_the_images_and_adds_one_all_reduce() -> None:
    alone, eight = (scaling.projection(1000, n, "100 Gbit/s network") for n in (1, 8))
    assert alone["pass over the images, s"] == pytest.approx(1281.167)
    assert eight["pass over the images, s"] == pytest.approx(1281.167 / 8)
    assert alone["all-reduce, ms"] == 0 and alone["efficiency %"] == 100
    assert eight["efficiency %"] < 100


def test_images_a_second_are_those_of_the_default_pass(tmp_path: Path) -> None:
    rows = [{"method": BASELINE, "images/s": 1.0}, {"method": DEFAULT, "images/s": 2500.0}]
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"rows": rows}))
    assert scaling.images_per_second(path) == 2500


def test_the_growth_of_the_pass_is_measured_and_assumed_rates_are_marked(
    monkeypatch, tmp_path: Path, capsys
) -> None:
    for name, steps in (("STEPS", {"N": (2, 4)}), ("PASS_STEPS", {"N": (2, 4), "H=W": (8, 16)})):
        monkeypatch.setattr(scaling, name, steps)
    monkeypatch.setattr(scaling, "START", {"N": 2, "C": 4, "H=W": 4})
    monkeypatch.setattr(scaling, "PASS_START", {"N": 2, "C": 4, "H=W": 8})
    scaling.main(["--device", "cpu", "--quick", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "scaling.json").read_text())
    sizes = [(row["variable"], row["N"], row["H=W"]) for row in content["measured passes"]]
    assert sizes == [("N", 2, 8), ("N", 4, 8), ("H=W", 2, 8), ("H=W", 2, 16)]
    assert all(row[f"{DEFAULT}, over plain"] > 0 for row in content["measured passes"])
    passes = content["computed, not measured"]["passes"]
    assert len(passes) == 27 and {row["rate"] for row in passes} == {"assumed, not measured"}
    assert "assumed, not measured" in capsys.readouterr().out
    rate = ["--images-per-second", "2500"]
    scaling.main(["--device", "cpu", "--quick", *rate, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "scaling.json").read_text())
    passes = content["computed, not measured"]["passes"]
    assert [row["rate"] for row in passes] == ["given"] * 9


def test_a_rate_says_whether_it_was_given_measured_or_assumed(tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"rows": [{"method": DEFAULT, "images/s": 2500.0}]}))

    def rates(given: float | None, statistics: Path | None) -> tuple:
        options = SimpleNamespace(images_per_second=given, statistics=statistics)
        return scaling.rates_of_one_gpu(options)

    assert rates(1000.0, path) == ([1000.0], "given")
    assert rates(None, path) == ([2500.0], "measured")
    assert rates(None, None) == (scaling.ASSUMED, "assumed, not measured")
    with pytest.raises(InputError, match="--images-per-second must be positive and finite; got 0"):
        rates(0.0, path)


def test_growth_is_fitted_at_the_largest_sizes() -> None:
    rows = [{"variable": "N", "N": n, "channel_dot, us": n**2} for n in (1, 10, 100)]
    assert scaling.fitted(rows, "channel_dot", "N")["exponent at the largest"] == pytest.approx(2)


def test_our_operators_are_right_on_odd_sizes(device: str, capsys) -> None:
    check.main(["--device", device])
    assert capsys.readouterr().out == "217 results of 'ours' are within their bounds\n"


def run_script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
    return subprocess.run(
        ["bash", str(script), str(folder), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# Runs a module as python -m does where the packages before "-m" are not installed.
WITHOUT = """
import runpy, sys
cut = sys.argv.index('-m')
sys.modules.update(dict.fromkeys(sys.argv[1:cut]))
sys.argv = sys.argv[cut + 1:]
sys.path.insert(0, '')
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""


def run_without(packages: list[str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *packages, "-m", *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )


def test_gpu_script_runs_its_phases_in_order_and_adds_up_failures(tmp_path: Path) -> None:
    python = program(
        tmp_path / "python", 'echo "ran $*"\ncase "$*" in *channel_dot*) exit 3;; esac'
    )
    out = tmp_path / "out"
    finished = run_script(out, "--dry", "more", "ops", "compile", PYTHON=str(python))
    assert finished.returncode == 4 + 64, finished.stderr
    log = (out / "gpu.log").read_text()
    assert log == finished.stdout
    results = re.findall(r"== (\w+): (\w+)", log)
    assert results == [("more", "ok"), ("ops", "FAILED"), ("compile", "FAILED")]
    ran = re.findall("^ran -m (\\S+)", log, re.MULTILINE)
    assert ran == ["benchmarks.needs", *["benchmarks"] * 5, "benchmarks.targets"]
    assert "failed: ops compile; not run or not finished: nothing; files: gpu.log" in log


def test_gpu_script_gives_every_phase_a_turn_in_one_call(tmp_path: Path) -> None:
    program(tmp_path / "nvidia-smi", "echo 9.0")
    program(tmp_path / "compute-sanitizer", "exit 0")
    machine = {"PYTHON": "echo", "PATH": f"{tmp_path}:{os.environ['PATH']}", "BUDGET": "470"}
    finished = run_script(tmp_path / "out", **machine)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    phases = ["build", "test", "ops", "model", "more", "sanitize", "compile"]
    assert re.findall(r"== (\w+): ok", finished.stdout) == phases
    limits = [int(seconds) for seconds in re.findall(r"^\+ \[(\d+) s\]", finished.stdout, re.M)]
    build, tests, *_, last = limits
    assert build == 250 and 70 < tests < 150  # a share of what the build leaves
    assert last > 400  # what the others did not need
    assert "--for-targets" in finished.stdout and "--beyond-targets" in finished.stdout
    for operator in suite.OPERATIONS:
        assert re.search(rf"^\+ .* -m benchmarks .*\b{operator}\b", finished.stdout, re.M)


@pytest.mark.parametrize(
    ("tool", "result", "status"),
    [
        ("echo '========= Error: Device not supported. See the list.'; exit 1",
         "not run: memcheck: Error: Device not supported. See the list.", 0),
        ("echo '========= ERROR SUMMARY: 2 errors'; exit 1", "FAILED", 32),
        ("echo '========= COMPUTE-SANITIZER'; exit 124",
         "not finished: memcheck racecheck initcheck synccheck", 0),
        ("[ $2 != racecheck ] || exit 137", "not finished: racecheck", 0),
        ("[ $2 != initcheck ] || exit 137; [ $2 != memcheck ] || exit 1",
         "FAILED, not finished: initcheck", 32),
        ("echo '========= Invalid __global__ write of size 4 bytes'; exit 124", "FAILED", 32),
        ("exit 0", "ok", 0),
        (None, "not run: compute-sanitizer was not found", 0),
    ],
)  # fmt: skip
def test_gpu_script_tells_findings_from_a_sanitizer_that_cannot_run(
    tmp_path: Path, tool: str | None, result: str, status: int
) -> None:
    if tool:
        program(tmp_path / "compute-sanitizer", f'echo "ran $2"\n{tool}')
    machine = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_HOME": str(tmp_path)}
    finished = run_script(tmp_path / "out", "sanitize", PYTHON="echo", **machine)
    assert f"== sanitize: {result}, " in finished.stdout
    assert finished.returncode == status
    tools = 0 if tool is None else 1 if result.startswith("not run") else 4
    assert finished.stdout.count("\nran ") == tools


def test_gpu_script_stops_what_takes_too_long_and_says_so(tmp_path: Path) -> None:
    program(tmp_path / "compute-sanitizer", "sleep 60")
    python = program(tmp_path / "python", "sleep 60")
    # The script's own limits are longer than a test may take.
    program(tmp_path / "timeout", f'shift 3\nexec {shutil.which("timeout")} 0.1 "$@"')
    machine = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python)}
    finished = run_script(tmp_path / "out", "ops", "sanitize", **machine)
    stopped = re.findall(r"^stopped after \d s: (.*)", finished.stdout, re.M)
    assert ["benchmarks.needs" in stopped[0], "channel_dot" in stopped[1]] == [True, True]
    assert re.findall(r"--tool (\w+)", "".join(stopped[2:6])) == [
        "memcheck", "racecheck", "initcheck", "synccheck",
    ]  # fmt: skip
    assert stopped[6].endswith(f"benchmarks.targets {tmp_path / 'out'}") and len(stopped) == 7
    results = re.findall(r"^== (\w+): (.*), \d+ s", finished.stdout, re.M)
    assert results == [
        ("ops", "FAILED"),
        ("sanitize", "not finished: memcheck racecheck initcheck synccheck"),
    ]
    assert finished.returncode == 4


def test_gpu_script_runs_nothing_where_nothing_can_run(tmp_path: Path) -> None:
    python = program(
        tmp_path / "python",
        f'case "$*" in *needs*) exec "{sys.executable}" -c "{WITHOUT}" numpy pybind11 "$@";; esac',
    )
    finished = run_script(tmp_path / "out", "--dry", PYTHON=str(python))
    assert finished.stdout == "this machine lacks: numpy, pybind11\nnothing was run\n"
    assert finished.returncode == 255


def test_gpu_script_names_what_its_time_does_not_reach(tmp_path: Path) -> None:
    finished = run_script(tmp_path, "--dry", "build", "ops", PYTHON="echo", BUDGET="0")
    assert "out of time, not run: env CCP_CUDA=0" in finished.stdout
    assert "== ops" not in finished.stdout and finished.returncode == 1  # nothing was built


def test_gpu_script_names_an_unknown_phase(tmp_path: Path) -> None:
    finished = run_script(tmp_path, "everything")
    assert finished.returncode == 255 and "unknown phase 'everything': build" in finished.stderr


@pytest.mark.parametrize(
    ("packages", "lacks", "status"),
    [
        ([], "", 0),
        (["pytest", "setuptools"], "setuptools, pytest", 0),
        (["numpy"], "numpy", 3),
        (["torch", "pybind11"], "torch, pybind11", 3),
    ],
)
def test_what_a_machine_lacks_is_named_in_one_line(packages, lacks, status) -> None:
    finished = run_without(packages, "benchmarks.needs", "--dry")
    assert finished.stdout == (f"this machine lacks: {lacks}\n" if lacks else "")
    assert finished.returncode == status, finished.stderr


def test_a_gpu_and_its_tools_are_asked_for(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(program(tmp_path / "nvidia-smi", "").parent))
    monkeypatch.setenv("CXX", str(program(tmp_path / "compiler", "")))
    assert needs.main([]) == 3
    assert f"lacks: a GPU for torch {torch.__version__}, nvcc" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "nvcc", "")
    assert needs.main([]) == 0 and "nvcc" not in capsys.readouterr().out


def test_all_is_imported_and_loops_run_without_tqdm_and_safetensors() -> None:
    program = """
        import importlib, pkgutil, sys
        sys.modules.update(tqdm=None, safetensors=None)
        import torch
        import ccp_ext
        from ccp_ext import models, reestimate_batchnorm
        from ccp_ext.progress import tqdm

        for found in pkgutil.walk_packages(ccp_ext.__path__, "ccp_ext."):
            if not found.name.startswith("ccp_ext._"):
                importlib.import_module(found.name)
        with tqdm([1, 2], "title", 2, disable=False) as bar:
            assert list(bar) == [1, 2]
            bar.set_postfix(loss=1.0, refresh=False)
        bar = tqdm(desc="moves", delay=1.0)
        bar.update()
        bar.set_postfix_str("gap 2", refresh=False)
        bar.close()
        reestimate_batchnorm(models.create("resnet8"), [torch.rand(4, 3, 8, 8)], progress=True)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0 and "%|" not in finished.stderr, finished.stderr


@pytest.mark.gpu
def test_memory_beyond_the_inputs_is_that_of_a_call(cuda: str) -> None:
    limits = Limits(1e9, 1e9, 1e9, {"fma": 1e9, "fp32": 1e9, "bf16": 1e9})
    operation = suite.OPERATIONS["map_similarity"]
    case = Case("none", (2, 256, 8, 8), torch.bfloat16, "NCHW", cuda)
    effort = sweep.Effort(seconds=0, compiled="none")
    ours, *others = sweep.measure(operation, case, limits, effort, compiled=False)[0]
    result = 4 * 256**2 / 2**20
    assert result <= ours["extra MiB"] and not any("extra MiB" in row for row in others)
    x = torch.empty(1 << 20, device=cuda)
    assert sweep._extra_bytes(lambda x: x + 1, (x,)) == 4 << 20


@pytest.mark.gpu
def test_check_reaches_every_kernel(cuda: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    folder = Path(__file__).parent.parent / "csrc" / "cuda"
    code = "".join(path.read_text() for path in folder.glob("*.cuh"))
    kernels = re.findall(r"__global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(", code)
    assert len(kernels) == code.count("__global__") > 10
    if torch.cuda.get_device_capability() != (9, 0):
        kernels.remove("compare_tall_map_tiles")  # of sm_90 alone
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        check.main(["--device", cuda])
    ran = "\n".join(event.key for event in trace.key_averages())
    assert not [name for name in kernels if not re.search(rf"\b{name}\b", ran)]


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def test_triton_rivals_compute_the_same() -> None:
    triton = pytest.importorskip("triton", reason="the rivals in Triton need it")
    # It converts arrays of one number to integers, which NumPy 2.4 no longer does.
    if _release(triton.__version__) < (3, 7) and _release(np.__version__) >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} does not run kernels with loops under"
            f" NumPy {np.__version__}: it needs Triton 3.7, or NumPy before 2.4"
        )
    # The interpreter is chosen when Triton's kernels are defined, hence another process.
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.check", "--candidate", "triton"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "92 results of 'triton' are within their bounds\n"  # all operators


def test_a_plain_network_is_trained_once(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.randint(0, 100, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images += 100 * labels.view(-1, 1, 1, 1)  # the bright ones and the dark ones
    np.savez(tmp_path / "data.npz", images=images.to(torch.uint8).numpy(), labels=labels.numpy())
    weights = tmp_path / "plain" / "resnet8.pt"
    command = ["train_cifar10", "--model", "resnet8", "--data", str(tmp_path / "data.npz")]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(weights), "--epochs", "4"])
    train_cifar10.main()
    assert [file.name for file in weights.parent.iterdir()] == ["resnet8.pt"]
    made = weights.read_bytes()
    train_cifar10.main()
    assert weights.read_bytes() == made
    assert capsys.readouterr().out.splitlines() == ["resnet8: 100.00 % of test"] * 2
