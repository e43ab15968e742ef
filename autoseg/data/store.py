"""The only door to zarr: OME-NGFF multiscale groups in, chunks out; both zarr majors, zarr format 2 and 3.

Reading never writes. A chunk that was never stored reads as the fill value, so `stored_chunks` tells which are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray

from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX, blocks

ZARR_MAJOR = int(zarr.__version__.split(".")[0])
CHUNK_CAP_BYTES = 2**30
CHUNK_EDGE = 64
NM_PER_UNIT = {"nanometer": 1.0, "micrometer": 1e3, "angstrom": 0.1, "millimeter": 1e6, "meter": 1e9}


class ChunkCache:
    """Decoded chunks, the most recently used ones, up to a number of bytes; one per process."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._chunks: OrderedDict[tuple[str, VoxelsZYX], NDArray[Any]] = OrderedDict()

    def get(self, key: tuple[str, VoxelsZYX], load: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return the cached chunk, or load and keep it."""
        if key in self._chunks:
            self._chunks.move_to_end(key)
            return self._chunks[key]
        chunk = load()
        self._chunks[key] = chunk
        self._num_bytes += chunk.nbytes
        while self._num_bytes > self.max_bytes and len(self._chunks) > 1:
            self._num_bytes -= self._chunks.popitem(last=False)[1].nbytes
        return chunk


class ArrayReader:
    """One zarr array of three axes, opened when first used (so that it travels to worker processes)."""

    def __init__(self, path: Path, cache: ChunkCache) -> None:
        self.path = path
        self._cache = cache

    @cached_property
    def _array(self) -> Any:
        try:
            array = zarr.open_array(str(self.path), mode="r")
        except Exception as error:
            raise DataError(self.path, f"is not a readable zarr array ({_brief(error)})", "restore it") from None
        if len(array.shape) != 3:
            raise DataError(self.path, f"has {len(array.shape)} axes", "store one channel with axes z, y, x")
        chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize
        if chunk_bytes > CHUNK_CAP_BYTES:
            raise DataError(
                self.path,
                f"one chunk {tuple(array.chunks)} decodes to {chunk_bytes / 2**30:.1f} GiB",
                "store it in smaller chunks (64³ is usual)",
            )
        return array

    @property
    def shape_zyx(self) -> VoxelsZYX:
        """Return the shape in voxels."""
        z, y, x = self._array.shape
        return int(z), int(y), int(x)

    @property
    def chunk_zyx(self) -> VoxelsZYX:
        """Return the chunk shape in voxels."""
        z, y, x = self._array.chunks
        return int(z), int(y), int(x)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the stored dtype."""
        return np.dtype(self._array.dtype)

    def read(self, box: Box, fill: float = 0) -> NDArray[Any]:
        """Return the voxels of `box` with shape box.shape_zyx; outside the array they are `fill`."""
        out = np.full(box.shape_zyx, fill, self.dtype)
        inside = box.clip(Box.whole(self.shape_zyx))
        if inside.num_voxels == 0:
            return out
        ranges = (
            range(a // c, (b - 1) // c + 1) for a, b, c in zip(inside.start, inside.stop, self.chunk_zyx, strict=True)
        )
        for index in itertools.product(*ranges):
            chunk_box = self._chunk_box(index)
            part = chunk_box.clip(inside)
            chunk = self._cache.get((str(self.path), index), lambda box=chunk_box: self._load(box))  # type: ignore[misc]
            out[part.relative_to(box).slices] = chunk[part.relative_to(chunk_box).slices]
        return out

    def _chunk_box(self, index: VoxelsZYX) -> Box:
        cz, cy, cx = self.chunk_zyx
        z, y, x = index
        start = (z * cz, y * cy, x * cx)
        return Box(start, (start[0] + cz, start[1] + cy, start[2] + cx)).clip(Box.whole(self.shape_zyx))

    def _load(self, box: Box) -> NDArray[Any]:
        try:
            return np.asarray(self._array[box.slices])
        except Exception as error:
            raise DataError(
                self.path, f"the chunk at voxel {box.start} cannot be decoded ({_brief(error)})", "restore the file"
            ) from None

    @cached_property
    def stored_chunks(self) -> NDArray[np.bool_]:
        """Return for each chunk of the grid whether it was ever written; all True where one cannot tell."""
        counts = [math.ceil(n / c) for n, c in zip(self.shape_zyx, self.chunk_zyx, strict=True)]
        stored = np.zeros(counts, dtype=bool)
        metadata = _read_json(self.path / ".zarray")
        if metadata is None:
            return np.ones(counts, dtype=bool)
        if metadata.get("dimension_separator", ".") == "/":
            names = (
                f"{z.name}.{y.name}.{x}"
                for z in _folders(self.path)
                for y in _folders(Path(z.path))
                for x in os.listdir(y.path)
            )
        else:
            names = (name for name in os.listdir(self.path))
        for name in names:
            with contextlib.suppress(ValueError, IndexError):
                z, y, x = (int(part) for part in name.split("."))
                stored[z, y, x] = True
        return stored

    def stored_mask(self, box: Box) -> NDArray[np.bool_]:
        """Return for each voxel of `box` whether it lies in a stored chunk (outside the array: False)."""
        mask = np.zeros(box.shape_zyx, dtype=bool)
        inside = box.clip(Box.whole(self.shape_zyx))
        if inside.num_voxels == 0:
            return mask
        axes = [np.arange(a, b) // c for a, b, c in zip(inside.start, inside.stop, self.chunk_zyx, strict=True)]
        mask[inside.relative_to(box).slices] = self.stored_chunks[np.ix_(*axes)]
        return mask


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
        raise DataError(path, f"malformed multiscales metadata ({_brief(error)})", "repair its .zattrs") from None
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


def read_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a group or array of either format; {} if it has none."""
    attributes = _read_json(path / ".zattrs")
    if attributes is not None:
        return attributes
    metadata = _read_json(path / "zarr.json")
    found = metadata.get("attributes", {}) if metadata else {}
    return found if isinstance(found, dict) else {}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(path, f"is not readable JSON ({_brief(error)})", "restore the file") from None
    if not isinstance(content, dict):
        raise DataError(path, "is not a JSON object", "restore the file")
    return content


def _folders(path: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(path) if entry.name.isdigit() and entry.is_dir()]


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


# ---- writing ------------------------------------------------------------------------------------------------


def chunk_shape(shape_zyx: VoxelsZYX) -> VoxelsZYX:
    """Return the chunk shape for a new array: 64³, thin axes whole."""
    z, y, x = (min(n, CHUNK_EDGE) for n in shape_zyx)
    return z, y, x


def create_array(path: Path, shape_zyx: VoxelsZYX, dtype: DTypeLike, chunk_zyx: VoxelsZYX) -> Any:
    """Create a zarr format 2 array (zstd, '/' between chunk indices, fill 0), replacing what is there."""
    keywords: dict[str, Any] = {"zarr_format": 2} if ZARR_MAJOR >= 3 else {}
    compressor = numcodecs.Blosc(cname="zstd", clevel=3, shuffle=numcodecs.Blosc.SHUFFLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.open_array(
            str(path),
            mode="w",
            shape=shape_zyx,
            chunks=chunk_zyx,
            dtype=np.dtype(dtype),
            fill_value=0,
            compressor=compressor,
            dimension_separator="/",
            **keywords,
        )


def open_for_update(path: Path) -> Any:
    """Open an existing array to write more blocks into it."""
    return zarr.open_array(str(path), mode="r+")


def write_attributes(path: Path, attributes: dict[str, Any]) -> None:
    """Merge attributes into a zarr format 2 group, making the group if it is not there."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / ".zarray").exists():
        (path / ".zgroup").write_text('{\n    "zarr_format": 2\n}')
    merged = {**read_attributes(path), **attributes}
    (path / ".zattrs").write_text(json.dumps(merged, indent=2))


def make_groups(root: Path, leaf: Path) -> None:
    """Make `leaf` and every folder between it and `root` zarr format 2 groups."""
    for folder in [leaf, *leaf.parents]:
        write_attributes(folder, {})
        if folder == root:
            return


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


def pyramid_grids(grid: Grid, smallest_edge: int = 64) -> list[Grid]:
    """Return the grids of a pyramid; each level halves the axes that are not yet coarser than the others."""
    grids = [grid]
    while max(grids[-1].shape_zyx) >= 2 * smallest_edge and len(grids) < 8:
        fine = grids[-1]
        finest = min(fine.voxel_size_nm)
        factors = [
            2 if v < 1.5 * finest and n > 1 else 1 for v, n in zip(fine.voxel_size_nm, fine.shape_zyx, strict=True)
        ]
        if factors == [1, 1, 1]:
            break
        size = [v * f for v, f in zip(fine.voxel_size_nm, factors, strict=True)]
        shape = [max(1, n // f) for n, f in zip(fine.shape_zyx, factors, strict=True)]
        origin = [o + v * (f - 1) / 2 for o, v, f in zip(fine.origin_nm, fine.voxel_size_nm, factors, strict=True)]
        grids.append(
            Grid((shape[0], shape[1], shape[2]), (size[0], size[1], size[2]), (origin[0], origin[1], origin[2]))
        )
    return grids


def write_pyramid(path: Path, grids: list[Grid], reduce: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Fill s1, s2, ... from s0 block by block; `reduce` maps (..., 8 or fewer siblings) to one voxel."""
    for i, (fine, coarse) in enumerate(itertools.pairwise(grids)):
        source = ArrayReader(path / f"s{i}", ChunkCache(256 * 2**20))
        target = create_array(path / f"s{i + 1}", coarse.shape_zyx, source.dtype, chunk_shape(coarse.shape_zyx))
        f = [round(c / v) for c, v in zip(coarse.voxel_size_nm, fine.voxel_size_nm, strict=True)]
        for box in blocks(coarse.shape_zyx, (CHUNK_EDGE, 4 * CHUNK_EDGE, 4 * CHUNK_EDGE)):
            z, y, x = box.shape_zyx
            start = tuple(a * k for a, k in zip(box.start, f, strict=True))
            stop = tuple(b * k for b, k in zip(box.stop, f, strict=True))
            voxels = source.read(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
            siblings = voxels.reshape(z, f[0], y, f[1], x, f[2]).transpose(0, 2, 4, 1, 3, 5)
            target[box.slices] = reduce(siblings.reshape(z, y, x, -1))
