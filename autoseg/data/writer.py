"""Write one volume into the CellMap layout: the EM pyramid, and for each kept cell a crop of label arrays.

A volume is cut into NZ x NY x NX cells in raster order; each kept cell becomes a crop::

    +---+---+        --grid 1 2 2 --crops 1,2,3
    | 1 | 2 |        cells 1, 2 and 3 become crops, cell 4 stays unannotated EM
    +---+---+
    | 3 | 4 |
    +---+---+
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data import store
from autoseg.data.dataset import EM_NAME, GROUNDTRUTH, RECON
from autoseg.data.formats import Volume
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX

SLAB_BYTES = 2**28
SEMANTIC_UNKNOWN = 255


class ImportRequest(NamedTuple):
    """What the user asked to import; `values` maps a class to its values in the label volume."""

    data: Path
    name: str
    em: str
    voxel_size_nm: NmZYX
    labels: str | None = None
    values: Mapping[str, tuple[int, ...]] = {}
    instances: Mapping[str, str] = {}
    mask: str | None = None
    ignore_value: int | None = None
    grid: VoxelsZYX = (1, 1, 1)
    crops: tuple[int, ...] | None = None
    validate: tuple[int, ...] = ()


def write_em(em: Volume, group: Path, voxel_size_nm: NmZYX) -> None:
    """Write a volume as an OME-NGFF pyramid into the zarr group, slab by slab; floats become float32."""
    grid = Grid(em.shape_zyx, voxel_size_nm, (0.0, 0.0, 0.0))
    dtype = np.dtype(np.float32) if em.dtype.kind == "f" else em.dtype
    z, y, x = grid.shape_zyx
    depth = min(store.CHUNK_EDGE, z, max(1, SLAB_BYTES // (y * x * dtype.itemsize)))
    array = store.create_array(group / "s0", grid.shape_zyx, dtype, (depth, *store.chunk_shape(grid.shape_zyx)[1:]))
    for start, stop in _slabs(0, z, depth):
        slab = em.read(start, stop)
        if dtype.kind == "f" and not np.isfinite(slab).all():
            raise DataError(em.name, f"NaN or infinite grey values at z {start}..{stop}", "replace them")
        array[start:stop] = slab
    grids = store.pyramid_grids(grid)
    store.write_pyramid(group, grids, lambda siblings: _mean(siblings, dtype))
    store.write_attributes(group, store.multiscale_attributes(group.name, grids))


class VolumeWriter:
    """Writes one volume: its EM pyramid, and the label arrays of each kept cell."""

    def __init__(self, request: ImportRequest, sources: Mapping[str, Volume], folder: Path, first_id: int) -> None:
        self.request, self.sources = request, sources
        self.em = sources["em"]
        self.zarr = folder / f"{folder.name}.zarr"
        self.grid = Grid(self.em.shape_zyx, request.voxel_size_nm, (0.0, 0.0, 0.0))
        labelled = bool(request.labels or request.instances)
        kept = request.crops or tuple(range(1, int(np.prod(request.grid)) + 1))
        self.crop_cells = [(first_id + i, cell) for i, cell in enumerate(kept)] if labelled else []
        self.boxes = _cells(self.em.shape_zyx, request.grid)
        self.counts: dict[tuple[int, str], list[int]] = {}

    def write(self) -> list[str]:
        """Write everything; return remarks."""
        dtype = np.dtype(np.float32) if self.em.dtype.kind == "f" else self.em.dtype
        name = EM_NAME if dtype == np.uint8 else f"fibsem-{dtype}"
        write_em(self.em, self.zarr / RECON / "em" / name, self.request.voxel_size_nm)
        seen = self._write_labels() if self.crop_cells else set()
        self._write_annotations()
        store.make_groups(self.zarr, self.zarr / RECON / "em")
        return [*self._remarks(seen), *self._voxel_size_remark()]

    def _write_labels(self) -> set[int]:
        """Write the label arrays of all crops, one read of each slab; return the label values met."""
        arrays = {(i, name): self._create(i, cell, name) for i, cell in self.crop_cells for name in self._classes()}
        seen: set[int] = set()
        rows = sorted({(self.boxes[cell - 1].start[0], self.boxes[cell - 1].stop[0]) for _, cell in self.crop_cells})
        for row_start, row_stop in rows:
            for start, stop in _slabs(row_start, row_stop, self._label_depth()):
                slabs = {key: v.read(start, stop) for key, v in self.sources.items() if key != "em"}
                if "labels" in slabs:
                    seen |= set(np.unique(slabs["labels"]).tolist())
                for crop_id, cell in self.crop_cells:
                    box = self.boxes[cell - 1]
                    if box.start[0] == row_start:
                        part = {key: slab[:, box.slices[1], box.slices[2]] for key, slab in slabs.items()}
                        for name in self._classes():
                            values = self._encode(name, part)
                            arrays[crop_id, name][start - row_start : stop - row_start] = values
                            self._count(crop_id, name, values)
        return seen

    def _classes(self) -> list[str]:
        return [*self.request.values, *self.request.instances]

    def _label_depth(self) -> int:
        _, y, x = self.grid.shape_zyx
        return int(min(store.CHUNK_EDGE, max(1, SLAB_BYTES // (y * x * 8))))

    def _dtype(self, name: str) -> np.dtype[Any]:
        if name in self.request.values:
            return np.dtype(np.uint8)
        stored = self.sources[f"instances {name}"].dtype
        return np.dtype(np.uint8) if stored == bool else np.dtype(f"u{stored.itemsize}")

    def _unknown(self, name: str) -> int:
        return SEMANTIC_UNKNOWN if name in self.request.values else int(np.iinfo(self._dtype(name)).max)

    def _create(self, crop_id: int, cell: int, name: str) -> Any:
        shape = self.boxes[cell - 1].shape_zyx
        depth = min(self._label_depth(), shape[0])
        chunk = (depth, *store.chunk_shape(shape)[1:])
        return store.create_array(self._group(crop_id) / name / "s0", shape, self._dtype(name), chunk)

    def _group(self, crop_id: int) -> Path:
        return self.zarr / GROUNDTRUTH / f"crop{crop_id}"

    def _encode(self, name: str, part: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Return the stored values of one class: 0 absent, 1 or ids present, and unknown outside the mask."""
        if name in self.request.values:
            values = np.isin(part["labels"], self.request.values[name]).astype(np.uint8)
            if self.request.ignore_value is not None:
                values[part["labels"] == self.request.ignore_value] = SEMANTIC_UNKNOWN
        else:
            ids = part[f"instances {name}"]
            if ids.dtype.kind == "i" and ids.min() < 0:
                raise DataError(self.sources[f"instances {name}"].name, f"id {ids.min()}", "ids are 0 or positive")
            values = ids.astype(self._dtype(name))
            if "mask" in part and values.max(initial=0) == self._unknown(name):
                raise DataError(self.sources[f"instances {name}"].name, f"id {values.max()}", "relabel it smaller")
        if "mask" in part:
            values[part["mask"] == 0] = self._unknown(name)
        return values

    def _count(self, crop_id: int, name: str, values: NDArray[Any]) -> None:
        masked = "mask" in self.sources or (name in self.request.values and self.request.ignore_value is not None)
        unknown = int(np.count_nonzero(values == self._unknown(name))) if masked else 0
        total = self.counts.setdefault((crop_id, name), [0, 0])
        total[0] += int(np.count_nonzero(values == 0))
        total[1] += unknown

    def _write_annotations(self) -> None:
        for crop_id, cell in self.crop_cells:
            group = self._group(crop_id)
            grid = self.grid.crop(self.boxes[cell - 1])
            for name in self._classes():
                absent, unknown = self.counts[crop_id, name]
                instance = name in self.request.instances
                encoding = {"absent": 0, "unknown": self._unknown(name)} | ({} if instance else {"present": 1})
                kind = "instance_segmentation" if instance else "semantic_segmentation"
                annotation = {"class_name": name, "annotation_type": {"type": kind, "encoding": encoding}}
                counted = {"complement_counts": {"absent": absent, "unknown": unknown}}
                attributes = store.multiscale_attributes(name, [grid]) | {"cellmap": {"annotation": annotation}}
                store.write_attributes(group / name, attributes)
                store.write_attributes(group / name / "s0", {"cellmap": {"annotation": annotation | counted}})
            annotation = {"version": "0.1.1", "name": group.name, "class_names": self._classes()}
            store.write_attributes(group, {"cellmap": {"annotation": annotation}})
            store.make_groups(self.zarr, group)

    def _remarks(self, seen: set[int]) -> Iterator[str]:
        """Refuse named values that never occur; mention values that nobody named."""
        named = {value for values in self.request.values.values() for value in values}
        for name, values in self.request.values.items():
            missing = sorted(set(values) - seen)
            if missing and seen:
                raise DataError(
                    self.sources["labels"].name,
                    f"value {missing[0]} of class {name} does not occur",
                    f"it holds {sorted(seen)[:20]}; correct --values",
                )
        rest = sorted(seen - named - {0, self.request.ignore_value})
        if rest and named:
            yield f"label values {rest[:20]} are not named by --values: absent of every class there"

    def _voxel_size_remark(self) -> Iterator[str]:
        declared = self.em.voxel_size_nm
        if declared and not np.allclose(declared, self.request.voxel_size_nm, rtol=0.05):
            sizes = " x ".join(f"{v:g}" for v in declared)
            yield f"{self.em.name} declares voxels of {sizes} nm (z, y, x); --voxel-size-nm was taken"


def _cells(shape_zyx: VoxelsZYX, grid: VoxelsZYX) -> list[Box]:
    edges = [[round(i * n / g) for i in range(g + 1)] for n, g in zip(shape_zyx, grid, strict=True)]
    return [
        Box((edges[0][z], edges[1][y], edges[2][x]), (edges[0][z + 1], edges[1][y + 1], edges[2][x + 1]))
        for z in range(grid[0])
        for y in range(grid[1])
        for x in range(grid[2])
    ]


def _slabs(start: int, stop: int, depth: int) -> Iterator[tuple[int, int]]:
    for z in range(start, stop, depth):
        yield z, min(z + depth, stop)


def _mean(siblings: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    mean = siblings.mean(axis=-1, dtype=np.float32)
    return (np.rint(mean) if dtype.kind in "ui" else mean).astype(dtype)
