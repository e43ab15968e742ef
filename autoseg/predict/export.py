"""Labels as TIFF or HDF5, streamed from the zarr that prediction writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.data import store
from autoseg.data.formats import write_hdf5, write_tiff
from autoseg.geometry import Box, Grid
from autoseg.predict.decode import label_map
from autoseg.schema import Plan

SLAB_DEPTH = 16


def export_labels(zarr: Path, grid: Grid, plan: Plan, out: Path, *, probabilities: bool) -> None:
    """Write OUT.tif (one map: class numbers from 1 in plan order) or OUT.h5 (`labels`, and a mask for each class).

    With probabilities a TIFF gets companions OUT-CLASS-probability.tif, an HDF5 file more datasets; 255 is 1.
    """
    names = plan.class_names
    if out.suffix.lower() in (".tif", ".tiff"):
        maps = (label_map(slab, plan.classes) for slab in _slabs(zarr, names, grid))
        write_tiff(out, grid.shape_zyx, np.uint8, maps, grid.voxel_size_nm)
        for name in names if probabilities else ():
            companion = out.with_name(f"{out.stem}-{name}-probability{out.suffix}")
            slabs = (slab[0] for slab in _slabs(zarr / "probabilities", (name,), grid))
            write_tiff(companion, grid.shape_zyx, np.uint8, slabs, grid.voxel_size_nm)
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
