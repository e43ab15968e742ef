"""From label arrays to label codes, and from fine codes to coarse ones; one block in memory at a time.

Within a block most classes are the same everywhere. The others are flags, one bit each, and what a voxel's bits say
together is its key; the keys that occur become codes::

    er_mem  0 0 1 1 0         bits 00 00 01 01 10        codes  0 0 1 1 2
    er      0 0 0 0 1   -->   (uint8, up to 8 flags) -->        keys that occur, numbered
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, States
from autoseg.data.dataset import Crop, LabelArray
from autoseg.data.resample import block_sums, mean_of_sums, whole_factors
from autoseg.data.store import ArrayReader, Checksums, ChunkCache
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, VoxelsZYX, blocks

INDEX_BLOCK: VoxelsZYX = (8, 64, 64)
LEAST_BLOCK: VoxelsZYX = (32, 64, 128)
MOST_VOXELS = 2**22
COARSE_BLOCK: VoxelsZYX = (64, 64, 64)
SLICE = 2**20
MAX_CODES = 2**16


class _Flags:
    """Flags of the voxels of one block, eight to a byte; `columns` says which class and state each bit stands for."""

    def __init__(self, shape_zyx: VoxelsZYX, num_classes: int) -> None:
        self._shape = shape_zyx
        self.num_voxels = math.prod(shape_zyx)
        self.constant = np.zeros(num_classes, dtype=np.uint8)
        self._planes: list[NDArray[np.uint8]] = []
        self._columns: list[tuple[tuple[int, ...], int]] = []

    def add(self, classes: tuple[int, ...], present: NDArray[np.bool_], unknown: NDArray[np.bool_] | None) -> None:
        """Add the states of classes that are alike in this block; where unknown, present must be False.

        The arrays become its own.
        """
        if unknown is not None and unknown.any():
            if unknown.all():
                self.constant[list(classes)] = UNKNOWN
                return
            self.add_bit(classes, UNKNOWN, unknown)
        if present.all():
            self.constant[list(classes)] = PRESENT
        elif present.any():
            self.add_bit(classes, PRESENT, present)

    def add_bit(self, classes: tuple[int, ...], state: int, flags: NDArray[np.bool_]) -> None:
        """Add one flag: where it is set, these classes have that state."""
        place = len(self._columns) % 8
        self._columns.append((classes, state))
        if place == 0:
            self._planes.append(flags.view(np.uint8))
        else:
            self._planes[-1] |= np.left_shift(flags.view(np.uint8), place)

    def keys(self) -> tuple[NDArray[Any], list[bytes]]:
        """Return (local codes z, y, x, the row of states of each local code)."""
        if not self._planes:
            return np.zeros(self._shape, dtype=np.uint8), [self.constant.tobytes()]
        key: NDArray[Any] = self._planes[0]
        used = np.flatnonzero(_histogram(key, 256))
        bits = used[:, None] >> np.arange(8) & 1
        for plane in self._planes[1:]:
            wide: NDArray[Any] = _renumber(key, used).astype(np.uint16 if len(used) <= 256 else np.uint32)
            key = np.left_shift(wide, 8) | plane
            used = np.flatnonzero(_histogram(key, len(used) << 8))
            bits = np.concatenate([bits[used >> 8], used[:, None] >> np.arange(8) & 1], axis=1)
        rows = np.tile(self.constant, (len(used), 1))
        for i, (classes, state) in enumerate(self._columns):
            rows[np.ix_(bits[:, i] == 1, np.array(classes))] = state
        return _renumber(key, used), [row.tobytes() for row in rows]


def _histogram(values: NDArray[Any], length: int) -> NDArray[np.int64]:
    """Return how often each value occurs; `bincount` alone would widen all of them at once."""
    flat, total = values.ravel(), np.zeros(length, dtype=np.int64)
    if flat.itemsize == 1 and flat.size % 2 == 0 and flat.size >= 2**16:  # two at once
        pairs = _histogram(flat.view(np.uint16), 2**16).reshape(256, 256)
        both: NDArray[np.int64] = pairs.sum(axis=0) + pairs.sum(axis=1)
        return both[:length]
    for start in range(0, flat.size, SLICE):
        total += np.bincount(flat[start : start + SLICE], minlength=length)
    return total


def _renumber(key: NDArray[Any], used: NDArray[np.intp]) -> NDArray[Any]:
    """Return the place of each key among those used, in as few bytes as that takes."""
    dtype = np.uint8 if len(used) <= 256 else np.uint16 if len(used) <= MAX_CODES else np.uint32
    places = np.zeros(int(used[-1]) + 1, dtype=dtype)
    places[used] = np.arange(len(used))
    return _look_up(places, key)


def _look_up(table: NDArray[Any], key: NDArray[Any]) -> NDArray[Any]:
    if table.itemsize == key.itemsize == 1:
        whole = np.zeros(256, dtype=np.uint8)
        whole[: len(table)] = table
        found = np.frombuffer(key.tobytes().translate(whole.tobytes()), dtype=np.uint8)
        return found.reshape(key.shape)
    return np.take(table, key)


def check_room(shape_zyx: VoxelsZYX, folder: Path, where: str, itemsize: int = 1) -> None:
    """Raise DataError where codes of that shape do not fit into the folder's disk."""
    needed = math.prod(shape_zyx) * itemsize
    total, _, free = shutil.disk_usage(folder)
    if needed > total:  # no fault of the disk
        what = f"{shape_zyx} voxels are {needed / 2**30:.1f} GiB of codes, the disk has {total / 2**30:.1f} GiB"
        raise DataError(where, what, "correct the shape of its labels, or choose another --cache")
    if needed > free:
        what = f"{needed / 2**30:.1f} GiB of codes, {free / 2**30:.1f} GiB are free"
        raise DataError(folder, what, "make room, or choose another --cache")


