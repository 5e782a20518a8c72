"""One self-contained HTML page of a folder of ``ccp prune`` or ``ccp compare``.

The page loads nothing and runs no script: charts are SVG, images are PNG data in the page.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccp_ext import files
from ccp_ext.errors import InputError
from ccp_ext.ops import map_similarity
from ccp_ext.plan import PruningPlan
from ccp_ext.report import curves, summary, svg
from ccp_ext.report.snapshot import FILE, Snapshot
from ccp_ext.tables import cell

PAIRS = 4
_MATRIX = 256  # pixels a side; wider ones are averaged

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #5a6470; --rule: #d5dae0;
  --mark: #0068a8; --c0: #0068a8; --c1: #b84a00; --c2: #007a63; --c3: #a8386f; --c4: #7a5c00;
  --c5: #5b4fc7; --c6: #3d7a1f; --c7: #555b63; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --faint: #a3adb8;
  --rule: #363d46; --mark: #6cb8ee; --c0: #6cb8ee; --c1: #f39a5c; --c2: #3ccfab; --c3: #ea92bf;
  --c4: #dfc04a; --c5: #ada3ff; --c6: #93d272; --c7: #b9c0c8; } }
body { margin: 2rem auto; max-width: 94rem; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
p { max-width: 46rem; } .faint, figcaption { color: var(--faint); }
.scroll { overflow-x: auto; } figure { margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: right;
  font-size: .92rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tbody th { font-weight: 400; }
th:first-child { white-space: normal; }
tr.best > * { font-weight: 700; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } .middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--rule); } .level { stroke: var(--ink); stroke-dasharray: 5 4; }
.series { stroke: currentColor; fill: currentColor; stroke-width: 1.6; }
.series polyline { fill: none; } .hollow { fill: var(--paper); }
.series .band { fill-opacity: .13; stroke: none; } .control { color: var(--ink); }
.control polyline, .control .key { stroke-dasharray: 5 4; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.kept { fill: var(--mark); } .gone { fill: var(--faint); }
.share { fill: var(--mark); stroke: var(--rule); stroke-width: .5; }
.charts { display: flex; flex-wrap: wrap; column-gap: 2.5rem; }
.charts > * { flex: 0 1 490px; min-width: 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; } .pictures figure { margin: 0; }
img { image-rendering: pixelated; border: 1px solid var(--rule); }
img.map { width: 96px; height: 96px; }
"""


