"""The criteria as one family, and those that exist on weights and gradients, by their formulas."""

from __future__ import annotations

import copy
import dataclasses
from math import inf

import pytest
import torch
import torch.nn.functional as F
from small_networks import lively
from torch import nn

import ccp_ext
from ccp_ext import criteria, models, trace
from ccp_ext.cost import SearchedCost
from ccp_ext.criteria import gather
from ccp_ext.datasets import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.statistics import collect


def noise(count: int, size: int = 32, seed: int = 0) -> ImageSet:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator).to(torch.uint8)
    labels = torch.randint(10, (count,), generator=generator)
    return ImageSet(images, labels, (0.5,) * 3, (0.25,) * 3, 10, "noise")


def costs_by(name, model, graph, images, batch_size=8, **options):
    criterion = criteria.get(name, criteria.Options(**options))
    data = gather(model, graph, criterion, images, batch_size=batch_size, progress=False)
    return criterion.costs(model, graph, data)


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    model = lively(models.create("resnet8")).eval()
    return model, trace(model, torch.randn(1, 3, 32, 32)), noise(12)


def costs_of(name, subject, **options):
    model, graph, images = subject
    return costs_by(name, model, graph.inner, images, **options)


def gate_derivatives(subject, group):
    """[N, C], one sample at a time: gate times its gradient, summed over positions."""
    model, _, images = subject
    x, y = next(images.batches(len(images)))
    (tap,) = group.gate_taps
    seen = []

    def keep(tensor):
        tensor.retain_grad()
        seen.append(tensor)

    module = model.get_submodule(tap.module)
    if tap.port == "input":
        hook = module.register_forward_pre_hook(lambda _, args: keep(args[0]))
    else:
        hook = module.register_forward_hook(lambda _, args, output: keep(output))
    for k in range(len(x)):
        F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]).backward()
    hook.remove()
    return torch.cat([(z * z.grad).sum((2, 3)).detach() for z in seen])


