"""Criteria on the next layer's outputs, against the layers themselves and dense least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_networks import Concat, lively
from test_criteria import costs_by, noise
from torch import nn

from ccp_ext import criteria, models, trace
from ccp_ext.criteria import gather, gathering
from ccp_ext.criteria.reconstruction import lasso
from ccp_ext.criteria.refitting import RefitProblem, greedy_path
from ccp_ext.criteria.sensitivity import LossSensitivity
from ccp_ext.errors import InputError


def mask(size, removed):
    m = torch.zeros(size, dtype=torch.bool)
    m[list(removed)] = True
    return m


def chain(channels=6):
    """A convolution whose channels another one reads."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, 4, 3, stride=2, padding=1)
    )
    return model, trace(model, torch.randn(1, 3, 8, 8)), noise(14, 8)


def inputs_of(model, path, images):
    """The input of a module for all images."""
    x, _ = next(images.batches(len(images)))
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model.eval()(x)
    hook.remove()
    return seen[0].double()


def lost_output(model, group, removed, images):
    """1/2 ||consumer(x) - consumer(x without the channels)||^2 per image, over all consumers."""
    total = 0.0
    for part in group.consumers:
        x = inputs_of(model, part.module, images)
        gone = [p for i in removed for p in part.index[i]]
        layer = model.get_submodule(part.module)
        dim = 1 if layer.weight.dim() > 2 else -1
        weight = layer.weight.detach().double()
        apply = F.linear if layer.weight.dim() == 2 else _convolve(layer)
        without = x.index_fill(dim, torch.tensor(gone, dtype=torch.long), 0)
        total += float((apply(x, weight) - apply(without, weight)).square().sum() / len(x))
    return total


def _convolve(layer):
    return lambda x, weight: F.conv2d(x, weight, None, layer.stride, layer.padding)


def assert_thinet_costs_are_the_lost_outputs(model, graph, images):
    costs = costs_by("thinet", model, graph, images, batch_size=5)
    for group in graph.groups:
        for removed in ([0], [1, 3], [0, 2, 3]):
            found = costs[group.name].objective(mask(group.channels, removed))
            assert found == pytest.approx(lost_output(model, group, removed, images), rel=1e-4)


def test_thinet_is_the_error_of_the_next_layers_outputs():
    assert_thinet_costs_are_the_lost_outputs(*chain())


def test_thinet_of_coupled_channels_adds_the_layers_that_read_them():
    model = lively(models.create("resnet8")).eval()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    assert any(len(group.consumers) > 1 for group in graph.groups)
    assert_thinet_costs_are_the_lost_outputs(model, graph, noise(6, 8))


def test_thinet_on_large_maps_looks_at_positions_drawn_by_the_seed():
    model, graph, _ = chain()
    images = noise(60, 50)  # 24 x 24 output positions
    (group,) = graph.groups
    exact = lost_output(model, group, [1, 3], images)
    found = [
        costs_by("thinet", model, graph, images, seed=seed)[group.name].objective(mask(6, [1, 3]))
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    for cost in found:
        assert cost != exact and cost == pytest.approx(exact, rel=0.02)


def test_thinet_of_concatenated_and_flattened_channels():
    model = lively(Concat()).eval()
    assert_thinet_costs_are_the_lost_outputs(
        model, trace(model, torch.randn(1, 3, 8, 8)), noise(6, 8)
    )


# --- LASSO ---------------------------------------------------------------------------------------


def coordinate_descent(gram, level, sweeps):
    """argmin of 1/2 b'Gb - (G1)'b + level ||b||_1."""
    b, target = torch.zeros(len(gram)).double(), gram.sum(1)
    for _ in range(sweeps):
        for i in range(len(gram)):
            rest = target[i] - gram[i] @ b + gram[i, i] * b[i]
            b[i] = rest.sign() * (rest.abs() - level).clamp(min=0) / gram[i, i]
    return b


@pytest.mark.parametrize("seed", range(2))
def test_lasso_chooses_the_support_of_a_solution_of_that_size(seed):
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(seed)).double()
    rows[:, 0] = rows[:, 1] + 0.3 * rows[:, 0]
    gram = rows.T @ rows / 40
    supports = {}
    for level in torch.linspace(0.999, 0.002, 40).tolist():
        b = coordinate_descent(gram, level * float(gram.sum(1).abs().max()), 60)
        support = tuple(torch.nonzero(b.abs() > 1e-9).flatten().tolist())
        supports.setdefault(len(support), []).append(support)
    assert len(supports) > 4
    for size, found in supports.items():
        kept = tuple(torch.nonzero(~lasso(gram, 7 - size)).flatten().tolist())
        assert kept in found


