"""From costs and a budget to a plan."""

from __future__ import annotations

import pytest
import torch

import ccp_ext
from ccp_ext import Cost, InputError, criteria, make_plan, models, planning
from ccp_ext import cost as cost_module
from ccp_ext.cost import SearchedCost
from ccp_ext.forecast import removed_masks
from ccp_ext.joint import JointCost


@pytest.fixture(scope="module")
def graph():
    return ccp_ext.trace(models.create("resnet8"), torch.randn(1, 3, 16, 16)).inner


def random_costs(graph, seed=0):
    generator = torch.Generator().manual_seed(seed)
    costs = {}
    for group in graph.groups:
        a = torch.randn(2 * group.channels, group.channels, generator=generator)
        costs[group.name] = Cost(a.T @ a, torch.randn(group.channels, generator=generator))
    return costs


def test_each_group_loses_the_channels_that_select_chooses(graph):
    costs = random_costs(graph)
    plan = make_plan(graph, costs, ratio=0.5)
    for group in graph.groups:
        cost = costs[group.name]
        choice = ccp_ext.select(F=cost.S, u=cost.u, r=group.channels // 2)
        kept = torch.nonzero(~choice.removed).flatten().tolist()
        assert list(plan.groups[group.name].kept) == kept
        assert plan.record["objective"][group.name] == choice.objective
    assert plan.record["budget"] == {"ratio": 0.5}


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.6}])
def test_budgets_are_met_from_below(graph, budget):
    plan = make_plan(graph, random_costs(graph), **budget)
    (kind, share) = next(iter(budget.items()))
    name = {"macs": "macs", "params": "parameters"}[kind]
    assert 0.9 * share < plan.forecast[f"{name}_after"] / plan.forecast[f"{name}_before"] <= share


def test_statistics_serve_as_costs_without_the_first_order_term(graph):
    torch.manual_seed(0)
    model = models.create("resnet8").eval()
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    with ccp_ext.collect(model, graph) as stats:
        stats.backward(model(x), y)
    plan = make_plan(graph, stats, macs=0.5)
    ccp = criteria.get("ccp")
    costs = ccp.costs(model, graph, stats)
    expected = make_plan(graph, costs, macs=0.5, allocation=ccp.allocation)
    assert plan.groups == expected.groups
    assert plan.record["allocation"] == expected.record["allocation"]
    assert plan.record["allocation"]["method"] == "optimal"
    assert make_plan(graph, costs, macs=0.5).record["allocation"]["method"] == "uniform"
    shares = make_plan(graph, stats, ratio=0.5)
    assert shares.record["allocation"]["method"] == "uniform"
    assert shares.groups == make_plan(graph, costs, ratio=0.5, allocation="uniform").groups


def test_kept_counts_are_multiples(graph):
    plan = make_plan(graph, random_costs(graph), macs=0.6, multiple=8)
    assert all(len(group.kept) % 8 == 0 for group in plan.groups.values())


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.4}, {"activations": 0.8}])
def test_optimal_plans_cost_no_more_than_uniform_ones_and_have_a_bound(graph, budget):
    costs = random_costs(graph)
    uniform = make_plan(graph, costs, **budget)
    optimal = make_plan(graph, costs, **budget, allocation="optimal")
    for plan in (uniform, optimal):
        note = plan.record["allocation"]
        total = 0.0
        for group in graph.groups:
            removed = torch.ones(group.channels, dtype=torch.bool)
            removed[list(plan.groups[group.name].kept)] = False
            total += costs[group.name].objective(removed)
        assert note["objective"] == pytest.approx(total, rel=1e-6)
        assert note["achieved"] <= note["budget"]
    summary = optimal.record["allocation"]
    assert summary["method"] == "optimal" and summary["relaxed"] == 0
    assert summary["objective"] < uniform.record["allocation"]["objective"]
    assert summary["lower_bound"] <= summary["objective"]
    assert summary["gap"] == summary["objective"] - summary["lower_bound"]
    assert "lower_bound" not in uniform.record["allocation"]


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"ratio": 0.5}])
def test_joint_plans_cost_the_whole_network_no_more_than_where_they_begin(graph, budget):
    torch.manual_seed(0)
    model = models.create("resnet8").eval()
    with ccp_ext.collect(model, graph, first_order=False, keep_rows=True) as stats:
        stats.backward(model(torch.randn(24, 3, 16, 16)))
    cost = JointCost.of(stats)
    optimal, joint = (
        make_plan(graph, stats, **budget, allocation=name) for name in ("optimal", "joint")
    )
    before, after = (cost.objective(removed_masks(plan)) for plan in (optimal, joint))
    found = joint.record["allocation"]["joint"]
    assert found["start"] == pytest.approx(before)
    assert joint.record["allocation"]["objective"] == pytest.approx(after)
    assert after < before and found["exchanges"] > 0
    note = joint.record["allocation"]
    # The cost is not negative, and the bound knows more than that.
    assert 0 < note["lower_bound"] <= note["objective"]
    assert note["gap"] == pytest.approx(note["objective"] - note["lower_bound"])
    if "macs" in budget:
        assert joint.forecast["macs_after"] <= 0.5 * joint.forecast["macs_before"]
    else:
        assert joint.forecast == optimal.forecast
    costs = stats.costs()
    for name, mask in removed_masks(joint).items():
        assert joint.record["objective"][name] == pytest.approx(costs[name].objective(mask))


