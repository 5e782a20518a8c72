"""Figures: what they show, the files they make, and what they leave alone."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest
import torch

from ccp_ext import PruningPlan, plots, trace
from ccp_ext.errors import InputError
from tests.small_networks import InPlace, random_plan

pytest.importorskip("matplotlib", reason="figures need matplotlib")


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return random_plan(trace(InPlace(), torch.zeros(1, 3, 8, 8)))


@pytest.fixture
def drawn(monkeypatch):
    """The figures in place of their files."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_the_figure_of_a_plan_shows_what_it_keeps(plan, drawn):
    plan.plot("plan.png")
    counts, shares = drawn[0].axes
    kept, removed = counts.containers
    for k, group in enumerate(plan.groups.values()):
        assert kept[k].get_height() == len(group.kept)
        assert removed[k].get_y() == len(group.kept)
        assert removed[k].get_y() + removed[k].get_height() == group.channels
        share = shares.containers[0][k].get_height()
        assert share == pytest.approx(100 * len(group.kept) / group.channels)
    assert [text.get_text() for text in shares.get_xticklabels()] == list(plan.groups)
    macs = plan.forecast["macs_after"] / plan.forecast["macs_before"]
    assert f"{macs:.1%} of the MACs" in counts.get_title("left")


def test_the_matrix_is_ordered_by_the_choice_and_its_colours_centred(drawn):
    torch.manual_seed(0)
    matrix = torch.randn(7, 7)
    removed = torch.tensor([False, True, False, True, False, False, True])
    plots.matrix_figure(matrix, removed, "matrix.svg", title="S")
    (image,) = drawn[0].axes[0].images
    order = [1, 3, 6, 0, 2, 4, 5]
    assert torch.equal(torch.as_tensor(image.get_array().data), matrix.double()[order][:, order])
    low, high = image.get_clim()
    assert low == -high < 0
    labels = [text.get_text() for text in drawn[0].axes[0].get_xticklabels()]
    assert labels == ["removed (3)", "kept (4)"]


@pytest.mark.parametrize("removed", [torch.zeros(3, dtype=bool), torch.ones(3, dtype=bool)])
def test_a_matrix_of_zeros_with_one_block_can_be_drawn(removed, tmp_path):
    plots.matrix_figure(torch.zeros(3, 3), removed, tmp_path / "zeros.png")


def test_curves_are_sorted_and_rows_without_a_value_left_out(drawn):
    rows = [{"MACs": 4, "loss": 0.5}, {"MACs": 2, "loss": 0.9}, {"MACs": 3, "loss": None}, {}]
    plots.tradeoff_figure({"ccp": rows, "none": [{}]}, "curve.png")
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[2, 0.9], [4, 0.5]] and line.get_label() == "ccp"
    assert drawn[0].axes[0].get_xlabel() == "MACs" and drawn[0].axes[0].get_ylabel() == "loss"


def test_the_ending_decides_the_format(plan, tmp_path):
    plan.plot(tmp_path / "plan.PNG")
    plan.plot(tmp_path / "plan.svg")
    assert (tmp_path / "plan.PNG").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert "<svg" in text and all(re.search(re.escape(name), text) for name in plan.groups)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.PNG", "plan.svg"]


def test_plotting_changes_no_setting_and_chooses_no_backend(tmp_path):
    code = """
        import sys, matplotlib, torch
        from ccp_ext import plots
        before = matplotlib.rcParams.copy()
        plots.matrix_figure(torch.eye(3), torch.tensor([True, False, False]), sys.argv[1])
        assert matplotlib.rcParams.copy() == before
        assert "matplotlib.pyplot" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "matrix.png")]
    subprocess.run(command, check=True, timeout=120)


def test_matplotlib_is_imported_when_it_is_needed():
    code = "import sys, ccp_ext.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_matplotlib_the_error_says_what_to_install(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=re.escape("pip install 'ccp_ext[plots]'")):
        plan.plot("plan.png")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: plots.matrix_figure(torch.eye(3), torch.zeros(3, dtype=bool), "a.pdf"), "a.pdf"),
        (lambda p: plots.matrix_figure(torch.eye(3), torch.zeros(2, dtype=bool), p), r"\[3, 3\]"),
        (lambda p: plots.matrix_figure(torch.eye(3), torch.zeros(3), p), "float32"),
        (
            lambda p: plots.matrix_figure(torch.eye(2) / 0, torch.zeros(2, dtype=bool), p),
            "must be finite",
        ),
        (lambda p: plots.tradeoff_figure({"a": [{}]}, p), "both 'MACs' and 'loss'"),
        (
            lambda p: plots.tradeoff_figure(
                {"a": [{"MACs": 1, "loss": 1}]}, p.parent / "no" / "a.svg"
            ),
            "cannot be written",
        ),
    ],
)
def test_bad_input_is_named(draw, message, tmp_path):
    with pytest.raises(InputError, match=message):
        draw(tmp_path / "figure.png")
