"""Criteria on gradients, Hessians and propagated importance, against loops and dense algebra."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import Concat, lively
from test_criteria import costs_by, noise
from torch import nn

from ccp_ext import criteria, measure, models, prune, trace
from ccp_ext.auxiliary import AuxiliaryHeads, train_heads
from ccp_ext.criteria import gather
from ccp_ext.criteria.gates import rearranged as found_by_kwon
from ccp_ext.criteria.propagation import infinite_feature_selection
from ccp_ext.errors import InputError
from ccp_ext.plan import PruningPlan


class Small(nn.Module):
    """Two hidden convolutions, one with a bias; smooth, so that it has a Hessian everywhere."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, stride=2)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 4, 2, bias=False)
        self.softplus = nn.Softplus()
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        return self.head(self.softplus(self.second(x)).mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(1)
    model = lively(Small()).eval()
    images = noise(70, 8)
    x, y = next(images.batches(len(images)))
    return model, trace(model, x[:1]), images, x, y


def gates(model, x):
    """The logits as a function of factors at the two groups' gates."""

    def logits(first, second):
        z = torch.tanh(model.norm(model.first(x))) * first.view(1, -1, 1, 1)
        z = F.softplus(model.second(z)) * second.view(1, -1, 1, 1)
        return model.head(z.mean((2, 3)))

    return logits


def gate_gradient(model, x, y):
    """Gradients of the mean loss at the gates of both groups."""
    ones = [torch.ones(5, requires_grad=True), torch.ones(4, requires_grad=True)]
    loss = F.cross_entropy(gates(model, x)(*ones), y)
    return dict(zip(("first", "second"), torch.autograd.grad(loss, ones), strict=True))


def mini_batches(x, y):
    """The mini-batches of 32 that a pass in batches of 40 makes."""
    for first, last in ((0, 32), (32, 40), (40, 70)):
        yield x[first:last], y[first:last]


def test_taylor_2019_squares_the_mini_batches_gradients(small):
    model, graph, images, x, y = small
    costs = costs_by("taylor-2019", model, graph, images, batch_size=40)
    rows = [gate_gradient(model, *batch) for batch in mini_batches(x, y)]
    for name in ("first", "second"):
        expected = torch.stack([row[name] for row in rows]).square().mean(0)
        torch.testing.assert_close(-costs[name].u, expected.double(), rtol=1e-4, atol=1e-10)


def rearranged(rows, r):
    """Offer each kept column once: add it to the removed ones, then take out the one without which
    the length of the removed columns' sum is least."""
    squares = rows.square().sum(0)
    removed = squares.argsort(stable=True)[:r].tolist()
    for offered in squares.argsort(stable=True)[r:].tolist():
        removed.append(offered)
        lengths = {k: float(sum(rows[:, j] for j in removed if j != k).norm()) for k in removed}
        removed.remove(min(lengths, key=lengths.get))
    return sorted(removed)


def test_kwon_rearranges_the_diagonals_mask(small):
    model, graph, images, x, y = small
    costs = costs_by("kwon", model, graph, images, batch_size=40)
    gradients = [gate_gradient(model, *batch) for batch in mini_batches(x, y)]
    for name, size in (("first", 5), ("second", 4)):
        rows = torch.stack([row[name] for row in gradients]).double()
        torch.testing.assert_close(costs[name].S, rows.T @ rows / 3, rtol=1e-4, atol=1e-10)
        for r in range(1, size):
            choice = costs[name].choose(r)
            assert torch.nonzero(choice.removed).flatten().tolist() == rearranged(rows, r)


def test_kwons_rearrangement_of_random_rows_changes_the_mask():
    changed = 0
    for seed in range(20):
        rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)).double()
        found = torch.nonzero(found_by_kwon(rows.T @ rows, 4)).flatten().tolist()
        assert found == rearranged(rows, 4)
        changed += found != sorted(rows.square().sum(0).argsort()[:4].tolist())
    assert changed > 5