@pytest.mark.parametrize("name", criteria.names())
def test_an_option_that_the_criterion_does_not_use_is_refused(name):
    given = {"site": "weight", "curvature": "exact", "rows": 2, "temperature": 2.0}
    given |= {"first_order": True, "diagonal": True, "normalise": "none", "greedy": True}
    given |= {"ridge": 0.5}
    assert {*given, "seed"} == {field.name for field in dataclasses.fields(criteria.Options)}
    uses = criteria.get(name).uses
    for option, value in given.items():
        if option in uses:
            criteria.get(name, criteria.Options(**{option: value}))
        else:
            with pytest.raises(InputError, match=f"{name!r} has no {option} to set, got {value!r}"):
                criteria.get(name, criteria.Options(**{option: value}))


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("name", criteria.names())
def test_every_criterion_leads_to_a_pruned_model(name, scope, subject):
    model, graph, images = subject
    graph = graph.select_groups(scope)
    before = copy.deepcopy(model.state_dict())
    costs = costs_by(name, model, graph, images)
    for group in graph.groups:
        cost = costs[group.name]
        assert cost.channels == group.channels
        for term in (cost.S, cost.u):
            assert term is None or torch.isfinite(term).all()
    plan = ccp_ext.make_plan(graph, costs, ratio=0.5)
    slim = ccp_ext.prune(copy.deepcopy(model), plan)
    assert all(len(plan.groups[g.name].kept) == g.channels // 2 for g in graph.groups)
    assert slim(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", criteria.names())
def test_every_criterion_gives_equal_bits_twice(name, subject):
    first, second = costs_of(name, subject), costs_of(name, subject)
    for group, cost in first.items():
        for a, b in ((cost.S, second[group].S), (cost.u, second[group].u)):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("name", criteria.names())
def test_every_criterion_says_where_it_comes_from(name):
    criterion = criteria.get(name)
    assert criterion.source and criterion.summary and "\n" not in criterion.summary
    assert criterion.note or name == "random"  # what the source leaves open, or what differs


def test_costs_that_compare_across_groups_are_allocated_by_their_sum_and_others_uniformly():
    optimal = {name for name in criteria.names() if criteria.get(name).allocation == "optimal"}
    assert optimal == {
        *("ccp", "ccp-ac", "fisher", "taylor", "taylor-2019", "obd-c", "sosp-h"),
        *("kwon", "gate-refit", "refit-loss"),
        "group-fisher",  # published as a ranking of the channels of all layers
    }
    assert {criteria.get(name).allocation for name in criteria.names()} == {"optimal", "uniform"}


@pytest.mark.parametrize(("name", "order"), [("l1", 1), ("l2", 2)])
def test_norms_are_the_filters_norms(name, order, subject):
    model, graph, _ = subject
    costs = costs_of(name, subject)
    for group in graph.inner.groups:
        weight = model.get_submodule(group.name).weight.detach()
        assert torch.allclose(-costs[group.name].u, weight.flatten(1).norm(order, 1).double())


def test_fpgm_sums_the_distances_to_all_filters_and_over_coupled_layers(subject):
    model, graph, images = subject
    costs = costs_by("fpgm", model, graph, images)
    group = graph["layer2.0.conv2"]
    expected = torch.zeros(group.channels, dtype=torch.float64)
    for part in group.producers:
        weight = model.get_submodule(part.module).weight.detach().double()
        for i, (mine,) in enumerate(part.index):
            for (other,) in part.index:
                expected[i] += (weight[mine] - weight[other]).square().sum().sqrt()
    assert len(group.producers) > 1
    torch.testing.assert_close(-costs[group.name].u, expected)


def test_bn_scale_is_the_absolute_factor(subject):
    model, graph, _ = subject
    costs = costs_of("bn-scale", subject)
    expected = model.layer2[0].bn1.weight.detach().abs().double()
    torch.testing.assert_close(-costs["layer2.0.conv1"].u, expected)


def test_bn_scale_names_the_group_without_a_batchnorm():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = trace(model, torch.randn(1, 3, 4, 4))
    with pytest.raises(InputError, match="bn-scale.*'0' has none"):
        criteria.get("bn-scale").costs(model, graph, None)


def test_taylor_and_fisher_follow_the_per_sample_gate_derivatives(subject):
    taylor, fisher = costs_of("taylor", subject), costs_of("fisher", subject)
    group = subject[1].inner.groups[1]
    a = gate_derivatives(subject, group)
    assert torch.allclose(-taylor[group.name].u, a.abs().mean(0), rtol=1e-4, atol=1e-7)
    assert torch.allclose(-fisher[group.name].u, 0.5 * a.square().mean(0), rtol=1e-4, atol=1e-9)


def test_ccp_options_choose_curvature_site_and_terms(subject):
    name = subject[1].inner.groups[0].name
    assert costs_of("ccp", subject)[name].u is None
    assert costs_of("ccp", subject, first_order=True)[name].u is not None
    paper = costs_of("ccp-paper", subject)[name]
    literal = costs_of("ccp", subject, curvature="empirical", site="weight", first_order=True)[name]
    assert torch.equal(paper.S, literal.S) and torch.equal(paper.u, literal.u)
    diagonal = costs_of("ccp", subject, diagonal=True)[name].S
    assert torch.equal(diagonal, torch.diag(costs_of("ccp", subject)[name].S.diagonal()))


def test_gathered_statistics_are_those_of_collect(subject):
    model, graph, images = subject
    criterion = criteria.get("ccp", criteria.Options(first_order=True))
    gathered = gather(model, graph.inner, criterion, images, batch_size=5, progress=False)
    with collect(model, graph.inner, **criterion.statistics()) as stats:
        for x, y in images.batches(5):
            stats.backward(model(x), y)
    for name in stats:
        assert torch.equal(gathered[name].S, stats[name].S)
        assert torch.equal(gathered[name].u, stats[name].u)


def test_gathering_goes_on_from_its_checkpoint(subject, tmp_path):
    model, graph, images = subject
    criterion, path = criteria.get("ccp-paper"), tmp_path / "statistics.pt"
    whole = gather(model, graph.inner, criterion, images, batch_size=4, progress=False)
    stopped = images.subset(range(8))
    gather(model, graph.inner, criterion, stopped, batch_size=4, checkpoint=path, progress=False)
    options = {"batch_size": 4, "checkpoint": path, "progress": False}
    resumed = gather(model, graph.inner, criterion, images, **options)
    for name in whole:
        assert whole[name].count == resumed[name].count == 12
        assert torch.equal(whole[name].S, resumed[name].S)
    torch.save({"batches": 1}, path)
    with pytest.raises(InputError, match="statistics.pt is damaged or of another run"):
        gather(model, graph.inner, criterion, images, **options)


def test_gathering_refuses_a_loss_that_is_not_finite(subject):
    model, graph, images = subject
    broken = copy.deepcopy(model)
    broken.linear.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="the loss is nan within the first 12 images"):
        gather(broken, graph.inner, criteria.get("ccp-paper"), images, progress=False)


def test_a_searched_cost_returns_what_its_search_finds():
    found = torch.tensor([True, False, True])
    quadratic = SearchedCost(u=-torch.arange(3.0), search=lambda r: found)
    choice = quadratic.choose(2, method="exact", node_limit=3)
    assert choice.removed is found and choice.objective == 2.0
    assert (choice.lower_bound, choice.status, choice.method) == (-inf, "heuristic", "search")
    exact = SearchedCost(u=-torch.arange(3.0), search=lambda r: found, loss=lambda m: 7.0)
    assert exact.choose(2).objective == exact.objective(found) == 7.0
    for r in (-1, 4):
        with pytest.raises(InputError, match=f"r must lie within 0 to C = 3; got {r}"):
            exact.choose(r)
    with pytest.raises(ValueError, match="search must be given"):
        SearchedCost(u=torch.zeros(3))


def test_random_is_the_seeds(subject):
    name = subject[1].inner.groups[0].name
    first, again, other = (costs_of("random", subject, seed=s)[name].u for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_unknown_criterion_is_named():
    with pytest.raises(InputError, match="criterion must be one of .*; got 'ccpp'"):
        criteria.get("ccpp")


def test_a_negative_ridge_is_refused():
    with pytest.raises(InputError, match="ridge must be a number of 0 or more, got -1"):
        criteria.Options(ridge=-1)
