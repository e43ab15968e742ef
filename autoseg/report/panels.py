"""The best, median and worst scored crops as panels: EM, truth, prediction, errors.

The EM is stored once per crop and reused by reference; classes and errors are transparent PNGs of few colours::

    <symbol em> ----+--> EM      + scale bar
                    +--> truth   + classes, hatched where unknown
                    +--> prediction + classes
                    +--> errors  + false positive, false negative, confused
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.report.html import Html, el, join
from autoseg.report.palette import CONFUSED, FALSE_NEGATIVE, FALSE_POSITIVE, NUM_LOOKS, UNKNOWN_INK, css, look
from autoseg.report.png import png_uri
from autoseg.report.sections import Flags, Section

FILL, OUTLINE, STRIPE, HATCH = 105, 235, 45, 150
UNKNOWN_INDEX = 2 * NUM_LOOKS
CLEAR = 255
MIN_TAG_PIXELS = 0.002
Indices = NDArray[np.uint8]


def panel_row(section: Section, numbers: Sequence[int], crop: int) -> Html:
    """Return the four panels; `numbers` are the places of the section's classes on the page, `crop` of the crop."""
    em_id = f"em{crop}"
    half_unknown = section.unknown_CYX.sum(axis=0) * 2 >= len(numbers)
    truth = _overlay(section.truth_CYX, numbers, half_unknown & ~section.truth_CYX.any(axis=0))
    predicted = _overlay(section.predicted_CYX, numbers, None)
    definition = el(
        "svg",
        el("defs", el("symbol", _image(section, png_uri(section.em_YX)), id=em_id, **_frame(section))),
        class_="defs", aria_hidden="true",
    )  # fmt: skip
    panels = (
        ("EM", [_scale_bar(section)]),
        ("truth", [_image(section, truth), *_tags(section, section.truth_CYX, numbers)]),
        ("prediction", [_image(section, predicted), *_tags(section, section.predicted_CYX, numbers)]),
        ("errors", [_image(section, _error_overlay(section))]),
    )
    width, height = _size(section)
    drawn = [
        el(
            "figure",
            el("a", "close", href=f"#crop{crop}", class_="close"),
            el("a", el("svg", el("use", href=f"#{em_id}", width=width, height=height), marks, role="img",
                       aria_label=title, class_="panel", **_frame(section)), href=f"#{em_id}-{title}"),
            el("figcaption", title),
            id=f"{em_id}-{title}",
        )
        for title, marks in panels
    ]  # fmt: skip
    return join(definition, el("div", drawn, class_="panels"))


def visible(section: Section) -> list[int]:
    """Return the classes that are true or predicted in the section, the most voxels first."""
    sizes = (section.truth_CYX | section.predicted_CYX).sum(axis=(1, 2))
    return [int(k) for k in np.argsort(-sizes, kind="stable") if sizes[k]]


def partly_unknown(section: Section) -> list[int]:
    """Return the classes whose truth is unknown somewhere in the section."""
    return [int(k) for k in np.flatnonzero(section.unknown_CYX.any(axis=(1, 2)))]


def error_legend() -> Html:
    """Return what the colours of the errors mean."""
    meanings = (
        (FALSE_POSITIVE, "predicted, not true"),
        (FALSE_NEGATIVE, "true, not predicted"),
        (CONFUSED, "one class taken for another"),
    )
    chips = [el("li", el("i", "", class_="chip", style=f"background:{css(rgb)}"), text) for rgb, text in meanings]
    hatch = el("li", el("i", "", class_="chip hatch"), "no truth for at least half of the classes")
    return el("ul", chips, hatch, class_="legend")


def _size(section: Section) -> tuple[int, int]:
    """Return width and height in drawing units: pixels of x, and y stretched to the same nanometres."""
    height, width = section.em_YX.shape
    return width, max(1, round(height * section.pixel_nm[0] / section.pixel_nm[1]))


def _frame(section: Section) -> dict[str, str]:
    width, height = _size(section)
    return {"viewBox": f"0 0 {width} {height}"}


def _image(section: Section, uri: str) -> Html:
    width, height = _size(section)
    small = "cells" if max(section.em_YX.shape) < 160 else None
    return el("image", width=width, height=height, preserveAspectRatio="none", href=uri, class_=small)


def _topmost(flags_CYX: Flags) -> NDArray[np.int64]:
    """Return for each pixel its smallest class in the section (parts lie over wholes), -1 where there is none."""
    top = np.full(flags_CYX.shape[1:], -1, dtype=np.int64)
    for k in np.argsort(-flags_CYX.sum(axis=(1, 2)), kind="stable"):
        top[flags_CYX[k]] = k
    return top


