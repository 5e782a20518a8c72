"""Fine-tuning: what is learned, resumption to the bit, refusals and the files."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ccp_ext.auxiliary import AuxiliaryHeads
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import Evaluation, evaluate
from ccp_ext.finetune import FinetuneConfig, finetune
from ccp_ext.finetune.run import Run, _epoch_seed
from ccp_ext.graph import trace

SETTINGS = dict(epochs=4, batch_size=16, learning_rate=0.05, seed=3, augment="crop_flip")


def bright_or_dark(count: int = 60, split: str = "train") -> ImageSet:
    """Three classes of noisy grey levels."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 60, (count, 1, 6, 6), generator=generator)
    images = (labels.view(-1, 1, 1, 1) * 90 + noise).clamp(max=255).to(torch.uint8)
    return ImageSet(images, labels, (0.5,), (0.25,), 3, "levels", split)


def network(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    assert_equal_states(a.state_dict(), b.state_dict())


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for (name, x), y in zip(a.items(), b.values(), strict=True):
        assert torch.equal(x, y), name


def without_seconds(history):
    return [tuple(vars(record).values())[:-1] for record in history]


class Stop(Exception):
    pass


def stop_after(epochs: int, exception: type[BaseException] = Stop):
    """A validation that raises in epoch ``epochs + 1``, so that ``epochs`` checkpoints exist."""
    seen = []

    def validate(model):
        seen.append(1)
        if len(seen) > epochs:
            raise exception
        return 50.0

    return validate


def fifty(model):
    return 50.0


# Training


def test_training_learns_and_records_each_epoch():
    model, test = network(), bright_or_dark(30, "test")
    settings = {**SETTINGS, "epochs": 40, "learning_rate": 0.2}
    history = finetune(model, bright_or_dark(), **settings, validate=test, progress=False)
    assert [record.epoch for record in history] == list(range(1, 41))
    assert history[-1].train_loss < 0.6 * history[0].train_loss
    result = evaluate(model, test, progress=False)
    assert result.accuracy > 90
    assert history[-1].validation_accuracy == result.accuracy
    assert history[-1].validation_loss == pytest.approx(result.loss, rel=1e-6)
    assert history[-1].seconds > 0


def test_one_step_is_that_of_sgd_written_out():
    data, model = bright_or_dark(8), network()
    model[3].p = 0.0
    oracle = copy.deepcopy(model).train()
    finetune(
        model,
        data,
        epochs=1,
        batch_size=8,
        learning_rate=0.1,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.5,
        label_smoothing=0.1,
        schedule="step",
        step_at=(),
        progress=False,
    )
    [(x, y)] = data.batches(8)
    cross_entropy(oracle(x), y, label_smoothing=0.1).backward()
    for new, old in zip(model.parameters(), oracle.parameters(), strict=True):
        decay = 0.5 if old.ndim > 1 else 0.0
        torch.testing.assert_close(new.data, old.data - 0.1 * (old.grad + decay * old.data))


def test_mixup_blends_images_and_losses_by_one_share():
    data, model = bright_or_dark(8), network()
    model[3].p = 0.0
    oracle, seen = copy.deepcopy(model).train(), []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    [record] = finetune(model, data, epochs=1, batch_size=8, mixup=1.0, seed=1, progress=False)
    handle.remove()
    # Which share and order were drawn shows in the first image, a blend of two of the set.
    [(x, y)] = data.batches(8, shuffle=True, seed=_epoch_seed(1, 0))
    [mixed] = seen
    shares = torch.linalg.lstsq(x.flatten(1).double().T, mixed.flatten(1).double().T).solution
    torch.testing.assert_close(shares.sum(0), torch.ones(8).double())
    share = shares.diagonal().min()
    order = (shares - share * torch.eye(8)).argmax(0)
    assert 0.01 < share < 0.99 and (order != torch.arange(8)).any()
    torch.testing.assert_close(mixed, (share * x + (1 - share) * x[order]).float())
    logits = oracle(mixed)
    expected = share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, y[order])
    assert record.train_loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_moving_average_is_validated_and_returned():
    decay, steps, validated = 0.8, [], []

    def watch(model):
        validated.append(copy.deepcopy(model.state_dict()))
        return 50.0

    model = network()
    model.register_forward_pre_hook(
        lambda module, inputs: steps.append(copy.deepcopy(module.state_dict()))
    )
    finetune(model, bright_or_dark(16), epochs=2, batch_size=4, ema_decay=decay, validate=watch)
    plain = network()
    finetune(plain, bright_or_dark(16), epochs=2, batch_size=4)
    name = "0.weight"
    weights = [state[name] for state in steps[1:]] + [plain.state_dict()[name]]
    average = weights[0]
    for weight in weights[1:]:
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.state_dict()[name], average)
    assert not torch.allclose(average, weights[-1])
    assert_equal_states(model.state_dict(), validated[-1])