def write(folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Make the page of a finished run or comparison.

    Args:
        folder: the output of ``ccp prune`` or ``ccp compare``.
        output: the file to write; by default ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        InputError: the folder holds neither, or a file in it is damaged.
    """
    folder = Path(folder)
    kinds = {"comparison.json": _comparison, "report.json": _run}
    found = next((name for name in kinds if (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"{os.fspath(folder)!r} holds no finished run of `ccp prune` or `ccp compare`"
        )
    try:
        content = json.loads((folder / found).read_text(encoding="utf-8"))
        text = kinds[found](folder, content)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{folder / found} is damaged ({error!r})") from error
    path = Path(output) if output is not None else folder / "report.html"
    files.write_text(path, text)
    return path


# --- a comparison --------------------------------------------------------------------------------


def _comparison(folder: Path, result: Mapping[str, Any]) -> str:
    repairs = list(dict.fromkeys(entry["repair"] for entry in result["summary"]))
    # The style of each criterion, the same in all charts.
    places = {name: k for k, name in enumerate(result["settings"]["criteria"])}
    charts = [_accuracy_chart(result, repair, places) for repair in repairs]
    ranks = [
        (e["criterion"], e["mean rank"], e["spread"] or 0.0, places[e["criterion"]])
        for e in result["ranks"]
    ]
    return _page(
        f"Comparison of criteria on {result['settings']['model']}",
        _paragraph(summary.explanation(result)),
        _section("Accuracy against cost", _charts(charts)),
        _section(
            "Ranks",
            _figure(
                svg.ranges("Rank of each criterion", "mean rank (1 is best)", ranks, first=1),
                "By accuracy on the selection half, anew for each budget, repair and seed; the "
                "bars are one standard deviation to each side.",
            ),
            _table("Ranks", result["ranks"]),
        ),
        _section("Tables", *(_table(title, rows) for title, rows in summary.tables(result))),
        _finetuning(curves.of_comparison(folder, result, places)),
        _kept_by_layer(result),
        *_of_plain_model(folder / FILE),
        _section("Settings", _facts(result["settings"])),
    )


def _accuracy_chart(result: Mapping[str, Any], repair: str, places: Mapping[str, int]) -> str:
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    for entry in result["summary"]:
        if entry["repair"] == repair:
            point = (
                100 * entry["MACs kept"],
                entry["report accuracy"],
                entry["report accuracy spread"],
            )
            points.setdefault(entry["criterion"], []).append(point)
    # In the order of the best means, so that the legend reads as the lines lie.
    ordered = sorted(points.items(), key=lambda c: -sum(accuracy for _, accuracy, _ in c[1]))
    series = [svg.Series(name, sorted(line), places[name]) for name, line in ordered]
    beside = summary.control_of(result, repair)
    level = ("unpruned", result["plain"]["report accuracy"])
    if beside is not None:
        level = ("unpruned, fine-tuned too", beside["report accuracy"])
    title = f"Accuracy against MACs, repair: {repair}"
    chart = svg.lines(title, "MACs kept, %", "accuracy on the report half, %", series, level)
    return _figure(chart, f"Repair: {repair}. Bars: one standard deviation over the seeds.")


def _kept_by_layer(result: Mapping[str, Any]) -> str:
    """A picture for each budget; nothing for files of earlier versions, which have no counts."""
    channels = result["plain"].get("channels")
    if channels is None:
        return ""
    kept: dict[str, dict[str, Mapping[str, float]]] = {}
    for entry in result["summary"]:  # of all repairs, before which the same channels were chosen
        kept.setdefault(f"{entry['kind']} {entry['budget']}", {})[entry["criterion"]] = {
            group: entry["kept"][group] / count for group, count in channels.items()
        }
    parts = []
    for budget, shares in kept.items():
        arms = [name for name in result["settings"]["criteria"] if name in shares]
        rows = [(name, list(shares[name].values())) for name in arms]
        title = f"Channels kept by layer, {budget}"
        percent = [
            {"group": group, **{name: f"{100 * shares[name][group]:.0f}" for name in arms}}
            for group in channels
        ]
        chart = svg.shares(title, "kept", rows, list(channels))
        parts.append(
            _figure(chart, f"Budget: {budget}. Mean over the seeds.")
            + _details("As a table", _table(f"{title}, in percent", percent))
        )
    return _section("Channels kept by layer", *parts)


def _of_plain_model(file: Path) -> list[str]:
    """Matrices and maps; nothing for folders of earlier versions, which have no such file."""
    if not file.is_file():
        return []
    snapshot = Snapshot.load(file)

    def arrange(group: str) -> _Arranged:
        S = snapshot.S[group]
        alone = 0.5 * S.diagonal() - _linear(S, snapshot.u.get(group))
        order = alone.argsort(descending=True, stable=True).tolist()
        return _Arranged(order, f"{len(order)} channels")

    order = (
        "Channels stand in the order of what the removal of each alone costs, the dearest first."
    )
    return [
        _matrices(snapshot, arrange, order),
        _alike(snapshot, lambda group, channel: f"{channel}"),
    ]


def _finetuning(charts: Sequence[curves.Chart]) -> str:
    """The curves; nothing where no model was fine-tuned."""
    if not charts:
        return ""
    if not any(chart.series for chart in charts):
        note = "There are no curves: the logs of the epochs are missing or damaged."
        return _section("Fine-tuning", _paragraph(note))
    return _section("Fine-tuning", _charts(map(_curves, charts)))


def _curves(chart: curves.Chart) -> str:
    if not chart.series:
        return _paragraph(f"{chart.title}: there is no curve. {chart.left_out}")
    drawn = svg.curves(chart.title, "epoch", chart.unit, chart.series, digits=chart.digits)
    return _figure(drawn, " ".join(filter(None, (chart.note, chart.left_out))))


# --- a run ---------------------------------------------------------------------------------------


def _run(folder: Path, report: Mapping[str, Any]) -> str:
    plan = PruningPlan.load(folder / "plan.json")
    snapshot = Snapshot.load(folder / FILE)
    settings, stages = report["settings"], report["stages"]
    if "repair options" in report:  # files of earlier versions have none
        settings = {**settings, "repair options": report["repair options"]}
    first, last = stages[0], stages[-1]

    def fate(group: str, channel: int) -> str:
        return f"{channel} {'stays' if channel in plan.groups[group].kept else 'goes'}"

    def arrange(group: str) -> _Arranged:
        kept, channels = plan.groups[group].kept, plan.groups[group].channels
        removed = sorted(set(range(channels)) - set(kept))
        return _Arranged([*kept, *removed], f"{len(kept)} of {channels} stay", len(kept))

    return _page(
        f"{settings['model']} pruned by {settings['criterion']}",
        _paragraph(
            f"{last['MACs'] / first['MACs']:.1%} of the MACs and "
            f"{last['parameters'] / first['parameters']:.1%} of the parameters remain; the test "
            f"accuracy went from {first['accuracy %']:.2f} % to {last['accuracy %']:.2f} %."
        ),
        _section(
            "Stages",
            _table("The model after each stage", stages),
            *(_paragraph(f"{row['stage']}: {row['summary']}.") for row in report.get("refits", [])),
        ),
        _finetuning(curves.of_run(folder, settings)),
        _forecast(report.get("forecast", [])),
        _section("Channels", *_channels(plan)),
        _matrices(
            snapshot,
            arrange,
            "Channels that stay come first, and the lines part them from the removed ones.",
        ),
        _alike(snapshot, fate),
        _section("Settings", _facts(settings)),
    )


def _forecast(rows: Sequence[Mapping[str, Any]]) -> str:
    """The criterion's objective, and what the loss did."""
    if not rows:
        return ""
    note = (
        "The criterion's objective (of ccp: half the mean squared change of the logits) beside the "
        "change of the mean loss on the images of the statistics."
    )
    return _section("Forecast", _paragraph(note), _table("Forecast of each round", rows))


def _channels(plan: PruningPlan) -> list[str]:
    groups = plan.groups.items()
    chart = svg.strips(
        "Channels kept and removed", [(name, g.channels, g.kept) for name, g in groups]
    )
    rows = [
        {
            "group": name,
            "channels": group.channels,
            "kept": len(group.kept),
            "kept %": 100 * len(group.kept) / group.channels,
        }
        for name, group in groups
    ]
    total = {
        "group": "all",
        "channels": sum(row["channels"] for row in rows),
        "kept": sum(row["kept"] for row in rows),
    }
    total["kept %"] = 100 * total["kept"] / total["channels"]
    return [
        _figure(chart, "One bar a channel: tall ones stay, low ones are removed."),
        _details("As a table", _table("Channels by group", [*rows, total])),
    ]


@dataclass(frozen=True)
class _Arranged:
    """The channels of a group as they stand in its matrix.

    Attributes:
        order: all of them.
        size: what to say of them.
        parted: how many stand before a line, if there is to be one.
    """

    order: list[int]
    size: str
    parted: int | None = None


def _matrices(snapshot: Snapshot, arrange: Callable[[str], _Arranged], order: str) -> str:
    """Heat maps, with the channels of a group as ``arrange`` has them, in words ``order``."""
    title = "Pairwise costs"
    if not snapshot.S:
        note = snapshot.note or "This criterion scores each channel by itself."
        return _section(title, _paragraph(note))
    return _section(
        title,
        *([_paragraph(snapshot.note)] if snapshot.note else []),
        _paragraph(
            "Ŝ of the objective β'Ŝβ, whose sum over the channels that stay is made small. "
            f"{order} Blue is negative, red positive."
        ),
        _row(
            _heat_map(group, s_hat(S, snapshot.u.get(group)), arrange(group))
            for group, S in snapshot.S.items()
        ),
    )


def _heat_map(group: str, matrix: np.ndarray, arranged: _Arranged) -> str:
    ordered = matrix[arranged.order][:, arranged.order]
    scale = float(np.quantile(np.abs(ordered), 0.98)) or 1.0
    pixels = _enlarged(_diverging(_shrunk(ordered) / scale))
    if arranged.parted is not None:
        pixels = _with_border(pixels, arranged.parted / len(ordered))
    return _figure(
        _image(pixels, "matrix", f"Heat map of S-hat of {group}"),
        f"{group}: {arranged.size}; colours to ±{scale:.2g}",
    )


def s_hat(S: Tensor, u: Tensor | None) -> np.ndarray:
    """The matrix of min b'S_hat b over KEPT masks b; see GroupStatistics.s_hat."""
    return (0.5 * S + torch.diag(_linear(S, u) - S.sum(1))).numpy()


def _linear(S: Tensor, u: Tensor | None) -> Tensor:
    return torch.zeros(len(S)) if u is None else u


def _alike(snapshot: Snapshot, label: Callable[[str, int], str]) -> str:
    """Pairs of maps, with the ``label`` of a group and its channel."""
    parts = [
        _paragraph(
            "The pairs of channels whose maps of one training image are most alike by structural "
            "similarity (1: equal), as QSFM finds them. Blank maps are left out."
        ),
        _figure(
            _image(snapshot.image.movedim(0, 2).numpy(), "map", "The sample image"), "The image"
        ),
    ]
    for name, maps in snapshot.maps.items():
        figures = [
            _figure(
                _image(pixels, "map", f"Map of channel {i}")
                + _image(others, "map", f"Map of channel {j}"),
                f"{label(name, i)}, {label(name, j)}: {value:.3f}",
            )
            for i, j, value in _most_similar(maps)
            for pixels, others in [_greys(maps[[i, j]])]
        ]
        parts.append(f"<h3>{escape(name)}</h3>" + _row(figures))
    return _section("Feature maps that are alike", *parts)


def _most_similar(maps: Tensor) -> list[tuple[int, int, float]]:
    """(i, j, similarity) of a few pairs of maps ``[C, H, W]``, no channel in two of them."""
    alive = maps.flatten(1).std(1) > 0
    span = float(maps.amax() - maps.amin()) or 1.0
    values = map_similarity(maps.unsqueeze(0) / span, "ssim")
    values = values.masked_fill(~(alive[:, None] & alive), -torch.inf).triu(1)
    values = values.masked_fill(torch.ones_like(values).tril().bool(), -torch.inf)
    pairs = []
    for _ in range(PAIRS):
        i, j = divmod(int(values.argmax()), len(values))
        value = float(values[i, j])
        if not np.isfinite(value):
            break
        pairs.append((i, j, value))
        values[[i, j]] = values[:, [i, j]] = -torch.inf
    return pairs


# --- images --------------------------------------------------------------------------------------


def _greys(maps: Tensor) -> np.ndarray:
    """uint8 of maps, on one common scale."""
    low, high = maps.amin(), maps.amax()
    return ((maps - low) / (high - low) * 255).round().byte().numpy()


def _shrunk(matrix: np.ndarray) -> np.ndarray:
    """Block averages, so that no side is longer than a picture's."""
    block = -(-len(matrix) // _MATRIX)
    if block == 1:
        return matrix
    starts = np.arange(0, len(matrix), block)
    sums = np.add.reduceat(np.add.reduceat(matrix, starts, 0), starts, 1)
    sizes = np.diff([*starts, len(matrix)])
    return sums / np.outer(sizes, sizes)


def _diverging(values: np.ndarray) -> np.ndarray:
    """Values in -1..1 (others are cut) as uint8 colours from blue over white to red."""
    places, colours = (-1, 0, 1), np.array([(33, 102, 172), (247, 247, 247), (178, 24, 43)])
    channels = [np.interp(values, places, colours[:, k]) for k in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """Whole multiples of the pixels, so that a line between them can be thin."""
    times = max(1, _MATRIX // len(pixels))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _with_border(pixels: np.ndarray, share: float) -> np.ndarray:
    """A dark line behind that share of the rows and columns."""
    at = round(share * len(pixels))
    return np.insert(np.insert(pixels, at, 0, axis=0), at, 0, axis=1)


def _image(pixels: np.ndarray, kind: str, description: str) -> str:
    data = base64.b64encode(_png(pixels)).decode()
    return f'<img class="{kind}" alt="{escape(description)}" src="data:image/png;base64,{data}">'


def _png(pixels: np.ndarray) -> bytes:
    """uint8 ``[H, W]``, ``[H, W, 1]`` (grey) or ``[H, W, 3]`` as a PNG file."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] not in (1, 3):
        pixels = pixels[..., :1]  # of images with other channels the first
    height, width, channels = pixels.shape
    header = struct.pack(">2I5B", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


# --- HTML ----------------------------------------------------------------------------------------


def _page(title: str, *parts: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _paragraph(text: str) -> str:
    unbroken = text.replace(" %", "\N{NO-BREAK SPACE}%")
    return f"<p>{escape(unbroken)}</p>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _row(figures: Iterable[str]) -> str:
    return f'<div class="pictures">{"".join(figures)}</div>'


def _charts(figures: Iterable[str]) -> str:
    """Beside one another where the page is wide."""
    return f'<div class="charts">{"".join(figures)}</div>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table whose first column names the rows; rows marked "best" stand out."""
    heads = "".join(
        f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in rows[0]
    )
    lines = []
    for row in rows:
        name, *values = (escape(cell(value)) for value in row.values())
        best = ' class="best"' if "best" in row.values() else ""
        cells = "".join(f"<td>{value}</td>" for value in values)
        name = name.replace(":", ":<wbr>")  # where the long name of an arm may break
        lines.append(f'<tr{best}><th scope="row">{name}</th>{cells}</tr>')
    label = escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f"<table><caption>{label}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _facts(settings: Mapping[str, Any]) -> str:
    rows = [{"setting": name, "value": _plain(value)} for name, value in settings.items()]
    return _details("All settings", _table("Settings", rows))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
