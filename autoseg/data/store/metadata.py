"""OME-NGFF metadata: multiscale groups of version 0.4 and 0.5 in, version 0.4 out."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from autoseg.data.store.engine import brief, read_attributes
from autoseg.data.store.layout import read_layout
from autoseg.errors import DataError
from autoseg.geometry import Grid, NmZYX

NM_PER_UNIT = {"nanometer": 1.0, "micrometer": 1e3, "angstrom": 0.1, "millimeter": 1e6, "meter": 1e9}


class Level(NamedTuple):
    """One resolution of a multiscale group."""

    path: Path
    grid: Grid
    dtype: np.dtype[Any]
    fill_value: float = 0


class Multiscale(NamedTuple):
    """An OME-NGFF group: levels from fine to coarse, and its attributes."""

    path: Path
    levels: tuple[Level, ...]
    attributes: dict[str, Any]

    def level_for(self, voxel_size_nm: NmZYX) -> Level:
        """Return the coarsest level that is nowhere coarser than that voxel size (within 1 %), else the finest."""
        return self.levels_for(voxel_size_nm)[0]

    def levels_for(self, voxel_size_nm: NmZYX) -> tuple[Level, ...]:
        """Return all levels, the one that suits first, then those finer than it, then those coarser.

        Not every level is stored everywhere; the first that is, is the best there.
        """
        fine = [
            i
            for i, level in enumerate(self.levels)
            if all(v <= t * 1.01 for v, t in zip(level.grid.voxel_size_nm, voxel_size_nm, strict=True))
        ]
        best = fine[-1] if fine else 0
        return self.levels[best::-1] + self.levels[best + 1 :]


def open_multiscale(path: Path, *, finest_only: bool = False) -> Multiscale:
    """Read the metadata of an OME-NGFF 0.4 or 0.5 group with axes z, y, x; DataError names what is wrong.

    A level without a folder or with an empty one was not fetched and is left out; of labels only the finest is read.
    """
    if not path.is_dir():
        raise DataError(path, "does not exist", "restore the folder")
    attributes = read_attributes(path)
    ome = attributes.get("ome", attributes)
    try:
        multiscale = ome["multiscales"][0]
        axes, datasets = multiscale["axes"], multiscale["datasets"]
    except (KeyError, IndexError, TypeError):
        raise DataError(path, "has no OME-NGFF multiscales metadata", "restore it, or remove the folder") from None
    try:
        names = [axis["name"] for axis in axes]
        if names != ["z", "y", "x"]:
            raise DataError(path, f"axes are {names}", "store one channel with axes z, y, x")
        to_nm = [_nm_per_unit(path, axis.get("unit", "nanometer")) for axis in axes]
        common = multiscale.get("coordinateTransformations") or []
        spaces = [(_array_path(path, dataset), *_space(path, dataset, common, to_nm)) for dataset in datasets]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(path, f"malformed multiscales metadata ({brief(error)})", "repair its .zattrs") from None
    if not spaces:
        raise DataError(path, "lists no arrays", "restore the group")
    spaces.sort(key=lambda space: math.prod(space[1]))
    spaces = spaces[:1] if finest_only else [space for space in spaces if _is_there(space[0])]
    if not spaces:
        raise DataError(path, "none of the arrays that it lists is there", "restore them, or remove the folder")
    levels = []
    for array, size, origin in spaces:
        layout = read_layout(array)
        levels.append(Level(array, Grid(layout.shape_zyx, size, origin), layout.dtype, layout.fill_value))
    return Multiscale(path, tuple(levels), attributes)


def _is_there(array: Path) -> bool:
    return array.is_dir() and any(array.iterdir())


def _array_path(path: Path, dataset: dict[str, Any]) -> Path:
    inner = PurePosixPath(str(dataset["path"]))
    if inner.is_absolute() or ".." in inner.parts:
        raise DataError(path, f"points outside itself ({inner})", "repair its .zattrs")
    return path / inner


def _space(path: Path, dataset: dict[str, Any], common: list[Any], to_nm: list[float]) -> tuple[NmZYX, NmZYX]:
    """Return voxel size and origin (the centre of voxel 0) of a level in nm."""
    scale, translation = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
    scaled = False
    for transform in [*dataset["coordinateTransformations"], *common]:
        if transform["type"] == "scale":
            factor = _three(path, "scale", transform["scale"])
            if not all(f > 0 for f in factor):
                raise DataError(path, f"scale {factor}", "a voxel size is three positive numbers (z, y, x)")
            scaled = True
            scale = [a * b for a, b in zip(scale, factor, strict=True)]
            translation = [a * b for a, b in zip(translation, factor, strict=True)]
        elif transform["type"] == "translation":
            moved = _three(path, "translation", transform["translation"])
            translation = [a + b for a, b in zip(translation, moved, strict=True)]
        elif transform["type"] != "identity":
            raise DataError(path, f"transformation {transform['type']!r}", "use scale and translation")
    if not scaled:
        raise DataError(path, f"level {dataset['path']} has no scale", "add its voxel size to the multiscales metadata")
    vz, vy, vx = (a * b for a, b in zip(scale, to_nm, strict=True))
    oz, oy, ox = (a * b for a, b in zip(translation, to_nm, strict=True))
    if not all(math.isfinite(v) for v in (vz, vy, vx, oz, oy, ox)) or not vz * vy * vx > 0:
        what = f"level {dataset['path']} has voxels of {vz:g}, {vy:g}, {vx:g} nm at {oz:g}, {oy:g}, {ox:g} nm"
        raise DataError(path, what, "correct its scale and translation")
    return (vz, vy, vx), (oz, oy, ox)


def _three(path: Path, what: str, values: Any) -> list[float]:
    numbers = [float(value) for value in values] if isinstance(values, list) else []
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise DataError(path, f"{what} {values}", "it is three finite numbers (z, y, x)")
    return numbers


def _nm_per_unit(path: Path, unit: str) -> float:
    if unit not in NM_PER_UNIT:
        raise DataError(path, f"unit {unit!r}", f"use one of {', '.join(NM_PER_UNIT)}")
    return NM_PER_UNIT[unit]


def multiscale_attributes(name: str, grids: list[Grid]) -> dict[str, Any]:
    """Return OME-NGFF 0.4 metadata for levels s0, s1, ... on these grids."""
    datasets = [
        {
            "path": f"s{i}",
            "coordinateTransformations": [
                {"type": "scale", "scale": list(grid.voxel_size_nm)},
                {"type": "translation", "translation": list(grid.origin_nm)},
            ],
        }
        for i, grid in enumerate(grids)
    ]
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    return {"multiscales": [{"version": "0.4", "name": name, "axes": axes, "datasets": datasets}]}
