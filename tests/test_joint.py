"""The joint cost against its definition, and its descent against brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ccp_ext import JointCost, collect, joint, refine, trace
from ccp_ext.allocation.resource import Resource
from ccp_ext.errors import InputError
from ccp_ext.joint.descent import _Point
from ccp_ext.joint.problem import Problem
from tests.small_networks import Shared, lively

WIDTHS = {"a": 4, "b": 5, "c": 3}


@dataclass(frozen=True)
class Named:
    name: str
    channels: int


BILINEAR = Resource(linear={"a": 3, "c": 4}, products={("a", "b"): 2, ("b", "c"): 1})


@dataclass(frozen=True)
class Groups:
    groups: tuple[Named, ...]

    def resource(self, kind: str) -> Resource:
        assert kind == "macs"
        return BILINEAR


GRAPH = Groups(tuple(Named(name, width) for name, width in WIDTHS.items()))


def bilinear(keep) -> int:
    """A chain a - b - c: what a channel uses depends on its neighbours' widths."""
    return BILINEAR(keep)


def random_cost(seed: int, samples: int = 40, dtype=torch.float64) -> JointCost:
    """Correlated channels, within the groups and between them, and a linear term."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(WIDTHS.values())
    shared = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    mixed = shared @ torch.randn(4, total, generator=generator, dtype=torch.float64)
    mixed += 0.5 * torch.randn(samples, total, generator=generator, dtype=torch.float64)
    u = 0.3 * torch.randn(total, generator=generator, dtype=torch.float64)
    widths = list(WIDTHS.values())
    rows, linear = {}, {}
    for name, q, v in zip(WIDTHS, mixed.split(widths, 1), u.split(widths), strict=True):
        rows[name], linear[name] = q.to(dtype), v.to(dtype)
    return JointCost(rows, samples, linear)


def random_masks(seed: int, removed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, width in WIDTHS.items():
        masks[name] = torch.zeros(width, dtype=torch.bool)
        masks[name][torch.randperm(width, generator=generator)[:removed]] = True
    return masks


def dense(cost: JointCost) -> tuple[Tensor, Tensor]:
    q = torch.cat([cost.rows[name] for name in WIDTHS], 1).double()
    u = torch.cat([cost.u[name] for name in WIDTHS]).double()
    return q.T @ q / cost.count, u


def value(F: Tensor, u: Tensor, mask: Tensor) -> float:
    m = mask.double()
    return (0.5 * m @ F @ m - u @ m).item()


def joined(masks) -> Tensor:
    return torch.cat([masks[name] for name in WIDTHS])


def keep_counts(mask: Tensor) -> dict[str, int]:
    parts = mask.split(list(WIDTHS.values()))
    return {name: int((~part).sum()) for name, part in zip(WIDTHS, parts, strict=True)}


def flipped(mask: Tensor, *channels: int) -> Tensor:
    other = mask.clone()
    other[list(channels)] ^= True
    return other


# --- the cost ----------------------------------------------------------------------------------


def test_the_cost_is_the_quadratic_form_of_the_whole_network():
    cost, masks = random_cost(0), random_masks(1)
    F, u = dense(cost)
    assert cost.objective(masks) == pytest.approx(value(F, u, joined(masks)), rel=1e-12)
    blocks = torch.block_diag(*(block for block in _diagonal_blocks(F)))
    assert cost.within_groups(masks) == pytest.approx(value(blocks, u, joined(masks)), rel=1e-12)
    assert cost.objective({}) == cost.within_groups({}) == 0.0


def _diagonal_blocks(F: Tensor):
    start = 0
    for width in WIDTHS.values():
        yield F[start : start + width, start : start + width]
        start += width


@pytest.mark.parametrize("first_order", [False, True])
def test_the_cost_of_statistics_joins_what_their_groups_say(first_order):
    torch.manual_seed(0)
    net = lively(Shared()).eval()
    graph = trace(net, torch.randn(2, 3, 6, 6))
    with collect(net, graph, curvature="logits", keep_rows=True) as stats:
        stats.backward(net(torch.randn(7, 3, 6, 6)), torch.arange(7) % 5)
    cost = JointCost.of(stats, first_order)
    masks = {g.name: torch.arange(g.channels) % 2 == 0 for g in graph.groups}
    alone = sum(stats[name].cost(first_order).objective(m) for name, m in masks.items())
    assert cost.within_groups(masks) == pytest.approx(alone, rel=1e-5)
    one = {name: mask for name, mask in list(masks.items())[:1]}
    assert cost.objective(one) == pytest.approx(cost.within_groups(one), rel=1e-12)


# --- the descent -------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [6, 40])  # fewer rows than channels, and more
@pytest.mark.parametrize("seed", range(6))
def test_no_single_move_improves_the_result(seed, samples):
    cost, start = random_cost(seed, samples), random_masks(seed)
    budget = bilinear(keep_counts(joined(start)))
    result = refine(GRAPH, cost, start, resource=bilinear, budget=budget)
    F, u = dense(cost)
    mask = joined(result.removed)
    best = value(F, u, mask)
    assert result.status == "local minimum"
    assert result.start == pytest.approx(value(F, u, joined(start)), rel=1e-12)
    assert result.objective == pytest.approx(best, rel=1e-12)
    assert result.objective <= result.start
    assert result.keep == keep_counts(mask) and bilinear(result.keep) <= budget
    single = [(i,) for i in range(len(mask))]
    for channels in single + list(itertools.combinations(range(len(mask)), 2)):
        other = flipped(mask, *channels)
        is_pair_of_one_kind = len(channels) == 2 and mask[channels[0]] == mask[channels[1]]
        keep = keep_counts(other)
        if not is_pair_of_one_kind and _fits(keep, budget):
            assert value(F, u, other) > best - 1e-10


def least_cost(cost: JointCost, budget: int) -> float:
    """By enumeration of all masks within the budget."""
    F, u = dense(cost)
    every = torch.tensor(list(itertools.product([False, True], repeat=len(u))))
    parts = every.split(list(WIDTHS.values()), 1)
    keep = {name: (~part).sum(1) for name, part in zip(WIDTHS, parts, strict=True)}
    within = (torch.stack(list(keep.values())) > 0).all(0) & (bilinear(keep) <= budget)
    m = every[within].double()
    return (0.5 * (m @ F * m).sum(1) - m @ u).min().item()


def test_the_descent_gains_most_of_what_there_is_to_gain_and_the_bound_holds():
    gained, possible, left = 0.0, 0.0, 0.0
    for seed in range(5):
        cost, start = random_cost(seed), random_masks(seed)
        budget = bilinear(keep_counts(joined(start)))
        least = least_cost(cost, budget)
        result = refine(GRAPH, cost, start, resource=bilinear, budget=budget)
        assert result.objective >= least - 1e-10
        gained += result.start - result.objective
        possible += result.start - least
        bound = joint.lower_bound(GRAPH, cost, result.removed, iterations=100, macs=budget)
        assert bound <= least + 1e-10
        left += least - bound
    assert gained > 0.9 * possible
    assert left < 0.2 * possible  # the relaxation is worth something


def test_the_bound_is_the_minimum_where_the_relaxation_is_exact():
    """Removing two channels of "b" costs nothing and is enough."""
    cost = orthogonal({"a": [9, 9, 9, 9], "b": [0, 0, 9, 9, 9], "c": [9, 9, 9]})
    masks = {name: torch.zeros(width, dtype=torch.bool) for name, width in WIDTHS.items()}
    masks["b"][:2] = True
    bound = joint.lower_bound(GRAPH, cost, masks, macs=bilinear({"a": 4, "b": 3, "c": 3}))
    assert bound == pytest.approx(0.0, abs=1e-9)


def test_the_bound_at_fixed_counts_holds_and_is_worth_something():
    left, possible = 0.0, 0.0
    for seed in range(5):
        cost, start = random_cost(seed), random_masks(seed)
        F, u = dense(cost)
        keep = keep_counts(joined(start))
        every = torch.tensor(list(itertools.product([False, True], repeat=len(u))))
        values = [value(F, u, mask) for mask in every if keep_counts(mask) == keep]
        bound = joint.lower_bound(GRAPH, cost, start, iterations=200, per_group=keep)
        assert bound <= min(values) + 1e-10
        left += min(values) - bound
        possible += sum(values) / len(values) - min(values)
    assert left < 0.2 * possible


def _fits(keep: dict[str, int], budget: int) -> bool:
    return min(keep.values()) > 0 and bilinear(keep) <= budget


def test_without_a_budget_every_group_keeps_its_number_of_channels():
    cost, start = random_cost(3), random_masks(3)
    result = refine(GRAPH, cost, start)
    assert result.keep == keep_counts(joined(start))
    assert result.exchanges > 0 and result.transfers == result.chains == 0
    assert result.objective < result.start


def test_a_transfer_moves_a_channel_to_another_group():
    """Independent channels: one of "a" is dear and gone, one of "b" is cheap and there."""
    cost = orthogonal({"a": [5, 5, 5, 5], "b": [1, 4, 4, 4, 4], "c": [5, 5, 5]})
    start = {name: torch.zeros(width, dtype=torch.bool) for name, width in WIDTHS.items()}
    start["a"][0] = True
    result = refine(GRAPH, cost, start, resource=lambda keep: sum(keep.values()), budget=11)
    assert (result.exchanges, result.transfers, result.chains) == (0, 1, 0)
    assert result.removed["b"].tolist() == [True, False, False, False, False]
    assert not result.removed["a"].any()


def test_a_chain_pays_for_one_channel_with_two():
    cost = orthogonal({"a": [9, 9, 9, 9], "b": [1, 1, 9, 9, 9], "c": [99, 99, 99]})
    start = {name: torch.zeros(width, dtype=torch.bool) for name, width in WIDTHS.items()}
    start["a"][0] = True

    def resource(keep):
        return 2 * keep["a"] + keep["b"] + 10 * keep["c"]

    result = refine(GRAPH, cost, start, resource=resource, budget=2 * 3 + 5 + 30)
    assert (result.exchanges, result.transfers, result.chains) == (0, 0, 1)
    assert result.removed["b"].tolist() == [True, True, False, False, False]
    assert not result.removed["a"].any() and result.objective == pytest.approx(1.0)


def orthogonal(diagonal: dict[str, list[float]]) -> JointCost:
    """A cost without interactions, with these diagonals of F."""
    values = torch.tensor([v for part in diagonal.values() for v in part], dtype=torch.float64)
    q = torch.diag((len(values) * values).sqrt())
    parts = q.split([len(part) for part in diagonal.values()], 1)
    return JointCost(dict(zip(diagonal, parts, strict=True)), len(values))


@pytest.mark.parametrize("seed", range(4))
def test_only_allowed_counts_are_reached(seed):
    cost, start = random_cost(seed), random_masks(seed)
    start["b"] = torch.tensor([True, False, True, True, False])
    counts = {"a": (2, 4), "b": (2, 4, 5), "c": (1, 2, 3)}
    budget = bilinear(keep_counts(joined(start)))
    result = refine(GRAPH, cost, start, resource=bilinear, budget=budget, counts=counts)
    assert all(result.keep[name] in allowed for name, allowed in counts.items())
    assert bilinear(result.keep) <= budget and result.objective <= result.start


def test_the_bookkeeping_of_many_flips_equals_a_recomputation():
    cost, start = random_cost(5), random_masks(5)
    F, u = dense(cost)
    point = _Point.at(Problem(cost, list(WIDTHS)), joined(start))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        flips = torch.randperm(len(u), generator=generator)[:2].tolist()
        expected = value(F, u, flipped(point.removed, *flips)) - value(F, u, point.removed)
        assert point.change(flips)[0] == pytest.approx(expected, abs=1e-11)
        point.flip(flips)
    changed = value(F, u, point.removed) - value(F, u, joined(start))
    assert point.value == pytest.approx(changed, abs=1e-11)
    assert point.keep == keep_counts(point.removed)
    torch.testing.assert_close(point.gradient, F @ point.removed.double() - u)
    alone = [value(F, u, flipped(point.removed, i)) for i in range(len(u))]
    expected = torch.tensor(alone, dtype=torch.float64) - value(F, u, point.removed)
    torch.testing.assert_close(point.flip_costs(), expected)


def test_float32_rows_end_at_a_local_minimum_of_their_own_precision():
    cost, start = random_cost(2, samples=6, dtype=torch.float32), random_masks(2)
    budget = bilinear(keep_counts(joined(start)))
    result = refine(GRAPH, cost, start, resource=bilinear, budget=budget)
    exact = refine(GRAPH, random_cost(2, samples=6), start, resource=bilinear, budget=budget)
    assert result.status == "local minimum"
    assert result.objective == pytest.approx(exact.objective, rel=1e-4)


def test_limits_stop_the_walk_and_the_start_is_left_alone():
    cost, start = random_cost(4), random_masks(4)
    copies = {name: mask.clone() for name, mask in start.items()}
    budget = bilinear(keep_counts(joined(start)))
    options = {"resource": bilinear, "budget": budget}
    one = refine(GRAPH, cost, start, **options, max_moves=1)
    assert one.exchanges + one.transfers + one.chains == 1 and one.status == "move limit"
    none = refine(GRAPH, cost, start, **options, time_limit=0.0)
    assert none.status == "time limit" and none.objective == none.start
    assert torch.equal(joined(none.removed), joined(start))
    assert all(torch.equal(start[name], copies[name]) for name in start)


def test_equal_input_gives_equal_results():
    cost, start = random_cost(6), random_masks(6)
    options = {"resource": bilinear, "budget": bilinear(keep_counts(joined(start)))}
    first, second = (refine(GRAPH, cost, start, **options) for _ in range(2))
    assert torch.equal(joined(first.removed), joined(second.removed))
    assert first.objective == second.objective


@pytest.mark.gpu
def test_a_gpu_walks_to_the_same_choice(cuda):
    cost, start = random_cost(1), random_masks(1)
    options = {"resource": bilinear, "budget": bilinear(keep_counts(joined(start)))}
    there = JointCost({n: q.to(cuda) for n, q in cost.rows.items()}, cost.count, cost.u)
    here, away = refine(GRAPH, cost, start, **options), refine(GRAPH, there, start, **options)
    assert torch.equal(joined(here.removed), joined(away.removed))


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resource": bilinear}, "resource and budget must be given together"),
        ({"resource": bilinear, "budget": 1}, "more than the budget of 1"),
        ({"removed": {}}, "group 'a' has no mask"),
        ({"removed": {"a": torch.ones(4, dtype=torch.bool)}}, "removes all its channels"),
        ({"removed": {"a": torch.zeros(3, dtype=torch.bool)}}, r"must be bool \[4\]"),
        ({"removed": {"a": torch.zeros(4)}}, r"torch.float32 \[4\]"),
        ({"rows": {}}, "group 'a' has no rows"),
        ({"rows": {"a": torch.zeros(40, 3)}}, r"must be \[M, 4\], got \[40, 3\]"),
        ({"rows": {"a": torch.full((40, 4), torch.nan)}}, "must be finite"),
        ({"rows": {"a": torch.zeros(7, 4)}}, "equally many rows, got"),
    ],
)
def test_bad_input_is_named(change, message):
    cost, masks = random_cost(0), random_masks(0)
    if "rows" in change:
        rows = {**cost.rows, **change["rows"]} if change["rows"] else {}
        cost = JointCost(rows, cost.count, cost.u)
    if "removed" in change:
        masks = {**masks, **change["removed"]} if change["removed"] else {}
    options = {name: change[name] for name in ("resource", "budget") if name in change}
    with pytest.raises(InputError, match=message):
        refine(GRAPH, cost, masks, **options)
