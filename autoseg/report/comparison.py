"""A ranking as people look at it: a table in the terminal, CSV, and one self-contained page with figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from autoseg.errors import DataError
from autoseg.report.figures import Line, Point, bar, line_chart, thin
from autoseg.report.html import Html, document, el, join, section, table
from autoseg.report.palette import css, look
from autoseg.report.terminal import MISSING, number
from autoseg.schema import Ranking, RankRow, load_as, read_json_lines, write_atomically

BAR_WIDTH, BAR_GAP, BAR_HEIGHT = 14, 26, 140


def ranking_table(ranking: Ranking) -> Table:
    """Return the changes, best first, with the noise that their differences must exceed."""
    noise = f"noise: sd {ranking.noise_sd:.3f} between seeds" if ranking.noise_sd is not None else "noise: unknown"
    rank = "ranked" if ranking.ranked else "not ranked: three seeds of each are needed"
    out = Table(title=f"mean Dice ({noise}; {rank})", title_justify="left")
    out.add_column("change", overflow="fold")
    for name in ("mean Dice", "sd", "seeds", "best class"):
        out.add_column(name, justify="right")
    out.add_column("beside the next", overflow="fold")
    for row in ranking.rows:
        best = f"{row.best_class} {number(row.per_class[row.best_class])}" if row.best_class else MISSING
        out.add_row(row.name, number(row.mean_dice), number(row.sd), str(len(row.seeds)), best, in_words(row))
    return out


def in_words(row: RankRow) -> str:
    """Return whether a row is really above the next, in words."""
    same = f"trains as {', '.join(row.same_as)}; " if row.same_as else ""
    if row.separable_from_next is None:
        return f"{same}{MISSING}"
    return same + ("better" if row.separable_from_next else "not separable")


def ranking_csv(ranking: Ranking) -> str:
    """Return the rows as CSV, one column for each class."""
    classes = list(dict.fromkeys(name for row in ranking.rows for name in row.per_class))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["change", "description", "mean_dice", "sd", "seeds", "separable_from_next", "same_as", *classes])
    for row in ranking.rows:
        cells = [row.name, row.description, row.mean_dice, row.sd, len(row.seeds), row.separable_from_next]
        writer.writerow([*cells, " ".join(row.same_as), *(row.per_class.get(name) for name in classes)])
    return out.getvalue()


def write_comparison(folder: Path, out: Path) -> None:
    """Write the page of a comparison, and ranking.csv beside ranking.json; DataError if there is no ranking."""
    path = folder / "ranking.json"
    if not path.is_file():
        raise DataError(folder, "holds no ranking.json", "pass the --out of autoseg compare")
    ranking = load_as(path, Ranking)
    write_atomically(folder / "ranking.csv", ranking_csv(ranking).encode())
    write_atomically(out, render(ranking, _curves(folder, ranking)).encode())


def render(ranking: Ranking, curves: Mapping[str, tuple[list[Point], list[Point]]]) -> Html:
    """Return the whole page; `curves` are (loss, validation Dice) over steps of one run of each change."""
    parts = [_verdict(ranking), _rank_section(ranking), _class_section(ranking), _curve_section(curves)]
    body = el("body", el("header", el("h1", "Comparison")), el("main", parts), el("footer", "Written by autoseg."))
    return document("comparison – autoseg report", body)


def _verdict(ranking: Ranking) -> Html:
    noise = "unknown, since no run repeats another" if ranking.noise_sd is None else f"{ranking.noise_sd:.4f} mean Dice"
    lines = [el("p", f"Noise between runs that differ only in their seed: {noise}.")]
    if ranking.best:
        lines.append(el("p", f"Go on with {' and '.join(ranking.best)}: {ranking.because}."))
    lines += [el("p", f"{name} failed: {why}") for name, why in ranking.failed.items()]
    return section("verdict", "Verdict", el("div", lines))


def _rank_section(ranking: Ranking) -> Html:
    rows = [
        (
            row.name,
            bar(row.mean_dice),
            number(row.sd),
            MISSING if row.interval is None else f"{row.interval[0]:.3f}–{row.interval[1]:.3f}",
            str(len(row.seeds)),
            in_words(row),
            row.description,
        )
        for row in ranking.rows
    ]
    head = ("change", "mean Dice", "sd", "95 % over crops", "seeds", "beside the next", "")
    return section("ranking", "Ranking", table(head, rows))


def _class_section(ranking: Ranking) -> Html:
    classes = list(dict.fromkeys(name for row in ranking.rows for name in row.per_class))
    rows = [(name, *(number(row.per_class.get(name)) for row in ranking.rows)) for name in classes]
    legend = [
        el("span", el("span", "■", style=f"color:{_colour(i)}"), f" {row.name} ") for i, row in enumerate(ranking.rows)
    ]
    figure = el("figure", _grouped_bars(ranking.rows, classes), el("figcaption", legend))
    return section("classes", "Dice by class", join(figure, table(("class", *(r.name for r in ranking.rows)), rows)))


def _grouped_bars(rows: Sequence[RankRow], classes: Sequence[str]) -> Html:
    """Return bars of Dice, a group for each class, in the order of the ranking."""
    group = len(rows) * BAR_WIDTH + BAR_GAP
    width, height = group * len(classes) + BAR_GAP, BAR_HEIGHT + 30
    parts = []
    for k, name in enumerate(classes):
        left = BAR_GAP + k * group
        for i, row in enumerate(rows):
            value = row.per_class.get(name) or 0.0
            x, tall = left + i * BAR_WIDTH, value * BAR_HEIGHT
            box = {"x": x, "y": round(BAR_HEIGHT - tall, 1), "width": BAR_WIDTH - 2, "height": round(tall, 1)}
            title = el("title", f"{name}, {row.name}: {number(row.per_class.get(name))}")
            parts.append(el("rect", title, fill=_colour(i), **box))
        parts.append(el("text", name, x=left, y=BAR_HEIGHT + 18, class_="tick"))
    svg = el("svg", parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img")
    return el("div", svg, class_="scroll")


def _curve_section(curves: Mapping[str, tuple[list[Point], list[Point]]]) -> Html:
    charts = []
    for which, title in enumerate(("Loss", "Validation Dice")):
        lines = [
            Line(name, thin(both[which]), _colour(i), 2) for i, (name, both) in enumerate(curves.items()) if both[which]
        ]
        if lines:
            charts.append(el("figure", el("h3", title), line_chart(lines, f"{title} over steps")))
    return section("curves", "Curves", el("div", charts, class_="charts"))


def _curves(folder: Path, ranking: Ranking) -> dict[str, tuple[list[Point], list[Point]]]:
    """Return loss and validation Dice over steps of the first seed of each change, as far as they were logged."""
    found = {}
    for row in ranking.rows:
        lines = read_json_lines(folder / "runs" / f"{row.name}-{row.seeds[0]}" / "log.jsonl")
        found[row.name] = (_points(lines, "loss"), _points(lines, "mean_dice"))
    return found


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _colour(index: int) -> str:
    return css(look(index).rgb)
