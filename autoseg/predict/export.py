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
from autoseg.geometry import Box, Grid
from autoseg.predict.decode import label_map
from autoseg.predict.volumes import files_of
from autoseg.schema import Plan

SLAB_DEPTH = 16
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


def _is_tiff(out: Path) -> bool:
    return out.suffix.lower() in TIFF_ENDINGS


def _companion(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}-probability{out.suffix}")


def export_labels(zarr: Path, grid: Grid, plan: Plan, out: Path, *, probabilities: bool) -> None:
    """Write OUT.tif (one map: class numbers from 1 in plan order) or OUT.h5 (`labels`, and a mask for each class).

    With probabilities a TIFF gets companions OUT-CLASS-probability.tif, an HDF5 file more datasets; 255 is 1.
    """
    names = plan.class_names
    if _is_tiff(out):
        maps = (label_map(slab, plan.classes) for slab in _slabs(zarr, names, grid))
        write_tiff(out, grid.shape_zyx, np.uint8, maps, grid.voxel_size_nm)
        for name in names if probabilities else ():
            slabs = (slab[0] for slab in _slabs(zarr / "probabilities", (name,), grid))
            write_tiff(_companion(out, name), grid.shape_zyx, np.uint8, slabs, grid.voxel_size_nm)
        return
    keys = ["labels", *names, *((f"{name}_probability" for name in names) if probabilities else ())]
    dtypes: dict[str, Any] = dict.fromkeys(keys, np.uint8)
    write_hdf5(out, grid.shape_zyx, dtypes, _keyed(zarr, grid, plan, probabilities), grid.voxel_size_nm)


def _keyed(zarr: Path, grid: Grid, plan: Plan, probabilities: bool) -> Iterator[dict[str, NDArray[Any]]]:
    names = plan.class_names
    graded = _slabs(zarr / "probabilities", names, grid) if probabilities else None
    for labels in _slabs(zarr, names, grid):
        slab: dict[str, NDArray[Any]] = {"labels": label_map(labels, plan.classes)}
        slab |= dict(zip(names, labels, strict=True))
        if graded is not None:
            slab |= {f"{name}_probability": p for name, p in zip(names, next(graded), strict=True)}
        yield slab


def _slabs(zarr: Path, names: tuple[str, ...], grid: Grid) -> Iterator[NDArray[np.uint8]]:
    readers = [store.ArrayReader(zarr / name / "s0", store.ChunkCache(64 * 2**20)) for name in names]
    depth, y, x = grid.shape_zyx
    for z in range(0, depth, SLAB_DEPTH):
        box = Box((z, 0, 0), (min(z + SLAB_DEPTH, depth), y, x))
        yield np.stack([reader.read(box) for reader in readers])
