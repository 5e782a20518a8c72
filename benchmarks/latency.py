"""A latency table's predictions beside the measured times of pruned networks.

    python -m benchmarks.latency [--networks resnet50 resnet56] [--rounds 20]

The table is measured once, layer by layer, on the plain network. Then networks pruned by several
plans (one share for all groups, and counts drawn at random) take turns with the plain one. What is
compared is the share of the plain network's time that stays: the table's, and the median over the
rounds of the measured one. A plain copy among them shows the noise.
"""

from __future__ import annotations

import argparse
import copy
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from benchmarks.common import interleaved, write_results
from benchmarks.networks import NETWORKS
from ccp_ext import PruningPlan, allocate, measure, surgery, trace
from ccp_ext.graph import ChannelGraph
from ccp_ext.report import table as text_table

STEPS = 8  # of the widths measured of every side of a layer
# A pass of ResNet-56 on one image is mostly the interpreter's time, and noise.
BATCHES = {"resnet50": 1, "resnet56": 16}
SHARES = (0.75, 0.5, 0.25)  # of the MACs to keep
DRAWS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for name in options.networks for row in measured(name, options)]
    print(text_table([{k: _rounded(v) for k, v in row.items()} for row in rows]))
    errors = {
        name: median(abs(r["error %"]) for r in rows if r["network"] == name and r["plan"] != "all")
        for name in options.networks
    }
    print({name: f"median |error| {error:.1f} %" for name, error in errors.items()})
    content = {"settings": vars(options), "median |error| %": errors, "rows": rows}
    print(write_results("latency", content))


def measured(name: str, options: argparse.Namespace) -> list[dict]:
    """A row for each plan of the network."""
    torch.manual_seed(options.seed)
    network = NETWORKS[name]
    model = network.create().eval()
    x = torch.randn(BATCHES[name], 3, network.image_size, network.image_size)
    graph = trace(model, x).inner
    widths = {layer.module: _steps(layer.out) + _steps(layer.inputs) for layer in graph.layers}
    table = measure.latency_table(model, graph, x, widths, repeats=5, warmup=2)
    plans = _counts(graph, options.seed)
    models = {plan: _pruned(model, graph, keep) for plan, keep in plans.items()}
    with torch.no_grad():
        calls = {"plain": model, **models}
        seconds = interleaved({k: _call(m, x) for k, m in calls.items()}, options.rounds)
    rows = []
    for plan, keep in plans.items():
        ratios = [a / b for a, b in zip(seconds[plan], seconds["plain"], strict=True)]
        deciles = quantiles(ratios, n=10, method="inclusive")
        predicted = table.predict(graph, keep) / table.milliseconds
        rows.append(
            {
                "network": name,
                "batch": BATCHES[name],
                "plan": plan,
                "MACs kept": graph.macs(keep) / graph.macs(),
                "predicted": predicted,
                "measured": median(ratios),
                "measured 10%": deciles[0],
                "measured 90%": deciles[-1],
                "error %": 100 * (predicted / median(ratios) - 1),
                "plain ms": 1e3 * median(seconds["plain"]),
                "plain ms, table": table.milliseconds,
            }
        )
    return rows


def _steps(full: int) -> list[int]:
    return [full * k // STEPS for k in range(1, STEPS) if full * k >= STEPS]


def _counts(graph: ChannelGraph, seed: int) -> dict[str, dict]:
    """The keep counts of every plan by its name."""
    plans = {"all": graph.counts()}
    for share in SHARES:
        plans[f"macs {share}"] = allocate(graph, macs=share).keep
    generator = torch.Generator().manual_seed(seed)
    for k in range(DRAWS):
        plans[f"random {k}"] = {
            g.name: int(torch.randint(1, g.channels + 1, (), generator=generator))
            for g in graph.groups
        }
    return plans


def _pruned(model: nn.Module, graph: ChannelGraph, keep: dict[str, int]) -> nn.Module:
    kept = {name: list(range(count)) for name, count in keep.items()}
    return surgery.prune(copy.deepcopy(model), PruningPlan.from_kept(graph, kept)).eval()


def _call(model: nn.Module, x: Tensor):
    return lambda: model(x)


def _rounded(value):
    return f"{value:.3f}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
