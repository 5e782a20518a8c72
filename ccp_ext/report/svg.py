"""Charts as SVG text for pages: no library, no script, colours from the page's style sheet.

A mark's colour and shape both come from one number, so that charts can be read without colours;
``currentColor`` and the classes follow the page into the dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
_TOP = 14
# Of the lines' plot: the place of its left, right and bottom sides; the width and height of the
# chart without its legend. So narrow that it fits a telephone without scrolling.
_LEFT, _RIGHT, _BOTTOM = 56, 482, 320
_WIDTH, _HEIGHT = 490, 364
_STRIP = 460  # the width of a row behind its name
_MARKS = 12  # of a curve, at most


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        points: (x, y, spread of y or None), in increasing x.
        style: colour and shape of the marks, 0 or more; None for a dashed line in the colour of the
            text, which is that of a control.
    """

    name: str
    points: Sequence[tuple[float, float, float | None]]
    style: int | None = 0


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    level: tuple[str, float] | None,
) -> str:
    """Lines with error bars, and a dashed level (name, y) across the chart."""
    heights = _heights(series) + ([] if level is None else [level[1]])
    across = _Scale(_padded(_abscissas(series)), _LEFT, _RIGHT)
    up = _Scale(_padded(heights), _BOTTOM, _TOP)
    parts = [_axes(across, up, x_label, y_label)]
    if level is not None:
        y = up(level[1])
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    # A few pixels aside, so that the error bars of equal budgets do not hide one another.
    for line, aside in zip(series, _asides(len(series), 3.0), strict=True):
        places = _places(line, across, up, aside)
        drawn = _polyline(places) + _bars(places) + _marks(line.style, places)
        parts.append(f"<g {_style(line.style)}>{drawn}</g>")
    return _with_legend(title, series, parts, None if level is None else level[0])


def curves(
    title: str, x_label: str, y_label: str, series: Sequence[Series], *, digits: int = 2
) -> str:
    """Lines over whole numbers such as epochs, with a shaded band for the spread.

    Args:
        digits: behind the point, of the values that the marks tell.
    """
    numbers = sorted(set(_abscissas(series)))
    margin = min(0.5, 0.06 * (numbers[-1] - numbers[0]) or 0.5)
    across = _Scale((numbers[0] - margin, numbers[-1] + margin), _LEFT, _RIGHT)
    up = _Scale(_padded(_heights(series)), _BOTTOM, _TOP)
    # A single epoch makes no lines: their marks stand side by side. Of long lines only some points
    # have marks, those of each line elsewhere, and the last.
    asides = _asides(len(series), 14.0 if len(numbers) == 1 else 0.0)
    every = math.ceil(len(numbers) / _MARKS)
    bands, drawn = [], []
    for k, (line, aside) in enumerate(zip(series, asides, strict=True)):
        places = _places(line, across, up, aside, x_label, digits)
        marked = places[k * every // len(series) :: every]
        if marked[-1:] != places[-1:]:
            marked.append(places[-1])
        spread = _bars(places) if len(numbers) == 1 else _band(places)
        bands.append(f"<g {_style(line.style)}>{spread}</g>")
        drawn.append(f"<g {_style(line.style)}>{_polyline(places)}{_marks(line.style, marked)}</g>")
    axes = _axes(across, up, x_label, y_label, least=1.0)
    return _with_legend(title, series, [axes, *bands, *drawn])


def ranges(
    title: str, x_label: str, rows: Sequence[tuple[str, float, float, int]], first: float
) -> str:
    """One line a row (name, value, spread, style) under a common axis that begins at ``first``."""
    step, left = 24, _room(name for name, *_ in rows) + 20
    right, bottom = max(left + 220, _WIDTH - 20), _TOP + step * len(rows)
    highest = max(value + spread for _, value, spread, _ in rows)
    across = _Scale((first, highest), left, right)
    parts = [
        f'<line class="grid" x1="{across(t):.1f}" x2="{across(t):.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text class="middle" x="{across(t):.1f}" y="{bottom + 16}">{_number(t)}</text>'
        for t in _ticks(across.low, across.high)
    ]
    for k, (name, value, spread, style) in enumerate(rows):
        y, low = _TOP + step * (k + 0.5), max(first, value - spread)
        parts.append(
            f'<text class="end" x="{left - 14}" y="{y + 4}">{escape(name)}</text>'
            f'<g {_style(style)}><line x1="{across(low):.1f}" x2="{across(value + spread):.1f}" '
            f'y1="{y}" y2="{y}"/>{_mark(style, across(value), y)}</g>'
        )
    x = (left + right) / 2
    parts.append(f'<text class="middle" x="{x}" y="{bottom + 36}">{escape(x_label)}</text>')
    return _svg(title, right + 20, bottom + 44, parts)


def strips(title: str, rows: Sequence[tuple[str, int, Iterable[int]]]) -> str:
    """One strip a row (name, channels, those kept): tall bars stay, low ones go."""
    step, left = 18, _room(name for name, _, _ in rows) + 16
    cell = min(10.0, _STRIP / max(channels for _, channels, _ in rows))
    parts = []
    for k, (name, channels, kept) in enumerate(rows):
        y, kept = _TOP + step * k, set(kept)
        tall = "".join(_bar(left + cell * i, y, cell, 12) for i in sorted(kept))
        low = "".join(
            _bar(left + cell * i, y + 9, cell, 3) for i in range(channels) if i not in kept
        )
        parts.append(
            f'<text class="end" x="{left - 10}" y="{y + 11}">{escape(name)}</text>'
            f'<path class="kept" d="{tall}"/><path class="gone" d="{low}"/>'
            f'<text x="{left + cell * channels + 8:.1f}" y="{y + 11}">{len(kept)}/{channels}</text>'
        )
    return _svg(title, left + _STRIP + 70, _TOP + step * len(rows) + 6, parts)


def shares(
    title: str, unit: str, rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[str]
) -> str:
    """A cell for each row (name, shares within 0 to 1) and column, the fuller the darker.

    Args:
        unit: what it is a share of, behind the numbers.
    """
    step, top, left = 20, 38, _room(name for name, _ in rows) + 16
    cell = min(26.0, _STRIP / len(columns))
    bottom, names = top + step * len(rows), _room(columns)
    parts = [_key(unit)]
    for k, (name, values) in enumerate(rows):
        y = top + step * k
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 14}">{escape(name)}</text>')
        parts += [
            _cell(f"{name}, {column}: {value:.0%}", left + cell * i, y, cell - 1, step - 2, value)
            for i, (column, value) in enumerate(zip(columns, values, strict=True))
        ]
    every = math.ceil(13 / cell)  # so that the names do not touch
    for i in range(0, len(columns), every):
        x = left + cell * (i + 0.5) + 4
        parts.append(
            f'<text class="end" transform="translate({x:.1f} {bottom + 6}) rotate(-90)">'
            f"{escape(columns[i])}</text>"
        )
    width = max(left + cell * len(columns), 180 + _room([f"100% {unit}"]))
    return _svg(title, math.ceil(width) + 4, bottom + names, parts)


