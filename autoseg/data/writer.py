"""Write one volume into the CellMap layout: the label arrays of its crops, then the EM pyramid.

A volume is cut into NZ x NY x NX cells in raster order; each kept cell becomes a crop::

    +---+---+        --grid 1 2 2 --crops 1,2,3
    | 1 | 2 |        cells 1, 2 and 3 become crops, cell 4 stays unannotated EM
    +---+---+
    | 3 | 4 |
    +---+---+

Files are read slab by slab, each once; a slab and what is made of it take a few times SLAB_BYTES.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from autoseg.data import store
from autoseg.data.dataset import EM_NAME, GROUNDTRUTH, RECON
from autoseg.data.formats import Volume
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX

SLAB_BYTES = 2**27
SEMANTIC_UNKNOWN = 255
SHOWN_VALUES = 20
# names that the annotation schema of CellMap (cellmap-schemas, version 0.1.1) requires, though nothing is known
CROP_ATTRIBUTES: Mapping[str, Any] = {
    **dict.fromkeys(("description", "start_date", "end_date", "duration_days", "protocol_uri")),
    **{"created_by": [], "created_with": []},
}


class ImportRequest(NamedTuple):
    """What the user asked to import; `values` maps a class to its values in the label volume.

    `validate` counts the crops of this import, from 1. `ignore_value` is a value of the label volume, or of the
    instance volumes where there is no label volume.
    """

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

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the classes that are annotated, in the order given."""
        return (*self.values, *self.instances)


def write_volume(
    request: ImportRequest, sources: Mapping[str, Volume], zarr: Path, crops: Mapping[int, Box]
) -> tuple[list[str], Counter[str]]:
    """Write a new zarr from open volumes `em`, `labels`, `mask` and `instances CLASS`.

    Return remarks, and the voxels of each class that is annotated anywhere (0 where it is absent from all crops).
    Labels come first: what is wrong with them shows before the long part. Raise DataError for bad voxels.
    """
    written = _LabelWriter(request, sources, zarr, crops).write() if crops else ([], Counter[str]())
    em = sources["em"]
    write_em(em, zarr / em_path(em.dtype), request.voxel_size_nm)
    store.make_groups(zarr, zarr / RECON / "em")
    return written


def em_path(dtype: DTypeLike) -> str:
    """Return where in its zarr EM of that dtype lies."""
    stored = _em_dtype(dtype)
    return f"{RECON}/em/{EM_NAME if stored == np.uint8 else f'fibsem-{stored}'}"


def write_em(em: Volume, group: Path, voxel_size_nm: NmZYX) -> None:
    """Write a volume as an OME-NGFF pyramid into the zarr group, slab by slab; floats become float32."""
    refuse_palette(em)
    grid = Grid(em.shape_zyx, voxel_size_nm, (0.0, 0.0, 0.0))
    dtype = _em_dtype(em.dtype)
    depth = _slab_depth(em.shape_zyx, em.dtype.itemsize)
    chunk = _chunk(em.shape_zyx, depth)
    array = store.create_array(group / "s0", em.shape_zyx, dtype, chunk, store_zeros=True)
    for start, stop in _slabs(0, em.shape_zyx[0], depth):
        with np.errstate(over="ignore"):
            slab = em.read(start, stop).astype(dtype, copy=False)
        if dtype.kind == "f" and not np.isfinite(slab).all():
            what = f"grey values at z {start} to {stop - 1} that are NaN, infinite or beyond float32"
            raise DataError(em.name, what, "replace them by finite ones")
        array[start:stop] = slab
    grids = store.pyramid_grids(grid)
    store.write_pyramid(group, grids, lambda siblings: _mean(siblings, dtype))
    store.write_attributes(group, store.multiscale_attributes(group.name, grids))


def refuse_palette(em: Volume) -> None:
    """Raise DataError for EM that is stored as indices into a table of colours; labels may be."""
    if em.is_palette:
        raise DataError(em.name, "holds indices of a colour palette, not grey values", "save it as 8 bit greyscale")


def cell_boxes(shape_zyx: VoxelsZYX, grid: VoxelsZYX) -> list[Box]:
    """Return the cells of a volume in raster order; edges are rounded, so that cells differ by one voxel at most."""
    z, y, x = ([round(i * n / g) for i in range(g + 1)] for n, g in zip(shape_zyx, grid, strict=True))
    return [
        Box((z[i], y[j], x[k]), (z[i + 1], y[j + 1], x[k + 1]))
        for i in range(grid[0])
        for j in range(grid[1])
        for k in range(grid[2])
    ]


