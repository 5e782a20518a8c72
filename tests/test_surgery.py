from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    SMALL_NETWORKS,
    Concat,
    Depthwise,
    SqueezeExcite,
    lively,
    output,
    random_plan,
)
from torch import nn

from ccp_ext import measure, models, surgery
from ccp_ext.cutting import Cut
from ccp_ext.errors import InputError
from ccp_ext.graph import trace
from ccp_ext.plan import PruningPlan

safetensors = pytest.importorskip("safetensors.torch", reason="the format of model files")

IMAGES = (2, 3, 8, 8)


def snapshot(model):
    """Everything that surgery may change: tensors by identity, value and strides, attributes."""
    tensors = {
        name: (tensor, tensor.detach().clone(), tensor.stride(), tensor.grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    plain = {name: str(module) for name, module in model.named_modules()}
    flags = [module.training for module in model.modules()]
    return tensors, plain, flags


def assert_unchanged(model, before):
    tensors, plain, flags = before
    for name, tensor in model.state_dict(keep_vars=True).items():
        same, value, strides, grad = tensors[name]
        assert tensor is same
        assert tensor.grad is grad
        assert torch.equal(tensor, value)
        assert tensor.stride() == strides
    assert {name: str(module) for name, module in model.named_modules()} == plain
    assert [module.training for module in model.modules()] == flags
    assert not hasattr(model, "ccp_plan")


def build(name):
    if name.startswith("torchvision."):
        torchvision = pytest.importorskip("torchvision", reason="compares with its networks")
        return getattr(torchvision.models, name.partition(".")[2])(num_classes=10)
    options = {"width_mult": 0.25} if name == "mobilenetv2" else {}
    return models.create(name, **options)


# --- equality ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "resnet56",
        "vgg16_bn",
        "mobilenetv2",
        "torchvision.resnet18",
        "torchvision.resnet50",
        "torchvision.mobilenet_v2",
    ],
)
def test_pruned_networks_are_smaller_train_and_equal_the_masked_ones(name, scope):
    torch.manual_seed(0)
    model, x = lively(build(name)), torch.randn(1, 3, 32, 32)
    graph = trace(model, x).select_groups(scope)
    plan = random_plan(graph)
    slim = surgery.prune(copy.deepcopy(model), plan, verify=False)

    with surgery.masked(model, plan):
        expected = output(model, x)
    torch.testing.assert_close(output(slim, x), expected, rtol=1e-3, atol=1e-4)
    assert measure.macs(slim, x) == plan.forecast["macs_after"] < plan.forecast["macs_before"]
    assert measure.parameters(slim) == plan.forecast["parameters_after"]
    assert plan.forecast["macs_before"] == measure.macs(model, x)
    for group in graph.groups:
        convolution = slim.get_submodule(group.producers[0].module)
        full = model.get_submodule(group.producers[0].module).weight
        assert convolution.weight.shape[0] < full.shape[0]
        assert convolution.weight.untyped_storage().nbytes() < full.untyped_storage().nbytes()
    F.cross_entropy(slim.train()(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    assert all(p.grad.shape == p.shape for p in slim.parameters())


@pytest.mark.parametrize("network", SMALL_NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_small_networks_equal_the_masked_ones(network, seed):
    torch.manual_seed(seed)
    model, x = lively(network(), seed), torch.randn(IMAGES)
    plan = random_plan(trace(model, x), share=0.4, seed=seed)
    slim = surgery.prune(copy.deepcopy(model), plan)
    with surgery.masked(model, plan):
        expected = output(model, x)
    torch.testing.assert_close(output(slim, x), expected, rtol=1e-4, atol=1e-5)
    assert measure.macs(slim, x) == plan.forecast["macs_after"]
    assert measure.parameters(slim) == plan.forecast["parameters_after"]
    assert not torch.allclose(expected, output(model, x), rtol=1e-2)


def test_pruned_network_traces_to_the_remaining_channels():
    model, x = models.create("resnet8"), torch.randn(1, 3, 16, 16)
    graph = trace(model, x)
    plan = random_plan(graph, share=0.5)
    slim = trace(surgery.prune(model, plan), x)
    assert [g.channels for g in slim.groups] == [len(g.kept) for g in plan.groups.values()]
    assert slim.macs() == plan.forecast["macs_after"]


def test_mask_is_gone_behind_the_context():
    model, x = lively(Concat()), torch.randn(IMAGES)
    plain = output(model, x)
    plan = random_plan(trace(model, x))
    with surgery.masked(model, plan):
        assert not torch.equal(output(model, x), plain)
    assert torch.equal(output(model, x), plain)


def test_mask_lets_gradients_pass_only_to_what_stays():
    model, x = lively(Concat()), torch.randn(IMAGES)
    plan = random_plan(trace(model, x))
    with surgery.masked(model, plan):
        model(x).sum().backward()
    kept = torch.zeros(6, dtype=torch.bool)
    kept[list(plan.groups["left"].kept)] = True
    gradient = model.left.weight.grad.flatten(1).abs().sum(1)
    assert (gradient[kept] > 0).all()
    assert (gradient[~kept] == 0).all()


# --- what surgery leaves alone -----------------------------------------------------------------


def test_memory_format_dtype_flags_and_hooks_stay():
    torch.manual_seed(0)
    model = lively(SqueezeExcite()).to(memory_format=torch.channels_last).double().train()
    model.bn.eval()
    model.conv.requires_grad_(False)
    model.bn.running_mean.fill_(0.25)
    calls = []
    model.last.register_forward_hook(lambda *_: calls.append(1))
    plan = random_plan(trace(model, torch.randn(IMAGES).double()))
    calls.clear()
    identities = {name: id(p) for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    surgery.prune(model, plan)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    assert model.last.weight.stride()[1] == 1
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert [model.training, model.bn.training] == [True, False]
    assert [model.conv.weight.requires_grad, model.last.weight.requires_grad] == [False, True]
    assert (model.bn.running_mean == 0.25).all()
    assert model.bn.num_batches_tracked == 0
    calls.clear()
    output(model, torch.randn(IMAGES).double())
    assert calls == [1]


def test_an_optimizer_made_before_goes_on_to_train_the_model():
    torch.manual_seed(0)
    model, x = lively(Concat()), torch.randn(IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hits = []
    model.left.weight.register_post_accumulate_grad_hook(hits.append)
    loss = model(x).sum()  # its graph is alive during surgery, as in a training loop
    loss.backward()
    surgery.prune(model, random_plan(trace(model, x)))
    assert all(p.grad is None for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    model.train()(x).square().sum().backward()
    optimizer.step()
    assert len(hits) == 2
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)


# --- refusals ----------------------------------------------------------------------------------


class Sized(nn.Module):
    """Its code can be made to rely on the number of channels after it was traced."""

    channels = None

    def __init__(self):
        super().__init__()
        self.first, self.bn, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8 * 64, 5)

    def forward(self, x):
        x = self.bn(self.first(x))
        return self.last(x.flatten(1) if self.channels is None else self.channels(x))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (lambda x: x.view(-1, 8 * 64), "raises in the model itself"),
        (lambda x: x.flip(1).flatten(1), "output of the pruned model differs from the masked"),
        (lambda x: torch.full_like(x, x.shape[1]).flatten(1), "differs from the masked"),
        (lambda x: x.new_zeros(x.shape[1] + 1, 512)[:, : 64 * x.shape[1]], "has shape"),
    ],
)
def test_failed_verification_restores_everything(code, message):
    torch.manual_seed(0)
    model = lively(Sized()).train()
    model.bn.eval()
    plan = PruningPlan.from_kept(trace(model, torch.randn(IMAGES)), {"first": [0, 2, 3]})
    model(torch.randn(IMAGES)).sum().backward()
    model.channels = code
    before = snapshot(model)
    with pytest.raises(InputError, match=f"verification failed, nothing was changed: .*{message}"):
        surgery.prune(model, plan)
    assert_unchanged(model, before)


def test_verification_names_the_module_that_fails():
    model = nn.Sequential(Sized())
    plan = PruningPlan.from_kept(trace(model, torch.randn(IMAGES)), {"0.first": [0, 2, 3]})
    model[0].channels = lambda x: x.view(-1, 8 * 64)
    with pytest.raises(InputError, match="raises in '0': shape"):
        surgery.prune(model, plan)


def broken(plan, modules):
    return PruningPlan(**{**vars(plan), "modules": {**plan.modules, **modules}})


@pytest.mark.parametrize(
    ("path", "side", "value", "message"),
    [
        ("nowhere", "out", (0,), "no module 'nowhere'"),
        ("bn", "inputs", (0,), "module 'bn' .* no input channels"),
        ("first", "out", (7, 8), r"'first' has 8 positions along 'out'; got \[7, 8\]"),
        ("last", "inputs", (512,), "'last' has 512 positions along 'in'"),
        ("", "out", (0,), r"module '' \(Sized\) is of no kind"),
        ("first", "channel_padding", (0, 1), "'first' .* no attribute channel_padding"),
    ],
)
def test_plans_that_do_not_fit_are_refused_before_the_first_edit(path, side, value, message):
    model = Sized()
    plan = PruningPlan.from_kept(trace(model, torch.randn(IMAGES)), {"first": [0, 2, 3]})
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        surgery.prune(model, broken(plan, {path: Cut(**{side: value})}), verify=False)
    assert_unchanged(model, before)


def test_depthwise_convolutions_make_equally_many_channels_of_each_input():
    model = Depthwise()
    plan = PruningPlan.from_kept(trace(model, torch.randn(IMAGES)), {"first": [0, 2, 3]})
    half = broken(plan, {"depthwise": Cut(out=(0, 4, 5))})
    with pytest.raises(InputError, match="makes 2 channels of each input channel"):
        surgery.prune(model, half, verify=False)


def test_a_plan_for_another_model_is_refused():
    plan = random_plan(trace(models.create("resnet8"), torch.randn(1, 3, 16, 16)))
    other = models.create("resnet20")
    before = snapshot(other)
    with pytest.raises(InputError, match="made for a ResNet whose parameters have other names"):
        surgery.prune(other, plan)
    assert_unchanged(other, before)


# --- verification of models that random inputs do not suit -------------------------------------


class Guarded(nn.Module):
    """Any function before and behind a convolution and a linear layer."""

    def __init__(self, before, after):
        super().__init__()
        self.before, self.after = before, after
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.after(self.last(F.relu(self.first(self.before(x)))))


def guarded(before=lambda x: x, after=lambda x: x):
    model = Guarded(before, after)
    plan = PruningPlan.from_kept(trace(model, torch.rand(IMAGES)), {"first": [0, 2, 3]})
    return model, plan


def half_infinite(x):
    rows = torch.arange(8)
    return x.masked_fill(rows < 2, -torch.inf).masked_fill(rows == 5, torch.nan)


def test_outputs_that_are_partly_not_finite_are_compared_where_they_are():
    model, plan = guarded(after=half_infinite)
    assert surgery.prune(model, plan).first.out_channels == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 1, "differs from the masked model's by 1;"),
        (lambda y: y.flip(3), "is NaN or infinite in other places than the masked model's"),
        (lambda y: y.abs(), "is NaN or infinite in other places than the masked model's"),
    ],
)
def test_outputs_that_are_partly_not_finite_can_still_differ(change, message):
    model, plan = guarded()
    # What the pruned model adds of its own.
    model.after = lambda y: (
        change(half_infinite(y)) if model.first.out_channels == 3 else half_infinite(y)
    )
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        surgery.prune(model, plan)
    assert_unchanged(model, before)