def _key(unit: str) -> str:
    """What the cells of :func:`shares` mean."""
    cells = [_cell(f"{k}0%", 40 + 12 * k, _TOP - 6, 12, 12, k / 10) for k in range(11)]
    ends = (
        f'<text class="end" x="34" y="{_TOP + 5}">0%</text>'
        f'<text x="180" y="{_TOP + 5}">100% {escape(unit)}</text>'
    )
    return "".join(cells) + ends


def _cell(title: str, x: float, y: float, width: float, height: float, share: float) -> str:
    return (
        f'<rect class="share" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" '
        f'fill-opacity="{share:.3f}"><title>{escape(title)}</title></rect>'
    )


@dataclass(frozen=True)
class _Scale:
    """Maps values to places along an axis."""

    values: tuple[float, float]
    start: float
    end: float

    @property
    def low(self) -> float:
        return self.values[0]

    @property
    def high(self) -> float:
        return self.values[1]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class _Place:
    """Of a point in the chart, with the ends of its spread, if there is one, and what it says."""

    x: float
    y: float
    ends: tuple[float, float] | None
    text: str


def _abscissas(series: Sequence[Series]) -> list[float]:
    return [x for line in series for x, _, _ in line.points]


def _heights(series: Sequence[Series]) -> list[float]:
    """Of all points, at both ends of their spreads."""
    points = [point for line in series for point in line.points]
    return [y + side * (spread or 0) for _, y, spread in points for side in (-1, 1)]


def _asides(count: int, step: float) -> list[float]:
    """Distances from the middle, ``step`` apart."""
    return [step * (k - (count - 1) / 2) for k in range(count)]


