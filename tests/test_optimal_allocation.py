"""Allocations that minimise the sum of the groups' costs: bounds, optima, and the rules."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import Concat, Depthwise, InPlace, Shared, SqueezeExcite, Tokens
from torch import nn

from benchmarks.allocation import synthetic_curves
from benchmarks.resnet50 import ResNet50
from ccp_ext.allocation import Allocation, allocate
from ccp_ext.allocation.lagrangian import Program, solve
from ccp_ext.allocation.resource import Affine, Resource, Table
from ccp_ext.errors import InputError
from ccp_ext.graph import trace


@dataclass
class Curve:
    """Of ``counts`` removed channels: the cost and a bound of it."""

    counts: np.ndarray
    objective: np.ndarray
    lower_bound: np.ndarray


class Bottlenecks(nn.Module):
    """Two bottleneck blocks on a stream, the second with a projection to a wider one."""

    def __init__(self, stem=4, inner=3, wide=6):
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.one = nn.Sequential(
            nn.Conv2d(stem, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(inner, stem, 1),
        )
        self.two = nn.Sequential(nn.Conv2d(stem, inner, 1), nn.ReLU(), nn.Conv2d(inner, wide, 3, 2))
        self.project = nn.Conv2d(stem, wide, 3, 2)
        self.head = nn.Linear(wide, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.one(x))
        x = F.relu(self.project(x) + self.two(x))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self, growth=3, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(3 + k * growth, growth, 3, padding=1) for k in range(layers)
        )
        self.head = nn.Linear(3 + layers * growth, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.head(x.mean((2, 3)))


NETWORKS = (Concat, SqueezeExcite, Shared, InPlace, Tokens, Depthwise, Bottlenecks, Dense)


def graph_of(make):
    return trace(make(), torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda make: make.__name__)
def graph(request):
    return graph_of(request.param)


@pytest.fixture(scope="module")
def bottlenecks():
    return graph_of(Bottlenecks)


def curves_of(graph, seed=0, slack=0.05, monotone=True):
    """Costs that grow faster and faster with the channels removed; bounds a little below."""
    rng = np.random.default_rng(seed)
    curves = {}
    for group in graph.groups:
        steps = np.sort(rng.exponential(size=group.channels))
        if not monotone:
            steps = rng.normal(size=group.channels)
        objective = np.r_[0, np.cumsum(steps)]
        below = slack * rng.random(group.channels + 1) * np.abs(objective)
        curves[group.name] = Curve(np.arange(group.channels + 1), objective, objective - below)
    return curves


def enumerated(graph, curves, kind, budget, field="objective"):
    """The least sum of the curves over all keep counts within the budget."""
    resource = graph.resource(kind)
    names = [g.name for g in graph.groups]
    best = np.inf
    for counts in itertools.product(*(range(1, g.channels + 1) for g in graph.groups)):
        if resource(dict(zip(names, counts, strict=True))) <= budget:
            removed = (graph[n].channels - c for n, c in zip(names, counts, strict=True))
            value = sum(getattr(curves[n], field)[r] for n, r in zip(names, removed, strict=True))
            best = min(best, value)
    return best


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("kind, share", [("macs", 0.45), ("params", 0.6), ("activations", 0.7)])
def test_the_bound_is_below_and_the_allocation_near_the_optimum(graph, kind, share, monotone):
    curves = curves_of(graph, monotone=monotone)
    found = allocate(graph, curves=curves, **{kind: share})
    assert found.kind == kind and found.relaxed == 0
    assert list(found.keep) == [g.name for g in graph.groups]
    assert found.achieved == graph.resource(kind)(found.keep) <= found.budget
    removed = {g.name: g.channels - found.keep[g.name] for g in graph.groups}
    assert found.objective == pytest.approx(sum(curves[n].objective[r] for n, r in removed.items()))
    best = enumerated(graph, curves, kind, found.budget)
    spread = sum(np.ptp(c.objective) for c in curves.values())
    bound = enumerated(graph, curves, kind, found.budget, "lower_bound")
    assert found.lower_bound <= bound + 1e-14 * spread
    # Exchanges of two groups find the optimum of networks as small as these, or nearly so.
    assert best - 1e-9 <= found.objective <= best + 0.02 * spread
    assert found.gap == found.objective - found.lower_bound


def test_the_dual_bound_is_tight_where_the_curves_are_convex(bottlenecks):
    curves = curves_of(bottlenecks, slack=0.0)
    found = allocate(bottlenecks, curves=curves, macs=0.5)
    spread = sum(np.ptp(c.objective) for c in curves.values())
    assert 0 <= found.gap <= 0.02 * spread
    uniform = allocate(bottlenecks, macs=0.5)
    cost = sum(curves[n].objective[bottlenecks[n].channels - k] for n, k in uniform.keep.items())
    assert found.objective <= cost
    assert found.multiplier > 0


def test_a_limit_on_the_tables_relaxes_but_stays_valid():
    graph = graph_of(Dense)
    curves = curves_of(graph)
    resource = graph.resource("macs")
    budget = int(0.5 * graph.macs())
    widths = {g.name: np.arange(1, g.channels + 1) for g in graph.groups}
    upper = {n: curves[n].objective[::-1][1:] for n in widths}
    lower = {n: curves[n].lower_bound[::-1][1:] for n in widths}
    program = Program(widths, upper, resource, budget)
    exact, relaxed = solve(program, lower), solve(program, lower, limit=3)
    assert exact.relaxed == 0 < relaxed.relaxed
    optimum = enumerated(graph, curves, "macs", budget)
    bound = enumerated(graph, curves, "macs", budget, "lower_bound")
    assert relaxed.lower_bound <= bound
    assert exact.lower_bound <= bound
    # The tangents cost little: the bound is no mere formality.
    assert relaxed.lower_bound > 0.5 * exact.lower_bound > 0
    for found in (exact, relaxed):
        assert resource(found.keep) <= budget
        assert found.objective >= optimum - 1e-9


def improvements(program, keep):
    """Widths within the budget that cost less, with one group changed or one narrowed for another.

    Yields the keep counts; of groups that are exchanged, those of up to 12 more or fewer channels.
    """
    at = {n: int(np.flatnonzero(w == keep[n])[0]) for n, w in program.widths.items()}
    moves = [{n: k} for n in at for k in range(len(program.widths[n]))]
    for a, b in itertools.permutations(at, 2):
        narrower = range(max(0, at[a] - 12), at[a])
        wider = range(at[b] + 1, min(len(program.widths[b]), at[b] + 13))
        moves += [{a: i, b: j} for i in narrower for j in wider]
    for move in moves:
        changed = {**at, **move}
        less = program.objective(changed) < program.objective(at) - 1e-9
        if less and program.cost(changed) <= program.budget:
            yield program.keep(changed)


@pytest.mark.parametrize("seed", [0, 7, 9])
@pytest.mark.parametrize("in_tables", [False, True])
def test_no_change_of_one_group_and_no_exchange_of_two_improves(in_tables, seed):
    rng = np.random.default_rng(seed)
    names = [f"group{k}" for k in range(6)]
    widths = {name: np.arange(1, 21) for name in names}
    values = {name: np.cumsum(np.sort(rng.exponential(size=20)))[::-1] for name in names}
    pairs = {pair: int(rng.integers(1, 9)) for pair in itertools.combinations(names, 2)}
    resource = Resource(products={**pairs, (names[0], names[0]): 5})
    if in_tables:
        resource = Resource(tables=tuple(product_table(*pair, c) for pair, c in pairs.items()))
    program = Program(widths, values, resource, 0.3 * resource(dict.fromkeys(names, 20)))
    found = solve(program, values)
    assert resource(found.keep) <= program.budget
    assert list(improvements(program, found.keep)) == []


def product_table(a, b, coefficient):
    value = lambda out, inputs: np.asarray(coefficient * out * inputs, dtype=np.float64)  # noqa: E731
    return Table(Affine(0, {a: 1}), Affine(0, {b: 1}), value, value, (lambda n: n, lambda n: n))


def test_more_budget_never_costs_more(bottlenecks):
    curves = curves_of(bottlenecks)
    found = [allocate(bottlenecks, curves=curves, macs=k / 20) for k in range(5, 21)]
    bounds = [f.lower_bound for f in found]
    assert all(b >= c - 1e-9 for b, c in itertools.pairwise(bounds))
    assert found[-1].objective == 0 and found[-1].keep == {
        g.name: g.channels for g in bottlenecks.groups
    }


def test_equal_input_gives_equal_allocations(bottlenecks):
    curves = curves_of(bottlenecks)
    assert allocate(bottlenecks, curves=curves, params=0.4) == allocate(
        bottlenecks, curves=curves, params=0.4
    )


def test_dear_channels_stay(bottlenecks):
    """The group whose channels cost a thousand times as much keeps more than uniformly."""
    curves = curves_of(bottlenecks)
    name = "stem"
    dear = curves[name]
    curves[name] = Curve(dear.counts, 1000 * dear.objective, 1000 * dear.lower_bound)
    uniform = allocate(bottlenecks, macs=0.5).keep[name]
    assert allocate(bottlenecks, curves=curves, macs=0.5).keep[name] > uniform


def test_only_counts_on_the_curve_are_kept(bottlenecks):
    curves = curves_of(bottlenecks)
    curves = {
        n: Curve(c.counts[::2], c.objective[::2], c.lower_bound[::2]) for n, c in curves.items()
    }
    keep = allocate(bottlenecks, curves=curves, macs=0.6).keep
    assert all((bottlenecks[n].channels - k) % 2 == 0 for n, k in keep.items())


@pytest.mark.parametrize("with_curves", [False, True])
def test_floors_ceilings_and_protected_groups_hold(bottlenecks, with_curves):
    curves = curves_of(bottlenecks) if with_curves else None
    first, second, *_ = (g.name for g in bottlenecks.groups)
    wide = next(g for g in bottlenecks.groups if g.channels == 6)
    found = allocate(
        bottlenecks,
        curves=curves,
        macs=0.6,
        floors={first: 3},
        ceilings={wide.name: 4},
        protected=[second],
        multiple={wide.name: 2},
    )
    assert found.keep[first] >= 3
    assert found.keep[wide.name] in (2, 4)
    assert found.keep[second] == bottlenecks[second].channels
    assert found.achieved <= found.budget


@pytest.fixture(scope="module")
def resnet50():
    return trace(ResNet50().eval(), torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_resnet50_meets_every_budget_from_below_and_near_its_bound(resnet50, scope):
    graph = resnet50.select_groups(scope)
    curves = synthetic_curves(graph, seed=1)
    for share in (0.2, 0.5, 0.9):
        found = allocate(graph, curves=curves, macs=share)
        assert found.relaxed == 0
        assert 0.995 * found.budget <= found.achieved <= found.budget
        own = {n: Curve(c.counts, c.objective, c.objective) for n, c in curves.items()}
        tight = allocate(graph, curves=own, macs=share)
        assert found.lower_bound <= tight.lower_bound <= tight.objective == found.objective
        assert tight.gap <= 0.005 * tight.objective
        uniform = allocate(graph, curves=curves, per_group=allocate(graph, macs=share).keep)
        assert found.objective < 0.8 * uniform.objective


def test_other_budgets_are_valued_by_the_curves(bottlenecks):
    curves = curves_of(bottlenecks)
    found = allocate(bottlenecks, curves=curves, ratio=0.5)
    plain = allocate(bottlenecks, ratio=0.5)
    assert found.keep == plain.keep and plain == Allocation(plain.keep, "ratio")
    removed = {n: bottlenecks[n].channels - k for n, k in found.keep.items()}
    assert found.objective == pytest.approx(sum(curves[n].objective[r] for n, r in removed.items()))
    assert found.lower_bound <= found.objective


def test_bad_input_is_named(bottlenecks):
    curves = curves_of(bottlenecks)
    first = bottlenecks.groups[0]
    with pytest.raises(InputError, match=f"curves has no group '{first.name}'"):
        rest = {n: c for n, c in curves.items() if n != first.name}
        allocate(bottlenecks, curves=rest, macs=0.5)
    short = Curve(curves[first.name].counts, curves[first.name].objective[1:], np.zeros(2))
    with pytest.raises(InputError, match=f"the curve of group '{first.name}' has"):
        allocate(bottlenecks, curves={**curves, first.name: short}, macs=0.5)
    with pytest.raises(InputError, match="none of the counts"):
        nothing_left = Curve(np.array([first.channels]), np.zeros(1), np.zeros(1))
        allocate(bottlenecks, curves={**curves, first.name: nothing_left}, macs=0.5)
    with pytest.raises(InputError, match="at least 3 of its 4 channels.*ceilings allow 2"):
        allocate(bottlenecks, macs=0.5, floors={first.name: 3}, ceilings={first.name: 2})
    with pytest.raises(InputError, match=r"floors names unknown groups \['x'\]"):
        allocate(bottlenecks, macs=0.5, floors={"x": 3})
    with pytest.raises(InputError, match=r"protected names unknown groups \['x'\]"):
        allocate(bottlenecks, macs=0.5, protected="x")
    with pytest.raises(InputError, match="smallest that can be reached is .*floors") as error:
        floors = {g.name: g.channels for g in bottlenecks.groups}
        allocate(bottlenecks, curves=curves, activations=0.9, floors=floors)
    assert str(bottlenecks.activations()) in str(error.value)
