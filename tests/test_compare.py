"""Comparisons: equal cost, shared statistics, resumption, several processes, tables and ranks."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re

import numpy as np
import pytest
import torch

from ccp_ext import cli, criteria, datasets, finetune, models, pipeline
from ccp_ext.checkpoints import load_model
from ccp_ext.compare import Arm, CompareSettings, compare
from ccp_ext.compare.bench import halves
from ccp_ext.errors import InputError
from ccp_ext.evaluation import evaluate
from ccp_ext.files import locked
from ccp_ext.finetune import FinetuneConfig
from ccp_ext.finetune.run import Run
from ccp_ext.plan import PruningPlan
from ccp_ext.repair import options as repair_options
from ccp_ext.report.page import write as write_page
from ccp_ext.report.summary import explanation, rank, summarise, tables
from ccp_ext.run_folder import RunFolder


def settings(inputs, **changes) -> CompareSettings:
    options = {
        "criteria": ("ccp", "l1"),
        "macs": (0.7, 0.5),
        "seeds": (0, 1),
        "images": 48,
        "batch_size": 32,
        "repair": ("batchnorm",),
        "repair_images": 48,
        **changes,
    }
    return CompareSettings(
        "resnet8", str(inputs / "weights.th"), str(inputs / "data.npz"), **options
    )


def silent(line: str) -> None:
    """Takes the place of print; picklable."""


def run(wanted: CompareSettings, output, **options):
    return compare(wanted, output, progress=False, say=silent, **options)


def results(rows):
    """The rows without what a clock or a memory counter said."""
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "MiB"))} for row in rows]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A comparison that nobody interrupted: (folder, result)."""
    output = tmp_path_factory.mktemp("whole") / "comparison"
    wanted = settings(inputs, repair=("none", "batchnorm"))
    return output, run(wanted, output)


def test_each_row_is_the_model_that_ccp_prune_makes_with_its_seed(inputs, whole, tmp_path):
    _, result = whole
    assert len(result["rows"]) == 3 * 2 * 2 * 2  # the random control was added
    for criterion in ("ccp", "random"):
        prune = pipeline.PruneSettings(
            model="resnet8",
            weights=str(inputs / "weights.th"),
            data=str(inputs / "data.npz"),
            macs=0.5,
            criterion=criterion,
            options=criteria.Options(seed=1),
            images=48,
            batch_size=32,
            repair="batchnorm",
            repair_images=48,
            seed=1,
        )
        folder = tmp_path / criterion
        stages = pipeline.run(prune, folder, progress=False, say=silent)["stages"]
        for stage, repair in ((stages[1], "none"), (stages[2], "batchnorm")):
            wanted = {"criterion": criterion, "budget": 0.5, "repair": repair, "seed": 1}
            (row,) = [r for r in result["rows"] if wanted.items() <= r.items()]
            assert row["all accuracy"] == pytest.approx(stage["accuracy %"])
            assert row["all loss"] == pytest.approx(stage["loss"])
            assert (row["MACs"], row["parameters"]) == (stage["MACs"], stage["parameters"])
            groups = PruningPlan.load(folder / "plan.json").groups
            assert row["kept"] == {name: len(group.kept) for name, group in groups.items()}


def test_rows_say_what_of_the_repair_the_settings_do_not(inputs, tmp_path):
    steps = "fold+refit-linear+batchnorm+finetune"
    wanted = settings(
        inputs,
        criteria=("l1",),
        macs=(0.5,),
        seeds=(1, 0),
        repair=("none", steps),
        finetune=FinetuneConfig(epochs=1, batch_size=32),
    )
    output = tmp_path / "run"
    run(wanted, output)
    rows = json.loads((output / "comparison.json").read_text())["rows"]
    recorded = [row["repair options"] for row in rows if row["repair"] == steps]
    assert recorded == [repair_options("fold+refit-linear+batchnorm")] * 4
    assert recorded[0]["refit-linear"]["joint"] == 0 and "ridge" in recorded[0]["refit-linear"]
    others = [row["repair options"] for row in rows if row["repair"] != steps]
    assert others == [{}] * 6  # without a repair, and of the unpruned control
    for path in (output / "rows").glob("*--0.json"):  # rows of an earlier version have none
        row = json.loads(path.read_text())
        del row["repair options"]
        path.write_text(json.dumps(row))
    assert len(run(wanted, output)["summary"]) == 4