def heads(model: nn.Module) -> AuxiliaryHeads:
    torch.manual_seed(5)
    return AuxiliaryHeads.spread(model, trace(model, torch.zeros(1, 1, 6, 6)), 3, count=1)


def test_auxiliary_heads_add_their_losses_and_are_trained_with_the_model():
    data = bright_or_dark(8)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *network(width=5).children())
    model[2] = nn.Conv2d(4, 5, 3, bias=False)
    model[5].p = 0.0
    auxiliary = heads(model)
    [tap], [head] = auxiliary.taps, auxiliary.heads
    assert tap.module == "2" and tap.port == "input"
    oracle, oracle_head = copy.deepcopy(model).train(), copy.deepcopy(head).train()
    settings = dict(epochs=1, batch_size=8, momentum=0.0, nesterov=False, weight_decay=0.0)
    settings |= dict(schedule="step", step_at=(), learning_rate=0.1, auxiliary_weight=0.5)
    [record] = finetune(model, data, **settings, auxiliary=auxiliary, progress=False)
    [(x, y)] = data.batches(8)
    features = oracle[1](oracle[0](x))
    own = cross_entropy(oracle[2:](features), y)
    loss = own + 0.5 * cross_entropy(oracle_head(features), y)
    loss.backward()
    assert record.train_loss == pytest.approx(loss.item(), rel=1e-5)
    pairs = [(model, oracle), (head, oracle_head)]
    for new, old in (p for a, b in pairs for p in zip(a.parameters(), b.parameters(), strict=True)):
        torch.testing.assert_close(new.data, old.data - 0.1 * old.grad)


def test_norm_and_bias_decay_only_on_demand():
    common = dict(epochs=1, batch_size=60, learning_rate=0.1, weight_decay=0.9, progress=False)
    spared, decayed = network(), network()
    finetune(spared, bright_or_dark(), **common)
    finetune(decayed, bright_or_dark(), **common, decay_norm_and_bias=True)
    assert decayed[1].weight.abs().sum() < spared[1].weight.abs().sum()
    assert torch.equal(decayed[0].weight, spared[0].weight)


def test_runs_repeat_to_the_bit_and_depend_on_the_seed():
    first, second, other = network(), network(), network()
    data = bright_or_dark()
    finetune(first, data, **SETTINGS, progress=False)
    torch.manual_seed(99)
    finetune(second, data, **SETTINGS, progress=False)
    finetune(other, data, **{**SETTINGS, "seed": 4}, progress=False)
    assert_equal_weights(first, second)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_global_random_state_and_training_flags_are_left_alone():
    model = network().eval()
    model[3].train()
    before = torch.get_rng_state()
    finetune(model, bright_or_dark(), epochs=1, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in model] == [False] * 3 + [True] + [False] * 3


def test_frozen_parameters_stay():
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    finetune(model, bright_or_dark(), epochs=1, progress=False)
    assert torch.equal(model[0].weight, before)


def test_channels_last_and_bfloat16_train_as_well():
    plain = finetune(network(), bright_or_dark(), **SETTINGS, progress=False)
    model = network()
    fast = finetune(
        model, bright_or_dark(), **SETTINGS, channels_last=True, amp=True, progress=False
    )
    assert fast[-1].train_loss == pytest.approx(plain[-1].train_loss, rel=0.1)
    assert model[0].weight.dtype == torch.float32


# Distillation


def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_scale():
    model = network()
    norm, dropout = model[1], model[3]
    norm.running_mean.fill_(0.1)
    before = copy.deepcopy(norm)
    flags = []
    dropout.register_forward_hook(lambda m, _, __: flags.append((m.training, norm.training)))
    history = finetune(model, bright_or_dark(), **SETTINGS, freeze_batchnorm=True, progress=False)
    assert set(flags) == {(True, False)}
    assert norm.training  # as before the training
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(norm, name), getattr(before, name)), name
    assert not torch.equal(norm.weight, before.weight)
    assert history[-1].train_loss < history[0].train_loss


