"""What people type, as values: durations, numbers, lists, pairs; each refuses what it cannot read in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from autoseg.errors import DataError, PlanError
from autoseg.geometry import NmZYX

SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def to_seconds(text: str) -> float:
    """Return the seconds of a duration such as 90, 90s, 10m, 2h or 1d."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([smhd]?)", text.strip())
    if not match or float(match[1]) == 0:
        raise PlanError("--budget", f"{text!r} is not a duration", "write 90s, 10m or 2h")
    return float(match[1]) * SECONDS[match[2]]


def to_number(flag: str, text: str) -> float:
    """Return the number of one text."""
    try:
        return float(text)
    except ValueError:
        raise DataError(flag, f"{text!r} is not a number", "give three positive numbers, in nm, order z y x") from None


def to_voxel_size(texts: Sequence[str]) -> NmZYX:
    """Return the voxel size in nm of three texts."""
    z, y, x = (to_number("--voxel-size-nm", text) for text in texts)
    if not all(math.isfinite(v) and v > 0 for v in (z, y, x)):
        raise DataError("--voxel-size-nm", " ".join(texts), "give three positive numbers, in nm, order z y x")
    return z, y, x


def to_pair(flag: str, text: str) -> tuple[str, str]:
    """Return (NAME, VALUE) of a NAME=VALUE text."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise DataError(flag, f"{text!r} is not NAME=VALUE", f"write {flag} mito=...")
    return name, value


def to_instances(texts: list[str]) -> dict[str, str]:
    """Return the file of each class from CLASS=FILE texts."""
    pairs = [to_pair("--instances", text) for text in texts]
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise DataError("--instances", f"{name} is given twice", "give each class one file")
    return dict(pairs)


def to_values(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the label values of each class from CLASS=V,V texts."""
    values: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, numbers = to_pair("--values", text)
        if name in values:
            raise DataError("--values", f"{name} is given twice", "list its values with commas: mito=1,2")
        values[name] = to_cells("--values", numbers)
    return values


def to_cells(flag: str, text: str) -> tuple[int, ...]:
    """Return the integers of a text such as 1,2."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        example = "mito=1,2" if flag == "--values" else "1,2"
        raise DataError(flag, f"{text!r} is not a list of integers", f"write {flag} {example}") from None


def to_interval(text: str) -> tuple[float, float]:
    """Return (start, stop) of a start:stop text, in nm."""
    low, colon, high = text.partition(":")
    try:
        if colon:
            return float(low), float(high)
    except ValueError:
        pass
    raise DataError("--roi-nm", f"{text!r} is not start:stop", "write three such as 0:400 0:2000 0:2000, in nm")