def test_the_halves_are_those_of_the_official_order(inputs, whole):
    plain = whole[1]["plain"]
    test = datasets.load(inputs / "data.npz", "test")
    model = load_model(lambda: models.create("resnet8"), inputs / "weights.th")
    for name, part in (("selection", range(20)), ("report", range(20, 40)), ("all", range(40))):
        expected = evaluate(model, test.subset(part), progress=False)
        assert plain[f"{name} accuracy"] == pytest.approx(expected.accuracy)
        assert plain[f"{name} loss"] == pytest.approx(expected.loss)


def test_every_row_is_within_its_budget(whole):
    for row in whole[1]["rows"]:
        assert 0.9 * row["budget"] < row["MACs kept"] <= row["budget"]


def test_an_arm_allocates_as_it_says_and_else_as_its_criterion_does(inputs, tmp_path):
    arms = ("ccp:allocation=uniform", "ccp", "ccp:allocation=joint")
    wanted = settings(inputs, criteria=arms, macs=(), params=(0.5,), seeds=(0,), allocation="auto")
    uniform, optimal, joint, random = run(wanted, tmp_path / "own")["rows"]
    assert uniform["MACs"] == random["MACs"] != optimal["MACs"]
    taken = [row["allocation"] for row in (uniform, optimal, joint, random)]
    assert taken == ["uniform", "optimal", "joint", "uniform"]
    assert optimal["objective"] < uniform["objective"]
    assert joint["report loss"] != optimal["report loss"]
    assert max(row["parameters kept"] for row in (uniform, optimal, joint)) <= 0.5


def test_a_joint_choice_needs_a_criterion_of_the_second_order(inputs, tmp_path):
    wanted = settings(inputs, criteria=("taylor:allocation=joint",))
    with pytest.raises(InputError, match="needs a criterion of the second order.*'taylor'"):
        run(wanted, tmp_path / "run")


def test_statistics_are_gathered_once_for_all_that_can_share_them(inputs, tmp_path, monkeypatch):
    gathered = []
    original = criteria.gather

    def counted(model, graph, criterion, *arguments, **options):
        gathered.append((criterion.name, criterion.options.seed))
        return original(model, graph, criterion, *arguments, **options)

    monkeypatch.setattr(criteria, "gather", counted)
    wanted = settings(inputs, criteria=("taylor", "ccp", "fisher", "ccp:diagonal"))
    run(wanted, tmp_path / "run")
    once = [("taylor", 0), ("ccp", 0), ("random", 0), ("taylor", 1), ("ccp", 1), ("random", 1)]
    assert gathered == [*once, ("ccp", 0)]  # the last for the page