def test_a_teacher_alone_pulls_the_model_to_its_outputs():
    data, teacher, model = bright_or_dark(), network(1), network(2)
    with torch.no_grad():
        teacher[6].weight.mul_(4)
    teacher.train()
    before = copy.deepcopy(teacher)
    options = {**SETTINGS, "epochs": 25, "distillation_weight": 1.0, "temperature": 2.0}

    def divergence() -> float:
        [(x, _)] = data.batches(100)
        with torch.no_grad():
            taught, own = (net.eval()(x).log_softmax(1) for net in (teacher, model))
        return float((taught.exp() * (taught - own)).sum(1).mean())

    at_start = divergence()
    teacher.train()
    finetune(model, data, **options, teacher=teacher, progress=False)
    assert all(module.training for module in teacher.modules())
    assert_equal_weights(teacher, before)
    assert divergence() < 0.2 * at_start


def test_the_distillation_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    own, taught = (torch.randn(5, 3, generator=generator) for _ in range(2))
    y = torch.tensor([0, 1, 2, 0, 1])
    config = FinetuneConfig(distillation_weight=0.3, temperature=3.0)
    run = Run(None, None, None, config, None, None, False)
    q, p = (own.double() / 3).softmax(1), (taught.double() / 3).softmax(1)
    expected = 0.7 * cross_entropy(own, y) + 0.3 * 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(run._loss(own, ((1.0, y),), taught), expected.float())


def test_distillation_leaves_the_weight_of_auxiliary_heads_as_it_is():
    generator = torch.Generator().manual_seed(0)
    own, taught, *others = (torch.randn(5, 3, generator=generator) for _ in range(4))
    y = torch.tensor([0, 1, 2, 0, 1])
    config = FinetuneConfig(distillation_weight=0.3, auxiliary_weight=0.5)
    alone = Run(None, None, None, config, None, None, False)
    beside = dataclasses.replace(alone, auxiliary=lambda: others)
    expected = alone._loss(own, ((1.0, y),), taught) + 0.5 * sum(
        cross_entropy(logits, y) for logits in others
    )
    torch.testing.assert_close(beside._loss(own, ((1.0, y),), taught), expected)


def test_a_teacher_of_other_classes_is_refused():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    with pytest.raises(InputError, match=r"teacher's logits have shape \(16, 5\)"):
        finetune(network(), bright_or_dark(), **SETTINGS, teacher=teacher, progress=False)


def test_the_model_cannot_teach_itself():
    model = network()
    with pytest.raises(InputError, match="teacher is the model itself"):
        finetune(model, bright_or_dark(), **SETTINGS, teacher=model, progress=False)


# Settings


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", "fast"),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("schedule", "linear"),
        ("warmup_epochs", 10),
        ("step_at", (0.7, 0.5)),
        ("step_at", (0.5, 1.0)),
        ("step_at", 0.5),
        ("step_factor", 0),
        ("label_smoothing", 1.0),
        ("distillation_weight", 1.5),
        ("temperature", 0.0),
        ("auxiliary_weight", math.inf),
        ("mixup", -0.1),
        ("ema_decay", 1.0),
        ("augment", "cutout"),
        ("seed", -1),
    ],
)
def test_a_bad_setting_is_refused_by_name(option, value):
    with pytest.raises(InputError, match=f"^{option} must be "):
        FinetuneConfig(**{option: value})


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(InputError, match="nesterov must be False when momentum is 0"):
        FinetuneConfig(momentum=0.0)


def test_the_cosine_schedule_warms_up_and_falls_to_zero():
    config = FinetuneConfig(epochs=10, learning_rate=0.2, warmup_epochs=2)
    assert config.learning_rate_at(0.5) == pytest.approx(0.05)
    assert config.learning_rate_at(2) == pytest.approx(0.2)
    assert config.learning_rate_at(6) == pytest.approx(0.1)
    assert config.learning_rate_at(10 - 1e-9) == pytest.approx(0.0, abs=1e-9)