def lookup(x):
    return F.embedding((x * 1000).long(), torch.ones(1000, 1)).squeeze(-1)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (lambda x: (x - 100).sqrt(), "Guarded has no finite output"),
        (lookup, r"Guarded cannot be run \(index out of range in self\)"),
    ],
)
def test_models_that_random_inputs_do_not_suit_can_be_pruned_without_verification(before, message):
    model, plan = guarded(before)
    unchanged = snapshot(model)
    with pytest.raises(InputError, match=message) as caught:
        surgery.prune(model, plan)
    assert "random inputs of shape (2, 3, 8, 8); verify=False" in str(caught.value)
    assert_unchanged(model, unchanged)
    assert surgery.prune(model, plan, verify=False).first.out_channels == 3


def replace_counter(model, x):
    model.calls = model.calls + 1
    return x


@pytest.mark.parametrize("write", [lambda model, x: x, replace_counter])
def test_verification_leaves_no_trace_in_buffers_that_the_forward_writes(write):
    model, plan = guarded()
    model.before = lambda x: write(model, x)
    counter = model.calls
    surgery.prune(model, plan)
    assert model.calls is counter
    assert counter == 0


# --- files -------------------------------------------------------------------------------------


def slim_resnet8(share=0.5):
    torch.manual_seed(0)
    model = lively(models.create("resnet8"))
    plan = random_plan(trace(model, torch.randn(1, 3, 16, 16)), share)
    return surgery.prune(model, plan).eval()


