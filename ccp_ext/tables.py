"""Tables of results, for a terminal and for Markdown files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """Lay out rows that share their keys; the first column to the left, the others to the right.

    Floats are shown with two decimals, integers with thousands separators, None as an empty cell.
    """
    if not rows:
        return ""
    heads = list(rows[0])
    cells = [heads] + [[cell(row[head]) for head in heads] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(heads))]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(("| " + " | ".join(padded) + " |") if markdown else "  ".join(padded).rstrip())
    rule = (
        "|" + "|".join("-" * (w + 1) + (":" if k else "-") for k, w in enumerate(widths)) + "|"
        if markdown
        else "  ".join("-" * w for w in widths)
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def cell(value: Any) -> str:
    """A value as :func:`table` shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
