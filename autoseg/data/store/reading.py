"""Read zarr arrays of three axes chunk by chunk, through a cache of decoded chunks."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.data.store.engine import brief, open_array, read_json
from autoseg.errors import DataError
from autoseg.geometry import Box, VoxelsZYX

CHUNK_CAP_BYTES = 2**30


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
            array = open_array(self.path)
        except Exception as error:
            raise DataError(self.path, f"is not a readable zarr array ({brief(error)})", "restore it") from None
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
        dtype: np.dtype[Any] = np.dtype(self._array.dtype)
        return dtype

    def read(self, box: Box, fill: float = 0) -> NDArray[Any]:
        """Return the voxels of `box` with shape box.shape_zyx; outside the array they are `fill`."""
        out = np.full(box.shape_zyx, fill, self.dtype)
        inside = box.clip(Box.whole(self.shape_zyx))
        if inside.num_voxels == 0:
            return out
        (z0, y0, x0), (z1, y1, x1), (cz, cy, cx) = inside.start, inside.stop, self.chunk_zyx
        ranges = (range(a // c, (b - 1) // c + 1) for a, b, c in ((z0, z1, cz), (y0, y1, cy), (x0, x1, cx)))
        for z, y, x in itertools.product(*ranges):
            chunk_box = self._chunk_box((z, y, x))
            part = chunk_box.clip(inside)
            chunk = self._cache.get((str(self.path), (z, y, x)), partial(self._load, chunk_box))
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
                self.path, f"the chunk at voxel {box.start} cannot be decoded ({brief(error)})", "restore the file"
            ) from None

    @cached_property
    def stored_chunks(self) -> NDArray[np.bool_]:
        """Return for each chunk of the grid whether it was ever written; all True where one cannot tell."""
        counts = [math.ceil(n / c) for n, c in zip(self.shape_zyx, self.chunk_zyx, strict=True)]
        stored = np.zeros(counts, dtype=bool)
        metadata = read_json(self.path / ".zarray")
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


def _folders(path: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in os.scandir(path) if entry.name.isdigit() and entry.is_dir()]