def test_group_fisher_divides_by_what_a_channel_costs():
    model = lively(models.create("mobilenetv2")).eval()
    names = ["features.2.layers.0.0", "features.4.layers.0.0"]
    example = torch.randn(1, 3, 32, 32)
    graph, images = trace(model, example).select_groups(names), noise(4)
    fisher = costs_by("fisher", model, graph, images)
    # The second block halves rows and columns: its depthwise maps are a quarter as large.
    prices = {"memory": (2 * 32 * 32, 32 * 32 + 16 * 16), "none": (1, 1), "macs": []}
    for name in names:
        kept = PruningPlan.from_kept(graph, {name: range(1, graph[name].channels)})
        slim = prune(copy.deepcopy(model), kept)
        prices["macs"].append(measure.macs(model, example) - measure.macs(slim, example))
    for kind, of_groups in prices.items():
        costs = costs_by("group-fisher", model, graph, images, normalise=kind)
        for name, price in zip(names, of_groups, strict=True):
            torch.testing.assert_close(costs[name].u * price, fisher[name].u, rtol=1e-5, atol=0)


def test_group_fisher_refuses_another_normalisation():
    with pytest.raises(
        InputError, match="normalise must be one of memory, macs, none; got 'flops'"
    ):
        criteria.get("group-fisher", criteria.Options(normalise="flops"))


def test_obd_c_weighs_squared_weights_by_the_per_sample_fisher(small):
    model, graph, images, x, _ = small
    costs = costs_by("obd-c", model, graph, images, batch_size=40, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        labels = torch.cat(
            [
                torch.multinomial(model(part).softmax(1), 1, generator=generator).squeeze(1)
                for part in x.split(40)
            ]
        )
    for name in ("first", "second"):
        weight = model.get_submodule(name).weight
        fisher = torch.zeros_like(weight)
        for k in range(len(x)):
            loss = F.cross_entropy(model(x[k : k + 1]), labels[k : k + 1])
            fisher += torch.autograd.grad(loss, weight)[0].square() / len(x)
        expected = 0.5 * (weight.detach().square() * fisher).flatten(1).sum(1)
        torch.testing.assert_close(-costs[name].u, expected.double(), rtol=1e-4, atol=1e-10)


def test_obd_c_of_a_linear_layer_and_of_coupled_layers_adds_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 10)).eval()
    graph, images = trace(model, torch.randn(1, 3, 4, 4)), noise(9, 4)
    cost = costs_by("obd-c", model, graph, images, batch_size=9)["1"]
    x, _ = next(images.batches(9))
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(model(x).softmax(1), 1, generator=generator).squeeze(1)
    weight, fisher = model[1].weight, 0.0
    for k in range(9):
        loss = F.cross_entropy(model(x[k : k + 1]), labels[k : k + 1])
        fisher = fisher + torch.autograd.grad(loss, weight)[0].square() / 9
    expected = 0.5 * (weight.square() * fisher).sum(1).detach()
    torch.testing.assert_close(-cost.u, expected.double(), rtol=1e-4, atol=1e-10)


def test_sosp_h_is_the_row_sum_of_the_exact_hessian(small):
    model, graph, images, x, y = small
    costs = costs_by("sosp-h", model, graph, images, batch_size=40)
    layers = (model.first, model.second)
    sizes = [layer.weight.numel() for layer in layers]
    point = torch.cat([layer.weight.detach().flatten() for layer in layers])

    def loss(w):
        parts = [p.view_as(m.weight) for p, m in zip(w.split(sizes), layers, strict=True)]
        names = ("first.weight", "second.weight")
        replaced = dict(zip(names, parts, strict=True))
        return F.cross_entropy(torch.func.functional_call(model, replaced, x), y)

    hessian = torch.autograd.functional.hessian(loss, point)
    leaf = point.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf), leaf)[0]
    first, second = gradient * point, (hessian @ point) * point
    start = 0
    for name, layer in zip(("first", "second"), layers, strict=True):
        part = slice(start, start + layer.weight.numel())
        sums = [t[part].view(len(layer.weight), -1).sum(1).abs() for t in (first, second)]
        expected = sums[0] + 0.5 * sums[1]
        torch.testing.assert_close(-costs[name].u, expected.double(), rtol=1e-3, atol=1e-7)
        start = part.stop


# --- rescaled gates ------------------------------------------------------------------------------


