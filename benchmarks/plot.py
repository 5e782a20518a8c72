"""How close each operator comes to the machine's limit, by size, as a picture.

    python -m benchmarks.plot FILE.json [PICTURE]

Draws a results file of the suite; without a name, beside it and named like it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

STYLE = {"NCHW": "o", "channels_last": "s"}
COLOUR = {"float32": "tab:blue", "bfloat16": "tab:orange"}
NO_PICTURE = "no picture: no operator was measured, or matplotlib is not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    rows = json.loads(options.file.read_text(encoding="utf-8")).get("rows", [])
    print(draw(rows, options.picture or options.file.with_suffix(".png")) or NO_PICTURE)


def draw(rows: Sequence[dict], path: Path) -> Path | None:
    """One panel an operator, our per cent of the limit; None without matplotlib or rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    ours = [row for row in rows if row.get("candidate") == "ours"]
    if not ours:
        return None
    operators = list(dict.fromkeys(row["operator"] for row in ours))
    figure = Figure(figsize=(10, 3.2 * len(operators)), layout="constrained")
    axes = figure.subplots(len(operators), 1, squeeze=False)[:, 0]
    for panel, operator in zip(axes, operators, strict=True):
        _panel(panel, operator, [row for row in ours if row["operator"] == operator])
    figure.savefig(path, dpi=100)
    return path


def _panel(panel, operator: str, rows: Sequence[dict]) -> None:
    for layout, marker in STYLE.items():
        for dtype, colour in COLOUR.items():
            points = [r for r in rows if r["layout"] == layout and r["dtype"] == dtype]
            if points:
                sizes = [f"{row['network']} {row['size']}" for row in points]
                panel.plot(
                    sizes,
                    [row["% of limit"] for row in points],
                    marker,
                    color=colour,
                    label=f"{layout} {dtype}",
                )
    panel.set(title=operator, ylabel="% of limit", ylim=(0, None))
    panel.tick_params(axis="x", labelrotation=60, labelsize=7)
    panel.axhline(100, color="grey", linewidth=0.8)
    panel.legend(fontsize=7)


if __name__ == "__main__":
    main()
