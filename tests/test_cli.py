"""The command line on real files: the whole job, its bad inputs, and its interruptions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import ccp_ext
from ccp_ext import cli, models, pipeline


def prune_command(inputs, output, **changes):
    options = {
        "model": "resnet8",
        "weights": inputs / "weights.th",
        "data": inputs / "data.npz",
        "macs": 0.5,
        "images": 64,
        "reestimate-images": 64,
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
    assert [row["stage"] for row in stages] == ["plain", "pruned", "re-estimated", "fine-tuned"]
    assert all(row["stage"] in printed for row in stages)
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


@pytest.mark.parametrize("stage", ["plain", "statistics", "pruned", "re-estimated", "fine-tuned"])
def test_an_interrupted_run_goes_on_to_the_same_model(
    stage, whole, inputs, tmp_path, capsys, monkeypatch
):
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        if stage == "statistics":
            original = pipeline._save_statistics

            def interrupted(stats, checkpoint, batches):
                original(stats, checkpoint, batches)
                raise KeyboardInterrupt

            patch.setattr(pipeline, "_save_statistics", interrupted)
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
        ({"images": 0}, "images must be at least 1, got 0"),
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
        patch.setattr(pipeline, "gather", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
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


def test_only_training_images_decide(inputs, tmp_path, monkeypatch):
    """Statistics, re-estimation and fine-tuning see the same whatever the test images are."""
    with np.load(inputs / "data.npz") as arrays:
        blank = {**arrays, "test_images": np.zeros_like(arrays["test_images"])}
    np.savez(tmp_path / "data.npz", **blank)
    models_made = []
    for data in (inputs / "data.npz", tmp_path / "data.npz"):
        output = tmp_path / f"run{len(models_made)}"
        assert cli.main(prune_command(inputs, output, data=data, epochs=1)) == 0
        with safe_open(output / "slim.safetensors", "pt") as file:
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
        pipeline.gather(model, graph, ccp_ext.criteria.get("ccp-paper"), train, progress=False)


def test_info_and_criteria(capsys):
    assert cli.main(["info"]) == 0
    info = capsys.readouterr().out
    assert ccp_ext.__version__ in info and torch.__version__ in info and "cpu" in info
    assert cli.main(["criteria"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ccp_ext.criteria.names())