def test_lasso_fills_up_with_the_largest_where_the_rest_is_dead():
    gram = torch.diag(torch.tensor([3.0, 0.0, 2.0, 0.0, 1.0]).double())
    assert torch.nonzero(~lasso(gram, 1)).flatten().tolist() == [0, 1, 2, 4]
    assert torch.nonzero(~lasso(gram, 3)).flatten().tolist() == [0, 2]


@pytest.mark.parametrize("seed", [1, 3, 28])
def test_lasso_agrees_with_scikit_learns_path_where_channels_leave_the_support(seed):
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, 6, generator=generator).double()
    rows = rows @ torch.randn(6, 6, generator=generator).double()
    _, _, path = linear.lars_path(rows.numpy(), rows.sum(1).numpy(), method="lasso")
    supports = [set((abs(column) > 1e-12).nonzero()[0]) for column in path.T]
    assert any(before - after for before, after in itertools.pairwise(supports))
    for size in range(1, 6):
        kept = set(torch.nonzero(~lasso(rows.T @ rows, 6 - size)).flatten().tolist())
        assert kept in [support for support in supports if len(support) == size]


def test_channel_pruning_selects_by_lasso_on_the_contributions():
    model, graph, images = chain()
    cost = costs_by("channel-pruning", model, graph, images)["0"]
    x, layer = inputs_of(model, "2", images), model[2]
    weight = layer.weight.detach().double()
    parts = [
        F.conv2d(x[:, i : i + 1], weight[:, i : i + 1], None, 2, 1).flatten() for i in range(6)
    ]
    rows = torch.stack(parts, 1)
    for r in range(6):
        assert torch.equal(cost.choose(r).removed, lasso(rows.T @ rows / 14, r))


# --- block OBS -----------------------------------------------------------------------------------


def refitted(model, images, removed, ridge):
    """1/2 min over V of sum ||(W - V) patch||^2 per image + ridge, V zero at the removed inputs."""
    layer = model[2]
    rows = F.unfold(inputs_of(model, "2", images), 3, padding=1, stride=2).mT.flatten(0, 1)
    shift = ridge * (rows.square().sum(0) / len(images)).mean()
    # The ridge as further samples.
    extra = (len(images) * shift).sqrt() * torch.eye(rows.shape[1]).double()
    rows = torch.cat([rows, extra])
    weight = layer.weight.detach().double().flatten(1)
    gone = mask(6, removed).repeat_interleave(9)
    lost = rows[:, gone] @ weight[:, gone].T
    change = torch.linalg.lstsq(rows[:, ~gone], lost, driver="gelsd").solution
    return 0.5 * float((lost - rows[:, ~gone] @ change).square().sum()) / len(images)


def test_osscar_costs_are_those_after_a_least_squares_refit():
    model, graph, images = chain()
    cost = costs_by("osscar", model, graph, images, ridge=0.02)["0"]
    greedy = cost.choose(3).removed.nonzero().flatten().tolist()
    for removed in ([2], [0, 5], greedy, [1, 2, 3, 4], range(6)):
        expected = refitted(model, images, removed, 0.02)
        assert cost.objective(mask(6, removed)) == pytest.approx(expected, rel=1e-4)
    assert cost.objective(mask(6, [])) == 0


