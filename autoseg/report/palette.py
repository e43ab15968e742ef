"""Colours by meaning: one look per class, errors, Dice; told apart with every common colour vision.

48 looks: 8 hues (Okabe and Ito, and Tol's wine) x 3 tones x solid or striped; the number of a class is beside its
colour wherever it is drawn, so that colour is never the only sign.
"""

from __future__ import annotations

from typing import NamedTuple

RGB = tuple[int, int, int]

HUES: tuple[RGB, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
    (240, 228, 66),
    (136, 34, 85),
)
NUM_LOOKS = 48
FALSE_POSITIVE: RGB = (230, 130, 0)
FALSE_NEGATIVE: RGB = (40, 140, 230)
CONFUSED: RGB = (220, 90, 190)
UNKNOWN_INK: RGB = (225, 225, 225)
VIRIDIS: tuple[RGB, ...] = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


class Look(NamedTuple):
    """How a class is drawn."""

    rgb: RGB
    striped: bool

    @property
    def css(self) -> str:
        """Return a CSS background."""
        colour = css(self.rgb)
        light = css(_mix(self.rgb, (255, 255, 255), 0.65))
        stripes = f"repeating-linear-gradient(135deg,{colour} 0 3px,{light} 3px 5px)"
        return stripes if self.striped else colour


def look(index: int) -> Look:
    """Return the look of the class of that index; after 48 classes looks repeat."""
    index %= NUM_LOOKS
    hue, tone = HUES[index % 8], index // 8 % 3
    toned = (hue, _mix(hue, (255, 255, 255), 0.5), _mix(hue, (0, 0, 0), 0.4))[tone]
    return Look(toned, index >= NUM_LOOKS // 2)


def css(rgb: RGB) -> str:
    """Return the colour as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def dice_colour(value: float) -> RGB:
    """Return the colour of a ratio from 0 (dark) to 1 (bright)."""
    at = min(max(value, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(at), len(VIRIDIS) - 2)
    return _mix(VIRIDIS[low], VIRIDIS[low + 1], at - low)


def ink_on(rgb: RGB) -> str:
    """Return black or white, whichever reads better on that colour."""
    red, green, blue = rgb
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue
