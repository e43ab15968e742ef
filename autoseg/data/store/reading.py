"""Read zarr arrays of three axes chunk by chunk, through a cache of decoded chunks."""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.store.codecs import decode_chunk
from autoseg.data.store.layout import IN_ORDER, Layout, chunk_range, parse_index, read_layout, stored_units
from autoseg.data.store.sidecar import Checksums, Recorded
from autoseg.errors import DataError
from autoseg.geometry import Box, VoxelsZYX

ENTRY_BYTES = 2**9
SLAB_BYTES = 2**20
STORED, MISSING = 1, 2


class Slots:
    """Memory for chunks, in slabs of many; what a chunk leaves, the next of its size takes.

    Apart from the heap, where chunks that come and go among all else leave holes: a loader's 128 MiB took 85 more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.num_bytes = max_bytes, 0
        self._idle: dict[int, list[NDArray[np.uint8]]] = {}

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return a slot of that many bytes, of any content."""
        idle = self._idle.setdefault(num_bytes, [])
        if not idle:
            if self.num_bytes >= self._max_bytes:
                self._free_slabs()
            size = _slots_of_slab(num_bytes) * num_bytes
            slab = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
            self.num_bytes += slab.nbytes
            idle.extend(slab[i : i + num_bytes] for i in range(0, slab.nbytes, num_bytes))
        return idle.pop()

    def give(self, slot: NDArray[np.uint8]) -> None:
        """Take back a slot that nobody looks at any more."""
        self._idle[slot.nbytes].append(slot)

    def _free_slabs(self) -> None:
        """Free the slabs that are wholly idle: those of chunks of another size."""
        for num_bytes, slots in self._idle.items():
            idle = Counter(id(slot.base) for slot in slots)
            full = _slots_of_slab(num_bytes)
            kept = [slot for slot in slots if idle[id(slot.base)] < full]
            self.num_bytes -= (len(slots) - len(kept)) * num_bytes
            slots[:] = kept