def test_osscar_removes_greedily_with_a_refit_after_each():
    model, graph, images = chain()
    cost = costs_by("osscar", model, graph, images, ridge=0.02)["0"]
    removed = []
    for r in range(6):
        choice = cost.choose(r)
        assert sorted(torch.nonzero(choice.removed).flatten().tolist()) == sorted(removed)
        assert choice.objective == cost.objective(choice.removed)
        left = [i for i in range(6) if i not in removed]
        removed.append(min(left, key=lambda i: refitted(model, images, [*removed, i], 0.02)))


def test_refit_is_exact_for_one_and_two_channels():
    model, graph, images = chain()
    cost = costs_by("refit", model, graph, images, ridge=0.02)["0"]
    for size in (1, 2):
        for removed in itertools.combinations(range(6), size):
            expected = refitted(model, images, removed, 0.02)
            assert cost.objective(mask(6, removed)) == pytest.approx(expected, rel=1e-3)
    assert torch.equal(cost.S, cost.S.T)


def test_refit_sees_that_one_of_two_equal_channels_is_free():
    model, graph, images = chain()
    model[0].weight.data[3] = model[0].weight.data[1]
    model[0].bias.data[3] = model[0].bias.data[1]
    cost = costs_by("refit", model, graph, images, ridge=1e-6)["0"]
    assert cost.choose(1).removed.nonzero().item() in (1, 3)
    assert cost.objective(mask(6, [3])) < 1e-4 * cost.objective(mask(6, [1, 3]))


def test_costs_of_several_readers_add_up():
    generator = torch.Generator().manual_seed(0)
    problems = []
    for outputs in (3, 5):
        rows = torch.randn(50, 8, generator=generator).double()
        W = torch.randn(outputs, 8, generator=generator).double()
        problems.append(RefitProblem(rows.T @ rows, W, 4, 0.01))
    path = greedy_path(problems)
    removed = []
    for channel, loss in zip(path.order.tolist(), path.losses, strict=False):
        assert float(loss) == pytest.approx(sum(p.loss(mask(4, removed)) for p in problems))
        left = [i for i in range(4) if i not in removed]
        best = min(left, key=lambda i: sum(p.loss(mask(4, [*removed, i])) for p in problems))
        assert channel == best
        removed.append(best)


def test_singular_moments_without_a_ridge_are_refused():
    model, graph, images = chain()
    model[0].weight.data[3] = model[0].weight.data[1]
    model[0].bias.data[3] = model[0].bias.data[1]
    with pytest.raises(InputError, match="moments of a layer's inputs are singular"):
        costs_by("refit", model, graph, images, ridge=0.0)


def test_dead_channels_cost_nothing():
    model, graph, images = chain()
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(-1.0)
    for name in ("thinet", "channel-pruning", "osscar", "refit", "refit-loss"):
        choice = costs_by(name, model, graph, images)["0"].choose(3)
        assert abs(choice.objective) < 1e-20 and int(choice.removed.sum()) == 3


# --- in the metric of the logits -----------------------------------------------------------------


def test_refit_loss_is_the_refit_error_in_the_metric_of_the_logits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(36, 3)).double()
    graph, images = trace(model, torch.randn(1, 3, 4, 4).double()), noise(50, 4)
    criterion = criteria.get("refit-loss", criteria.Options(ridge=0.0))
    seen = criterion.observation(model, graph)
    with seen:
        for _ in range(400):  # so many draws of the signs
            for x, y in images.batches(25):
                seen.update(x.double(), y)
    cost = criterion.costs(model, graph, seen)["0"]
    with torch.no_grad():
        x = model[:2](images.normalise(images.images).double())
    rows = F.unfold(x, 2).mT.flatten(0, 1)
    jacobian = model[4].weight.detach().view(3, 4, 9).transpose(0, 1).flatten(1)  # [O, logits P]
    metric = jacobian @ jacobian.T / 9
    weight = model[2].weight.detach().flatten(1)
    for removed in ([1], [0, 4], [0, 2, 3, 5]):
        gone = mask(6, removed).repeat_interleave(4)
        kept = torch.cat([rows[:, ~gone], torch.ones(len(rows), 1).double()], 1)
        lost = rows[:, gone] @ weight[:, gone].T
        error = lost - kept @ torch.linalg.lstsq(kept, lost).solution
        expected = 0.5 * float(((error @ metric) * error).sum()) / 50
        assert cost.objective(mask(6, removed)) == pytest.approx(expected, rel=0.05)


