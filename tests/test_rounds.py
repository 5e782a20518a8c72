"""The budgets of several rounds, each on the model that the last one left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccp_ext import models, surgery
from ccp_ext.allocation import allocate
from ccp_ext.allocation.rounds import Schedule
from ccp_ext.errors import InputError
from ccp_ext.graph import trace
from ccp_ext.plan import PruningPlan

SHAPE = (1, 3, 16, 16)
RULES = {"multiple": 1, "minimum": 1}


class Padded(nn.Module):
    """The middle channels of ``wide`` are those of ``narrow`` too: two groups of one producer."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 14, 3, 2, 1)
        self.narrow = nn.Conv2d(3, 9, 1)
        self.pad = models.IdentityPadShortcut(3, 2)
        self.inner = nn.Conv2d(14, 12, 1)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = F.relu(self.wide(x) + self.pad(self.narrow(x)))
        return self.last(F.relu(self.inner(x))).mean((2, 3))


@pytest.fixture(scope="module")
def plain():
    return Padded().eval()


@pytest.fixture(scope="module")
def graph(plain):
    return trace(plain, torch.zeros(SHAPE))


@pytest.fixture(scope="module")
def half_done(plain, graph):
    """A plan that keeps another number of channels of each group, and the graph that it leaves."""
    kept = {
        group.name: torch.randperm(group.channels)[: group.channels - 1 - number]
        for number, group in enumerate(graph.groups)
    }
    plan = PruningPlan.from_kept(graph, kept)
    slim = surgery.prune(copy.deepcopy(plain), plan)
    return plan, trace(slim, torch.zeros(SHAPE))


def test_one_round_is_the_budget_itself(graph):
    schedule = Schedule(graph, 1, {"macs": 0.3}, RULES)
    schedule.check()
    assert schedule.at(1, graph, None) == {"macs": 0.3}


@pytest.mark.parametrize("kind", ["macs", "params", "activations"])
def test_budgets_fall_by_equal_factors_to_the_one_asked_for(graph, kind):
    schedule = Schedule(graph, 3, {kind: 0.5}, RULES)
    whole = graph.resource(kind)(graph.counts())
    targets = [schedule.at(number, graph, None)[kind] for number in (1, 2, 3)]
    assert targets == pytest.approx([whole * 0.5 ** (k / 3) for k in (1, 2, 3)], abs=2)
    assert targets[-1] == allocate(graph, **{kind: 0.5}).budget


def test_a_round_asks_for_no_more_than_the_model_has(graph, half_done):
    slim = half_done[1]
    schedule = Schedule(graph, 3, {"macs": 1.0}, RULES)
    assert schedule.at(1, slim, half_done[0]) == {"macs": slim.macs()}


def test_ratios_count_from_the_plain_groups(graph, half_done):
    """Groups are known by their channels, not by their names, which hold positions."""
    plan, slim = half_done
    assert {g.name for g in slim.groups} != {g.name for g in graph.groups}
    counts = Schedule(graph, 2, {"ratio": 0.36}, RULES).at(1, slim, plan)["per_group"]
    asked = allocate(graph, ratio=1 - 0.64**0.5).keep
    expected = {
        len(plan.groups[name].kept): min(asked[name], len(plan.groups[name].kept)) for name in asked
    }
    assert {g.channels: counts[g.name] for g in slim.groups} == expected
    assert len(expected) == len(graph.groups)


def test_budgets_out_of_reach_are_refused(graph):
    with pytest.raises(InputError, match="smallest that can be reached"):
        Schedule(graph, 2, {"macs": 1e-6}, RULES).check()