class _Target(NamedTuple):
    """One class as it is stored; `values` is None where the source holds instance ids."""

    name: str
    source: str
    values: tuple[int, ...] | None
    dtype: np.dtype[Any]

    @property
    def unknown(self) -> int:
        """Return the stored value of voxels that are not annotated."""
        return SEMANTIC_UNKNOWN if self.values is not None else int(np.iinfo(self.dtype).max)

    @property
    def annotation(self) -> dict[str, Any]:
        """Return what CellMap's annotation metadata say of this class."""
        encoding = {"absent": 0, "unknown": self.unknown} | ({} if self.values is None else {"present": 1})
        kind = "instance_segmentation" if self.values is None else "semantic_segmentation"
        return {"class_name": self.name, "annotation_type": {"type": kind, "encoding": encoding}}


class _LabelWriter:
    """Writes the label arrays of all crops of one volume, in one pass over its files."""

    def __init__(
        self, request: ImportRequest, sources: Mapping[str, Volume], zarr: Path, crops: Mapping[int, Box]
    ) -> None:
        self._request, self._zarr, self._crops = request, zarr, crops
        self._grid = Grid(sources["em"].shape_zyx, request.voxel_size_nm, (0.0, 0.0, 0.0))
        self._sources = {key: source for key, source in sources.items() if key != "em"}
        self._targets = [_Target(name, "labels", values, np.dtype(np.uint8)) for name, values in request.values.items()]
        for name in request.instances:
            key = f"instances {name}"
            self._targets.append(_Target(name, key, None, np.dtype(f"u{sources[key].dtype.itemsize}")))
        self._depth = _slab_depth(self._grid.shape_zyx, sum(s.dtype.itemsize for s in self._sources.values()))
        self._seen: set[int] = set()

    def write(self) -> tuple[list[str], Counter[str]]:
        """Write arrays and annotations, return remarks and voxels by class.

        Raise DataError for bad ids or values that never occur.
        """
        arrays = {(i, t.name): self._create(i, t) for i in self._crops for t in self._targets}
        counts = dict.fromkeys(arrays, (0, 0))
        rows = sorted({(box.start[0], box.stop[0]) for box in self._crops.values()})
        for row in rows:
            for start, stop in _slabs(*row, self._depth):
                slabs = self._read(start, stop)
                for crop_id, box in self._crops.items():
                    if (box.start[0], box.stop[0]) != row:
                        continue
                    part = {key: slab[:, box.slices[1], box.slices[2]] for key, slab in slabs.items()}
                    for target in self._targets:
                        voxels, num_unknown = self._encode(target, part)
                        arrays[crop_id, target.name][start - row[0] : stop - row[0]] = voxels
                        absent, unknown = counts[crop_id, target.name]
                        absent += int(np.count_nonzero(voxels == 0))
                        counts[crop_id, target.name] = absent, unknown + num_unknown
        self._refuse_missing_values()
        for crop_id in self._crops:
            self._annotate(crop_id, counts)
        present = Counter[str]()
        for (crop_id, name), (absent, unknown) in counts.items():
            if (known := self._crops[crop_id].num_voxels - unknown) > 0:
                present[name] += known - absent
        return list(self._remarks(counts)), present

    def _read(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        slabs = {key: source.read(start, stop) for key, source in self._sources.items()}
        for plane in slabs.get("labels", ()):
            self._seen.update(np.unique(plane).tolist())
        ignored = self._request.ignore_value
        sources = {target.source for target in self._targets if self._ignores(target)}
        if ignored is not None and any((slabs[source] == ignored).any() for source in sources):
            self._seen.add(ignored)
        return slabs

    def _create(self, crop_id: int, target: _Target) -> Any:
        shape = self._crops[crop_id].shape_zyx
        path = self._group(crop_id) / target.name / "s0"
        return store.create_array(path, shape, target.dtype, _chunk(shape, self._depth))

    def _group(self, crop_id: int) -> Path:
        return self._zarr / GROUNDTRUTH / f"crop{crop_id}"

    def _encode(self, target: _Target, part: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], int]:
        """Return (stored values, how many of them are unknown); 0 is absent, 1 or an id present."""
        raw = part[target.source]
        hidden = raw == self._request.ignore_value if self._ignores(target) else np.zeros(raw.shape, dtype=bool)
        if "mask" in part:
            hidden |= part["mask"] == 0
        if target.values is None:
            voxels = self._ids(target, np.where(hidden, np.zeros_like(raw), raw))
        else:
            voxels = functools.reduce(np.logical_or, (raw == value for value in target.values)).astype(np.uint8)
        voxels[hidden] = target.unknown
        return voxels, int(np.count_nonzero(hidden))

    def _ignores(self, target: _Target) -> bool:
        is_meant = target.source == "labels" or "labels" not in self._sources
        return is_meant and self._request.ignore_value is not None

    def _ids(self, target: _Target, ids: NDArray[Any]) -> NDArray[Any]:
        where, low, high = self._sources[target.source].name, int(ids.min()), int(ids.max())
        if low < 0:
            raise DataError(
                where, f"instance id {low}", "ids are positive and 0 is no object; --ignore-value hides one"
            )
        # without a mask the same id is an object like any other: nothing is counted as unknown
        if high == target.unknown and ("mask" in self._sources or self._ignores(target)):
            what = f"instance id {high}, which means unknown in {target.dtype} where a mask or --ignore-value is given"
            raise DataError(where, what, "renumber the objects, or save wider integers")
        return ids.astype(target.dtype)

    def _annotate(self, crop_id: int, counts: Mapping[tuple[int, str], tuple[int, int]]) -> None:
        """Write the metadata of one crop: OME-NGFF for space, `cellmap` for what the values mean."""
        group = self._group(crop_id)
        grid = self._grid.crop(self._crops[crop_id])
        for target in self._targets:
            absent, unknown = counts[crop_id, target.name]
            counted = {"complement_counts": {"absent": absent, "unknown": unknown}}
            space = store.multiscale_attributes(target.name, [grid])
            store.write_attributes(group / target.name, space | _cellmap(target.annotation))
            store.write_attributes(group / target.name / "s0", _cellmap(target.annotation | counted))
        names = {"version": "0.1.1", "name": group.name, "class_names": [target.name for target in self._targets]}
        store.write_attributes(group, _cellmap(names | dict(CROP_ATTRIBUTES)))
        store.make_groups(self._zarr, group)

    def _refuse_missing_values(self) -> None:
        """Raise DataError for a named value that the whole file, not only the kept cells, does not hold."""
        named = {v: ("--values", f"for class {name}") for name, values in self._request.values.items() for v in values}
        if self._request.ignore_value is not None:
            named[self._request.ignore_value] = ("--ignore-value", "to be ignored")
        for start, stop in _slabs(0, self._grid.shape_zyx[0], self._depth):
            if named.keys() <= self._seen:
                return
            self._read(start, stop)
        for value in sorted(named.keys() - self._seen):
            flag, role = named[value]
            held = f"it holds {_listed(self._seen)}; " if "labels" in self._sources else ""
            where = self._sources[self._targets[0].source].name
            raise DataError(where, f"holds no voxel of value {value}, named {role}", f"{held}correct {flag}")

    def _remarks(self, counts: Mapping[tuple[int, str], tuple[int, int]]) -> Iterator[str]:
        named = {value for values in self._request.values.values() for value in values}
        rest = self._seen - named - {0, self._request.ignore_value}
        if rest and named:
            file = self._sources["labels"].name
            yield f"{file}: values {_listed(rest)} are not named by --values and count as none of its classes"
        for crop_id, box in self._crops.items():
            if all(counts[crop_id, target.name][1] == box.num_voxels for target in self._targets):
                yield f"crop{crop_id} holds no annotated voxel"


