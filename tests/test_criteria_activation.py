"""Reading feature maps, and the criteria on them, against loops over images and channels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import Concat, Shared, Tokens, lively
from test_criteria import costs_by, noise
from torch import nn

from ccp_ext import Cost, models, select, trace
from ccp_ext.activations import map_views, observe
from ccp_ext.errors import InputError


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    model = lively(models.create("resnet8")).eval()
    return model, trace(model, torch.randn(1, 3, 32, 32)), noise(10)


def inner_maps(model, images):
    """The maps [N, 32, 16, 16] between the convolutions of the second stage, by hand."""
    x, _ = next(images.batches(len(images)))
    with torch.no_grad():
        x = model.layer1(F.relu(model.bn1(model.conv1(x))))
        block = model.layer2[0]
        return F.relu(block.bn1(block.conv1(x)))


def stream_maps(model, images):
    """What the layers behind the third stage and the second one read of the second's stream."""
    x, _ = next(images.batches(len(images)))
    with torch.no_grad():
        second = model.layer2(model.layer1(F.relu(model.bn1(model.conv1(x)))))
        return second, model.layer3(second).mean((2, 3))


# --- reading -------------------------------------------------------------------------------------


class Keep:
    """Keeps the maps that it sees of one group."""

    def __init__(self, model, group):
        self.views, self.seen = map_views(model, group), []

    def readers(self):
        for view in self.views:
            yield view.tap, lambda x, view=view: self.seen.append(view.maps(x).clone())


def test_maps_of_one_module_are_read_behind_the_activation(subject):
    model, graph, images = subject
    group = graph["layer2.0.conv1"]
    seen = observe(model, {group.name: Keep(model, group)}, images.batches(4), progress=False)
    torch.testing.assert_close(torch.cat(seen[group.name].seen), inner_maps(model, images))


def test_coupled_maps_are_read_where_layers_read_them(subject):
    model, graph, images = subject
    group = graph["layer2.0.conv2"]
    seen = observe(model, {"g": Keep(model, group)}, images.batches(10), progress=False)["g"].seen
    second, last = stream_maps(model, images)
    own = [owned[0] for owned in group.producers[0].index]
    later = [owned[0] for owned in group.consumers[1].index]
    torch.testing.assert_close(seen[0], second[:, own])
    torch.testing.assert_close(seen[1], last[:, later])


def test_observing_leaves_the_model_as_it_was():
    model = lively(models.create("resnet8")).train()
    model.layer1.eval()
    graph, images = trace(model, torch.randn(1, 3, 32, 32)), noise(4)
    flags = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = observe(model, {"g": Keep(model, graph.groups[1])}, images.batches(2), progress=False)
    assert not any(tensor.requires_grad for tensor in seen["g"].seen)
    assert [m.training for m in model.modules()] == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_the_model_lacks_is_named(subject):
    model, graph, images = subject
    with pytest.raises(InputError, match="no module 'layer1.0.relu' whose output"):
        observe(Shared(), {"g": Keep(model, graph.inner.groups[0])}, [], progress=False)


# --- scores --------------------------------------------------------------------------------------


def test_apoz_is_the_share_of_active_values(subject):
    model, graph, images = subject
    costs = costs_by("apoz", model, graph, images, batch_size=4)
    maps = inner_maps(model, images)
    expected = [1 - float((maps[:, c] == 0).double().mean()) for c in range(32)]
    torch.testing.assert_close((-costs["layer2.0.conv1"].u).tolist(), expected)

    group, (second, last) = graph["layer2.0.conv2"], stream_maps(model, images)
    expected = []
    for (here,), (there,) in zip(*(part.index for part in group.consumers), strict=True):
        shares = [(t != 0).double().mean() for t in (second[:, here], last[:, there])]
        expected.append(float(sum(shares)) / 2)
    torch.testing.assert_close((-costs[group.name].u).tolist(), expected)


def test_entropy_is_that_of_a_histogram_of_the_averaged_maps(subject):
    model, graph, images = subject
    costs = costs_by("entropy", model, graph.inner, images, batch_size=4)
    pooled = inner_maps(model, images).double().mean((2, 3)).numpy()
    expected = []
    for column in pooled.T:
        share = np.histogram(column, bins=100)[0] / len(column)
        expected.append(float(-sum(p * math.log(p) for p in share if p > 0)))
    torch.testing.assert_close((-costs["layer2.0.conv1"].u).tolist(), expected)


def test_hrank_is_the_mean_rank_of_the_maps(subject):
    model, graph, images = subject
    costs = costs_by("hrank", model, graph.inner, images, batch_size=4)
    maps = inner_maps(model, images).numpy()
    expected = [
        float(np.mean([np.linalg.matrix_rank(image[c]) for image in maps])) for c in range(32)
    ]
    assert len(set(expected)) > 1
    assert (-costs["layer2.0.conv1"].u).tolist() == expected


def ssim(x, y, L):
    c1, c2 = (0.01 * L) ** 2, (0.03 * L) ** 2
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    above = (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
    return above / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2))


def psnr(x, y, L):
    error = ((x - y) ** 2).mean()
    return 60.0 if error <= 1e-6 * L**2 else 10 * math.log10(L**2 / error)


