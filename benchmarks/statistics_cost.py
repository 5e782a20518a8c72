"""What collecting the statistics costs, beside a plain forward and backward pass.

    python -m benchmarks.statistics_cost

ResNet-56 on CIFAR-10-sized images, all 27 inner groups. Before timing, the collected S is checked
against one made with plain torch operators.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved, ratio, write_results
from ccp_ext import collect, models, ops, trace
from ccp_ext.report import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = models.create("resnet56").eval()
    x, y = torch.randn(options.batch_size, 3, 32, 32), torch.randint(10, (options.batch_size,))
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    graph = trace(model, x[:1]).inner

    def plain() -> None:
        F.cross_entropy(model(x), y, reduction="sum").backward()

    def collector(**settings):
        stats = collect(model, graph, **settings)

        def run() -> None:
            with stats:
                stats.backward(model(x), y)

        return stats, run

    def with_parameter_gradients() -> None:
        with collect(model, graph, curvature="empirical", parameter_gradients=True):
            plain()

    timed = {"forward and backward": plain, "empirical, keeping .grad": with_parameter_gradients}
    for name, settings in {
        "empirical, u": {"curvature": "empirical"},
        "logits": {"curvature": "logits", "first_order": False},
        "logits, u": {"curvature": "logits"},
    }.items():
        stats, timed[name] = collector(**settings)
        if name == "empirical, u":
            timed[name]()
            _validate(model, graph, x, y, stats)
    seconds = interleaved(timed, options.rounds)
    baseline = seconds["forward and backward"]
    rows = [
        {
            "pass": name,
            "median ms": 1e3 * median(times),
            "ratio to forward and backward": ratio(times, baseline),
        }
        for name, times in seconds.items()
    ]
    print(table(rows))
    inside = _inside_the_pass(model, graph, x, y, options.rounds)
    print(
        f"channel_dot inside the pass: {inside['speed-up']:.2f} times as fast as torch's (x*g).sum"
    )
    suffix = "_channels_last" if options.channels_last else ""
    content = {"settings": vars(options), "rows": rows, "channel_dot inside the pass": inside}
    print(write_results(f"statistics_cost{suffix}", content))


def _inside_the_pass(model, graph, x, y, rounds: int) -> dict[str, float]:
    """Time spent in all 27 calls of channel_dot, and in the torch expression in its place.

    Here the caches are as they are in use: autograd has just written g, x is long gone.
    """

    def time_in(function) -> float:
        spent = []

        def timed(*arguments):
            begin = time.perf_counter()
            result = function(*arguments)
            spent.append(time.perf_counter() - begin)
            return result

        with (
            patch.object(ops, "channel_dot", timed),
            collect(model, graph, curvature="empirical") as stats,
        ):
            stats.backward(model(x), y)
        return sum(spent)

    ours, expression = [], []
    for _ in range(rounds):
        ours.append(time_in(ops.channel_dot))
        expression.append(time_in(lambda x, g, channel_dim: (x * g).sum((2, 3))))
    return {
        "ours, median ms": 1e3 * median(ours),
        "torch, median ms": 1e3 * median(expression),
        "speed-up": ratio(expression, ours),
    }


def _validate(model, graph, x, y, stats) -> None:
    """The last group's S against the same quantity by plain torch operators."""
    group = graph.groups[-1]
    (tap,) = group.gate_taps
    seen = {}

    def keep(tensor: torch.Tensor) -> None:
        tensor.retain_grad()
        seen["gate"] = tensor

    module = model.get_submodule(tap.module)
    if tap.port == "input":
        hook = module.register_forward_pre_hook(lambda _, args: keep(args[0]))
    else:
        hook = module.register_forward_hook(lambda _, args, output: keep(output))
    F.cross_entropy(model(x), y, reduction="sum").backward()
    hook.remove()
    a = (seen["gate"].double() * seen["gate"].grad.double()).sum((2, 3))
    expected = a.T @ a / len(x)
    error = ((stats[group].S - expected).norm() / expected.norm()).item()
    if error > 1e-5:
        raise AssertionError(f"S of {group.name} is off by {error:.2e}")


if __name__ == "__main__":
    main()
