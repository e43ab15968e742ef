"""Charts as inline SVG: text stays text, colours follow the page's light or dark, nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.report.html import Html, el, join
from autoseg.report.palette import RGB, ink_on
from autoseg.report.png import png_uri

MAX_POINTS = 240
Point = tuple[float, float]


class Line(NamedTuple):
    """One curve; `colour` is any CSS colour."""

    name: str
    points: Sequence[Point]
    colour: str
    width: float = 1.5
    opacity: float = 1.0


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Return at most `limit` points, each the mean of its neighbours; short curves stay as they are."""
    if len(points) <= limit:
        return list(points)
    parts = np.array_split(np.asarray(points, dtype=float), limit)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from low to high, about that many."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / count
    base = 10.0 ** math.floor(math.log10(rough))
    step = min((base * f for f in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 50, 12, 10, 34


def line_chart(lines: Sequence[Line], label: str, *, top: float | None = None, unit: str = "step") -> Html:
    """Return curves over steps; y starts at 0 and ends at `top` or above the highest point."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        return el("p", "Nothing to draw.", class_="muted")
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(0.0, *ys), top if top is not None else max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def at(point: Point) -> Point:
        x = LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    axes: list[Html] = []
    for value in ticks(y0, y1):
        _, y = at((x0, value))
        axes.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=round(y, 1), y2=round(y, 1), class_="grid"))
        axes.append(el("text", f"{value:.4g}", x=LEFT - 6, y=round(y + 4, 1), text_anchor="end"))
    for value in (v for v in ticks(x0, x1) if v == round(v)):
        x, _ = at((value, y0))
        axes.append(el("text", f"{value:,.0f}", x=round(x, 1), y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    axes.append(el("text", unit, x=WIDTH - RIGHT, y=HEIGHT - 3, text_anchor="end"))
    curves = [_curve(line, [at(point) for point in line.points]) for line in lines]
    return el("svg", axes, curves, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="chart", role="img", aria_label=label)


def _curve(line: Line, points: Sequence[Point]) -> Html:
    style = f"stroke:{line.colour};stroke-width:{line.width:g};opacity:{line.opacity:g}"
    if len(points) == 1:
        x, y = points[0]
        return el("circle", el("title", line.name), cx=round(x, 1), cy=round(y, 1), r=3, style=f"fill:{line.colour}")
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return el("polyline", el("title", line.name), points=where, class_="curve", style=style)


def sparkline(values: Sequence[float | None]) -> Html | None:
    """Return a small curve of values from 0 to 1, None if there are fewer than two."""
    known = [(i, value) for i, value in enumerate(values) if value is not None]
    if len(known) < 2:
        return None
    width, height = 84, 22
    where = " ".join(
        f"{2 + i / (len(values) - 1) * (width - 4):.1f},{height - 2 - v * (height - 4):.1f}" for i, v in known
    )
    base = el("line", x1=0, x2=width, y1=height - 2, y2=height - 2, class_="grid")
    line = el("polyline", points=where, class_="curve", style="stroke:var(--accent);stroke-width:1.5")
    text = ", ".join(f"{value:.2f}" for _, value in known)
    size = {"width": width, "height": height}
    return el("svg", base, line, viewBox=f"0 0 {width} {height}", class_="spark", role="img", aria_label=text, **size)


class Matrix(NamedTuple):
    """A table as picture: rows with their group, columns, a colour (or None) and a text for each cell."""

    rows: Sequence[str]
    groups: Sequence[str]
    columns: Sequence[str]
    colours: Sequence[Sequence[RGB | None]]
    texts: Sequence[Sequence[str]] | None
    label: str


CHARACTER, LEGIBLE_ROWS = 6.8, 60


def matrix(facts: Matrix) -> Html:
    """Return the matrix in a box that scrolls; with many rows only groups are named and cells get thin.

    The cells are one small PNG of a pixel each, so that 48 classes and 289 crops stay a few kilobytes.
    """
    legible = len(facts.rows) <= LEGIBLE_ROWS
    cell_w, cell_h = (40 if facts.texts else 18), (20 if facts.texts else 15 if legible else 4)
    names = _row_labels(facts, cell_h, legible)
    left = 10 + CHARACTER * max((len(name) for _, name in names), default=0)
    longest = CHARACTER * max((min(len(name), 24) for name in facts.columns), default=0)
    head, reach = 18 + 0.79 * longest, 12 + 0.62 * longest
    width, height = cell_w * len(facts.columns), cell_h * len(facts.rows)
    marks = [
        *_column_labels(facts.columns, left, head, cell_w),
        el("image", x=left, y=head, width=width, height=height, href=_pixels(facts.colours),
           preserveAspectRatio="none", class_="cells"),
        el("rect", x=left, y=head, width=width, height=height, class_="frame"),
        *(el("text", name, x=left - 6, y=round(head + y, 1), text_anchor="end") for y, name in names),
        *_cell_texts(facts, left, head, (cell_w, cell_h)),
    ]  # fmt: skip
    total_w, total_h = math.ceil(left + width + reach), math.ceil(head + height + 4)
    svg = el(
        "svg", el("title", facts.label), marks, viewBox=f"0 0 {total_w} {total_h}", width=total_w, height=total_h,
        class_="matrix", role="img", aria_label=facts.label,
    )  # fmt: skip
    return el("div", svg, class_="scroll", tabindex="0")


def shorten(name: str, limit: int = 24) -> str:
    """Return the name, its middle left out where it is longer."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[len(name) - limit // 2 + 1 :]}"


def _row_labels(facts: Matrix, cell_h: int, legible: bool) -> list[tuple[float, str]]:
    """Return (y, name) of every row, or of the first row of each group that has room for its name."""
    if legible:
        return [(cell_h * (i + 0.5) + 4, shorten(name)) for i, name in enumerate(facts.rows)]
    names: list[tuple[float, str]] = []
    for i, group in enumerate(facts.groups):
        y = cell_h * i + 9.0
        if (i == 0 or group != facts.groups[i - 1]) and (not names or y - names[-1][0] >= 12):
            names.append((y, shorten(group)))
    return names


def _column_labels(columns: Sequence[str], left: float, head: float, cell_w: int) -> list[Html]:
    labels = []
    for k, name in enumerate(columns):
        x, y = round(left + cell_w * (k + 0.5) + 3, 1), round(head - 5, 1)
        labels.append(el("text", shorten(name), x=x, y=y, transform=f"rotate(-52 {x} {y})"))
    return labels


def _cell_texts(facts: Matrix, left: float, head: float, cell: tuple[int, int]) -> list[Html]:
    texts = []
    for i, row in enumerate(facts.texts or ()):
        for k, text in enumerate(row):
            colour = facts.colours[i][k]
            x, y = round(left + cell[0] * (k + 0.5), 1), round(head + cell[1] * (i + 0.5) + 4, 1)
            style = f"fill:{ink_on(colour)}" if colour else None
            texts.append(el("text", text, x=x, y=y, text_anchor="middle", style=style))
    return texts


def _pixels(colours: Sequence[Sequence[RGB | None]]) -> str:
    rows = [[(0, 0, 0, 0) if colour is None else (*colour, 255) for colour in row] for row in colours]
    pixels: NDArray[Any] = np.asarray(rows, dtype=np.uint8).reshape(len(rows), -1, 4)
    return png_uri(pixels)


def bar(value: float | None, colour: str = "var(--accent)") -> Html:
    """Return a number with its share of 1 as a bar, a dash where there is none."""
    if value is None:
        return el("span", "–", class_="muted")
    fill = el("i", "", style=f"width:{100 * min(max(value, 0.0), 1.0):.1f}%;background:{colour}")
    return join(el("span", fill, class_="bar"), el("span", f"{value:.3f}", class_="num"))