def test_gate_refit_is_what_rescaled_gates_cannot_replace(small):
    model, graph, images, x, y = small
    criterion = criteria.get("gate-refit", criteria.Options(ridge=1e-9))
    stats = gather(model, graph, criterion, images, batch_size=70, progress=False)
    costs = criterion.costs(model, graph, stats)
    # Any Q with Q'Q = S gives the same least squares; 70 samples make S definite.
    values, vectors = torch.linalg.eigh(stats["first"].S.double())
    Q = values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T
    for r in range(1, 5):
        for removed in itertools.combinations(range(5), r):
            kept = [i for i in range(5) if i not in removed]
            target = Q[:, removed].sum(1, keepdim=True)
            scales = torch.linalg.lstsq(Q[:, kept], target).solution
            expected = 0.5 * float((target - Q[:, kept] @ scales).square().sum())
            mask = torch.zeros(5, dtype=torch.bool)
            mask[list(removed)] = True
            assert costs["first"].objective(mask) == pytest.approx(expected, rel=1e-4, abs=1e-8)


# --- NISP ----------------------------------------------------------------------------------------


def test_infinite_feature_selection_sums_the_paths_of_all_lengths():
    values = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).double()
    values[:, 5] = values[:, 0] + 0.1 * values[:, 5]
    ranks = values.argsort(0).argsort(0).double().numpy()
    correlation = np.corrcoef(ranks.T)
    spread = values.numpy().std(0) / values.numpy().std(0).max()
    graph = 0.5 * np.maximum(spread, spread[:, None]) + 0.5 * (1 - abs(correlation))
    step = 0.9 / max(abs(np.linalg.eigvalsh(graph))) * graph
    energy, power = np.zeros(6), np.ones(6)
    for _ in range(400):
        power = step @ power
        energy += power
    found = infinite_feature_selection(values)
    torch.testing.assert_close(found, torch.from_numpy(energy / energy.sum()))


def test_infinite_feature_selection_shares_ranks_among_equal_values():
    values = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 2.0], [2.0, 3.0]])
    both = infinite_feature_selection(torch.cat([values, values[:, :1]], 1))
    assert float(both[0]) == pytest.approx(float(both[2]))


def test_nisp_propagates_through_absolute_weights(small):
    model, graph, images, x, _ = small
    costs = costs_by("nisp", model, graph, images, batch_size=40)
    with torch.no_grad():
        z = torch.tanh(model.norm(model.first(x)))
        responses = F.softplus(model.second(z)).mean((2, 3))
        importance = infinite_feature_selection(responses)
        # Each of the 4 positions of `second` has a quarter of a response's importance; what a
        # position of `first` gets is spread by the transposed convolution.
        at_second = (importance / 4).view(1, 4, 1, 1).expand(1, 4, 2, 2)
        at_first = F.conv_transpose2d(at_second, model.second.weight.abs().double())
    for name, expected in (("first", at_first.sum((0, 2, 3))), ("second", importance)):
        torch.testing.assert_close(-costs[name].u, expected / expected.sum(), rtol=1e-4, atol=1e-9)


def test_nisp_counts_a_batchnorm_as_its_absolute_factor():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10),
    )  # fmt: skip
    model = lively(model).eval()
    model[3].weight.data[2] *= -40
    graph, images = trace(model, torch.randn(1, 3, 4, 4)), noise(20, 4)
    costs = costs_by("nisp", model, graph, images)
    x, _ = next(images.batches(20))
    with torch.no_grad():
        importance = infinite_feature_selection(model[:7](x))
        factor = model[3].weight.abs() / (model[3].running_var + model[3].eps).sqrt()
        expected = (importance * factor) @ model[2].weight.flatten(1).abs().double()
    torch.testing.assert_close(-costs["0"].u, expected / expected.sum(), rtol=1e-4, atol=1e-9)


# --- auxiliary classifiers -----------------------------------------------------------------------


