"""Time to a proven optimum of channel selection, or the gap that a time limit leaves.

python -m benchmarks.selection [--instances folder of .npz files with Q and r]
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
from ccp_ext.report import table
from ccp_ext.selection import select


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=Path, help="folder of .npz files with Q [N, C] and r")
    parser.add_argument("--channels", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--time-limit", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of what is proven fast")
    options = parser.parse_args()
    rows = []
    for name, samples, removed in _instances(options.instances, options.channels):
        rows.append(_measure(name, samples, removed, options.time_limit, options.rounds))
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    load = os.getloadavg()[0]
    print(f"load average at the end: {load:.1f}")
    settings = {key: value for key, value in vars(options).items() if key != "instances"}
    content = {"settings": settings, "load average": load, "rows": rows}
    print(write_results("selection", content))


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


def _instances(folder: Path | None, channels: list[int]) -> Iterator[tuple[str, np.ndarray, int]]:
    for file in sorted(folder.glob("*.npz")) if folder else ():
        with np.load(file) as data:
            yield file.stem, data["Q"].astype(np.float64), int(data["r"])
    for size in channels:
        yield f"generated_c{size}", low_rank_plus_noise(size), size // 2


def _measure(name: str, samples: np.ndarray, r: int, limit: float, rounds: int) -> dict:
    F, u = samples.T @ samples / len(samples), samples.mean(axis=0)
    seconds, gap = [], 0.0
    first = _timed(F, u, r, "swap", 0)[1]
    for _ in range(rounds):
        choice, elapsed = _timed(F, u, r, "branch_and_bound", limit)
        seconds.append(elapsed)
        gap = choice.gap / (_mean_of_random(F, u, r) - choice.objective)
        if choice.status != "optimal" or elapsed > 1:
            break
    return {
        "instance": name,
        "channels": len(u),
        "status": choice.status,
        "objective": choice.objective,
        "gap, % of spread": 100 * gap,
        "ms": 1e3 * median(seconds),
        "swap alone, ms": 1e3 * first,
    }


def _timed(F: np.ndarray, u: np.ndarray, r: int, method: str, limit: float):
    begin = time.perf_counter()
    choice = select(F, u=u, r=r, method=method, time_limit=limit)
    return choice, time.perf_counter() - begin


def _mean_of_random(F: np.ndarray, u: np.ndarray, r: int) -> float:
    """The mean cost of all masks with r ones."""
    channels = len(u)
    one, trace = r / channels, np.trace(F)
    two = one * (r - 1) / max(1, channels - 1)
    return 0.5 * (one * trace + two * (F.sum() - trace)) - one * u.sum()


if __name__ == "__main__":
    main()
