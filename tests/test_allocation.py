"""Budgets become keep counts: near the budget, never above it, and as uniform as they can be."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from ccp_ext import models
from ccp_ext.allocation import Allocation, allocate
from ccp_ext.errors import InputError
from ccp_ext.graph import trace


@dataclass
class Group:
    name: str
    channels: int


class Chain:
    """Convolutions in a row: each pair of neighbours costs the product of its widths."""

    def __init__(self, widths, positions, kernel=9, inputs=3, outputs=10):
        self.groups = [Group(f"conv{k}", width) for k, width in enumerate(widths)]
        self.positions, self.kernel, self.inputs, self.outputs = positions, kernel, inputs, outputs

    def weights(self, keep):
        widths = [self.inputs, *(keep[group.name] for group in self.groups)]
        convolutions = [self.kernel * a * b for a, b in zip(widths, widths[1:], strict=False)]
        return convolutions, widths[-1] * self.outputs

    def macs(self, keep):
        convolutions, linear = self.weights(keep)
        return linear + sum(p * w for p, w in zip(self.positions, convolutions, strict=True))

    def parameters(self, keep):
        convolutions, linear = self.weights(keep)
        return sum(convolutions) + linear + self.outputs + 2 * sum(keep.values())


class ResidualBlocks:
    """ResNet-56 for 32 x 32 images: the inner channels of 27 blocks, the streams stay whole."""

    STAGES = ((16, 32 * 32), (32, 16 * 16), (64, 8 * 8))

    def __init__(self):
        self.groups = [
            Group(f"layer{stage}.{block}", width)
            for stage, (width, _) in enumerate(self.STAGES, 1)
            for block in range(9)
        ]

    def convolutions(self, keep):
        """(positions, weights) of every layer."""
        yield 32 * 32, 3 * 16 * 9
        stream = 16
        for stage, (width, positions) in enumerate(self.STAGES, 1):
            for block in range(9):
                inner = keep[f"layer{stage}.{block}"]
                yield positions, 9 * stream * inner
                yield positions, 9 * inner * width
                stream = width
        yield 1, 64 * 10

    def macs(self, keep):
        return sum(positions * weights for positions, weights in self.convolutions(keep))

    def parameters(self, keep):
        norms = 2 * sum(keep.values())
        return sum(weights for _, weights in self.convolutions(keep)) + norms


def vgg():
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    return Chain(widths, [side * side for side in sides])


GRAPHS = {"resnet56": ResidualBlocks, "vgg16": vgg}


class Separable:
    """{name: (cost of a channel, channels)}."""

    def __init__(self, groups):
        self.costs = {name: cost for name, (cost, _) in groups.items()}
        self.groups = [Group(name, channels) for name, (_, channels) in groups.items()]

    def macs(self, keep):
        return sum(self.costs[name] * count for name, count in keep.items())


def whole(graph):
    return {group.name: group.channels for group in graph.groups}


@pytest.fixture(params=GRAPHS)
def graph(request):
    return GRAPHS[request.param]()


@pytest.fixture
def small():
    return Chain([10, 16, 5], [16, 4, 1])


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.25, 0.3, 0.45, 0.5, 0.623, 0.9, 0.999])
def test_a_fraction_is_met_within_half_a_percent_from_below(graph, kind, fraction):
    cost = {"macs": graph.macs, "params": graph.parameters}[kind]
    allocation = allocate(graph, **{kind: fraction})
    assert allocation.kind == kind
    assert allocation.budget == int(fraction * cost(whole(graph)))
    assert allocation.achieved == cost(allocation.keep)
    assert 0.995 * allocation.budget <= allocation.achieved <= allocation.budget


@pytest.mark.parametrize("multiple", [1, 8])
def test_no_group_could_be_given_back_another_step(graph, multiple):
    allocation = allocate(graph, macs=0.5, multiple=multiple)
    for group in graph.groups:
        kept = allocation.keep[group.name]
        if kept < group.channels:
            wider = {**allocation.keep, group.name: min(kept + multiple, group.channels)}
            assert graph.macs(wider) > allocation.budget


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_kept_fractions_differ_by_no_more_than_a_channel(graph, fraction):
    keep = allocate(graph, macs=fraction).keep
    channels = whole(graph)
    least = min(Fraction(keep[name], channels[name]) for name in keep)
    for name, kept in keep.items():
        assert Fraction(kept - 1, channels[name]) <= least + Fraction(1, min(channels.values()))


def test_what_is_left_goes_first_to_the_group_that_keeps_least():
    graph = Separable({"c": (1, 3), "b": (3, 4), "a": (3, 4)})
    # Two channels each cost 14, the next common fraction, 3/4, costs 20.
    assert allocate(graph, macs=17).keep == {"c": 2, "b": 3, "a": 2}
    # What is then left is too little for "a", and "c" gets it.
    assert allocate(graph, macs=18).keep == {"c": 3, "b": 3, "a": 2}


def test_more_budget_never_costs_less(graph):
    achieved = [allocate(graph, macs=k / 20).achieved for k in range(4, 21)]
    assert achieved == sorted(achieved)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("multiple, minimum", [(1, 1), (8, 1), (1, 12), (8, 12), (24, 1)])
def test_the_whole_budget_keeps_every_channel(graph, kind, multiple, minimum):
    allocation = allocate(graph, **{kind: 1.0}, multiple=multiple, minimum=minimum)
    assert allocation.keep == whole(graph)
    assert allocation.achieved == allocation.budget


def test_a_count_and_a_fraction_are_the_same_budget(small):
    plain = small.macs(whole(small))
    by_count = allocate(small, macs=plain // 2)
    assert by_count == allocate(small, macs=(plain // 2 + 0.5) / plain)
    assert allocate(small, macs=plain).keep == whole(small)


@pytest.mark.parametrize("budget", [{"macs": 0.75}, {"params": 0.6}, {"ratio": 0.5}])
@pytest.mark.parametrize("multiple", [2, 8, 12])
def test_keep_counts_are_multiples_or_everything(graph, budget, multiple):
    for group in graph.groups:
        kept = allocate(graph, **budget, multiple=multiple).keep[group.name]
        assert kept % multiple == 0 or kept == group.channels


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"ratio": 0.9}, {"per_group": {"conv1": 0.9}}])
def test_minimum_holds_and_narrow_groups_stay_whole(budget):
    graph = Chain([10, 160, 6], [1, 1, 1])
    keep = allocate(graph, **budget, minimum=8).keep
    assert min(keep["conv0"], keep["conv1"]) >= 8
    assert keep["conv2"] == 6


def test_ratio_removes_that_fraction_of_each_group_rounded_down(small):
    assert allocate(small, ratio=0.5) == Allocation({"conv0": 5, "conv1": 8, "conv2": 3}, "ratio")
    assert allocate(small, ratio=0.0).keep == whole(small)
    assert allocate(small, ratio=0.99).keep == {"conv0": 1, "conv1": 1, "conv2": 1}


def test_ratio_is_read_as_a_decimal_fraction():
    assert allocate(Chain([100], [1]), ratio=0.29).keep == {"conv0": 71}


def test_ratio_by_group_leaves_the_others_whole(small):
    assert allocate(small, ratio={"conv1": 0.25}).keep == {"conv0": 10, "conv1": 12, "conv2": 5}


def test_per_group_takes_kept_counts_and_removed_fractions(small):
    allocation = allocate(small, per_group={"conv2": 0.2, "conv0": 7})
    assert allocation == Allocation({"conv0": 7, "conv1": 16, "conv2": 4}, "per_group")
    assert list(allocation.keep) == ["conv0", "conv1", "conv2"]


def test_equal_input_gives_equal_counts(graph):
    assert allocate(graph, macs=0.47) == allocate(graph, macs=0.47)


def test_an_impossible_budget_names_what_can_be_reached(small):
    least = {"conv0": 4, "conv1": 4, "conv2": 4}
    reachable = small.macs(least)
    assert allocate(small, macs=reachable, minimum=3, multiple=4).keep == least
    with pytest.raises(InputError) as error:
        allocate(small, macs=reachable - 1, minimum=3, multiple=4)
    for part in (f"macs={reachable - 1}", str(reachable), "minimum=3", "multiple=4"):
        assert part in str(error.value)


BAD = {
    "no budget": (
        {},
        "exactly one of macs, params, activations, latency, ratio, per_group; got none",
    ),
    "two budgets": (dict(macs=0.5, ratio=0.5), "got macs, ratio"),
    "zero": (dict(macs=0.0), r"macs must be a fraction to keep, in \(0, 1\].*got 0.0"),
    "above one": (dict(params=1.5), "params must be a fraction.*got 1.5"),
    "NaN": (dict(macs=float("nan")), "got nan"),
    "flag": (dict(macs=True), "got True"),
    "text": (dict(macs="half"), "got 'half'"),
    "zero count": (dict(macs=0), "between 1 and the plain model's"),
    "large count": (dict(macs=10**9), "got 1000000000"),
    "whole ratio": (dict(ratio=1.0), r"ratio must be the fraction.*\[0, 1\); got 1.0"),
    "negative ratio": (dict(ratio=-0.1), "got -0.1"),
    "ratio of a group": (dict(ratio={"conv1": 2}), r"ratio\['conv1'\] must be.*got 2"),
    "unknown ratio": (dict(ratio={"conv9": 0.5}), r"ratio names unknown groups \['conv9'\]"),
    "unknown group": (dict(per_group={"x": 3}), r"per_group names unknown groups \['x'\]"),
    "not a mapping": (dict(per_group=0.5), "per_group must be a mapping.*got 0.5"),
    "no channels": (dict(per_group={"conv0": 0}), r"per_group\['conv0'\].*between 1 and 10.*got 0"),
    "many channels": (dict(per_group={"conv0": 11}), "between 1 and 10.*got 11"),
    "below minimum": (dict(per_group={"conv0": 3}, minimum=4), "between 4 and 10.*got 3"),
    "not a multiple": (dict(per_group={"conv0": 7}, multiple=4), "divisible by multiple=4.*got 7"),
    "removed fraction": (dict(per_group={"conv0": 1.0}), r"in \[0, 1\); got 1.0"),
    "multiple": (dict(macs=0.5, multiple=0), "multiple must be an integer >= 1; got 0"),
    "minimum": (dict(macs=0.5, minimum=0.5), "minimum must be an integer >= 1; got 0.5"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(small, arguments, message):
    with pytest.raises(InputError, match=f"allocate: .*{message}"):
        allocate(small, **arguments)


@pytest.mark.parametrize("scope", ["inner", "coupled"])
def test_a_traced_resnet56_meets_its_budgets_within_half_a_percent(scope):
    graph = trace(models.create("resnet56").eval(), torch.zeros(1, 3, 32, 32))
    graph = graph.inner if scope == "inner" else graph
    for budget in ({"macs": 0.5}, {"params": 0.7}):
        allocation = allocate(graph, **budget)
        assert 0.995 * allocation.budget <= allocation.achieved <= allocation.budget