@pytest.mark.parametrize("channels_last", [False, True])
def test_loaded_models_give_equal_bits_in_a_new_process(tmp_path, channels_last):
    slim, x = slim_resnet8(), torch.randn(4, 3, 16, 16)
    if channels_last:
        slim = slim.to(memory_format=torch.channels_last)
    surgery.save(slim, tmp_path / "slim.safetensors")
    safetensors.save_file({"x": x}, tmp_path / "x.safetensors")
    program = f"""
        from functools import partial
        import torch
        from safetensors.torch import load_file, save_file
        from ccp_ext import models, surgery
        torch.set_num_threads({torch.get_num_threads()})
        model = surgery.load("slim.safetensors", partial(models.create, "resnet8")).eval()
        with torch.no_grad():
            y = model(load_file("x.safetensors")["x"])
        save_file({{"y": y}}, "y.safetensors")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=120,
    )
    assert torch.equal(safetensors.load_file(tmp_path / "y.safetensors")["y"], output(slim, x))


def test_loading_restores_dtype_memory_format_plan_and_tensors(tmp_path):
    slim = slim_resnet8().to(torch.bfloat16).to(memory_format=torch.channels_last)
    surgery.save(slim, tmp_path / "slim.safetensors")
    loaded = surgery.load(tmp_path / "slim.safetensors", lambda: models.create("resnet8"))
    assert loaded.ccp_plan == slim.ccp_plan
    state = loaded.state_dict()
    for name, tensor in slim.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
        assert state[name].stride() == tensor.stride()


def test_plain_models_can_be_saved_and_loaded_too(tmp_path):
    model, x = lively(Concat()), torch.randn(IMAGES)
    surgery.save(model, tmp_path / "plain.safetensors")
    loaded = surgery.load(tmp_path / "plain.safetensors", Concat)
    assert torch.equal(output(loaded, x), output(model, x))
    assert not hasattr(loaded, "ccp_plan")


def test_twice_pruned_models_load_from_the_plain_one(tmp_path):
    slim, x = slim_resnet8(0.7), torch.randn(1, 3, 16, 16)
    surgery.prune(slim, random_plan(trace(slim, x), 0.5, seed=3))
    surgery.save(slim, tmp_path / "slim.safetensors")
    loaded = surgery.load(tmp_path / "slim.safetensors", lambda: models.create("resnet8"))
    assert torch.equal(output(loaded, x), output(slim, x))


def test_depthwise_convolution_cut_to_one_input_can_be_pruned_again_and_loaded(tmp_path):
    def network():
        return nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 5, 1)
        )

    model, x = network(), torch.randn(IMAGES)
    plain = copy.deepcopy(model)
    surgery.prune(model, PruningPlan.from_kept(trace(model, x), {"0": [1]}))
    surgery.prune(model, PruningPlan.from_kept(trace(model, x), {"1": [0, 2]}))
    assert model.ccp_plan.modules["1"].out == (3, 5)
    surgery.save(model, tmp_path / "slim.safetensors")
    loaded = surgery.load(tmp_path / "slim.safetensors", network)
    assert torch.equal(output(loaded, x), output(model, x))
    at_once = surgery.prune(plain, model.ccp_plan)
    assert torch.equal(output(at_once, x), output(model, x))
    assert str(at_once) == str(model) == str(loaded)


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def test_shared_tensors_are_written_once_and_stay_shared(tmp_path):
    model = tied()
    surgery.save(model, tmp_path / "tied.safetensors")
    with safetensors.safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["0.bias", "0.weight", "2.bias"]
    loaded = surgery.load(tmp_path / "tied.safetensors", tied)
    assert loaded[0].weight is loaded[2].weight
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_an_exception_while_saving_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    surgery.save(Concat(), path)
    old = path.read_bytes()

    def half_written(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        surgery.save(Concat(), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_saving_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    surgery.save(Concat(), path)
    old = path.read_bytes()
    program = """
        import os, signal, sys
        import safetensors.torch
        from torch import nn
        from ccp_ext import surgery

        def killed(tensors, filename, metadata):
            filename.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.save_file = killed
        surgery.save(nn.Linear(4, 4), sys.argv[1])
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path)], env=environment, timeout=120
    )
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == old


