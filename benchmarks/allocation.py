"""How near to the optimum budgets are allocated, and how fast, for ResNet-50.

python -m benchmarks.allocation [--budgets 0.2 0.5 0.9]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.common import write_results
from benchmarks.resnet50 import ResNet50
from ccp_ext import allocate, trace
from ccp_ext.graph import ChannelGraph
from ccp_ext.report import table


@dataclass(frozen=True)
class SyntheticCurve:
    """Cost and bound of removing ``counts`` channels."""

    counts: np.ndarray
    objective: np.ndarray
    lower_bound: np.ndarray


def synthetic_curve(channels: int, generator: np.random.Generator) -> SyntheticCurve:
    """The path of a greedy removal for S = L'L + D with C / 16 strong common factors.

    The channels' scales are log-normal, so that some of them are nearly free. The bound leaves
    L'L out: 1/2 m'Sm >= 1/2 sum_i D_i m_i, at least the smallest D.
    """
    rank = max(2, channels // 16)
    scale = np.exp(generator.normal(size=channels)) / np.sqrt(channels)
    loadings = 0.8 * scale * generator.normal(size=(rank, channels)) / np.sqrt(rank)
    own = (0.6 * scale) ** 2
    quadratic = loadings.T @ loadings + np.diag(own)
    increase = 0.5 * np.diagonal(quadratic).copy()
    steps = np.zeros(channels + 1)
    for r in range(1, channels + 1):
        chosen = int(increase.argmin())
        steps[r] = increase[chosen]
        increase += quadratic[chosen]
        increase[chosen] = np.inf
    bound = np.r_[0, np.cumsum(0.5 * np.sort(own))]
    objective = np.cumsum(steps)
    return SyntheticCurve(np.arange(channels + 1), objective, np.minimum(bound, objective))


def synthetic_curves(graph: ChannelGraph, seed: int) -> dict[str, SyntheticCurve]:
    """A curve for each group, at a scale of its own."""
    generator = np.random.default_rng(seed)
    curves = {}
    for group in graph.groups:
        curve = synthetic_curve(group.channels, generator)
        weight = np.exp(generator.normal())
        curves[group.name] = SyntheticCurve(
            curve.counts, weight * curve.objective, weight * curve.lower_bound
        )
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shares = [k / 10 for k in range(2, 10)]
    parser.add_argument("--budgets", type=float, nargs="*", default=shares, help="shares to keep")
    parser.add_argument("--scopes", nargs="*", default=["inner", "all"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    whole = trace(ResNet50().eval(), torch.zeros(1, 3, 224, 224))
    rows = []
    for scope in options.scopes:
        graph = whole.select_groups(scope)
        curves = synthetic_curves(graph, options.seed)
        for kind in ("macs", "params"):
            rows += [_measure(graph, scope, curves, kind, share) for share in options.budgets]
    print(table([{name: _rounded(value) for name, value in row.items()} for row in rows]))
    print(write_results("allocation", {"settings": vars(options), "rows": rows}))


def _measure(
    graph: ChannelGraph, scope: str, curves: Mapping[str, SyntheticCurve], kind: str, share: float
) -> dict:
    least = graph.resource(kind)(dict.fromkeys((g.name for g in graph.groups), 1))
    row = {"groups": f"{len(graph.groups)} ({scope})", "budget": f"{kind} {share}"}
    if least > share * graph.resource(kind)(graph.counts()):
        return row | dict.fromkeys(
            ("achieved", "uniform", "optimal", "bound", "gap %", "seconds", "seconds, two curves")
        )
    uniform = allocate(graph, **{kind: share})
    counts = {group.name: group.channels - uniform.keep[group.name] for group in graph.groups}
    # The curves as their own bounds: what is lost to the allocation alone.
    own = {n: SyntheticCurve(c.counts, c.objective, c.objective) for n, c in curves.items()}
    found, seconds = _timed(graph, own, kind, share)
    both, longer = _timed(graph, curves, kind, share)
    assert both.lower_bound <= found.lower_bound <= found.objective
    assert found.achieved == graph.resource(kind)(found.keep) <= found.budget
    return row | {
        "achieved": found.achieved / found.budget,
        "uniform": sum(curves[name].objective[r] for name, r in counts.items()),
        "optimal": found.objective,
        "bound": found.lower_bound,
        "gap %": 100 * found.gap / found.objective,
        "seconds": seconds,
        "seconds, two curves": longer,
    }


def _timed(graph: ChannelGraph, curves: Mapping[str, SyntheticCurve], kind: str, share: float):
    begin = time.perf_counter()
    found = allocate(graph, curves=curves, **{kind: share})
    return found, time.perf_counter() - begin


def _rounded(value):
    return f"{value:.5f}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