def test_refit_loss_compares_layers_by_what_they_do_to_the_logits():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))
    graph, images = trace(model, torch.randn(1, 3, 8, 8)), noise(40, 8)
    before = costs_by("refit-loss", model, graph, images)
    # Ten times larger outputs, divided out again: the next layer's error grows, the logits' not.
    for tensor in (model[2].weight, model[2].bias):
        tensor.data *= 10
    model[4].weight.data /= 10
    after = costs_by("refit-loss", model, graph, images)
    outputs = costs_by("osscar", model, graph, images)
    for name in before:
        for r in range(1, before[name].channels):
            a, b = before[name].choose(r), after[name].choose(r)
            assert torch.equal(a.removed, b.removed)
            assert b.objective == pytest.approx(a.objective, rel=1e-3)
    assert outputs["0"].choose(3).objective > 20 * before["0"].choose(3).objective


def test_refit_loss_frees_what_the_logits_do_not_see():
    model, graph, images = chain()
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(36, 3))
    model[4].weight.data.view(3, 4, 9)[:, 1:] = 0  # one channel of the last convolution counts
    model[2].weight.data[0, :3] = 0  # and does not read the first three
    graph = trace(model, torch.randn(1, 3, 8, 8))
    cost = costs_by("refit-loss", model, graph, images)["0"]
    assert torch.equal(cost.choose(3).removed, mask(6, [0, 1, 2]))
    assert cost.choose(3).objective < 1e-9 * cost.choose(4).objective


def test_refit_loss_goes_on_after_a_stop_to_the_same_bits(tmp_path, monkeypatch):
    model = lively(models.create("resnet8"))
    graph, images = trace(model, torch.randn(1, 3, 32, 32)).inner, noise(10, 32)
    whole = costs_by("refit-loss", model, graph, images, batch_size=3)
    criterion, file = criteria.get("refit-loss"), tmp_path / "sums.pt"
    seen, update = [], LossSensitivity.update

    def stopped(self, x, y):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(x))
        update(self, x, y)

    def gathered():
        options = {"batch_size": 3, "checkpoint": file, "progress": False}
        return gather(model, graph, criterion, images, **options)

    monkeypatch.setattr(gathering, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(gathering, "_WRITING", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LossSensitivity, "update", stopped)
        gathered()
    assert torch.load(file)["batches"] == 2
    left = []
    monkeypatch.setattr(
        LossSensitivity, "update", lambda self, x, y: (left.append(len(x)), update(self, x, y))
    )
    costs = criterion.costs(model, graph, gathered())
    assert left == [3, 1]
    for name, cost in whole.items():
        assert torch.equal(cost.u, costs[name].u)
        assert torch.equal(cost.choose(4).removed, costs[name].choose(4).removed)
    torch.save({"sums": {}, "batches": 2}, file)
    with pytest.raises(InputError, match="sums.pt is damaged or of another run"):
        gathered()


def test_refit_loss_is_repeatable_and_leaves_the_model_alone():
    model = lively(models.create("resnet8")).train()
    graph = trace(model, torch.randn(1, 3, 32, 32)).inner
    images = noise(10, 32)
    first, second = (costs_by("refit-loss", model, graph, images, seed=1) for _ in range(2))
    for name, cost in first.items():
        assert torch.equal(cost.u, second[name].u)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_family_is_registered():
    assert {"thinet", "channel-pruning", "osscar", "refit", "refit-loss"} <= set(criteria.names())