@pytest.mark.parametrize(("kind", "measure"), [("ssim", ssim), ("psnr", psnr)])
def test_qsfm_compares_every_pair_of_maps(kind, measure, subject):
    model, graph, images = subject
    costs = costs_by(f"qsfm-{kind}", model, graph.inner, images, batch_size=4)
    maps = inner_maps(model, images).double().numpy()
    S = costs["layer2.0.conv1"].S
    for i, j in ((0, 1), (3, 17), (30, 31)):
        values = [measure(x[i], x[j], x.max() - x.min()) for x in maps]
        assert float(S[i, j]) == pytest.approx(np.mean(values), rel=1e-5, abs=1e-6)
    assert torch.equal(S.diagonal(), torch.zeros(32, dtype=S.dtype))


@pytest.mark.parametrize(("kind", "largest"), [("ssim", 1.0), ("psnr", 60.0)])
def test_equal_and_empty_maps_are_as_similar_as_can_be(kind, largest):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = trace(model, torch.randn(1, 3, 8, 8))
    model[0].weight.data[2] = model[0].weight.data[1]
    model[0].bias.data[2] = model[0].bias.data[1]
    S = costs_by(f"qsfm-{kind}", model, graph, noise(5, 8))["0"].S
    assert float(S[1, 2]) == pytest.approx(largest)
    assert float(S[0, 1]) < 0.99 * largest
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(-1.0)
    S = costs_by(f"qsfm-{kind}", model, graph, noise(5, 8))["0"].S
    torch.testing.assert_close(S, largest * (1 - torch.eye(4)).double(), atol=1e-5, rtol=1e-6)


def test_qsfm_costs_are_the_kept_maps_summed_similarity_up_to_a_constant():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    cost = costs_by("qsfm-ssim", model, trace(model, torch.randn(1, 3, 8, 8)), noise(5, 8))["0"]
    whole = sum(float(cost.S[i, j]) for i, j in itertools.combinations(range(6), 2))
    for bits in itertools.product((False, True), repeat=6):
        kept = [i for i in range(6) if not bits[i]]
        among = sum(float(cost.S[i, j]) for i, j in itertools.combinations(kept, 2))
        assert cost.objective(torch.tensor(bits)) == pytest.approx(among - whole)
    for r in range(5):  # with one map left all choices are equal
        best = min(
            itertools.combinations(range(6), 6 - r),
            key=lambda kept: sum(float(cost.S[p]) for p in itertools.combinations(kept, 2)),
        )
        assert torch.nonzero(~cost.choose(r).removed).flatten().tolist() == list(best)


def test_qsfm_greedy_drops_one_of_the_closest_pair():
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 2, 1))
    graph = trace(model, torch.randn(1, 3, 8, 8))
    images = noise(5, 8)
    cost = costs_by("qsfm-psnr", model, graph, images, greedy=True)["0"]
    maps = model[:2](next(images.batches(5))[0]).detach()
    maps /= (maps.amax((1, 2, 3)) - maps.amin((1, 2, 3))).view(-1, 1, 1, 1)
    energy = maps.square().mean((0, 2, 3)).tolist()
    assert energy != sorted(energy)
    left = list(range(9))
    for r in range(9):
        gone = sorted(set(range(9)) - set(left))
        choice = cost.choose(r)
        assert torch.nonzero(choice.removed).flatten().tolist() == gone
        assert choice.objective == pytest.approx(cost.objective(choice.removed))
        if r == 8:
            break
        i, j = max(itertools.combinations(left, 2), key=lambda pair: float(cost.S[pair]))
        left.remove(min(i, j, key=lambda k: energy[k]))
    assert cost.choose(9).removed.all()


def test_depthwise_channels_are_compared_behind_the_depthwise_convolution():
    model = lively(models.create("mobilenetv2")).eval()
    graph, images = trace(model, torch.randn(1, 3, 32, 32)), noise(3)
    name = "features.2.layers.0.0"
    seen = []
    hook = model.features[2].layers[1].register_forward_hook(lambda m, a, y: seen.append(y))
    costs = costs_by("qsfm-ssim", model, graph.select_groups([name]), images)
    hook.remove()
    x = seen[0].detach().double().numpy()
    values = [ssim(maps[2], maps[5], maps.max() - maps.min()) for maps in x]
    assert float(costs[name].S[2, 5]) == pytest.approx(np.mean(values))


@pytest.mark.parametrize("name", ["apoz", "entropy", "hrank", "qsfm-ssim", "qsfm-psnr"])
@pytest.mark.parametrize("network", [Concat, Tokens])
def test_maps_of_any_number_of_dimensions_have_scores(name, network):
    model = network()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    costs = costs_by(name, model, graph, noise(6, 8))
    for group in graph.groups:
        choice = costs[group.name].choose(group.channels // 2)
        assert int(choice.removed.sum()) == group.channels // 2


def test_a_linear_cost_chooses_as_select_does():
    cost = Cost(u=torch.randn(7))
    assert torch.equal(cost.choose(3).removed, select(u=cost.u, r=3).removed)