def _overlay(flags_CYX: Flags, numbers: Sequence[int], hatched_YX: Flags | None) -> str:
    """Return the PNG of classes: translucent fill, opaque outline, two entries of the colour table for each look."""
    top = _topmost(flags_CYX)
    look_YX = np.asarray(numbers)[top] % NUM_LOOKS
    y, x = np.indices(top.shape)
    striped = (look_YX >= NUM_LOOKS // 2) & ((x + y) // 3 % 2 == 0) & ~_edges(top)
    indices = (2 * look_YX + _edges(top)).astype(np.uint8)
    indices[top < 0] = CLEAR
    indices[(top >= 0) & striped] = CLEAR
    if hatched_YX is not None:
        indices[hatched_YX & ((x - y) % 9 < 2)] = UNKNOWN_INDEX
    table = {UNKNOWN_INDEX: (*UNKNOWN_INK, HATCH)}
    for k in range(NUM_LOOKS):
        table[2 * k], table[2 * k + 1] = (*look(k).rgb, FILL), (*look(k).rgb, OUTLINE)
    return _indexed(indices, table)


def _error_overlay(section: Section) -> str:
    wrong = (section.truth_CYX != section.predicted_CYX) & ~section.unknown_CYX
    extra, missed = (wrong & section.predicted_CYX).any(axis=0), (wrong & section.truth_CYX).any(axis=0)
    indices = np.full(extra.shape, CLEAR, dtype=np.uint8)
    indices[extra], indices[missed], indices[extra & missed] = 0, 1, 2
    return _indexed(indices, {i: (*rgb, 175) for i, rgb in enumerate((FALSE_POSITIVE, FALSE_NEGATIVE, CONFUSED))})


def _indexed(indices: Indices, table: dict[int, tuple[int, int, int, int]]) -> str:
    colours = np.zeros((256, 4), dtype=np.uint8)
    for index, rgba in table.items():
        colours[index] = rgba
    return png_uri(indices, colours)


def _edges(top: NDArray[np.int64]) -> Flags:
    """Return where a pixel's class differs from that of a neighbour in the section."""
    edges = np.zeros(top.shape, dtype=bool)
    down, right = top[1:] != top[:-1], top[:, 1:] != top[:, :-1]
    edges[1:] |= down
    edges[:-1] |= down
    edges[:, 1:] |= right
    edges[:, :-1] |= right
    return edges


def _tags(section: Section, flags_CYX: Flags, numbers: Sequence[int]) -> list[Html]:
    """Return the number of each class where the class is densest."""
    top = _topmost(flags_CYX)
    width, height = _size(section)
    per_y = height / top.shape[0]
    size = max(5, round(max(width, height) / 19))
    tags: list[Html] = []
    taken: list[tuple[int, int]] = []
    for k in np.unique(top[top >= 0]).tolist():
        mask = top == k
        if mask.mean() >= MIN_TAG_PIXELS:
            y, x = _densest(mask)
            if any(abs(x - a) < size and abs(y - b) * per_y < size for a, b in taken):
                continue
            taken.append((x, y))
            x_in, y_in = min(max(x, size), width - size), min(max(y * per_y + size / 3, size), height - 2)
            tags.append(
                el(
                    "text",
                    numbers[k] + 1,
                    x=x_in,
                    y=round(y_in),
                    style=f"font-size:{size}px",
                    class_="tag",
                    text_anchor="middle",
                )
            )
    return tags


def _densest(mask_YX: Flags) -> tuple[int, int]:
    """Return the pixel of the mask with most of the mask around it."""
    reach = max(2, min(mask_YX.shape) // 12)
    padded: NDArray[Any] = np.pad(mask_YX.astype(np.int64), reach + 1).cumsum(axis=0).cumsum(axis=1)
    window = 2 * reach + 1
    sums = padded[window:, window:] - padded[:-window, window:] - padded[window:, :-window] + padded[:-window, :-window]
    height, width = mask_YX.shape
    y, x = np.unravel_index(np.argmax(np.where(mask_YX, sums[:height, :width], -1)), mask_YX.shape)
    return int(y), int(x)


def _scale_bar(section: Section) -> Html:
    """Return a bar of a round length near a quarter of the width."""
    width, height = _size(section)
    goal = width * section.pixel_nm[1] / 4
    base = 10.0 ** np.floor(np.log10(goal))
    length = float(max(base * f for f in (1, 2, 5) if base * f <= goal))
    text = f"{length / 1000:g} µm" if length >= 1000 else f"{length:g} nm"
    unit, pixels = max(width, height) / 100, length / section.pixel_nm[1]
    y = height - 4 * unit
    return join(
        el("rect", x=2 * unit, y=round(y - 6 * unit, 1), width=max(pixels + 4 * unit, 22 * unit), height=9 * unit,
           class_="plate"),
        el("rect", x=4 * unit, y=round(y + 0.2 * unit, 1), width=pixels, height=1.2 * unit, class_="bar-line"),
        el("text", text, x=4 * unit, y=round(y - 1.2 * unit, 1),
           style=f"font-size:{4.4 * unit:.1f}px", class_="bar-text"),
    )  # fmt: skip
