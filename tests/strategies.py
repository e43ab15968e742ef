"""What several test files make: small data sets on disk, and hypothesis strategies of geometry and records.

Import it as `from strategies import make_dataset` (pytest puts tests/ on the path).
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from autoseg import schema
from autoseg.data import store
from autoseg.data.convert import import_arrays
from autoseg.data.dataset import EM_NAME, GROUNDTRUTH, RECON
from autoseg.data.writer import ImportRequest
from autoseg.geometry import Grid, NmZYX, VoxelsZYX

UNKNOWN_LABEL = 250

# ---- data sets on disk --------------------------------------------------------------------------------------


def make_dataset(
    root: Path,
    *,
    seed: int = 0,
    shape: VoxelsZYX = (8, 64, 64),
    voxel_size_nm: NmZYX = (40.0, 8.0, 8.0),
    classes: Sequence[str] = ("mito", "er_mem", "pm"),
    crops: int = 2,
    partial: bool = True,
    validate: tuple[int, ...] = (),
) -> Path:
    """Import one synthetic volume `demo` as DATA = `root` and return `root`.

    ::

        demo/crop1        demo/crop2  ...     each of `shape`, side by side along x
        +-----------+-----------+             every voxel is one class or background; its grey value tells
        |           |           |             which (40, ... 200 with noise of sd 10), so a tiny network
        | unknown   | lacks the |             learns it in a few steps
        | in a slab | last class|
        +-----------+-----------+

    `partial`: the first section of crop 1 is unknown for every class, and the last crop (of several) does not
    annotate the last class. `validate` lists crops (from 1) that datasplit.csv holds out; without, no datasplit.
    """
    z, y, x = shape
    rng = np.random.default_rng(seed)
    whole = (z, y, x * crops)
    sigma = [max(0.5, 32.0 / v) for v in voxel_size_nm]
    fields = [ndimage.gaussian_filter(rng.standard_normal(whole), sigma) for _ in range(len(classes) + 1)]
    labels = np.argmax(fields, axis=0).astype(np.uint8)
    grey = np.linspace(200, 40, len(classes) + 1)[labels] + rng.normal(0, 10, whole)
    em = np.clip(np.rint(grey), 1, 255).astype(np.uint8)
    if partial and z > 1:
        labels[0, :, :x] = UNKNOWN_LABEL
    request = ImportRequest(
        data=root,
        name="demo",
        em="em",
        voxel_size_nm=voxel_size_nm,
        labels="labels",
        values={name: (i + 1,) for i, name in enumerate(classes)},
        ignore_value=UNKNOWN_LABEL if partial else None,
        grid=(1, 1, crops),
        validate=validate,
    )
    import_arrays(request, {"em": em, "labels": labels})
    if partial and crops > 1 and len(classes) > 1:
        shutil.rmtree(root / "demo/demo.zarr" / GROUNDTRUTH / f"crop{crops}" / classes[-1])
    return root


def write_multiscale(
    path: Path,
    levels: Sequence[tuple[Grid, NDArray[Any]]],
    attributes: Mapping[str, Any] | None = None,
    chunk_zyx: VoxelsZYX | None = None,
) -> Path:
    """Write an OME-NGFF group with these levels (fine to coarse) and return its path."""
    for i, (grid, values) in enumerate(levels):
        chunk = chunk_zyx or store.chunk_shape(grid.shape_zyx)
        array = store.create_array(path / f"s{i}", grid.shape_zyx, values.dtype, chunk)
        array[:] = values
    attributes = {**store.multiscale_attributes(path.name, [grid for grid, _ in levels]), **(attributes or {})}
    store.write_attributes(path, attributes)
    return path


def em_path(root: Path, dataset: str) -> Path:
    """Return where the EM of a data set lies."""
    return root / dataset / f"{dataset}.zarr" / RECON / "em" / EM_NAME


def crop_path(root: Path, dataset: str, crop: str) -> Path:
    """Return where the annotation of a crop lies."""
    return root / dataset / f"{dataset}.zarr" / GROUNDTRUTH / crop


def write_label(
    crop: Path,
    name: str,
    values: NDArray[Any],
    grid: Grid,
    *,
    instance: bool = False,
    unknown: int | None = None,
    counted_unknown: int = 0,
    chunk_zyx: VoxelsZYX | None = None,
) -> Path:
    """Write one class of a crop with its `cellmap` annotation; `unknown` is what the encoding declares."""
    kind = "instance_segmentation" if instance else "semantic_segmentation"
    encoding = {"absent": 0, "present": 1} | ({} if unknown is None else {"unknown": unknown})
    annotation = {"class_name": name, "annotation_type": {"type": kind, "encoding": encoding}}
    path = write_multiscale(crop / name, [(grid, values)], {"cellmap": {"annotation": annotation}}, chunk_zyx)
    counts = {"complement_counts": {"absent": int((values == 0).sum()), "unknown": counted_unknown}}
    store.write_attributes(path / "s0", {"cellmap": {"annotation": annotation | counts}})
    return path


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Return size and mtime of every file and folder below `root`: equal before and after means untouched."""
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in [root, *sorted(root.rglob("*"))]
    }
