"""Labels as TIFF or HDF5, streamed from the zarr that prediction writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.data import store
from autoseg.data.formats import write_hdf5, write_tiff
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, blocks
from autoseg.predict.decode import MAP_RULE, count_shown, covered, label_map
from autoseg.predict.volumes import files_of
from autoseg.schema import Plan

SLAB_DEPTH, TILE_EDGE = 16, 512
MAP_CACHE_BYTES = 2**28
NONE = "none"  # value 0 of a label map
TIFF_ENDINGS, FILE_ENDINGS = (".tif", ".tiff"), (".tif", ".tiff", ".h5", ".hdf5")


def zarr_of(out: Path) -> Path:
    """Return the zarr that prediction fills: OUT, or a hidden one beside a TIFF or HDF5 file; DataError otherwise."""
    ending = out.suffix.lower()
    if ending not in (".zarr", *FILE_ENDINGS):
        raise DataError(out, "has no known ending", "write to .zarr, .tif or .h5")
    return out if ending == ".zarr" else out.with_name(f".{out.name}.zarr")


def refuse_existing(out: Path, plan: Plan, spec: str, *, probabilities: bool) -> None:
    """Raise DataError if a TIFF or HDF5 output is the input, or exists and was not half exported by this command."""
    zarr = zarr_of(out)
    if zarr == out:
        return
    companions = [_companion(out, name) for name in plan.class_names if probabilities and _is_tiff(out)]
    for path in filter(Path.exists, (out, *companions)):
        if any(path.samefile(file) for file in files_of(spec)):
            raise DataError(path, "is the input", "choose another --out")
        if not zarr.exists():
            raise DataError(path, "exists", "choose another --out, or remove it first")


def map_values(plan: Plan) -> str:
    """Return in one sentence what the values of the label map of a TIFF or HDF5 file mean."""
    numbers = ", ".join(f"{k} {name}" for k, name in enumerate((NONE, *plan.class_names)))
    return f"values of the label map: {numbers}; {MAP_RULE}"


def _is_tiff(out: Path) -> bool:
    return out.suffix.lower() in TIFF_ENDINGS


def _companion(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}-probability{out.suffix}")


def export_labels(zarr: Path, grid: Grid, plan: Plan, out: Path, *, probabilities: bool) -> list[str]:
    """Write OUT.tif (one map: class numbers from 1 in plan order) or OUT.h5 (`labels`, and a mask for each class).

    With probabilities a TIFF gets companions OUT-CLASS-probability.tif, an HDF5 file more datasets; 255 is 1. The zarr
    holds probabilities in any case, by which the map decides. Return what the user should know of classes it covers.
    """
    names, num = plan.class_names, len(plan.class_names)
    shown = np.zeros((num, num + 1), dtype=np.int64)
    maps = _maps(zarr, grid, plan, shown)
    if _is_tiff(out):
        write_tiff(out, grid.shape_zyx, np.uint8, maps, grid.voxel_size_nm)
        for name in names if probabilities else ():
            slabs = (slab[0] for slab in _slabs(zarr / "probabilities", (name,), grid))
            write_tiff(_companion(out, name), grid.shape_zyx, np.uint8, slabs, grid.voxel_size_nm)
        return covered(shown, plan.classes)
    keys = ["labels", *names, *((f"{name}_probability" for name in names) if probabilities else ())]
    dtypes: dict[str, Any] = dict.fromkeys(keys, np.uint8)
    keyed = _keyed(zarr, grid, names, maps, probabilities)
    attributes = {"labels": {"class_names": [NONE, *names]}}
    write_hdf5(out, grid.shape_zyx, dtypes, keyed, grid.voxel_size_nm, attributes)
    return covered(shown, plan.classes)


def _keyed(
    zarr: Path, grid: Grid, names: tuple[str, ...], maps: Iterator[NDArray[np.uint8]], probabilities: bool
) -> Iterator[dict[str, NDArray[Any]]]:
    graded = _slabs(zarr / "probabilities", names, grid) if probabilities else None
    for labels, shown in zip(_slabs(zarr, names, grid), maps, strict=True):
        slab: dict[str, NDArray[Any]] = {"labels": shown} | dict(zip(names, labels, strict=True))
        if graded is not None:
            slab |= {f"{name}_probability": p for name, p in zip(names, next(graded), strict=True)}
        yield slab


def _maps(zarr: Path, grid: Grid, plan: Plan, shown: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Yield the label map slab by slab, made tile by tile, and add to `shown` what it shows of each class."""
    cache = store.ChunkCache(MAP_CACHE_BYTES)
    masks, graded = (
        [store.ArrayReader(folder / name / "s0", cache) for name in plan.class_names]
        for folder in (zarr, zarr / "probabilities")
    )
    depth, y, x = grid.shape_zyx
    for z in range(0, depth, SLAB_DEPTH):
        slab = np.empty((min(SLAB_DEPTH, depth - z), y, x), dtype=np.uint8)
        for tile in blocks(slab.shape, (SLAB_DEPTH, TILE_EDGE, TILE_EDGE)):
            box = tile.shift((z, 0, 0))
            labels, probability = (np.stack([reader.read(box) for reader in readers]) for readers in (masks, graded))
            slab[tile.slices] = label_map(labels, probability, plan.classes)
            shown += count_shown(labels, slab[tile.slices])
        yield slab


def _slabs(zarr: Path, names: tuple[str, ...], grid: Grid) -> Iterator[NDArray[np.uint8]]:
    readers = [store.ArrayReader(zarr / name / "s0", store.ChunkCache(64 * 2**20)) for name in names]
    depth, y, x = grid.shape_zyx
    for z in range(0, depth, SLAB_DEPTH):
        box = Box((z, 0, 0), (min(z + SLAB_DEPTH, depth), y, x))
        yield np.stack([reader.read(box) for reader in readers])
