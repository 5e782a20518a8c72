"""The benchmarks run, check what they time, and write results of the promised form."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import check, networks, scaling, statistics_cost, suite
from benchmarks.limits import Limits
from benchmarks.operation import Work
from benchmarks.resnet50 import ResNet50
from benchmarks.statistics_methods import BASELINE, PAPER
from ccp_ext import InputError, ops

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
    "GB/s": float,
    "TFLOP/s": float,
    "bound by": str,
    "% of limit": float,
    "% of copy": float,
    "% of two-stream read": float,
    "time over ours": float,
}


def run_quick(folder: Path, *arguments: str) -> dict:
    suite.main([*arguments, "--quick", "--device", "cpu", "--output", str(folder)])
    return json.loads((folder / "operators.json").read_text())


@pytest.mark.parametrize("operator", suite.OPERATIONS)
def test_every_operator_is_measured_beside_its_rivals(operator: str, tmp_path: Path) -> None:
    content = run_quick(tmp_path, operator, "--shapes", "resnet56")
    assert {"cpu", "torch", "commit"} <= content["environment"].keys()
    assert all(content["limits"][name] > 0 for name in ("copy", "read", "read_two"))
    operation = suite.OPERATIONS[operator]
    cases = {(r["layout"], r["dtype"]) for r in content["rows"]}
    assert cases == {(la, d) for la in operation.layouts for d in ("float32", "bfloat16")}
    assert {"ours", "eager"} <= {row["candidate"] for row in content["rows"]}
    for row in content["rows"]:
        assert row["operator"] == operator and row["network"] == "resnet56"
        assert all(isinstance(row[name], kind) for name, kind in ROW.items())
        assert 0 < row["us 10%"] <= row["us"] <= row["us 90%"] and row["% of limit"] > 0
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


TINY = ("--image-size", "8", "--batch-size", "2", "--rounds", "3", "--device", "cpu")


def test_statistics_cost_compares_time_memory_and_results(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        statistics_cost, "_peak", lambda name, *_: {BASELINE: 60.0, PAPER: 70.0}[name]
    )
    statistics_cost.main([*TINY, "--methods", BASELINE, PAPER, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "statistics_resnet56.json").read_text())
    plain, ours = content["rows"]
    assert (plain["method"], ours["method"]) == (BASELINE, PAPER)
    assert plain["over forward and backward"] == 1 and plain["error of S"] is None
    assert 0 < ours["error of S"] < 1e-5
    assert ours["more than forward and backward, MiB"] == 10
    assert content["channel_dot inside the pass"]["speed-up"] > 0


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
    inner = 9 * sum(4 * (c * c + 2 * c) + 8 for c in (16, 32, 64))
    streams = sum(4 * (c * c + 2 * c) + 8 for c in (16, 16, 32))  # 64 = 16 + 16 + 32 coupled
    assert scaling.bytes_of_sums("resnet56") == inner + streams


def test_projection_divides_the_images_and_adds_one_all_reduce() -> None:
    alone, eight = (scaling.projection(1000, n, "100 Gbit/s network") for n in (1, 8))
    assert alone["pass over the images, s"] == pytest.approx(1281.167)
    assert eight["pass over the images, s"] == pytest.approx(1281.167 / 8)
    assert alone["all-reduce, ms"] == 0 and alone["efficiency %"] == 100
    assert eight["efficiency %"] < 100


def test_growth_is_fitted_at_the_largest_sizes() -> None:
    rows = [{"variable": "N", "N": n, "channel_dot, us": n**2} for n in (1, 10, 100)]
    assert scaling.fitted(rows, "channel_dot", "N")["exponent at the largest"] == pytest.approx(2)


def test_our_operators_are_right_on_odd_sizes(device: str, capsys) -> None:
    check.main(["--device", device])
    assert "results of 'ours' are within their bounds" in capsys.readouterr().out


def test_triton_rivals_compute_the_same() -> None:
    pytest.importorskip("triton", reason="the rivals in Triton need it")
    # The interpreter is chosen when Triton's kernels are defined, hence another process.
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.check", "--candidate", "triton"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert not finished.stdout.startswith("0 results")
