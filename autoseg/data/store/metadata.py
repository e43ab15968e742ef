"""OME-NGFF metadata: multiscale groups of version 0.4 and 0.5 in, version 0.4 out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autoseg.data.store.engine import brief, read_attributes
from autoseg.data.store.reading import ArrayReader, ChunkCache
from autoseg.errors import DataError
from autoseg.geometry import Grid, NmZYX

NM_PER_UNIT = {"nanometer": 1.0, "micrometer": 1e3, "angstrom": 0.1, "millimeter": 1e6, "meter": 1e9}


class Level(NamedTuple):
    """One resolution of a multiscale group."""

    path: Path
    grid: Grid


class Multiscale(NamedTuple):
    """An OME-NGFF group: levels from fine to coarse, and its attributes."""

    path: Path
    levels: tuple[Level, ...]
    attributes: dict[str, Any]

    def level_for(self, voxel_size_nm: NmZYX) -> Level:
        """Return the coarsest level that is nowhere coarser than that voxel size (within 1 %), else the finest."""
        fine = [
            level
            for level in self.levels
            if all(v <= t * 1.01 for v, t in zip(level.grid.voxel_size_nm, voxel_size_nm, strict=True))
        ]
        return fine[-1] if fine else self.levels[0]


def open_multiscale(path: Path) -> Multiscale:
    """Read the metadata of an OME-NGFF 0.4 or 0.5 group with axes z, y, x; DataError names what is wrong."""
    attributes = read_attributes(path)
    ome = attributes.get("ome", attributes)
    try:
        multiscale = ome["multiscales"][0]
        axes, datasets = multiscale["axes"], multiscale["datasets"]
    except (KeyError, IndexError, TypeError):
        raise DataError(path, "has no OME-NGFF multiscales metadata", "import it with `autoseg import`") from None
    try:
        names = [axis["name"] for axis in axes]
        if names != ["z", "y", "x"]:
            raise DataError(path, f"axes are {names}", "store one channel with axes z, y, x")
        to_nm = [_nm_per_unit(path, axis.get("unit", "nanometer")) for axis in axes]
        levels = [_level(path, dataset, multiscale.get("coordinateTransformations", []), to_nm) for dataset in datasets]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(path, f"malformed multiscales metadata ({brief(error)})", "repair its .zattrs") from None
    if not levels:
        raise DataError(path, "lists no arrays", "restore the group")
    levels.sort(key=lambda level: math.prod(level.grid.voxel_size_nm))
    return Multiscale(path, tuple(levels), attributes)


def _level(path: Path, dataset: dict[str, Any], common: list[Any], to_nm: list[float]) -> Level:
    scale, translation = np.ones(3), np.zeros(3)
    for transform in [*dataset["coordinateTransformations"], *common]:
        if transform["type"] == "scale":
            factor = np.asarray(transform["scale"], float)
            scale, translation = scale * factor, translation * factor
        elif transform["type"] == "translation":
            translation = translation + np.asarray(transform["translation"], float)
    if not any(t["type"] == "scale" for t in [*dataset["coordinateTransformations"], *common]):
        raise DataError(path, f"level {dataset['path']} has no scale", "add its voxel size to the multiscales metadata")
    if scale.shape != (3,) or not np.isfinite(scale).all() or not (scale > 0).all():
        raise DataError(path, f"scale {scale.tolist()}", "a voxel size is three positive numbers (z, y, x)")
    if translation.shape != (3,) or not np.isfinite(translation).all():
        raise DataError(path, f"translation {translation.tolist()}", "an origin is three finite numbers (z, y, x)")
    voxel_size = tuple(float(v) for v in scale * to_nm)
    origin = tuple(float(v) for v in translation * to_nm)
    array_path = path / str(dataset["path"])
    if not array_path.resolve().is_relative_to(path.resolve()):
        raise DataError(path, f"points outside itself ({dataset['path']})", "repair its .zattrs")
    shape = ArrayReader(array_path, ChunkCache(0)).shape_zyx
    return Level(
        array_path, Grid(shape, (voxel_size[0], voxel_size[1], voxel_size[2]), (origin[0], origin[1], origin[2]))
    )


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