def _room(names: Iterable[str]) -> int:
    """Width enough for the longest name."""
    return 7 * max(map(len, names))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers inside, about five of them, ``least`` apart or more."""
    rough = max((high - low) / 5 or 1.0, least)
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(across: _Scale, up: _Scale, x_label: str, y_label: str, least: float = 0.0) -> str:
    """Both, with ticks on the horizontal one that are ``least`` apart or more."""
    parts = []
    for t in _ticks(up.low, up.high):
        y = f"{up(t):.1f}"
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="end" x="{_LEFT - 8}" y="{up(t) + 4:.1f}">{_number(t)}</text>'
        )
    for t in _ticks(across.low, across.high, least):
        x = f"{across(t):.1f}"
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_BOTTOM}"/>'
            f'<text class="middle" x="{x}" y="{_BOTTOM + 17}">{_number(t)}</text>'
        )
    middle = (_TOP + _BOTTOM) / 2
    parts.append(
        f'<text class="middle" x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 8}">'
        f"{escape(x_label)}</text>"
        f'<text class="middle" transform="translate(14 {middle}) rotate(-90)">{escape(y_label)}'
        "</text>"
    )
    return "".join(parts)


def _with_legend(
    title: str, series: Sequence[Series], parts: Sequence[str], level: str | None = None
) -> str:
    """The chart of ``parts`` with the names of its lines below, row by row, the level's last."""
    entries: list[tuple[str, str, Series | None]] = [(s.name, _style(s.style), s) for s in series]
    if level is not None:
        entries.append((level, 'class="level"', None))
    column = 30 + _room(name for name, _, _ in entries) + 12
    columns = max(1, (_WIDTH - _LEFT) // column)
    legend = []
    for k, (name, style, line) in enumerate(entries):
        x, y = _LEFT + 11 + column * (k % columns), _HEIGHT + 12 + 18 * (k // columns)
        mark = "" if line is None else _mark(line.style, x, y)
        legend.append(
            f'<g><g {style}><line class="key" x1="{x - 11}" x2="{x + 11}" y1="{y}" y2="{y}"/>{mark}'
            f'</g><text x="{x + 18}" y="{y + 4}">{escape(name)}</text></g>'
        )
    width = max(_WIDTH, _LEFT + column)
    height = _HEIGHT + 18 * math.ceil(len(entries) / columns) + 6
    return _svg(title, width, height, [*parts, *legend])


def _places(
    line: Series, across: _Scale, up: _Scale, aside: float, x_label: str = "", digits: int = 2
) -> list[_Place]:
    """Of the line's points, ``aside`` to the right; with an ``x_label`` they tell x as well."""
    places = []
    for x, y, spread in line.points:
        text = f"{line.name}, {x_label} {_number(x)}" if x_label else line.name
        text += f": {y:.{digits}f}"
        ends = None
        if spread is not None:
            text += f" ± {spread:.{digits}f}"
            ends = (up(y - spread), up(y + spread))
        places.append(_Place(across(x) + aside, up(y), ends, text))
    return places


def _polyline(places: Sequence[_Place]) -> str:
    path = " ".join(f"{place.x:.1f},{place.y:.1f}" for place in places)
    return f'<polyline points="{path}"/>'


def _bars(places: Sequence[_Place]) -> str:
    return "".join(
        f'<line x1="{place.x:.1f}" x2="{place.x:.1f}" y1="{place.ends[0]:.1f}" '
        f'y2="{place.ends[1]:.1f}"/>'
        for place in places
        if place.ends
    )


def _band(places: Sequence[_Place]) -> str:
    """The area of the spreads."""
    spread = [(place.x, *place.ends) for place in places if place.ends]
    if not spread:
        return ""
    corners = [(x, high) for x, _, high in spread] + [(x, low) for x, low, _ in spread[::-1]]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polygon class="band" points="{path}"/>'


def _marks(style: int | None, places: Sequence[_Place]) -> str:
    return "".join(
        f"<g><title>{escape(place.text)}</title>{_mark(style, place.x, place.y)}</g>"
        for place in places
    )


def _style(k: int | None) -> str:
    return 'class="series control"' if k is None else f'class="series c{k % COLOURS}"'


def _mark(k: int | None, x: float, y: float) -> str:
    """Circle, square, triangle, diamond in turn; hollow from the second round of colours on.

    A control has a cross.
    """
    if k is None:
        return f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m-8 0l8 -8"/>'
    hollow = ' class="hollow"' if k // COLOURS % 2 else ""
    shape = (k + k // COLOURS) % 4
    if shape == 0:
        return f'<circle{hollow} cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    offsets = {
        1: ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        2: ((0, -5.5), (5, 4), (-5, 4)),
        3: ((0, -6), (6, 0), (0, 6), (-6, 0)),
    }[shape]
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in offsets)
    return f'<polygon{hollow} points="{corners}"/>'


def _bar(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.2f} {y}h{0.82 * width:.2f}v{height}h-{0.82 * width:.2f}z"


def _number(value: float) -> str:
    return f"{value:.10g}"


def _svg(title: str, width: int, height: float, parts: Iterable[str]) -> str:
    # On a narrow page it scrolls, since smaller letters could not be read.
    size = f"max-width:{width}px;min-width:{0.75 * width:.0f}px"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">'
        f'<svg role="img" viewBox="0 0 {width} {height:.0f}" style="{size}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg></div>"
    )