class CodeWriter:
    """Numbers rows of states as they come and writes codes.npy: one byte a voxel until that is too few."""

    def __init__(self, folder: Path, shape_zyx: VoxelsZYX, where: str) -> None:
        self._path, self._shape, self._where = folder / "codes.npy", shape_zyx, where
        self._rows: dict[bytes, int] = {}
        self.undeclared: dict[str, int] = {}
        self._dtype: type[np.unsignedinteger[Any]] = np.uint8
        self._create(self._path)

    def _create(self, path: Path) -> None:
        check_room(self._shape, path.parent, self._where, np.dtype(self._dtype).itemsize)
        self._offset = np.lib.format.open_memmap(path, mode="w+", dtype=self._dtype, shape=self._shape).offset

    def _map(self) -> NDArray[Any]:
        """Map the codes, without reading their header again as np.load does."""
        return np.memmap(self._path, self._dtype, mode="r+", offset=self._offset, shape=self._shape)

    def write(self, box: Box, local: NDArray[Any], rows: list[bytes]) -> None:
        """Write one block; mapped for this block alone, so that written pages do not stay in memory."""
        table = np.array([self._rows.setdefault(row, len(self._rows)) for row in rows])
        if len(self._rows) > MAX_CODES:
            raise DataError(self._where, f"more than {MAX_CODES} combinations of labels", "check its label arrays")
        if len(self._rows) > 256 and self._dtype is np.uint8:
            self._widen()
        self._map()[box.slices] = int(table[0]) if len(table) == 1 else _look_up(table.astype(self._dtype), local)

    def _widen(self) -> None:
        narrow = self._path.rename(self._path.with_name("narrow.npy"))
        self._dtype = np.uint16
        self._create(self._path)
        for z in range(0, self._shape[0], INDEX_BLOCK[0]):
            layer = slice(z, z + INDEX_BLOCK[0])
            self._map()[layer] = np.load(narrow, mmap_mode="r")[layer]
        narrow.unlink()

    def finish(self) -> tuple[States, NDArray[np.int64]]:
        """Write counts.npy; return (states of each code, number of voxels of each code)."""
        states = np.frombuffer(b"".join(self._rows), dtype=np.uint8).reshape(len(self._rows), -1)
        path = self._path.with_name("counts.npy")
        layers = [-(-n // b) for n, b in zip(self._shape, INDEX_BLOCK, strict=True)]
        shape = (math.prod(layers), len(states))
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint32, shape=shape)
        histogram = np.zeros(len(states), dtype=np.int64)
        per_layer = layers[1] * layers[2]
        for i in range(layers[0]):
            layer = np.asarray(self._map()[i * INDEX_BLOCK[0] : (i + 1) * INDEX_BLOCK[0]])
            counts = np.zeros((per_layer, len(states)), dtype=np.int64)
            for row, box in zip(counts, blocks(_zyx(layer.shape), INDEX_BLOCK), strict=True):
                part = layer[box.slices]
                low = part.min()
                if low == part.max():
                    row[low] = part.size
                else:
                    row[:] = np.bincount(part.ravel(), minlength=len(states))
            np.load(path, mmap_mode="r+")[i * per_layer : (i + 1) * per_layer] = counts
            histogram += counts.sum(axis=0)
        for written in (self._path, path):  # a rename may reach the disk before what was renamed
            with open(written, "rb") as file:
                os.fsync(file.fileno())
        return states, histogram


# ---- from label arrays --------------------------------------------------------------------------------------


def encode_labels(crop: Crop, writer: CodeWriter, checksums: Checksums) -> None:
    """Write the codes of a crop at its own voxel size; each chunk of each label array is decoded once.

    The writer also counts the voxels of values that a semantic annotation does not declare; they are present. Of a
    block, the chunks of one array at a time are in memory, and the flags; the rest is of a part of MOST_VOXELS.
    """
    cache = ChunkCache(2**62, checksums)
    readers = [ArrayReader(label.path, cache) for label in crop.labels]
    stored = [reader.stored_chunks for reader in readers]
    for block in blocks(crop.grid.shape_zyx, _block_shape([r.chunk_zyx for r in readers], crop.grid.shape_zyx)):
        parts = [part.shift(block.start) for part in blocks(block.shape_zyx, _part_shape(block.shape_zyx))]
        flags = [_Flags(part.shape_zyx, len(readers)) for part in parts]
        for k, (label, reader, there) in enumerate(zip(crop.labels, readers, stored, strict=True)):
            for box, flag in zip(parts, flags, strict=True):
                wanted = box.shift(crop.start_zyx)
                edges = zip(wanted.start, wanted.stop, reader.chunk_zyx, strict=True)
                chunks = tuple(slice(a // c, -(-b // c)) for a, b, c in edges)
                # where nothing is stored, one voxel tells the fill value of all
                part = wanted if there[chunks].any() else Box(wanted.start, _zyx([a + 1 for a in wanted.start]))
                odd = _add_label(flag, k, label, reader.read(part))
                if odd:
                    writer.undeclared[label.name] = writer.undeclared.get(label.name, 0) + odd
            cache.clear()
        for box, flag in zip(parts, flags, strict=True):
            writer.write(box, *flag.keys())


def _add_label(flags: _Flags, k: int, label: LabelArray, values: NDArray[Any]) -> int:
    """Add the states of one class in one part; return how many of its present voxels hold an undeclared value."""
    low, high = values.min(), values.max()
    unsure = label.unknown is not None and low <= label.unknown <= high
    if low == high:
        flags.constant[k] = UNKNOWN if unsure else PRESENT if low != label.absent else ABSENT
        odd = flags.constant[k] == PRESENT and label.present not in (None, low)
        return flags.num_voxels if odd else 0
    if values.dtype == np.uint8 and high == 1 and label.absent == 0 and not unsure:
        odd = 0 if label.present in (None, 1) else int(np.count_nonzero(values))
        flags.add_bit((k,), PRESENT, values.view(np.bool_))  # zeros and ones are flags as they are
        return odd
    present = values != label.absent
    unknown = values == label.unknown if unsure else None
    if unknown is not None:
        present &= ~unknown
    odd = 0 if label.present is None else int(np.count_nonzero(present & (values != label.present)))
    flags.add((k,), present, unknown)
    return odd


def _block_shape(chunks: Sequence[VoxelsZYX], shape_zyx: VoxelsZYX) -> VoxelsZYX:
    """Return a block that holds whole chunks of every array, so that none is decoded twice.

    Chunks that fit no common block of bounded size are read in blocks of the largest.
    """
    block = [min(n, math.lcm(*sizes)) for n, sizes in zip(shape_zyx, zip(*chunks, strict=True), strict=True)]
    if math.prod(block) > MOST_VOXELS:
        block = [min(n, max(sizes)) for n, sizes in zip(shape_zyx, zip(*chunks, strict=True), strict=True)]
    for axis in (2, 1, 0):
        wanted = max(1, LEAST_BLOCK[axis] // block[axis])
        if math.prod(block) * wanted <= MOST_VOXELS:
            block[axis] *= wanted
    return _zyx(block)


def _part_shape(block_zyx: VoxelsZYX) -> VoxelsZYX:
    """Return the block halved, along its longest axis each time, until it is of bounded size: a chunk may be huge."""
    part = list(block_zyx)
    while math.prod(part) > MOST_VOXELS:
        axis = part.index(max(part))
        part[axis] = -(-part[axis] // 2)
    return _zyx(part)


# ---- from codes to coarser (or finer) ones ------------------------------------------------------------------


class Fine(NamedTuple):
    """Codes at the voxel size of the annotation."""

    grid: Grid
    codes: Callable[[Box], NDArray[Any]]
    states_CK: States


def encode_codes(fine: Fine, grid: Grid, writer: CodeWriter) -> None:
    """Write the codes on another grid: present where it fills at least half of what is known there.

    Unknown where less than half is known. All classes are judged on their own: a majority of codes would erase
    membranes.
    """
    ratio = [max(1.0, v / w) for v, w in zip(grid.voxel_size_nm, fine.grid.voxel_size_nm, strict=True)]
    block = _zyx([max(1, int(b / r)) for b, r in zip(COARSE_BLOCK, ratio, strict=True)])
    for box in blocks(grid.shape_zyx, block):
        target = grid.crop(box)
        covering = fine.grid.covering(target).clip(Box.whole(fine.grid.shape_zyx))
        codes = np.ascontiguousarray(fine.codes(covering))
        used = np.flatnonzero(_histogram(codes, len(fine.states_CK)))
        flags = _Flags(box.shape_zyx, fine.states_CK.shape[1])
        states = fine.states_CK[used]
        alike: dict[bytes, list[int]] = {}
        for k, column in enumerate(states.T):
            alike.setdefault(column.tobytes(), []).append(k)
        patterns = []
        for key, classes in alike.items():
            if len(set(key)) == 1:
                flags.constant[classes] = key[0]
            else:
                patterns.append((tuple(classes), np.frombuffer(key, dtype=np.uint8)))
        if patterns:
            source = fine.grid.crop(covering)
            shares = _shares(_renumber(codes, used), [p for _, p in patterns], source, target)
            for (members, _), (present, unknown) in zip(patterns, shares, strict=True):
                lacking = unknown > 0.5 + 1e-5
                filled = present >= 0.5 * (1 - unknown) - 1e-5
                flags.add(members, filled & ~lacking, lacking)
        writer.write(box, *flags.keys())


def _shares(
    local: NDArray[Any], patterns: Sequence[NDArray[np.uint8]], source: Grid, target: Grid
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield (share present, share unknown) on the target for the states that each pattern gives to local codes."""
    wanted = [(i, state) for i, p in enumerate(patterns) for state in (PRESENT, UNKNOWN) if (p == state).any()]
    factors = whole_factors(source, target)
    summed = math.prod(f or 1 for f in factors)
    width = 8 if summed < 2**8 else 16 if summed < 2**16 else 32  # bits of one sum; several are added at once
    found: dict[tuple[int, int], NDArray[np.float32]] = {}
    for start in range(0, len(wanted), 64 // width):
        batch = wanted[start : start + 64 // width]
        table = np.zeros(len(patterns[0]), dtype=np.uint64)
        for place, (i, state) in enumerate(batch):
            table |= (patterns[i] == state).astype(np.uint64) << np.uint64(width * place)
        sums = block_sums(np.take(table, local), factors)
        for place, key in enumerate(batch):
            sum_ZYX = (sums >> np.uint64(width * place)) & np.uint64(2**width - 1)
            found[key] = mean_of_sums(sum_ZYX.astype(np.float32), source, target, factors)
    nowhere = np.zeros(target.shape_zyx, dtype=np.float32)
    for i in range(len(patterns)):
        yield found.get((i, PRESENT), nowhere), found.get((i, UNKNOWN), nowhere)


def _zyx(values: Sequence[int]) -> VoxelsZYX:
    z, y, x = (int(v) for v in values)
    return z, y, x
