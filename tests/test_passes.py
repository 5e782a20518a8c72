"""Functions and forward passes that halt and go on."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from ccp_ext.graph import Tap
from ccp_ext.passes import Halting, Walk, tapped


def test_a_halting_function_runs_only_while_it_is_resumed():
    seen = []

    def count():
        for k in range(3):
            seen.append(k)
            halting.halt()

    halting = Halting(count)
    assert seen == []
    for k in range(3):
        assert halting.resume() and seen == list(range(k + 1))
    assert not halting.resume() and not halting.resume()


def test_closing_ends_the_function_where_it_stands():
    left = []

    def work():
        try:
            halting.halt()
            left.append("went on")
        finally:
            left.append("cleaned up")

    threads = threading.active_count()
    halting = Halting(work)
    halting.resume()
    halting.close()
    assert left == ["cleaned up"] and threading.active_count() == threads
    never_started = Halting(work)
    never_started.close()
    assert left == ["cleaned up"] and threading.active_count() == threads


def test_errors_reach_whoever_resumes():
    def fail():
        raise KeyError("inside")

    halting = Halting(fail)
    with pytest.raises(KeyError, match="inside"):
        halting.resume()
    halting.close()


def test_walks_through_one_model_take_turns():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    inputs = [torch.randn(3, 2) for _ in range(4)]
    taps = {"first": Tap("0", "output", -1), "last": Tap("2", "output", -1)}
    with tapped(model, taps) as tap:
        walks = [Walk(tap, x, lambda key, tensor: tensor) for x in inputs]
        for walk in walks:
            walk.until("first")
            assert "last" not in walk.seen
        with torch.no_grad():
            model[2].bias += 1  # all walks still have to run this layer
            for walk, x in zip(walks, inputs, strict=True):
                walk.until("last")
                torch.testing.assert_close(walk.seen["first"][0], model[0](x))
                torch.testing.assert_close(walk.seen["last"][0], model(x))
                assert not walk.seen["last"][0].requires_grad
        with pytest.raises(RuntimeError, match="ended without reaching last 2 times"):
            walks[0].until("last", 2)
        for walk in walks:
            walk.close()
    assert not model[0]._forward_hooks


def test_a_walk_halts_only_where_it_is_awaited(monkeypatch):
    halts, original = [], Halting.halt
    monkeypatch.setattr(Halting, "halt", lambda self: (halts.append(self), original(self)))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    taps = {k: Tap(str(k), "output", -1) for k in range(3)}
    with tapped(model, taps) as tap:
        walk = Walk(tap, torch.randn(3, 2), lambda key, tensor: tensor)
        walk.until(1)
        assert list(walk.seen) == [0, 1] and len(halts) == 1
        walk.until(0)
        assert list(walk.seen) == [0, 1] and len(halts) == 1
        walk.close()