def test_an_interrupted_comparison_goes_on_to_the_same_rows(inputs, whole, tmp_path):
    output, done = tmp_path / "broken", []

    def interrupting(line):
        done.append(line)
        if len(done) == 9:
            raise KeyboardInterrupt

    wanted = settings(inputs, repair=("none", "batchnorm"))
    with pytest.raises(KeyboardInterrupt):
        compare(wanted, output, progress=False, say=interrupting)
    assert not (output / "comparison.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (output / "rows").iterdir()}
    assert len(kept) == 9
    result = run(wanted, output)
    kept[output / "snapshot.safetensors"] = (output / "snapshot.safetensors").stat().st_mtime_ns
    run(wanted, output)
    assert results(result["rows"]) == results(whole[1]["rows"])
    snapshots = [(folder / "snapshot.safetensors").read_bytes() for folder in (output, whole[0])]
    assert snapshots[0] == snapshots[1]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_folder_grows_by_criteria_budgets_seeds_and_repairs(inputs, whole, tmp_path):
    output = tmp_path / "run"
    wanted = settings(inputs, repair=("none", "batchnorm"))
    part = dataclasses.replace(
        wanted,
        criteria=("ccp", "random"),
        macs=wanted.macs[:1],
        seeds=wanted.seeds[1:],
        repair=("batchnorm",),
    )
    assert len(run(part, output)["rows"]) == 2
    kept = {path: path.stat().st_mtime_ns for path in (output / "rows").iterdir()}
    assert results(run(wanted, output)["rows"]) == results(whole[1]["rows"])
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(run(part, output)["rows"]) == 2
    assert len(list((output / "rows").iterdir())) == len(whole[1]["rows"])


def test_two_processes_make_the_rows_of_one_and_the_failure_of_one_leaves_the_others(
    inputs, whole, tmp_path
):
    wanted = settings(inputs, repair=("none", "batchnorm"))
    output = tmp_path / "run"
    with pytest.raises(InputError, match="device 'cuda:99' cannot be used"):
        run(wanted, output, devices=("cpu", "cuda:99"))
    assert len(list((output / "rows").iterdir())) == 12
    result = run(wanted, output, devices=("cpu", "cpu"))
    for one, two in zip(results(whole[1]["rows"]), results(result["rows"]), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            number = isinstance(value, int | float)
            assert math.isclose(two[name], value) if number else two[name] == value, name


@pytest.mark.gpu
def test_rows_on_a_gpu(cuda, inputs, tmp_path):
    pytest.importorskip("safetensors", reason="the format of snapshots")
    rows = run(settings(inputs, seeds=(0,)), tmp_path / "run", devices=(cuda, cuda))["rows"]
    assert len(rows) == 6
    assert all("GPU" in row["memory"] and row["statistics MiB"] > 0 for row in rows)


def test_fine_tuning_is_a_repair_and_leaves_no_checkpoint(inputs, tmp_path):
    wanted = settings(
        inputs,
        macs=(0.5,),
        seeds=(3,),
        repair=("fold+refit+batchnorm", "batchnorm", "batchnorm+finetune"),
        finetune=FinetuneConfig(epochs=1, batch_size=32),
    )
    rows = run(wanted, tmp_path / "run")["rows"]
    losses = {row["repair"]: row["all loss"] for row in rows if row["criterion"] == "ccp"}
    assert len(set(losses.values())) == 3
    for row in rows:
        assert row["repair images"] == (wanted.repair_images if "refit" in row["repair"] else None)
    assert not list((tmp_path / "run" / "rows").glob("*.pt"))


def test_the_unpruned_model_is_the_control_of_fine_tuning(inputs, tmp_path):
    schedule = FinetuneConfig(epochs=1, batch_size=32)
    repairs = ("none", "batchnorm+finetune", "finetune")
    wanted = settings(inputs, repair=repairs, finetune=schedule)
    result = run(wanted, tmp_path / "run")
    first, second = [row for row in result["rows"] if row["criterion"] == "unpruned"]
    assert [first["seed"], second["seed"]] == [0, 1]
    assert (first["budget"], first["repair"]) == (1.0, "finetune")
    assert first["kept"] == result["plain"]["channels"]
    assert first["MACs kept"] == 1 and first["objective"] is None and first["repair seconds"] > 0
    model = load_model(lambda: models.create("resnet8"), inputs / "weights.th")
    finetune.finetune(model, datasets.load(inputs / "data.npz"), schedule, seed=1, progress=False)
    alone = evaluate(model, datasets.load(inputs / "data.npz", "test"), progress=False)
    assert second["all loss"] == pytest.approx(alone.loss)

    entry = result["control"]
    assert entry["report accuracy"] == (first["report accuracy"] + second["report accuracy"]) / 2
    for found in (result["summary"], result["ranks"]):
        assert "unpruned" not in {line["criterion"] for line in found}
    shown = tables(result)
    assert len(shown) == 2 * 3
    for title, lines in shown:
        names = [(line["criterion"], line[""]) for line in lines]
        assert (("unpruned", "control") in names) == ("finetune" in title)
        assert [mark for _, mark in names].count("best") == 1
    assert "control: the unpruned model" in explanation(result)
    page = write_page(tmp_path / "run").read_text(encoding="utf-8")
    assert page.count("unpruned, fine-tuned too</text>") == 2
    curves = 2 * 2 * 2  # budgets, repairs, accuracy and loss
    assert page.count("unpruned</text>") == 1 + curves


def test_all_arms_and_the_control_are_distilled_and_logged(inputs, tmp_path):
    schedule = FinetuneConfig(epochs=2, batch_size=32)
    wanted = settings(
        inputs, macs=(0.5,), seeds=(1,), repair=("none", "finetune"), finetune=schedule, distil=True
    )
    result = run(wanted, tmp_path / "run")
    undistilled = run(dataclasses.replace(wanted, distil=False), tmp_path / "undistilled")
    tuned = [row["repair"] == "finetune" for row in result["rows"]]
    for changes, one, two in zip(tuned, result["rows"], undistilled["rows"], strict=True):
        assert (one["all loss"] != two["all loss"]) == changes
    control, plain = (
        load_model(lambda: models.create("resnet8"), inputs / "weights.th") for _ in range(2)
    )
    data, test = (datasets.load(inputs / "data.npz", split) for split in ("train", "test"))
    history = finetune.finetune(control, data, schedule, seed=1, teacher=plain, progress=False)
    assert result["control"]["all loss"] == pytest.approx(evaluate(control, test).loss)

    logs = tmp_path / "run" / "logs"
    names = {f"{name}--macs--0.5--finetune--1.csv" for name in ("ccp", "l1", "random")}
    assert {log.name for log in logs.iterdir()} == names | {"unpruned--macs--1.0--finetune--1.csv"}
    for epoch, line in zip(
        history, log_lines(logs / "unpruned--macs--1.0--finetune--1.csv"), strict=True
    ):
        assert line["epoch"] == str(epoch.epoch)
        assert float(line["train_loss"]) == pytest.approx(epoch.train_loss)
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["distil"] is True
    said = "2 epochs, of every model, the unpruned one too, with the unpruned model's outputs as"
    assert said in explanation(result) and "(weight 0.5, temperature 4)" in explanation(result)
    assert "Fine-tuning takes 2 epochs. best" in explanation(undistilled)


def log_lines(path):
    """The lines of a fine-tuning's log, without the seconds."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]


def test_distillation_goes_on_after_a_stop_to_the_same_rows_and_logs(inputs, tmp_path, monkeypatch):
    wanted = settings(
        inputs,
        criteria=("l1",),
        macs=(0.5,),
        seeds=(0,),
        repair=("finetune",),
        finetune=FinetuneConfig(epochs=2, batch_size=32),
        distil=True,
    )
    expected, output = run(wanted, tmp_path / "whole")["rows"], tmp_path / "broken"
    epoch = Run.train_epoch

    def stopped(run, number):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(run, number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(wanted, output)
    (broken,) = (output / "logs").iterdir()
    assert len(log_lines(broken)) == 1
    broken.write_text("damaged")
    assert results(run(wanted, output)["rows"]) == results(expected)
    logs = sorted((tmp_path / "whole" / "logs").iterdir())
    assert len(logs) == 3
    for log in logs:
        assert log_lines(output / "logs" / log.name) == log_lines(log)


def test_arms_are_fine_tuned_with_the_auxiliary_heads_of_their_criterion(
    inputs, tmp_path, monkeypatch
):
    heads, original = [], finetune.finetune

    def recorded(*arguments, auxiliary, **others):
        heads.append(0 if auxiliary is None else len(auxiliary.heads))
        return original(*arguments, auxiliary=auxiliary, **others)

    monkeypatch.setattr("ccp_ext.compare.bench.finetune", recorded)
    wanted = settings(
        inputs,
        criteria=("ccp-ac", "random"),
        macs=(0.5,),
        seeds=(0,),
        repair=("finetune",),
        finetune=FinetuneConfig(epochs=1, batch_size=32),
    )
    rows = run(wanted, tmp_path / "run")["rows"]
    assert [row["criterion"] for row in rows] == ["ccp-ac", "random", "unpruned"]
    assert heads == [3, 0, 0]


def test_without_fine_tuning_there_is_no_control(whole):
    _, result = whole
    assert result["control"] is None and "control" not in explanation(result)
    assert "unpruned" not in {row["criterion"] for row in result["rows"]}


def test_a_stop_between_fine_tuning_and_its_row_loses_no_epoch(inputs, tmp_path, monkeypatch):
    wanted = settings(
        inputs,
        criteria=("random",),
        macs=(0.5,),
        seeds=(0,),
        repair=("finetune",),
        finetune=FinetuneConfig(epochs=2, batch_size=32),
    )
    trained, epoch, write = [], Run.train_epoch, RunFolder.write

    def counted(run, number):
        trained.append(number)
        return epoch(run, number)

    def stopped(folder, name, content):
        if name.startswith("rows/"):
            raise KeyboardInterrupt
        write(folder, name, content)

    monkeypatch.setattr(Run, "train_epoch", counted)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(wanted, tmp_path / "run")
    assert trained == [0, 1]
    run(wanted, tmp_path / "run")
    assert trained == [0, 1, 0, 1]  # the other two are the control's
    row = next((tmp_path / "run" / "rows").iterdir())
    row.with_suffix(".pt").write_text("of a run that was stopped after it wrote the row")
    run(wanted, tmp_path / "run")
    assert not row.with_suffix(".pt").exists()


def test_one_process_at_a_time_works_in_a_folder(inputs, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with locked(output), pytest.raises(InputError, match=f"is in use by process {os.getpid()}"):
        run(settings(inputs), output)
    assert os.listdir(output) == []


def test_other_settings_and_damaged_rows_are_refused(inputs, whole, tmp_path):
    output, _ = whole
    wanted = settings(inputs, repair=("none", "batchnorm"))
    with pytest.raises(InputError, match="holds a run with images=48, not 64"):
        run(dataclasses.replace(wanted, images=64), output)
    older = tmp_path / "older"
    older.mkdir()
    kept = json.loads((output / "settings.json").read_text())
    del kept["repair_memory"]
    (older / "settings.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match="another version .*, which lacks the setting repair_mem"):
        run(wanted, older)
    damaged = tmp_path / "run"
    small = settings(inputs, seeds=(0,), criteria=("random",))
    run(small, damaged)
    file = next((damaged / "rows").iterdir())
    other = json.loads(file.read_text()) | {"repair options": {"refit": {"ridge": 1.0}}}
    file.write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"was repaired with \{'refit': \{'ridge': 1.0\}\}, not "):
        run(small, damaged)
    for content in ("{", "{}", "[]"):
        file.write_text(content)
        with pytest.raises(InputError, match=re.escape(file.name)):
            run(small, damaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"macs": ()}, "exactly one kind"),
        ({"params": (0.5,)}, "exactly one kind"),
        ({"seeds": ()}, "seeds must hold one value or more"),
        ({"seeds": (0, 0)}, "seeds holds a value twice"),
        ({"seeds": (-1,)}, "seeds must be at least 0, got -1"),
        ({"criteria": ("l1", "l1")}, "criteria holds a value twice"),
        ({"criteria": ("magic",)}, "criterion must be one of"),
        ({"criteria": ("ccp:colour=red",)}, "'colour'; an option must be one of site, "),
        ({"criteria": ("ccp:seed=1",)}, "'seed'; an option must be one of"),
        ({"criteria": ("ccp:diagonal=maybe",)}, "sets diagonal, which takes bool"),
        ({"criteria": ("ccp:temperature",)}, "sets temperature, which takes float"),
        ({"criteria": ("ccp:curvature=red",)}, "curvature"),
        (
            {"criteria": ("ccp:allocation=best",)},
            "allocation must be one of auto, uniform, optimal, joint",
        ),
        ({"allocation": "best"}, "allocation must be one of auto, uniform, optimal, joint"),
        ({"repair": ("glue",)}, "repair must be none, or steps of fold, refit"),
        ({"repair": ("batchnorm+refit",)}, "in this order"),
        ({"repair": ("finetune",)}, "needs a schedule"),
        ({"distil": True}, r"distil is given, but there is no fine-tuning \(epochs\)"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"macs": (0.5, 1.5)}, "1.5"),
        ({"macs": (0.001,)}, "0.001"),
        ({"criteria": ("ccp:rows=0",)}, "rows must be a positive integer, got 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(changes, message, inputs, tmp_path):
    with pytest.raises(InputError, match=message):
        run(settings(inputs, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_arm_is_a_criterion_with_options():
    arm = Arm.parse("ccp:curvature=sampled:temperature=4:diagonal:allocation=optimal")
    assert arm.options == criteria.Options(curvature="sampled", temperature=4, diagonal=True)
    assert (arm.criterion, arm.allocation) == ("ccp", "optimal")
    assert arm.with_seed(5).options.seed == 5


def row(criterion: str, seed: int, accuracy: float, **changes):
    first = {"criterion": criterion, "kind": "macs", "budget": 0.5, "repair": "none", "seed": seed}
    return {**first, "selection accuracy": accuracy, "device": "cpu", **changes}


def test_the_best_and_those_within_its_spread_are_marked():
    rows = [
        *(row("good", s, a) for s, a in enumerate((90.0, 92.0, 91.0))),
        *(row("near", s, a) for s, a in enumerate((89.0, 90.5, 91.0))),
        *(row("steady", s, 89.0) for s in range(3)),
        row("good", 0, 10.0, budget=0.3),
        row("near", 0, 20.0, budget=0.3),
    ]
    found = summarise(rows)
    assert [(e["criterion"], e["budget"], e["mark"]) for e in found] == [
        ("good", 0.5, "best"),
        ("near", 0.5, "close"),
        ("steady", 0.5, ""),
        ("near", 0.3, "best"),
        ("good", 0.3, ""),
    ]
    assert found[0]["selection accuracy"] == 91 and found[0]["selection accuracy spread"] == 1
    assert found[0]["seeds"] == 3 and found[3]["selection accuracy spread"] is None


def test_the_channels_kept_are_averaged_by_group():
    rows = [row("a", 0, 90.0, kept={"x": 3, "y": 8}), row("a", 1, 90.0, kept={"x": 4, "y": 8})]
    assert summarise(rows)[0]["kept"] == {"x": 3.5, "y": 8}


def test_a_figure_that_a_row_lacks_is_not_averaged():
    rows = [row("a", seed, 90.0, **{"choice MiB": figure}) for seed, figure in enumerate((3, None))]
    assert summarise(rows)[0]["choice MiB"] is summarise(rows[::-1])[0]["choice MiB"] is None


def test_the_halves_of_a_test_set_sorted_by_class_hold_the_same_classes(inputs):
    test = datasets.load(inputs / "data.npz", "test")
    test = test.subset(test.labels.argsort())
    first, second = (test.labels[list(part)] for part in halves(test))
    assert (first.bincount(minlength=10) - second.bincount(minlength=10)).abs().max() <= 1


def test_the_explanation_says_how_the_test_set_was_halved(inputs, whole, tmp_path):
    assert "on the first half of the test images (selection)" in explanation(whole[1])
    arrays = dict(np.load(inputs / "data.npz"))
    order = arrays["test_labels"].argsort(kind="stable")
    arrays |= {name: arrays[name][order] for name in ("test_images", "test_labels")}
    np.savez(tmp_path / "sorted.npz", **arrays)
    small = settings(inputs, criteria=("random",), macs=(0.5,), seeds=(0,), repair=("none",))
    result = run(dataclasses.replace(small, data=str(tmp_path / "sorted.npz")), tmp_path / "run")
    said = explanation(result)
    assert "on every second test image, which are sorted by class (selection)" in said
    assert "on the others (report)" in said and "first half" not in said


def test_ranks_are_taken_within_budget_repair_and_seed():
    rows = [
        *(row(name, 0, a) for name, a in (("a", 90.0), ("b", 80.0), ("c", 80.0))),
        *(row(name, 1, a) for name, a in (("a", 50.0), ("b", 60.0), ("c", 40.0))),
    ]
    found = rank(rows)
    assert [entry["criterion"] for entry in found] == ["a", "b", "c"]
    assert [entry["mean rank"] for entry in found] == [1.5, 1.75, 2.75]
    assert [entry["best rank"] for entry in found] == [1.0, 1.0, 2.5]
    assert [entry["worst rank"] for entry in found] == [2.0, 2.5, 3.0]
    assert found[0]["spread"] == pytest.approx(math.sqrt(0.5))
    assert rank(rows[:3])[0]["spread"] is None


def test_the_command_line_writes_and_prints_the_tables(inputs, tmp_path, capsys):
    output = tmp_path / "run"
    command = [
        "compare",
        "--quiet",
        *("--model", "resnet8"),
        *("--weights", inputs / "weights.th"),
        *("--data", inputs / "data.npz"),
        *("--criteria", "ccp,l1"),
        *("--macs", "0.7,0.5"),
        *("--seeds", "0,1"),
        *("--repair", "refit-linear,refit+batchnorm"),
        *("--images", 48, "--repair-images", 48),
        *("--output", output),
        *("--device", "cpu"),
    ]
    command = [str(word) for word in command]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    result = json.loads((output / "comparison.json").read_text())
    taken = {"ccp": "optimal", "l1": "uniform", "random": "uniform"}
    with open(output / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["rows"]) == 24
    assert {row["criterion"]: row["allocation"] for row in rows} == taken
    assert "kept" not in rows[0]
    assert float(rows[3]["report loss"]) == result["rows"][3]["report loss"]
    markdown = (output / "comparison.md").read_text()
    for title, lines in tables(result):
        assert title in printed and title in markdown and len(lines) == 3
        assert all(line["report %"] in printed for line in lines)
        assert {line["criterion"]: line["allocation"] for line in lines} == taken
    assert os.fspath(output / "report.html") in printed
    assert cli.main([*command, "--device", "tpu"]) == 2
    assert "device must be auto or one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--seeds", "0;1"])
    assert "must be values joined by commas, got '0;1'" in capsys.readouterr().err


def test_the_seconds_and_the_memory_are_of_each_part(whole):
    for found in whole[1]["rows"]:
        assert found["repair seconds"] > 0 or found["repair"] == "none"
        assert found["choice seconds"] > 0 and found["memory"].startswith("peak of the process")
    ccp = [found for found in whole[1]["rows"] if found["criterion"] == "ccp"]
    assert len({found["statistics seconds"] for found in ccp if found["seed"] == 0}) == 1
    assert torch.tensor([found["statistics seconds"] for found in ccp]).min() > 0
