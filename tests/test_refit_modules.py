"""Fitting all layers of a module together to what the plain model's module gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from gauss_newton_reference import changes_of_outputs
from small_networks import lively, output, random_plan
from torch import nn

import ccp_ext
from ccp_ext.compensation import modules as fitting
from ccp_ext.compensation import refit, refit_modules
from ccp_ext.compensation.gauss_newton import improve
from ccp_ext.compensation.layers import find_layers
from ccp_ext.compensation.modules import FoldedModule
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError


class Block(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stage1 = nn.Sequential(Block(4, 6), Block(4, 6))
        self.stage2 = nn.Sequential(Block(4, 6), Block(4, 6))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.stage2(self.stage1(F.relu(self.stem(x)))).mean((2, 3)))


def images(count: int = 48, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return ImageSet(pixels, labels, (0.5,) * 3, (0.3,) * 3, 5, "noise")


def pruned(share: float = 0.5) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = lively(Net()).eval()
    graph = ccp_ext.trace(model, torch.randn(1, 3, 8, 8)).select_groups("inner")
    return model, ccp_ext.prune(copy.deepcopy(model), random_plan(graph, share))


def error(model: nn.Module, slim: nn.Module, data: ImageSet, stage: str) -> float:
    """Squared, of a stage's output, the model's own up to there."""
    results = []
    for net in (model, slim):
        part = nn.Sequential(net.stem, nn.ReLU(), net.stage1)
        part = part if stage == "stage1" else nn.Sequential(part, net.stage2)
        results.append(output(part, data.normalise(data.images)).double())
    return (results[0] - results[1]).square().sum().item()


def folded(slim: nn.Module, model: nn.Module, path: str = "stage1") -> FoldedModule:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x.to(next(slim.parameters()).dtype)
    return FoldedModule.of(slim, path, find_layers(model, slim, images(1)), x, seed=0)


def samples(network: FoldedModule, count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What other weights give in float64."""
    generator = torch.Generator().manual_seed(2)
    teacher = tuple(
        p + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in network.get()
    )
    xs = [torch.randn(8, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(x, network(teacher, x)) for x in xs]


def test_stages_come_nearer_than_a_refit_brings_them_also_on_other_images():
    model, slim = pruned()
    data, others = images(), images(32, seed=1)
    refit(model, slim, data, progress=False)
    before = {s: (error(model, slim, data, s), error(model, slim, others, s)) for s in stages()}
    left = refit_modules(model, slim, data, progress=False)
    assert list(left) == ["stage1", "stage2", "head"]
    for stage in stages():
        assert error(model, slim, others, stage) < 0.85 * before[stage][1]
    # Only of the first stage is the error before that of the refit.
    assert error(model, slim, data, "stage1") == pytest.approx(
        left["stage1"] * before["stage1"][0], rel=1e-3
    )


def stages() -> tuple[str, str]:
    return "stage1", "stage2"


def test_enough_iterations_give_the_gauss_newton_step_of_all_layers():
    model, slim = pruned()
    network = folded(slim.double(), model.double())
    start, data = network.get(), samples(network)
    moved = improve(network, start, data, 500)
    taken, expected = changes_of_outputs(network, start, moved, data)
    torch.testing.assert_close(taken, expected, rtol=1e-4, atol=1e-5)


def test_the_preconditioner_saves_iterations(monkeypatch):
    model, slim = pruned()
    network = folded(slim.double(), model.double())
    data = samples(network)
    with_it = network.loss(improve(network, network.get(), data, 4), data)
    monkeypatch.setattr(FoldedModule, "preconditioner", lambda *_: lambda p: p)
    assert with_it < 0.7 * network.loss(improve(network, network.get(), data, 4), data)


def test_a_layer_by_itself_is_solved_by_least_squares():
    model, slim = pruned()
    data = images()
    refit_modules(model, slim, data, ["head"], progress=False)
    x = data.normalise(data.images)
    inputs = output(nn.Sequential(slim.stem, nn.ReLU(), slim.stage1, slim.stage2), x).mean((2, 3))
    inputs = torch.cat([inputs, torch.ones(len(x), 1)], 1).double()
    best = torch.linalg.lstsq(inputs, output(model, x).double()).solution
    torch.testing.assert_close(output(slim, x).double(), inputs @ best, rtol=1e-2, atol=1e-2)


def test_every_step_starts_where_the_last_one_led():
    model, slim = pruned()
    refit(model, slim, images(), progress=False)
    left = []
    for steps in (1, 2, 3):
        copied = copy.deepcopy(slim)
        left.append(
            refit_modules(
                model, copied, images(), ["stage1"], steps=steps, iterations=3, progress=False
            )["stage1"]
        )
    assert left[2] < left[1] < left[0] < 1


def test_a_module_of_its_parameters_gives_what_it_did_and_writing_them_back_changes_nothing():
    model, slim = pruned()
    network = folded(slim, model)
    x = torch.randn(3, 4, 8, 8)
    expected = output(slim.stage1, x)
    assert len(network.layers) == 4
    torch.testing.assert_close(network(network.get(), x), expected)
    network.put(network.get())
    torch.testing.assert_close(output(slim.stage1, x), expected)
    moved = tuple(p + 0.1 for p in network.get())
    wanted = network(moved, x)
    network.put(moved)
    torch.testing.assert_close(output(slim.stage1, x), wanted)


def test_nothing_else_changes_and_a_repeat_is_equal_to_the_bit():
    model, slim = pruned()
    slim.stage1.train()
    flags = [module.training for module in slim.modules()]
    twin = copy.deepcopy(slim)
    before = {name: value.clone() for name, value in slim.state_dict().items()}
    plain = copy.deepcopy(model.state_dict())
    for net in (slim, twin):
        refit_modules(model, net, images(), ["stage1"], steps=1, iterations=2, progress=False)
    for name, value in slim.state_dict().items():
        fitted = name.startswith("stage1") and (
            ("conv" in name and name.endswith("weight")) or ("bn" in name and name.endswith("bias"))
        )
        assert torch.equal(value, before[name]) != fitted, name
        assert torch.equal(value, twin.state_dict()[name]), name
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    assert [module.training for module in slim.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in slim.modules())


@pytest.mark.parametrize("limit", ["positions", "memory"])
def test_no_more_images_are_used_than_needed_or_fit(monkeypatch, limit):
    options = {}
    if limit == "positions":
        monkeypatch.setattr(fitting, "_POSITIONS", 20 * 64)
    else:
        monkeypatch.setattr(fitting, "too_wide", lambda features, memory: False)
        options["memory"] = 20.5 * 2 * 4 * 64 * 4 / 2**30
    results = []
    for count in (20, 40):
        model, slim = pruned()
        data = images(40).subset(range(count))
        refit_modules(
            model,
            slim,
            data,
            ["stage1"],
            steps=1,
            iterations=2,
            batch_size=16,
            progress=False,
            **options,
        )
        results.append(slim.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_layer_whose_equations_do_not_fit_into_memory_stays_as_it_is(monkeypatch):
    model, slim = pruned()
    wide = slim.stage1[0].conv1.weight[0].numel()
    assert wide > slim.stage1[0].conv2.weight[0].numel()
    monkeypatch.setattr(fitting, "too_wide", lambda features, memory: features >= wide)
    before = copy.deepcopy(slim.state_dict())
    refit_modules(model, slim, images(), ["stage1"], steps=1, iterations=2, progress=False)
    moved = {k for k, value in slim.state_dict().items() if not torch.equal(value, before[k])}
    assert "stage1.0.conv2.weight" in moved
    assert not moved & {"stage1.0.conv1.weight", "stage1.0.bn1.bias"}


class Reads(Net):
    """Something besides the BatchNorm reads the convolution's output."""

    def __init__(self) -> None:
        super().__init__()

        class Both(Block):
            def forward(self, x):
                inner = self.conv1(x)
                y = self.bn2(self.conv2(self.relu(self.bn1(inner))))
                return F.relu(y + x + inner.mean((1, 2, 3), keepdim=True))

        self.stage1 = nn.Sequential(Both(4, 6), Block(4, 6))


def test_a_convolution_that_is_read_beside_its_norm_is_told():
    torch.manual_seed(0)
    model = lively(Reads()).eval()
    graph = ccp_ext.trace(model, torch.randn(1, 3, 8, 8)).select_groups("inner")
    name = next(g.name for g in graph.groups if g.name.startswith("stage2"))
    plan = ccp_ext.PruningPlan.from_kept(graph, {name: [0, 1, 2]})
    slim = ccp_ext.prune(copy.deepcopy(model), plan)
    with pytest.raises(InputError, match="'stage1'.*besides"):
        refit_modules(model, slim, images(), ["stage1"], progress=False)


class Changes(Net):
    """The first stage changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.SiLU(inplace=True), Block(4, 6))


def test_a_module_may_change_its_input():
    torch.manual_seed(0)
    model = lively(Changes()).eval()
    graph = ccp_ext.trace(model, torch.randn(1, 3, 8, 8)).select_groups("inner")
    slim = ccp_ext.prune(copy.deepcopy(model), random_plan(graph, 0.5))
    left = refit_modules(model, slim, images(), ["stage1"], progress=False)
    assert left["stage1"] < 0.9


class Twice(torch.autograd.Function):
    """No forward-mode derivatives."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class TwiceAsItWas(torch.autograd.Function):
    """The same in the older form, which functional transforms do not take."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Doubled(Block):
    def __init__(self, *sizes: int, twice: type[torch.autograd.Function]) -> None:
        super().__init__(*sizes)
        self.twice = twice

    def forward(self, x):
        return self.twice.apply(super().forward(x))


@pytest.mark.parametrize("twice", [Twice, TwiceAsItWas])
def test_a_module_without_derivatives_is_told_and_left_out_by_default(twice):
    torch.manual_seed(0)
    model = Net()
    model.stage1 = Doubled(4, 6, twice=twice)
    model = lively(model).eval()
    graph = ccp_ext.trace(model, torch.randn(1, 3, 8, 8)).select_groups("inner")
    slim = ccp_ext.prune(copy.deepcopy(model), random_plan(graph, 0.5))
    assert "stage1" not in refit_modules(model, slim, images(), progress=False)
    with pytest.raises(InputError, match="'stage1' has no forward-mode derivatives"):
        refit_modules(model, slim, images(), ["stage1"], progress=False)


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        (["stage3"], {}, "'stage3' is not a module"),
        ([""], {}, "is not a module inside"),
        (["stage1.0.conv1"], {}, "fewer channels"),
        (["stage1.0.relu"], {}, "fewer channels"),
        (["stage1.0.bn2"], {}, "no layer"),
        (None, {"steps": 0}, "steps must be 1 or more, got 0"),
        (None, {"memory": 0.0}, "memory must be a positive number"),
        (None, {"iterations": 0}, "iterations must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_told(modules, options, message):
    model, slim = pruned()
    with pytest.raises(InputError, match=message):
        refit_modules(model, slim, images(4), modules, progress=False, **options)


def test_a_model_that_was_not_pruned_is_told():
    model, _ = pruned()
    with pytest.raises(InputError, match="after ccp_ext.prune"):
        refit_modules(model, copy.deepcopy(model), images(4), progress=False)