def test_the_step_schedule_falls_at_its_fractions():
    config = FinetuneConfig(epochs=8, learning_rate=1.0, schedule="step")
    rates = [config.learning_rate_at(epoch) for epoch in (0, 3.99, 4, 5.99, 6, 7.9)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_given_config_can_be_changed_in_the_call():
    config = FinetuneConfig(**SETTINGS)
    history = finetune(network(), bright_or_dark(), config, epochs=2, progress=False)
    assert len(history) == 2


def test_training_on_the_test_split_is_refused():
    with pytest.raises(InputError, match="test split is for evaluation only"):
        finetune(network(), bright_or_dark(split="test"), **SETTINGS, progress=False)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(InputError, match="nothing to train"):
        finetune(network().requires_grad_(False), bright_or_dark(), **SETTINGS, progress=False)


@pytest.mark.parametrize("option", ["checkpoint", "log"])
def test_a_file_in_a_folder_that_does_not_exist_is_refused_at_once(tmp_path, option):
    with pytest.raises(InputError, match=f"{option}: the folder of"):
        finetune(network(), bright_or_dark(), **{option: tmp_path / "no" / "file"}, progress=False)


# Checkpoints


@pytest.mark.parametrize("extras", [{}, {"mixup": 0.4, "ema_decay": 0.9}])
@pytest.mark.parametrize("stopped_after", [1, 3])
@pytest.mark.parametrize("exception", [Stop, KeyboardInterrupt])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(
    tmp_path, stopped_after, exception, extras
):
    settings = {**SETTINGS, **extras}
    data, checkpoint, log = bright_or_dark(), tmp_path / "run.pt", tmp_path / "run.csv"
    unbroken = network()
    expected = finetune(unbroken, data, **settings, validate=fifty, progress=False)
    with pytest.raises(exception):
        finetune(
            network(),
            data,
            **settings,
            validate=stop_after(stopped_after, exception),
            checkpoint=checkpoint,
            log=log,
            progress=False,
        )
    torch.manual_seed(7)
    resumed = network()
    history = finetune(
        resumed,
        data,
        **settings,
        validate=fifty,
        checkpoint=checkpoint,
        log=log,
        progress=False,
    )
    assert_equal_weights(resumed, unbroken)
    assert without_seconds(history) == without_seconds(expected)
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["train_loss"]) for row in rows] == [r.train_loss for r in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.csv", "run.pt"]


def test_a_resumed_run_continues_with_its_auxiliary_heads(tmp_path):
    def run(stop: int | None, **files) -> nn.Module:
        model = network()
        with contextlib.suppress(Stop):
            finetune(
                model,
                bright_or_dark(),
                **SETTINGS,
                auxiliary=heads(model),
                validate=fifty if stop is None else stop_after(stop),
                progress=False,
                **files,
            )
        return model

    run(2, checkpoint=tmp_path / "run.pt")
    resumed = run(None, checkpoint=tmp_path / "run.pt")
    assert_equal_weights(resumed, run(None))
    with pytest.raises(InputError, match="auxiliary heads that the run began with"):
        finetune(network(), bright_or_dark(), **SETTINGS, checkpoint=tmp_path / "run.pt")


def test_a_run_stopped_within_an_epoch_repeats_that_epoch(tmp_path):
    data, checkpoint = bright_or_dark(), tmp_path / "run.pt"
    unbroken = network()
    finetune(unbroken, data, **SETTINGS, progress=False)
    broken, forwards = network(), []

    def stop_in_third_epoch(module, inputs):
        forwards.append(1)
        if len(forwards) == 10:
            raise KeyboardInterrupt

    broken.register_forward_pre_hook(stop_in_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, data, **SETTINGS, checkpoint=checkpoint, progress=False)
    resumed = network()
    finetune(resumed, data, **SETTINGS, checkpoint=checkpoint, progress=False)
    assert_equal_weights(resumed, unbroken)


def test_a_finished_run_is_loaded_without_training(tmp_path):
    data, checkpoint = bright_or_dark(), tmp_path / "run.pt"
    model = network()
    first = finetune(model, data, **SETTINGS, checkpoint=checkpoint, progress=False)
    again = network()
    second = finetune(
        again, data, **SETTINGS, checkpoint=checkpoint, validate=stop_after(0), progress=False
    )
    assert second == first
    assert_equal_weights(again, model)


@pytest.fixture
def finished(tmp_path):
    checkpoint = tmp_path / "run.pt"
    finetune(network(), bright_or_dark(), **SETTINGS, checkpoint=checkpoint, progress=False)
    return checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.06}, "settings: learning_rate is 0.05 there and 0.06 here"),
        ({"epochs": 9}, "settings: epochs is 4 there and 9 here"),
        ({"model": network(width=7)}, r"model: 0.weight is torch.float32 \[6, 1, 3, 3\] there"),
        ({"model": network(seed=1)}, "the model the run began with had other weights"),
        ({"train_set": bright_or_dark(57)}, "data: count is 60 there and 57 here"),
        ({"teacher": network(seed=2)}, "the teacher had other weights"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(finished, change, message):
    before = finished.read_bytes()
    given = {"model": network(), "train_set": bright_or_dark(), **SETTINGS, **change}
    with pytest.raises(InputError, match=f"belongs to another run .*{message}"):
        finetune(**given, checkpoint=finished, progress=False)
    assert finished.read_bytes() == before


def test_a_checkpoint_is_read_without_running_code(finished):
    content = torch.load(finished, weights_only=True)
    assert content["model"].keys() == network().state_dict().keys()
    assert len(content["history"]) == 4


def test_a_broken_or_foreign_checkpoint_is_refused(finished):
    def attempt():
        finetune(network(), bright_or_dark(), **SETTINGS, checkpoint=finished, progress=False)

    finished.write_bytes(finished.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"run\.pt is not a readable PyTorch file"):
        attempt()
    finished.write_bytes(b"")
    with pytest.raises(InputError, match=r"run\.pt is not a readable PyTorch file"):
        attempt()
    torch.save({"weights": torch.zeros(2)}, finished)
    with pytest.raises(InputError, match="was not written by finetune"):
        attempt()


# Failures


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_checkpoint(tmp_path):
    data, checkpoint, model = bright_or_dark(), tmp_path / "run.pt", network()
    forwards = []

    def poison(module, inputs, output):
        forwards.append(1)
        return output * math.nan if len(forwards) == 4 * 2 + 3 else output

    model.register_forward_hook(poison)
    with pytest.raises(
        InputError, match=r"loss became nan in epoch 3, step 3 of 4, at .* rate 0.0"
    ):
        finetune(model, data, **SETTINGS, checkpoint=checkpoint, progress=False)
    content = torch.load(checkpoint, weights_only=True)
    assert len(content["history"]) == 2
    assert all(torch.isfinite(value).all() for value in content["model"].values())
    resumed, unbroken = network(), network()
    finetune(resumed, data, **SETTINGS, checkpoint=checkpoint, progress=False)
    finetune(unbroken, data, **SETTINGS, progress=False)
    assert_equal_weights(resumed, unbroken)


def test_weights_that_overflow_in_the_last_step_are_not_saved(tmp_path):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(InputError, match="no longer finite at the end of epoch 1"):
        finetune(
            network(),
            bright_or_dark(),
            epochs=1,
            batch_size=60,
            learning_rate=3e38,
            weight_decay=100.0,
            checkpoint=checkpoint,
            progress=False,
        )
    assert not checkpoint.exists()


# Reports


def test_validation_may_be_a_function(tmp_path):
    modes = []

    def validate(model):
        modes.append(model.training)
        return Evaluation(accuracy=12.5, loss=0.25, count=8)

    history = finetune(
        network(), bright_or_dark(), epochs=2, batch_size=16, validate=validate, progress=False
    )
    assert modes == [False, False]
    assert [(r.validation_accuracy, r.validation_loss) for r in history] == [(12.5, 0.25)] * 2


def test_each_log_row_is_on_disk_when_its_epoch_ends(tmp_path):
    log, lengths = tmp_path / "log.csv", []

    def validate(model):
        lengths.append(len(log.read_text().splitlines()))
        return 0.0

    finetune(network(), bright_or_dark(), epochs=3, validate=validate, log=log, progress=False)
    assert lengths == [1, 2, 3]


def test_progress_shows_the_epoch_and_the_loss_and_can_be_silent(capsys):
    finetune(network(), bright_or_dark(), epochs=2, batch_size=60)
    shown = capsys.readouterr().err
    assert "epoch 1/2" in shown and "epoch 2/2" in shown and "loss=" in shown
    finetune(network(), bright_or_dark(), epochs=2, batch_size=60, progress=False)
    assert capsys.readouterr().err == ""