@pytest.mark.parametrize("name", [".", "missing/slim.safetensors"])
def test_a_path_that_cannot_be_written_is_named(tmp_path, name):
    with pytest.raises(InputError) as caught:
        surgery.save(Concat(), tmp_path / name)
    assert f"save: {str(tmp_path / name)!r} cannot be written: " in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_equal_models_give_equal_files_in_every_process(tmp_path):
    program = """
        import sys, torch
        from small_networks import random_plan
        from torch import nn
        from ccp_ext import surgery
        from ccp_ext.graph import trace
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1))
        model = model.to(memory_format=torch.channels_last)
        model[0].bias = model[1].bias
        graph = trace(model, torch.randn(1, 3, 4, 4))
        surgery.prune(model, random_plan(graph, record={"seed": 0, "criterion": "l1"}))
        for name in sys.argv[1:]:
            surgery.save(model, name)
    """
    for seed in "12":
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), *(seed + name for name in "abcd")],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
            check=True,
            timeout=120,
        )
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert len(list(tmp_path.iterdir())) == 8


def metadata_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ccp_ext"])


def rewritten(path, **fields):
    content = {**metadata_of(path), **fields}
    safetensors.save_file(safetensors.load_file(path), path, {"ccp_ext": json.dumps(content)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a whole safetensors file"),
        (lambda path: path.write_bytes(b"{}" * 500), "not a whole safetensors file"),
        (
            lambda path: safetensors.save_file({"x": torch.ones(1)}, path),
            "not written by ccp_ext.save",
        ),
        (lambda path: rewritten(path, version=9), "has version 9; this ccp_ext reads 1"),
        (lambda path: safetensors.save_file({}, path, {"ccp_ext": "{"}), "broken metadata"),
        (lambda path: rewritten(path, aliases={"x": "nowhere"}), "broken metadata"),
        (lambda path: rewritten(path, layouts=3), "broken metadata"),
        (lambda path: rewritten(path, plan={"version": 1}), "plan in .*missing: "),
        (lambda path: rewritten(path, plan=None), "does not fit ResNet of model_fn: size mismatch"),
    ],
)
def test_broken_files_are_refused_in_one_sentence(tmp_path, damage, message):
    path = tmp_path / "slim.safetensors"
    surgery.save(slim_resnet8(), path)
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        surgery.load(path, lambda: models.create("resnet8"))
    assert "slim.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_model_fn_is_refused(tmp_path):
    surgery.save(slim_resnet8(), tmp_path / "slim.safetensors")
    with pytest.raises(InputError, match="made for a ResNet whose parameters have other names"):
        surgery.load(tmp_path / "slim.safetensors", lambda: models.create("resnet20"))
    surgery.save(Concat(), tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="does not fit SqueezeExcite of model_fn: Missing key"):
        surgery.load(tmp_path / "plain.safetensors", SqueezeExcite)


def test_metadata_is_plain_text_that_holds_the_plan(tmp_path):
    slim = slim_resnet8()
    surgery.save(slim, tmp_path / "slim.safetensors")
    plan = metadata_of(tmp_path / "slim.safetensors")["plan"]
    assert plan["fingerprint"] == slim.ccp_plan.fingerprint
