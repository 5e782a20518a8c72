"""Channel selection: time to the first mask and to a proven optimum, or the gap that a time limit
leaves, beside other solvers with the same limit.

python -m benchmarks.selection [--instances folder of .npz files with Q and r] [--rivals] [--long]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import write_results
from benchmarks.selection_rivals import RIVALS
from ccp_ext.report import table
from ccp_ext.selection import Choice, curve, select

LONG = {256: 10.0, 512: 60.0, 2048: 60.0}  # channels and seconds
SEEDS = {2048: 4}  # of the generated instances with a long run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=Path, help="folder of .npz files with Q [N, C] and r")
    parser.add_argument("--channels", type=int, nargs="*", default=[64, 128, 256, 512, 2048])
    parser.add_argument("--time-limit", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of what is fast")
    parser.add_argument("--rivals", action="store_true", help="run the other solvers, too")
    parser.add_argument(
        "--long", action="store_true", help="10 s with 256 channels, 60 s with 512 and 2048, too"
    )
    options = parser.parse_args()
    rivals = [rival for rival in RIVALS if options.rivals and rival.installed()]
    for rival in RIVALS:
        if options.rivals and rival not in rivals:
            print(f"{rival.name} is skipped: the package {rival.package} is not installed")
    settings = {key: value for key, value in vars(options).items() if key != "instances"}
    rows, compared, searched = [], [], []

    def write() -> Path:  # what is done, if the rest is interrupted
        tables = {"rows": rows, "rivals": compared, "long": searched}
        load = os.getloadavg()[0]
        return write_results("selection", {"settings": settings, "load average": load} | tables)

    for name, samples, r in _instances(options.instances, options.channels):
        F, u = _cost(samples)
        rows.append(_measure(name, F, u, r, options.time_limit, options.rounds))
        print(table(rows[-1:]), flush=True)
        for rival in rivals:
            if len(u) <= rival.largest:
                compared.append(_compare(rival, rows[-1], F, u, r, options.time_limit))
                print(table(compared[-1:]), flush=True)
        write()
    instances = _long_instances(options.instances, options.channels) if options.long else ()
    for name, samples, r in instances:
        F, u = _cost(samples)
        limit = LONG[len(u)]
        found = _timed(select, F, u=u, r=r, method="branch_and_bound", time_limit=limit)
        searched.append(_outcome(name, *found) | {"time limit": limit})
        print(table(searched[-1:]), flush=True)
        write()
    print(table(rows))
    print(table(compared))
    print(table(searched))
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    print(write())


def low_rank_plus_noise(channels: int, seed: int = 0) -> np.ndarray:
    """Samples [2C, C] with strongly coupled channels: C / 16 common factors, uneven scales."""
    generator = np.random.default_rng(seed)
    count, rank = 2 * channels, max(2, channels // 16)
    loadings = generator.normal(size=(rank, channels)) / np.sqrt(rank)
    common = generator.normal(size=(count, rank)) @ loadings
    own = generator.normal(size=(count, channels))
    mean = generator.normal(size=channels)
    scale = 2 * np.exp(0.5 * generator.normal(size=channels)) / np.sqrt(channels)
    return scale * (0.8 * common + 0.6 * own + 0.1 * mean)


def like_a_layer(channels: int, rank: int = 12, seed: int = 0) -> np.ndarray:
    """Samples [3000, C] of few directions, heavy-tailed over samples and channels, as the
    derivatives along the channels of a trained layer are."""
    generator = np.random.default_rng(seed)
    loadings = np.abs(generator.normal(size=(rank, channels))) * 2.0 ** -np.arange(rank)[:, None]
    hardness = generator.normal(size=(3000, 1)) * np.exp(generator.normal(size=(3000, 1)))
    common = (generator.normal(size=(3000, rank)) + 0.3) @ loadings
    own = 0.1 * generator.normal(size=(3000, channels))
    scale = np.exp(0.7 * generator.normal(size=channels)) / channels
    return scale * hardness * (common + own)


Instance = tuple[str, np.ndarray, int]  # name, samples and count


def _instances(folder: Path | None, channels: list[int]) -> Iterator[Instance]:
    for file in sorted(folder.glob("*.npz")) if folder else ():
        with np.load(file) as data:
            yield file.stem, data["Q"].astype(np.float64), int(data["r"])
    for size in channels:
        yield f"generated_c{size}", low_rank_plus_noise(size), size // 2
        if size >= 1024:
            yield f"like_a_layer_c{size}", like_a_layer(size), size // 2


def _long_instances(folder: Path | None, channels: list[int]) -> Iterator[Instance]:
    for name, samples, r in _instances(folder, channels):
        if samples.shape[1] in LONG:
            yield name, samples, r
    for size in channels:
        for seed in range(1, SEEDS.get(size, 1)):
            yield f"generated_c{size}, seed {seed}", low_rank_plus_noise(size, seed), size // 2


def _cost(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return samples.T @ samples / len(samples), samples.mean(axis=0)


def _measure(
    name: str, F: np.ndarray, u: np.ndarray, r: int, limit: float, rounds: int
) -> dict[str, object]:
    first = [_timed(select, F, u=u, r=r, method="round") for _ in range(rounds)]
    found = [_timed(select, F, u=u, r=r, method="branch_and_bound", time_limit=limit)]
    choice = found[0][0]
    while choice.status == "optimal" and len(found) < rounds and found[0][1] < 1:
        found.append(_timed(select, F, u=u, r=r, method="branch_and_bound", time_limit=limit))
    counts = range(0, len(u) + 1, 1 if len(u) < 1024 else 16)
    path, *curve_seconds = _timed(curve, F, u=u, counts=counts)
    spread = choice.random - choice.lower_bound
    seconds, cpu = median(s for _, s, _ in found), median(cpu for _, _, cpu in found)
    return _outcome(name, choice, seconds, cpu) | {
        "round, ms": 1e3 * median(seconds for _, seconds, _ in first),
        "round, CPU ms": 1e3 * median(cpu for _, _, cpu in first),
        "round, % above best": 100 * (first[0][0].objective - choice.objective) / spread,
        "curve, counts": len(path.counts),
        "curve, CPU seconds": curve_seconds[1],
        "curve, largest gap %": 100 * float((path.objective - path.lower_bound).max()) / spread,
    }


def _outcome(name: str, choice: Choice, seconds: float, cpu: float) -> dict[str, object]:
    return {
        "instance": name,
        "channels": len(choice.removed),
        "status": choice.status,
        "objective": choice.objective,
        "lower bound": choice.lower_bound,
        "random": choice.random,
        "gap, % of spread": 100 * choice.relative_gap,
        "nodes": choice.nodes,
        "seconds": seconds,
        "CPU seconds": cpu,
    }


def _compare(rival, ours: dict, F: np.ndarray, u: np.ndarray, r: int, limit: float) -> dict:
    row = {
        "instance": ours["instance"],
        "solver": rival.name,
        "seconds": None,
        "CPU seconds": None,
        "ours, seconds": ours["seconds"],
        "objective": None,
        "above ours, % of spread": None,
        "gap, % of spread": None,
        "failed": None,
    }
    try:
        (mask, bound), seconds, cpu = _timed(rival.solve, F, u, r, limit)
    except Exception as failure:  # a licence, a limit of size: whatever ends a rival is a result
        return {**row, "failed": str(failure)[:60]}
    m = mask.astype(np.float64)
    assert m.sum() == r, f"{rival.name} returned {m.sum()} channels instead of {r}"
    cost = float(0.5 * m @ F @ m - u @ m)
    spread = ours["random"] - ours["lower bound"]
    row |= {"seconds": seconds, "CPU seconds": cpu, "objective": cost}
    row["above ours, % of spread"] = 100 * (cost - ours["objective"]) / spread
    if np.isfinite(bound):
        row["gap, % of spread"] = 100 * (cost - bound) / spread
    return row


def _timed(function, *arguments, **options):
    """The result, the seconds and the CPU seconds, which others on the machine do not stretch."""
    cpu, begin = time.process_time(), time.perf_counter()
    result = function(*arguments, **options)
    return result, time.perf_counter() - begin, time.process_time() - cpu


if __name__ == "__main__":
    main()