def test_a_joint_plan_without_rows_is_refused(graph):
    with pytest.raises(InputError, match="allocation='joint' needs joint=, or statistics"):
        make_plan(graph, random_costs(graph), macs=0.5, allocation="joint")


def test_wide_groups_are_allocated_over_evenly_spaced_counts(graph, monkeypatch):
    monkeypatch.setattr(planning, "CURVE_COUNTS", 5)
    plan = make_plan(graph, random_costs(graph), macs=0.5, allocation="optimal")
    for group in graph.groups:
        counts = [1 + k * (group.channels - 1) // 4 for k in range(5)]
        assert len(plan.groups[group.name].kept) in counts
    note = plan.record["allocation"]
    assert note["lower_bound"] <= note["objective"]


def test_what_leaves_nothing_to_choose_is_the_same_for_both_allocations(graph):
    costs = random_costs(graph)
    uniform = make_plan(graph, costs, ratio=0.5)
    assert make_plan(graph, costs, ratio=0.5, allocation="optimal").groups == uniform.groups


def test_costs_with_a_search_of_their_own_are_allocated_without_a_bound(graph):
    costs = random_costs(graph)
    name = graph.groups[0].name
    cost = costs[name]
    first = lambda r: torch.arange(cost.channels) < r  # noqa: E731
    costs[name] = SearchedCost(cost.S, cost.u, search=first)
    plan = make_plan(graph, costs, macs=0.5, allocation="optimal")
    kept = plan.groups[name].kept
    assert kept == tuple(range(cost.channels - len(kept), cost.channels))
    assert "lower_bound" not in plan.record["allocation"]


@pytest.mark.parametrize("allocation", ["uniform", "optimal"])
def test_rules_on_the_counts_hold(graph, allocation):
    first, second, third = (g.name for g in graph.groups)
    plan = make_plan(
        graph,
        random_costs(graph),
        macs=0.7,
        allocation=allocation,
        multiple={first: 4},
        minimum=2,
        floors={second: 20},
        ceilings={third: 30},
        protected=[first],
    )
    kept = {name: len(group.kept) for name, group in plan.groups.items()}
    assert kept[first] == graph[first].channels and kept[second] >= 20 and 2 <= kept[third] <= 30


def test_latency_budgets_make_plans(graph):
    model = models.create("resnet8").eval()
    example = torch.randn(1, 3, 16, 16)

    def outputs(module, arguments):
        weights = [m.weight for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
        return float(sum(-(-len(weight) // 8) for weight in weights))

    table = ccp_ext.measure.latency_table(model, graph, example, 8, timer=outputs)
    for allocation in ("uniform", "optimal"):
        plan = make_plan(
            graph, random_costs(graph), latency=0.8, latency_table=table, allocation=allocation
        )
        keep = {name: len(group.kept) for name, group in plan.groups.items()}
        assert plan.record["budget"] == {"latency": 0.8}
        assert plan.record["allocation"]["achieved"] == table.predict(graph, keep)
        assert table.predict(graph, keep) <= 0.8 * table.milliseconds


@pytest.mark.parametrize("progress", [False, True])
def test_bars_show_what_takes_long(progress, graph, capsys, monkeypatch):
    bars, solve = planning.tqdm, cost_module.select
    at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(planning, "tqdm", lambda *a, **k: bars(*a, **{**k, **at_once}))

    def reporting(*arguments, progress, **options):
        if progress:
            progress(5.0, 3.0)
        return solve(*arguments, **options)

    monkeypatch.setattr(cost_module, "select", reporting)
    make_plan(graph, random_costs(graph), macs=0.5, allocation="optimal", progress=progress)
    shown = capsys.readouterr().err
    for title in ("cost curves", "choosing channels", "gap 2"):
        assert (title in shown) == progress


def test_bad_costs_are_named(graph):
    costs = random_costs(graph)
    name = graph.groups[0].name
    with pytest.raises(InputError, match=f"group '{name}' has no cost"):
        make_plan(graph, {k: v for k, v in costs.items() if k != name}, ratio=0.5)
    with pytest.raises(InputError, match=f"cost of group '{name}' is for 3 channels"):
        make_plan(graph, {**costs, name: Cost(u=torch.zeros(3))}, ratio=0.5)
    with pytest.raises(InputError, match="exactly one of"):
        make_plan(graph, costs)
    with pytest.raises(
        InputError, match="allocation must be one of auto, uniform, optimal, joint; got"
    ):
        make_plan(graph, costs, macs=0.5, allocation="best")