def test_heads_read_the_layers_at_equal_distances():
    model = models.create("resnet20")
    graph = trace(model, torch.randn(1, 3, 32, 32))
    heads = AuxiliaryHeads.spread(model, graph, 7)
    # Nine blocks: a quarter, a half and three quarters of the way.
    modules = [tap.module for tap in heads.taps]
    assert modules == ["layer1.2.conv1", "layer2.1.conv1", "layer3.0.conv1"]
    with heads.attached(model):
        model(torch.randn(2, 3, 32, 32))
        assert [tuple(logits.shape) for logits in heads()] == [(2, 7)] * 3
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_heads_learn_and_the_network_stays():
    torch.manual_seed(0)
    model = lively(models.create("resnet8")).train()
    graph, images = trace(model, torch.randn(1, 3, 32, 32)), noise(64)
    brightness = torch.arange(10, dtype=torch.uint8).mul(25)[images.labels].view(-1, 1, 1, 1)
    images = dataclasses.replace(images, images=images.images // 25 + brightness)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heads = AuxiliaryHeads.spread(model, graph, 10)
    first = train_heads(model, heads, images, epochs=1, batch_size=16, progress=False)
    last = train_heads(model, heads, images, epochs=25, batch_size=16, progress=False)
    assert last < 0.5 * first
    assert model.training and not heads.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def head_outputs(model, heads, x):
    with heads.attached(model):
        logits = model(x)
        return [logits, *heads()]


def test_ccp_ac_squares_the_gradient_of_all_losses_together(small):
    model, graph, images, x, y = small
    options = criteria.Options(curvature="empirical", first_order=True)
    criterion = criteria.get("ccp-ac", options)
    data = gather(model, graph, criterion, images, batch_size=40, progress=False)
    costs = criterion.costs(model, graph, data)
    assert [tap.module for tap in data.heads.taps] == ["first", "second"]
    rows = []
    for k in range(len(x)):
        seen = []
        hook = model.second.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        outputs = head_outputs(model, data.heads, x[k : k + 1])
        hook.remove()
        loss = sum(F.cross_entropy(logits, y[k : k + 1]) for logits in outputs)
        (gradient,) = torch.autograd.grad(loss, seen[0])
        rows.append((gradient * seen[0]).sum((0, 2, 3)).detach())
    a = torch.stack(rows)
    torch.testing.assert_close(costs["first"].S, a.T @ a / len(a), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(costs["first"].u, a.mean(0), rtol=1e-3, atol=1e-6)


def test_ccp_ac_adds_the_curvature_of_the_heads_logits(small):
    model, graph, images, x, y = small
    criterion = criteria.get("ccp-ac", criteria.Options(rows=400))
    data = gather(model, graph, criterion, images.subset(range(4)), progress=False)
    found = criterion.costs(model, graph, data)["first"].S
    expected = torch.zeros(5, 5)
    for k in range(4):
        seen = []
        hook = model.second.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        outputs = head_outputs(model, data.heads, x[k : k + 1])
        hook.remove()
        for logit in torch.cat(outputs, 1)[0]:
            (gradient,) = torch.autograd.grad(
                logit, seen[0], retain_graph=True, allow_unused=True, materialize_grads=True
            )
            a = (gradient * seen[0]).sum((0, 2, 3)).detach()
            expected += a.outer(a) / 4
    error = (found - expected).norm() / expected.norm()
    assert error < 0.15  # 1,600 random projections


def test_ccp_ac_refuses_what_the_sum_of_losses_does_not_have(small):
    model, graph, *_ = small
    for options, message in (
        ({"curvature": "sampled"}, "takes curvature logits or empirical, got 'sampled'"),
        ({"first_order": True}, "first_order=True only with curvature='empirical'"),
    ):
        criterion = criteria.get("ccp-ac", criteria.Options(**options))
        with pytest.raises(InputError, match=message):
            criterion.observation(model, graph)


@pytest.mark.parametrize("name", ["taylor-2019", "obd-c", "sosp-h", "nisp", "kwon", "ccp-ac"])
def test_gradient_criteria_run_on_networks_with_concatenations(name):
    model = lively(Concat()).eval()
    model.head = nn.Linear(16 * 16, 10)
    graph = trace(model, torch.randn(1, 3, 8, 8))
    costs = costs_by(name, model, graph, noise(20, 8))
    kept = {g.name: ~costs[g.name].choose(2).removed for g in graph.groups}
    slim = prune(model, PruningPlan.from_kept(graph, kept))
    assert slim(torch.randn(2, 3, 8, 8)).shape == (2, 10)