def _slots_of_slab(num_bytes: int) -> int:
    return max(1, SLAB_BYTES // num_bytes)


class Held(NamedTuple):
    """A chunk in the cache, and the slot that its values lie in, if in any."""

    chunk: NDArray[Any]
    slot: NDArray[np.uint8] | None = None


class ChunkCache:
    """Decoded chunks, the most recently used ones, up to a number of bytes; one per process.

    With `checksums`, no chunk enters whose stored bytes are not those that were recorded. A chunk is good until
    the next is asked for: then its memory may be used again.
    """

    def __init__(self, max_bytes: int, checksums: Checksums | None = None) -> None:
        self.max_bytes, self.checksums = max_bytes, checksums
        self.slots = Slots(max_bytes)
        self._num_bytes = 0
        self._chunks: OrderedDict[tuple[str, VoxelsZYX], Held] = OrderedDict()

    def get(self, key: tuple[str, VoxelsZYX], load: Callable[[VoxelsZYX], Held]) -> NDArray[Any]:
        """Return the cached chunk of (array, index), or load and keep it."""
        if key in self._chunks:
            self._chunks.move_to_end(key)
            return self._chunks[key].chunk
        held = load(key[1])
        self._chunks[key] = held
        self._num_bytes += _held_bytes(held.chunk)
        while self._num_bytes > self.max_bytes and len(self._chunks) > 1:
            chunk, slot = self._chunks.popitem(last=False)[1]
            self._num_bytes -= _held_bytes(chunk)
            if slot is not None:
                self.slots.give(slot)
        return held.chunk

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()
        self.slots = Slots(self.max_bytes)
        self._num_bytes = 0


def _held_bytes(chunk: NDArray[Any]) -> int:
    """Return the memory of an entry; a chunk that is not stored is one value, broadcast."""
    return ENTRY_BYTES + (0 if 0 in chunk.strides else chunk.nbytes)


class ArrayReader:
    """One zarr array of three axes, opened when first used (so that it travels to worker processes)."""

    def __init__(self, path: Path, cache: ChunkCache) -> None:
        self.path = path
        self._cache = cache
        self._key = str(path)
        self._recorded: Recorded | None = None
        self._verified: set[VoxelsZYX] = set()

    @cached_property
    def layout(self) -> Layout:
        """Return what the metadata declares; DataError if it cannot be read, or is not what was recorded."""
        layout = read_layout(self.path)
        checksums = self._cache.checksums
        if checksums is not None:
            recorded = checksums.of(self.path, layout)
            recorded.check_metadata()
            self._recorded = recorded if recorded.rows else None
        return layout

    @property
    def shape_zyx(self) -> VoxelsZYX:
        """Return the shape in voxels."""
        return self.layout.shape_zyx

    @property
    def chunk_zyx(self) -> VoxelsZYX:
        """Return the chunk shape in voxels."""
        return self.layout.chunk_zyx

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the stored dtype."""
        return self.layout.dtype

    def read(self, box: Box, fill: float = 0) -> NDArray[Any]:
        """Return the voxels of `box` with shape box.shape_zyx; outside the array they are `fill`."""
        inside = box.clip(Box.whole(self.shape_zyx))
        out = np.empty(box.shape_zyx, self.dtype) if inside == box else np.full(box.shape_zyx, fill, self.dtype)
        if inside.num_voxels == 0:
            return out
        (z0, y0, x0), (z1, y1, x1), (cz, cy, cx) = inside.start, inside.stop, self.chunk_zyx
        oz, oy, ox = box.start
        for z in range(z0 // cz, (z1 - 1) // cz + 1):
            za, zb, zc = max(z0, z * cz), min(z1, z * cz + cz), z * cz
            for y in range(y0 // cy, (y1 - 1) // cy + 1):
                ya, yb, yc = max(y0, y * cy), min(y1, y * cy + cy), y * cy
                for x in range(x0 // cx, (x1 - 1) // cx + 1):
                    xa, xb, xc = max(x0, x * cx), min(x1, x * cx + cx), x * cx
                    chunk = self._cache.get((self._key, (z, y, x)), self._load)
                    part = chunk[za - zc : zb - zc, ya - yc : yb - yc, xa - xc : xb - xc]
                    out[za - oz : zb - oz, ya - oy : yb - oy, xa - ox : xb - ox] = part
        return out

    def _load(self, index: VoxelsZYX) -> Held:
        """Return the decoded chunk, cut to the array; one that is not stored is its fill value."""
        layout = self.layout
        sizes = zip(layout.shape_zyx, index, layout.chunk_zyx, strict=True)
        shape = tuple(min(c, n - i * c) for n, i, c in sizes)
        if layout.shards is None:
            unit, raw = index, self._raw(index)
            if self._recorded is not None:
                self._recorded.check(layout, index, raw)
        else:
            unit, raw = self._chunk_of_shard(index)
        if raw is None:
            return Held(np.broadcast_to(np.array(layout.fill_value, layout.dtype), shape))
        slot = self._cache.slots.take(layout.chunk_bytes)
        try:
            chunk = self._decode(unit, raw, slot)
        except DataError:
            self._cache.slots.give(slot)
            raise
        if chunk.shape == shape:
            return Held(chunk, slot)
        cut = chunk[: shape[0], : shape[1], : shape[2]].copy()
        self._cache.slots.give(slot)
        return Held(cut)

    def _chunk_of_shard(self, index: VoxelsZYX) -> tuple[VoxelsZYX, bytes | None]:
        """Return (the shard that holds a chunk, the stored bytes of the chunk or None)."""
        layout = self.layout
        z, y, x = (i // n for i, n in zip(index, layout.chunks_of_unit, strict=True))
        unit = (z, y, x)
        if self._recorded is not None and unit not in self._verified:
            self._recorded.check(layout, unit, self._raw(unit))
            self._verified.add(unit)
        table = self._cache.get((f"{self._key} index", unit), self._shard_index)
        place = tuple(i % n for i, n in zip(index, layout.chunks_of_unit, strict=True))
        try:
            found = chunk_range(table, place, layout) if table.size else None
        except ValueError as error:
            raise self._undecodable(unit, error) from None
        return unit, None if found is None else self._raw(unit, *found)

    def _shard_index(self, unit: VoxelsZYX) -> Held:
        """Return the index of a shard (z, y, x, 2), nothing if the shard is not stored."""
        layout = self.layout
        assert layout.shards is not None
        start = -layout.index_bytes if layout.shards.at_end else 0
        raw = self._raw(unit, start, layout.index_bytes)
        try:
            return Held(parse_index(raw, layout) if raw is not None else np.zeros(0, np.uint64))
        except ValueError as error:
            raise self._undecodable(unit, error) from None

    def check_decodes(self, unit: VoxelsZYX, raw: bytes) -> None:
        """Raise DataError, naming the file, unless its bytes are a chunk, or a shard of chunks."""
        layout = self.layout
        if layout.shards is None:
            self._decode(unit, raw)
            return
        try:
            table = parse_index(raw[-layout.index_bytes :] if layout.shards.at_end else raw, layout)
            found = [chunk_range(table, place, layout) for place in np.ndindex(layout.chunks_of_unit)]
        except ValueError as error:
            raise self._undecodable(unit, error) from None
        for offset, length in filter(None, found):
            self._decode(unit, raw[offset : offset + length])

    def _decode(self, unit: VoxelsZYX, raw: bytes, out: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        """Return the chunk that these stored bytes are; DataError names the file if they are none."""
        layout = self.layout
        try:
            flat = decode_chunk(raw, layout.codecs, layout.dtype, math.prod(layout.chunk_zyx), out)
        except ValueError as error:
            raise self._undecodable(unit, error) from None
        if layout.axes == IN_ORDER:
            return flat.reshape(layout.chunk_zyx)
        return flat.reshape([layout.chunk_zyx[axis] for axis in layout.axes]).transpose(np.argsort(layout.axes))

    def _undecodable(self, unit: VoxelsZYX, error: ValueError) -> DataError:
        what = f"the chunk {self.layout.file_name(unit)} cannot be decoded ({error})"
        return DataError(self.path, what, "restore the file")

    def _raw(self, unit: VoxelsZYX, offset: int = 0, length: int | None = None) -> bytes | None:
        """Return the stored bytes of a unit, or some of them (a negative offset counts from its end); None: no file."""
        longest = self.layout.longest_bytes if self.layout.shards is None else -1
        try:
            with open(f"{self._key}/{self.layout.file_name(unit)}", "rb") as file:
                if offset:
                    file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
                return file.read(longest if length is None else length)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            what = f"the chunk {self.layout.file_name(unit)} cannot be read ({error.strerror})"
            raise DataError(self.path, what, "restore the file") from None

    @cached_property
    def stored_chunks(self) -> NDArray[np.bool_]:
        """Return for each chunk of the grid whether it was ever written (in shards: whether its shard was)."""
        layout = self.layout
        stored = np.zeros(layout.unit_counts, dtype=bool)
        for unit in stored_units(self.path, layout):
            stored[unit] = True
        if layout.unit_zyx == layout.chunk_zyx:
            return stored
        axes = [
            np.arange(-(-n // c)) * c // u
            for n, c, u in zip(layout.shape_zyx, layout.chunk_zyx, layout.unit_zyx, strict=True)
        ]
        return stored[np.ix_(*axes)]

    @property
    def any_stored(self) -> bool:
        """Return whether any chunk was ever written; DamageError if there were some and now there is none."""
        found = next(stored_units(self.path, self.layout), None) is not None
        if not found and self._recorded is not None:
            self._recorded.check_some()
        return found

    def coverage(self, box: Box) -> float:
        """Return the share of the voxels of `box` that lie in stored chunks; outside the array there are none."""
        if self._all_seen(box):
            return 1.0
        states, lengths = self._units(box)
        if states is None:
            return 0.0
        z, y, x = lengths
        return float(np.einsum("zyx,z,y,x->", (states == STORED).astype(float), z, y, x)) / box.num_voxels

    def _all_seen(self, box: Box) -> bool:
        """Return whether every file under the box was found already, the usual case: asked for each patch."""
        (z0, y0, x0), (z1, y1, x1) = box
        (nz, ny, nx), (uz, uy, ux) = self.shape_zyx, self.layout.unit_zyx
        if not (0 <= z0 < z1 <= nz and 0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx):
            return False
        states = self._seen[z0 // uz : (z1 - 1) // uz + 1, y0 // uy : (y1 - 1) // uy + 1, x0 // ux : (x1 - 1) // ux + 1]
        return bool((states == STORED).all())

    def stored_mask(self, box: Box) -> NDArray[np.bool_]:
        """Return for each voxel of `box` whether it lies in a stored chunk (outside the array: False)."""
        mask = np.zeros(box.shape_zyx, dtype=bool)
        states, lengths = self._units(box)
        if states is not None:
            stored = states == STORED
            for axis, counts in enumerate(lengths):
                stored = np.repeat(stored, counts, axis=axis)
            mask[box.clip(Box.whole(self.shape_zyx)).relative_to(box).slices] = stored
        return mask

    def _units(self, box: Box) -> tuple[NDArray[np.int8] | None, list[NDArray[Any]]]:
        """Return the states of the stored files under a box, and how many of its voxels each holds along each axis.

        Each file is looked for once, when it is first asked for: a volume may have millions.
        """
        inside = box.clip(Box.whole(self.shape_zyx))
        if inside.num_voxels == 0:
            return None, []
        units = self.layout.unit_zyx
        ranges = [range(a // u, (b - 1) // u + 1) for a, b, u in zip(inside.start, inside.stop, units, strict=True)]
        states = self._seen[tuple(slice(r.start, r.stop) for r in ranges)]
        if not states.all():
            for unit in itertools.product(*ranges):
                z, y, x = unit
                if self._seen[unit] == 0:
                    found = os.path.exists(f"{self._key}/{self.layout.file_name((z, y, x))}")
                    self._seen[unit] = STORED if found else MISSING
                    if not found and self._recorded is not None:
                        self._recorded.check(self.layout, (z, y, x), None)
        lengths = [
            np.diff(np.clip(np.arange(r.start, r.stop + 1) * u, a, b))
            for r, u, a, b in zip(ranges, units, inside.start, inside.stop, strict=True)
        ]
        return states, lengths

    @cached_property
    def _seen(self) -> NDArray[np.int8]:
        return np.zeros(self.layout.unit_counts, dtype=np.int8)
