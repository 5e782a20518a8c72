"""Each criterion's scores against its published formula, on a small network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ccp_ext import criteria, models, trace
from ccp_ext.errors import InputError
from ccp_ext.statistics import collect


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    model = models.create("resnet8").eval()
    x, y = torch.randn(12, 3, 32, 32), torch.randint(10, (12,))
    return model, trace(model, x[:1]).inner, x, y


def costs_of(name, subject, **options):
    model, graph, x, y = subject
    criterion = criteria.get(name, criteria.Options(**options))
    settings = criterion.statistics()
    if settings is None:
        return criterion.costs(model, graph, None)
    with collect(model, graph, **settings) as stats:
        stats.backward(model(x), y)
    return criterion.costs(model, graph, stats)


def gate_derivatives(subject, group):
    """[N, C], one sample at a time: gate times its gradient, summed over positions."""
    model, _, x, y = subject
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
def test_every_criterion_gives_each_group_a_finite_cost_of_its_size(name, subject):
    costs = costs_of(name, subject)
    for group in subject[1].groups:
        cost = costs[group.name]
        assert cost.channels == group.channels
        for term in (cost.S, cost.u):
            assert term is None or torch.isfinite(term).all()
    assert criteria.get(name).source and criteria.get(name).summary


@pytest.mark.parametrize(("name", "order"), [("l1", 1), ("l2", 2)])
def test_norms_are_the_filters_norms(name, order, subject):
    model, graph, *_ = subject
    costs = costs_of(name, subject)
    for group in graph.groups:
        weight = model.get_submodule(group.name).weight.detach()
        assert torch.allclose(-costs[group.name].u, weight.flatten(1).norm(order, 1).double())


def test_taylor_and_fisher_follow_the_per_sample_gate_derivatives(subject):
    taylor, fisher = costs_of("taylor", subject), costs_of("fisher", subject)
    group = subject[1].groups[1]
    a = gate_derivatives(subject, group)
    assert torch.allclose(-taylor[group.name].u, a.abs().mean(0), rtol=1e-4, atol=1e-7)
    assert torch.allclose(-fisher[group.name].u, 0.5 * a.square().mean(0), rtol=1e-4, atol=1e-9)


def test_ccp_options_choose_curvature_site_and_terms(subject):
    name = subject[1].groups[0].name
    assert costs_of("ccp", subject)[name].u is None
    assert costs_of("ccp", subject, first_order=True)[name].u is not None
    paper = costs_of("ccp-paper", subject)[name]
    literal = costs_of("ccp", subject, curvature="empirical", site="weight", first_order=True)[name]
    assert torch.equal(paper.S, literal.S) and torch.equal(paper.u, literal.u)
    diagonal = costs_of("ccp", subject, diagonal=True)[name].S
    assert torch.equal(diagonal, torch.diag(costs_of("ccp", subject)[name].S.diagonal()))


def test_random_is_the_seeds(subject):
    name = subject[1].groups[0].name
    first, again, other = (costs_of("random", subject, seed=s)[name].u for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_unknown_criterion_is_named():
    with pytest.raises(InputError, match="criterion must be one of .*; got 'ccpp'"):
        criteria.get("ccpp")