def _listed(values: set[int]) -> str:
    """Return the smallest values as text, and how many more there are."""
    shown = ", ".join(str(value) for value in sorted(values)[:SHOWN_VALUES])
    return shown + (f" and {len(values) - SHOWN_VALUES} more" if len(values) > SHOWN_VALUES else "")


def _cellmap(annotation: dict[str, Any]) -> dict[str, Any]:
    return {"cellmap": {"annotation": annotation}}


def _em_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    given = np.dtype(dtype)
    return np.dtype(np.float32) if given.kind == "f" else given


def _slab_depth(shape_zyx: VoxelsZYX, voxel_bytes: int) -> int:
    """Return how many planes to read at once: as deep as a chunk, if memory allows."""
    plane = shape_zyx[1] * shape_zyx[2] * voxel_bytes
    return min(store.CHUNK_EDGE, shape_zyx[0], max(1, SLAB_BYTES // plane))


def _chunk(shape_zyx: VoxelsZYX, depth: int) -> VoxelsZYX:
    """Return chunks no deeper than a slab, so that each is written once; where that is thin, wider in the plane."""
    z, y, x = store.chunk_shape(shape_zyx)
    if depth >= z:
        return z, y, x
    edge = store.CHUNK_EDGE * math.isqrt(z // depth)
    return depth, min(edge, shape_zyx[1]), min(edge, shape_zyx[2])


def _slabs(start: int, stop: int, depth: int) -> Iterator[tuple[int, int]]:
    for z in range(start, stop, depth):
        yield z, min(z + depth, stop)


def _mean(siblings: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    mean = siblings.mean(axis=-1, dtype=np.float32 if dtype.itemsize <= 2 else np.float64)
    rounded: NDArray[Any] = np.rint(mean) if dtype.kind in "ui" else mean
    return rounded.astype(dtype)
