"""The command line on real files: the whole job, its bad inputs, and its interruptions."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ccp_ext
from ccp_ext import cli, compare, criteria, datasets, models, pipeline
from ccp_ext.checkpoints import load_model
from ccp_ext.criteria import gathering
from ccp_ext.evaluation import evaluate
from ccp_ext.files import locked
from ccp_ext.subject import sample

safetensors = pytest.importorskip("safetensors.torch", reason="the format of model files")


def prune_command(inputs, output, **changes):
    options = {
        "model": "resnet8",
        "weights": inputs / "weights.th",
        "data": inputs / "data.npz",
        "macs": 0.5,
        "criterion": "ccp",
        "images": 64,
        "repair-images": 64,
        "batch-size": 32,
        "output": output,
        **changes,
    }
    words = [w for k, v in options.items() if v is not None for w in (f"--{k}", str(v))]
    return ["prune", "--quiet", *words]


def complaint(capsys, arguments):
    """Exit status 2 and exactly one line on stderr, which is returned."""
    assert cli.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_prune_then_evaluate(inputs, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(prune_command(inputs, output, epochs=1)) == 0
    printed = capsys.readouterr().out
    stages = json.loads((output / "report.json").read_text())["stages"]
    assert [row["stage"] for row in stages] == ["plain", "pruned", "refitted", "fine-tuned"]
    assert all(row["stage"] in printed for row in stages)
    assert "refitted: all 64 images for every layer" in printed
    plan = ccp_ext.PruningPlan.load(output / "plan.json")
    assert stages[1]["MACs"] == plan.forecast["macs_after"] <= 0.5 * stages[0]["MACs"]
    assert stages[1]["parameters"] == plan.forecast["parameters_after"] < stages[0]["parameters"]
    assert not list(output.glob("*.pt"))

    slim = str(output / "slim.safetensors")
    data = str(inputs / "data.npz")
    assert (
        cli.main(["evaluate", "--quiet", "--model", "resnet8", "--weights", slim, "--data", data])
        == 0
    )
    assert f"{stages[-1]['accuracy %']:.2f}" in capsys.readouterr().out


def test_the_models_own_normalisation_takes_the_place_of_the_datas(inputs, tmp_path, capsys):
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)
    own = ["--mean", "0.3,0.4,0.5", "--std", "0.2,0.3,0.25"]
    model = load_model(lambda: models.create("resnet8"), inputs / "weights.th")
    images = datasets.load(inputs / "data.npz", "test", mean=mean, std=std)
    expected = evaluate(model, images, progress=False).loss
    assert expected != evaluate(model, datasets.load(inputs / "data.npz", "test")).loss

    command = prune_command(inputs, tmp_path / "run", repair="none")
    assert cli.main([*command, *own]) == 0
    stages = json.loads((tmp_path / "run" / "report.json").read_text())["stages"]
    assert stages[0]["loss"] == pytest.approx(expected, rel=1e-6)
    subject = [str(word) for word in command[2:8]] + own + ["--batch-size", "32"]
    assert cli.main(["evaluate", "--quiet", *subject]) == 0
    assert f"{expected:.4f}" in capsys.readouterr().out
    others = ["--macs", "0.5", "--criteria", "l1", "--seeds", "0", "--images", "32"]
    others += ["--repair", "none", "--output", str(tmp_path / "comparison")]
    assert cli.main(["compare", "--quiet", *subject, *others]) == 0
    plain = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["plain"]
    assert plain["all loss"] == pytest.approx(expected, rel=1e-6)
    assert "mean must be 3 finite numbers" in complaint(capsys, [*command, "--mean", "0.5"])
    assert "another folder" in complaint(capsys, command)


@pytest.mark.parametrize("command", ["prune", "evaluate", "compare"])
def test_the_help_says_how_a_mean_that_begins_with_a_minus_is_given(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    (example,) = re.findall(r"--mean=-\S+", capsys.readouterr().out)
    subject = ["--model", "resnet8", "--weights", "w", "--data", "d"]
    given = cli._parser().parse_args(["evaluate", *subject, example])
    assert given.mean == (-0.1, 0.0, 0.0)


def test_every_repair_and_all_of_the_fine_tuning(inputs, tmp_path):
    output = tmp_path / "run"
    options = {"repair": "fold+refit+batchnorm", "epochs": 1, "auxiliary-heads": 2}
    options |= {"allocation": "joint", "mixup": 0.2, "ema-decay": 0.9, "label-smoothing": 0.1}
    assert cli.main([*prune_command(inputs, output, **options), "--distil", "--amp"]) == 0
    stages = json.loads((output / "report.json").read_text())["stages"]
    names = ["plain", "pruned", "folded", "refitted", "re-estimated", "fine-tuned"]
    assert [row["stage"] for row in stages] == names
    assert len({row["loss"] for row in stages}) == len(names)
    plan = ccp_ext.PruningPlan.load(output / "plan.json")
    recorded = json.loads((output / "report.json").read_text())["repair options"]
    assert plan.record["repair options"] == recorded
    assert list(recorded) == ["fold", "refit", "batchnorm"]
    defaults = inspect.signature(ccp_ext.refit).parameters
    for name in ("layers", "residual", "ridge", "positions", "joint"):
        assert recorded["refit"][name] == defaults[name].default


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"criterion": "ccp-ac"}, 3),
        ({"criterion": "ccp-ac", "auxiliary-heads": 1}, 1),
        ({"criterion": "ccp-ac", "auxiliary-heads": 0}, 0),
        ({"criterion": "ccp"}, 0),
    ],
)
def test_fine_tuning_has_the_criterions_auxiliary_heads_unless_others_are_asked_for(
    options, expected, inputs, tmp_path, monkeypatch
):
    heads, original = [], pipeline.finetune

    def recorded(*arguments, auxiliary, **others):
        heads.append(0 if auxiliary is None else len(auxiliary.heads))
        return original(*arguments, auxiliary=auxiliary, **others)

    monkeypatch.setattr(pipeline, "finetune", recorded)
    command = prune_command(inputs, tmp_path / "run", epochs=1, repair="none", **options)
    assert cli.main(command) == 0
    assert heads == [expected]


def test_heads_that_were_trained_before_a_stop_are_not_again(inputs, tmp_path, capsys, monkeypatch):
    output, trained, original = tmp_path / "run", [], pipeline.train_heads
    options = {"criterion": "ccp-ac", "epochs": 1, "repair": "none", "images": 32}
    command = prune_command(inputs, output, **options)

    def counted(model, heads, *arguments, **others):
        trained.append(len(heads.heads))
        return original(model, heads, *arguments, **others)

    def interrupted(model, *_, auxiliary, **others):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train_heads", counted)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "finetune", interrupted)
        assert cli.main(command) == 130
    capsys.readouterr()
    kept = (output / "heads.pt").read_bytes()
    (output / "heads.pt").write_bytes(b"half")
    assert "heads.pt" in complaint(capsys, command)
    torch.save({"heads": torch.zeros(1)}, output / "heads.pt")
    assert "heads.pt is damaged" in complaint(capsys, command)
    (output / "heads.pt").write_bytes(kept)
    assert cli.main(command) == 0
    assert trained == [3] and not list(output.glob("*.pt"))


def test_steps_of_a_repair_that_were_taken_before_a_stop_are_not_again(
    inputs, tmp_path, capsys, monkeypatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"criterion": "l1", "repair": "refit-linear+refit-modules"}
    assert cli.main(prune_command(inputs, whole, **options)) == 0
    command = prune_command(inputs, broken, **options)
    apply = pipeline.repair.apply

    def interrupting(step, *arguments, **others):
        if step == "refit-modules":
            raise KeyboardInterrupt
        return apply(step, *arguments, **others)

    def only_modules(step, *arguments, **others):
        assert step == "refit-modules"
        return apply(step, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.repair, "apply", interrupting)
        assert cli.main(command) == 130
    capsys.readouterr()
    kept = torch.load(broken / "repaired.pt")
    for damaged in ({}, kept | {"model": {"conv1.weight": torch.zeros(1)}}):
        torch.save(damaged, broken / "repaired.pt")
        assert "repaired.pt is damaged" in complaint(capsys, command)
    torch.save(kept, broken / "repaired.pt")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.repair, "apply", only_modules)
        assert cli.main(command) == 0
    assert (broken / "slim.safetensors").read_bytes() == (whole / "slim.safetensors").read_bytes()
    refits = [json.loads((f / "report.json").read_text())["refits"] for f in (broken, whole)]
    assert refits[0] == refits[1] and not list(broken.glob("*.pt"))


def test_a_stop_before_the_last_files_are_removed_leaves_none(inputs, tmp_path, monkeypatch):
    output = tmp_path / "run"
    command = prune_command(inputs, output, repair="batchnorm")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.RunFolder, "remove", stopped)
        assert cli.main(command) == 130
    assert {"report.json", "repaired.pt", "statistics.pt"} <= {f.name for f in output.iterdir()}
    assert cli.main(command) == 0
    left = {"plan.json", "report.json", "settings.json", "slim.safetensors"}
    assert {f.name for f in output.iterdir()} == left | {"snapshot.safetensors"}


def test_the_folder_of_a_running_command_is_refused(inputs, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    with locked(output):
        error = complaint(capsys, prune_command(inputs, output, criterion="l1"))
        # The settings are those of the first process, which may be about to write them.
        assert not (output / "settings.json").exists()
    assert f"{output} is in use by process {os.getpid()}" in error


def test_an_interruption_while_the_package_is_imported_is_quiet(tmp_path):
    (tmp_path / "ccp_ext").mkdir()
    slow = "import time; print('importing', flush=True); time.sleep(60)"
    (tmp_path / "ccp_ext" / "__init__.py").write_text(slow)
    path = os.pathsep.join([str(tmp_path), str(Path(ccp_ext.__file__).parents[1])])
    # The tests themselves may run in the background, where interruptions are ignored.
    command_line = (
        "import ccp_command, signal, sys; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(ccp_command.main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command_line],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout.readline() == "importing\n"
        command.send_signal(signal.SIGINT)
        assert command.communicate(timeout=30) == ("", "")
    assert command.returncode == 130


def test_a_run_says_which_allocation_its_criterion_led_to(inputs, whole, tmp_path):
    assert cli.main(prune_command(inputs, tmp_path / "l1", criterion="l1", images=32)) == 0
    taken = [
        ccp_ext.PruningPlan.load(folder / "plan.json").record["allocation"]["method"]
        for folder in (whole, tmp_path / "l1")
    ]
    assert taken == ["optimal", "uniform"]


def test_a_refit_may_follow_every_round(inputs, tmp_path, capsys):
    output = tmp_path / "run"
    options = {"rounds": 2, "repair": "refit", "macs": 0.4}
    assert cli.main(prune_command(inputs, output, **options)) == 0
    stages = json.loads((output / "report.json").read_text())["stages"]
    names = ["plain", "pruned, round 1", "refitted, round 1", "pruned", "refitted"]
    assert [row["stage"] for row in stages] == names
    # The targets are the plain model's, so that the last refit is that of a single round with the
    # same channels, but for the old weights that the ridge draws it to.
    plain = models.create("resnet8")
    state = torch.load(inputs / "weights.th", weights_only=True)["state_dict"]
    plain.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    train = ccp_ext.datasets.load(inputs / "data.npz", "train")
    images = sample(train, 64, 0, "repair")
    plan = ccp_ext.PruningPlan.load(output / "plan.json")
    once = ccp_ext.prune(copy.deepcopy(plain), plan)
    cut = ccp_ext.prune(copy.deepcopy(plain), plan)
    ccp_ext.refit(plain.eval(), once, images, progress=False)
    slim = ccp_ext.load(output / "slim.safetensors", lambda: models.create("resnet8"))
    x = train.normalise(images.images)
    with torch.no_grad():
        outputs = [m.eval()(x) for m in (plain, cut, once, slim)]
    before, single, rounds = ((o - outputs[0]).square().mean() for o in outputs[1:])
    assert rounds < 1.5 * single < before
    assert "fold" in complaint(
        capsys, prune_command(inputs, tmp_path / "fold", **{**options, "repair": "fold+refit"})
    )


def test_without_options_the_command_does_what_the_functions_do(monkeypatch):
    subject = {"model": "resnet8", "weights": "w.pt", "data": "digits"}
    words = [word for name, value in subject.items() for word in (f"--{name}", value)]
    words += ["--macs", "0.5", "--output", "run"]

    class Stop(Exception):
        pass

    def given(settings, *_, **others):
        raise Stop(settings)

    monkeypatch.setattr(pipeline, "run", given)
    monkeypatch.setattr(compare, "compare", given)
    for command, expected in (
        ("prune", pipeline.PruneSettings(**subject, macs=0.5)),
        ("compare", compare.CompareSettings(**subject, macs=(0.5,))),
    ):
        with pytest.raises(Stop) as stop:
            cli.main([command, *words])
        assert stop.value.args == (expected,)


def test_distillation_of_a_comparison_without_epochs_is_refused(capsys):
    subject = ("--model", "resnet8", "--weights", "w.pt", "--data", "digits")
    command = ["compare", *subject, "--macs", "0.5", "--output", "run", "--distil"]
    assert "distil is given, but there is no fine-tuning (epochs)" in complaint(capsys, command)


@pytest.mark.parametrize("option", ["--distil", "--auxiliary-heads=2"])
def test_options_of_fine_tuning_without_epochs_are_refused(option, inputs, tmp_path, capsys):
    error = complaint(capsys, [*prune_command(inputs, tmp_path / "run"), option])
    assert "is given, but there is no fine-tuning (epochs)" in error


@pytest.mark.gpu
def test_prune_on_a_gpu(cuda, inputs, tmp_path):
    assert cli.main(prune_command(inputs, tmp_path / "run", epochs=1, device=cuda)) == 0
    stages = json.loads((tmp_path / "run" / "report.json").read_text())["stages"]
    assert len(stages) == 4 and stages[1]["MACs"] <= 0.5 * stages[0]["MACs"]


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(inputs, tmp_path, capsys):
    output = tmp_path / "run"
    command = prune_command(inputs, output, criterion="l1")
    assert cli.main(command) == 0
    before = (output / "slim.safetensors").stat().st_mtime_ns
    assert cli.main(command) == 0
    assert (output / "slim.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()
    error = complaint(capsys, prune_command(inputs, output, criterion="l2"))
    assert "holds a run with criterion='l1', not 'l2'" in error


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The folder of a run that nobody interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(prune_command(inputs, output, epochs=1)) == 0
    return output


@pytest.mark.parametrize("stage", ["plain", "statistics", "pruned", "refitted", "fine-tuned"])
def test_an_interrupted_run_goes_on_to_the_same_model(
    stage, whole, inputs, tmp_path, capsys, monkeypatch
):
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(gathering, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        if stage == "statistics":
            original = gathering._Checkpoint.save

            def interrupted(self, batches, images):
                original(self, batches, images)
                raise KeyboardInterrupt

            patch.setattr(gathering._Checkpoint, "save", interrupted)
        else:
            record = pipeline._Recorder.record

            def interrupted(self, name, model):
                if name == stage:
                    raise KeyboardInterrupt
                record(self, name, model)

            patch.setattr(pipeline._Recorder, "record", interrupted)
        capsys.readouterr()
        assert cli.main(prune_command(inputs, broken, epochs=1)) == 130
        assert "interrupted; the same command goes on from here" in capsys.readouterr().err
    assert not (broken / "report.json").exists() and not list(broken.glob(".*"))

    assert cli.main(prune_command(inputs, broken, epochs=1)) == 0
    assert (broken / "slim.safetensors").read_bytes() == (whole / "slim.safetensors").read_bytes()


def test_bad_input_ends_with_one_sentence_and_writes_nothing(inputs, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("plain text")
    (tmp_path / "broken.th").write_bytes(b"not a checkpoint")
    torch.save(models.create("resnet20").state_dict(), tmp_path / "other.th")
    poisoned = models.create("resnet8").state_dict()
    poisoned["linear.weight"].fill_(float("nan"))
    torch.save(poisoned, tmp_path / "nan.th")
    with np.load(inputs / "data.npz") as arrays:
        labels = arrays["train_labels"].copy()
        labels[3] = -1
        np.savez(tmp_path / "labels.npz", **{**arrays, "train_labels": labels})
    cases = [
        ({"weights": "missing.th"}, "weights 'missing.th': no such file"),
        ({"weights": tmp_path / "broken.th"}, "not a readable PyTorch file"),
        ({"weights": tmp_path / "other.th"}, "do not fit"),
        ({"weights": tmp_path / "nan.th"}, "linear.weight is not finite"),
        ({"weights": tmp_path / "text.pt"}, "not a readable PyTorch file"),
        ({"model": "builtins:dict"}, "must return a torch.nn.Module, got dict"),
        ({"model": "builtins:range"}, "constructor fails"),
        ({"rows": 0}, "rows must be a positive integer, got 0"),
        ({"temperature": "nan"}, "temperature must be positive, got nan"),
        ({"seed": 10**30}, "seed must be at least 0"),
        ({"data": "missing.npz"}, "'missing.npz' is unknown"),
        ({"data": tmp_path / "labels.npz"}, "hold -1"),
        ({"model": "resnet57"}, "resnet57"),
        ({"model": "no_such_module:make"}, "cannot be imported"),
        ({"criterion": "magic"}, "criterion must be one of"),
        ({"macs": 0.01}, "0.01"),
        ({"macs": 1.5}, "1.5"),
        ({"macs": None, "ratio": 1.0}, "1.0"),
        ({"macs": None, "latency": "5"}, "latency must be a fraction"),
        ({"macs": None, "latency": 0.5, "latency-table": "missing.json"}, "'missing.json'"),
        ({"latency-table": "table.json"}, "latency_table is given, but the budget is not"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"minimum": 0}, "minimum must be an integer >= 1; got 0"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"repair-memory": 0}, "repair_memory must be a positive number of GiB, got 0.0"),
        ({"repair": "refit+refit-linear"}, "repair must be none, or steps of fold, refit-linear"),
        ({"device": "tpu"}, "device must be auto or one of cpu"),
        ({"epochs": 1, "learning-rate": -1}, "learning_rate"),
    ]
    for changes, message in cases:
        output = tmp_path / "run"
        error = complaint(capsys, prune_command(inputs, output, **changes))
        assert message in error, changes
        assert not output.exists(), changes
    error = complaint(capsys, prune_command(inputs, tmp_path / "nan", weights=tmp_path / "nan.th"))
    assert "not finite" in error
    assert not (tmp_path / "nan" / "slim.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "[]"),
        ("settings.json", "{"),
        ("stages.json", '[{"stage": "plain"}]'),
        ("plan.json", "{}"),
        ("statistics.pt", "text"),
        ("report.json", "[]"),
        ("report.json", "{}"),
    ],
)
def test_a_damaged_run_folder_is_refused(name, content, inputs, tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(criteria, "gather", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(prune_command(inputs, output)) == 130
    capsys.readouterr()
    (output / name).write_text(content)
    assert name in complaint(capsys, prune_command(inputs, output))


def test_a_run_whose_weights_changed_under_their_name_is_refused(inputs, tmp_path, capsys):
    weights = tmp_path / "weights.th"
    weights.write_bytes((inputs / "weights.th").read_bytes())
    command = prune_command(inputs, tmp_path / "run", weights=weights, criterion="l1")
    assert cli.main(command) == 0
    state = torch.load(weights, weights_only=True)
    state["state_dict"]["module.linear.bias"] += 1
    torch.save(state, weights)
    capsys.readouterr()
    assert "holds a run with content of weights=" in complaint(capsys, command)


ROUNDS = {"rounds": 3, "repair": "batchnorm", "allocation": "optimal", "macs": 0.4, "minimum": 2}


@pytest.fixture(scope="module")
def in_rounds(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("rounds") / "run"
    assert cli.main(prune_command(inputs, output, **ROUNDS)) == 0
    return output


def test_rounds_reach_the_budget_by_equal_factors(in_rounds):
    report = json.loads((in_rounds / "report.json").read_text())
    assert [row["stage"] for row in report["stages"]] == [
        "plain",
        "pruned, round 1",
        "re-estimated, round 1",
        "pruned, round 2",
        "re-estimated, round 2",
        "pruned",
        "re-estimated",
    ]
    macs = {row["stage"]: row["MACs"] for row in report["stages"]}
    for stage, share in (("pruned, round 1", 0.4 ** (1 / 3)), ("pruned, round 2", 0.4 ** (2 / 3))):
        assert 0.95 * share < macs[stage] / macs["plain"] <= share
    assert 0.38 < macs["pruned"] / macs["plain"] <= 0.4
    assert sorted(p.name for p in in_rounds.iterdir()) == [
        "plan.json",
        "report.json",
        "settings.json",
        "slim.safetensors",
        "snapshot.safetensors",
    ]


def test_the_plan_of_all_rounds_is_for_the_plain_model(in_rounds, inputs):
    plan = ccp_ext.PruningPlan.load(in_rounds / "plan.json")
    model = ccp_ext.prune(models.create("resnet8"), plan)
    slim = ccp_ext.load(in_rounds / "slim.safetensors", lambda: models.create("resnet8"))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in slim.state_dict().items()}
    # The weights that stay are those of the plain model at the plan's positions.
    plain = torch.load(inputs / "weights.th", weights_only=True)["state_dict"]
    cut = plan.modules["layer2.0.conv1"]
    expected = plain["module.layer2.0.conv1.weight"][list(cut.out)]
    assert torch.equal(slim.state_dict()["layer2.0.conv1.weight"], expected)
    assert all(len(group.kept) >= 2 for group in plan.groups.values())


def test_each_round_is_measured_against_its_forecast(in_rounds, whole):
    rows = json.loads((in_rounds / "report.json").read_text())["forecast"]
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["loss change"] == row["loss after"] - row["loss before"]
        assert row["objective"] > 0
    rows = json.loads((whole / "report.json").read_text())["forecast"]
    assert [row["round"] for row in rows] == [1]
    plan = ccp_ext.PruningPlan.load(whole / "plan.json")
    assert rows[0]["objective"] == plan.record["allocation"]["objective"]


@pytest.mark.parametrize("stage", ["pruned, round 1", "statistics2.pt", "re-estimated, round 2"])
def test_interrupted_rounds_go_on_to_the_same_model(
    stage, in_rounds, inputs, tmp_path, monkeypatch
):
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        record, save = pipeline._Recorder.record, gathering._Checkpoint.save

        def stopped_record(self, name, model):
            if name == stage:
                raise KeyboardInterrupt
            record(self, name, model)

        def stopped_save(self, batches, images):
            save(self, batches, images)
            if self.path.name == stage:
                raise KeyboardInterrupt

        patch.setattr(pipeline._Recorder, "record", stopped_record)
        patch.setattr(gathering._Checkpoint, "save", stopped_save)
        assert cli.main(prune_command(inputs, broken, **ROUNDS)) == 130
    assert not (broken / "report.json").exists()
    assert cli.main(prune_command(inputs, broken, **ROUNDS)) == 0
    assert (broken / "slim.safetensors").read_bytes() == (
        in_rounds / "slim.safetensors"
    ).read_bytes()
    forecasts = [
        json.loads((folder / "report.json").read_text())["forecast"]
        for folder in (broken, in_rounds)
    ]
    assert forecasts[0] == forecasts[1]


def test_modules_are_refitted_after_the_layers(inputs, tmp_path):
    weights = []
    for repair in ("refit-linear", "refit-linear+refit-modules"):
        output = tmp_path / repair
        assert cli.main(prune_command(inputs, output, criterion="l1", repair=repair)) == 0
        weights.append(safetensors.load_file(output / "slim.safetensors"))
    stages = json.loads((output / "report.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages][-2:] == ["refitted linearly", "modules refitted"]
    assert any(not torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


@pytest.mark.parametrize("criterion", ["ccp", "l1"])
def test_a_ratio_in_rounds_ends_with_the_same_counts(criterion, inputs, tmp_path):
    counts = []
    for rounds in (1, 2):
        output = tmp_path / f"{rounds}"
        changes = {"macs": None, "ratio": 0.55, "rounds": rounds, "criterion": criterion}
        assert cli.main(prune_command(inputs, output, **changes)) == 0
        plan = ccp_ext.PruningPlan.load(output / "plan.json")
        counts.append({name: len(group.kept) for name, group in plan.groups.items()})
    assert counts[0] == counts[1]


def weights_in_tiles(module, arguments):
    """The milliseconds of a made-up machine: 8 outputs take as long as 1."""
    weights = [m.weight for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    return float(sum(-(-len(w) // 8) * w[0].numel() for w in weights))


def test_a_latency_budget_measures_a_table_once(inputs, tmp_path, capsys, monkeypatch):
    measured = pipeline.measure.latency_table
    monkeypatch.setattr(
        pipeline.measure,
        "latency_table",
        lambda *arguments: measured(*arguments, timer=weights_in_tiles),
    )
    output = tmp_path / "run"
    command = prune_command(inputs, output, macs=None, latency=0.7, criterion="l1", rounds=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline._Recorder, "record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert cli.main(command) == 130
    table = ccp_ext.LatencyTable.load(output / "latency.json")
    assert cli.main(command) == 0
    assert ccp_ext.LatencyTable.load(output / "latency.json") == table
    model = models.create("resnet8")
    graph = ccp_ext.trace(model, torch.zeros(1, 3, 16, 16))
    plan = ccp_ext.PruningPlan.load(output / "plan.json")
    keep = {name: len(group.kept) for name, group in plan.groups.items()}
    assert table.predict(graph, keep) <= 0.7 * table.milliseconds

    saved = prune_command(
        inputs,
        tmp_path / "again",
        **{"macs": None, "latency": f"{0.7 * table.milliseconds}ms"},
        **{"latency-table": output / "latency.json", "criterion": "l1", "rounds": 2},
    )
    assert cli.main(saved) == 0
    again = ccp_ext.PruningPlan.load(tmp_path / "again" / "plan.json")
    assert again.groups == plan.groups
    content = json.loads((output / "latency.json").read_text())
    (output / "latency.json").write_text(json.dumps({**content, "device": "another"}))
    capsys.readouterr()
    assert "content of latency_table" in complaint(capsys, saved)


def test_the_latency_table_of_a_folder_is_read_under_its_lock(
    inputs, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "run"
    command = prune_command(inputs, output, macs=None, latency=0.7, criterion="l1", repair="none")
    measured, tables = pipeline.measure.latency_table, []

    def measure_beside_another_process(*arguments):
        table = measured(*arguments, timer=weights_in_tiles)
        theirs = dataclasses.replace(table, milliseconds=2 * table.milliseconds)
        output.mkdir()
        theirs.save(output / "latency.json")
        tables.extend((table, theirs))
        return table

    monkeypatch.setattr(pipeline.measure, "latency_table", measure_beside_another_process)
    taken = []
    monkeypatch.setattr(
        pipeline, "make_plan", lambda *_, latency_table, **__: taken.append(latency_table) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(command)
    mine, theirs = tables
    assert taken == [theirs] != [mine]
    assert ccp_ext.LatencyTable.load(output / "latency.json") == theirs
    (output / "latency.json").write_text("{")
    with locked(output):
        assert "is in use by process" in complaint(capsys, command)
    assert "latency.json' is malformed" in complaint(capsys, command)


def test_only_training_images_decide(inputs, tmp_path, monkeypatch):
    """Statistics, re-estimation and fine-tuning see the same whatever the test images are."""
    with np.load(inputs / "data.npz") as arrays:
        blank = {**arrays, "test_images": np.zeros_like(arrays["test_images"])}
    np.savez(tmp_path / "data.npz", **blank)
    models_made = []
    for data in (inputs / "data.npz", tmp_path / "data.npz"):
        output = tmp_path / f"run{len(models_made)}"
        assert cli.main(prune_command(inputs, output, data=data, epochs=1)) == 0
        with safetensors.safe_open(output / "slim.safetensors", "pt") as file:
            models_made.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    first, second = models_made
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_not_finite_stops_the_statistics(inputs, monkeypatch):
    """Finite outputs can still lose: the statistics look at the loss themselves."""
    train = ccp_ext.datasets.load(inputs / "data.npz", "train")
    model = models.create("resnet8").eval()
    model.linear.bias.data[0] = float("inf")
    graph = ccp_ext.trace(model, train.normalise(train.images[:1])).inner
    with pytest.raises(ccp_ext.InputError, match="statistics: the loss is nan"):
        criteria.gather(model, graph, criteria.get("ccp-paper"), train, progress=False)


def test_info_and_criteria(capsys):
    assert cli.main(["info"]) == 0
    info = capsys.readouterr().out
    assert ccp_ext.__version__ in info and torch.__version__ in info and "cpu" in info
    assert cli.main(["criteria"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ccp_ext.criteria.names())
    assert "allocation: optimal" in listed and "allocation: uniform" in listed
