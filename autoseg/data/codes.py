"""Label codes: everything that was annotated in a crop, as one small integer per voxel.

Code c stands for one combination of annotated states; `states_CK[c, k]` says absent, present or unknown for
class k. A patch reads one array instead of K, augmentation moves one, and every class frequency is a bincount::

    mito_mem  0 0 1 1 0        codes  0 0 1 1 2        states   mito_mem  er
    er        0 0 0 0 1   -->                               0:  absent    absent
                                                            1:  present   absent
                                                            2:  absent    present

Code volumes are built block by block into a sidecar cache that is keyed by the content of the annotation and by
the voxel size, not by the class table; deleting the cache is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, States
from autoseg.data.dataset import Crop, LabelArray
from autoseg.data.resample import resample
from autoseg.data.store import ArrayReader, ChunkCache, checksums_in
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX, blocks

CODES_VERSION = 1
BUILD_BLOCK: VoxelsZYX = (32, 256, 256)
INDEX_BLOCK: VoxelsZYX = (8, 64, 64)
MAX_CODES = 2**16


class CropCodes(NamedTuple):
    """The annotation of one crop at one voxel size; `counts_BC` counts each code in each index block."""

    grid: Grid
    codes_ZYX: NDArray[Any]
    names: tuple[str, ...]
    states_CK: States
    counts_BC: NDArray[np.uint32]

    @property
    def histogram_C(self) -> NDArray[np.int64]:
        """Return the number of voxels of each code."""
        histogram: NDArray[np.int64] = self.counts_BC.sum(axis=0, dtype=np.int64)
        return histogram


def default_cache() -> Path:
    """Return the folder of the code cache if the user names none."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "autoseg"


def open_codes(crop: Crop, voxel_size_nm: NmZYX, cache: Path) -> CropCodes:
    """Return the label codes of a crop at that voxel size, from the cache or built into it."""
    grid = crop.grid.at_voxel_size(voxel_size_nm)
    folder = cache / "codes" / _content_key(crop, grid)
    if not folder.exists():
        _build_into(crop, grid, folder)
    try:
        return _read_entry(folder, grid)
    except (OSError, EOFError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(folder, f"damaged code cache ({error})", "delete this folder; it is built anew") from None


def _read_entry(folder: Path, grid: Grid) -> CropCodes:
    table = json.loads((folder / "table.json").read_bytes())
    codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
    counts = np.load(folder / "counts.npy", allow_pickle=False)
    names, states = tuple(table["names"]), np.array(table["states"], dtype=np.uint8)
    expected = (grid.shape_zyx, (len(index_blocks(grid.shape_zyx)), len(states)), (len(states), len(names)))
    if (codes.shape, counts.shape, states.shape) != expected:
        raise ValueError(f"shapes {codes.shape}, {counts.shape}, {states.shape} instead of {expected}")
    return CropCodes(grid, codes, names, states, counts)


def index_blocks(shape_zyx: VoxelsZYX) -> list[Box]:
    """Return the index blocks of a code volume, in the order of the rows of `counts_BC`."""
    return list(blocks(shape_zyx, INDEX_BLOCK))


def _content_key(crop: Crop, grid: Grid) -> str:
    digest = hashlib.sha256(repr((CODES_VERSION, crop.grid, grid)).encode())
    for label in crop.labels:
        digest.update(repr((label.name, label.instance, label.absent, label.unknown)).encode())
        for folder, subfolders, files in os.walk(label.path):
            subfolders.sort()
            for name in sorted(files):
                status = os.stat(os.path.join(folder, name))
                entry = (os.path.relpath(folder, label.path), name, status.st_size, status.st_mtime_ns)
                digest.update(repr(entry).encode())
        digest.update(str(label.path.resolve()).encode())
    return digest.hexdigest()[:32]


def _build_into(crop: Crop, grid: Grid, folder: Path) -> None:
    """Build in a temporary folder and rename; when two processes build at once, the first one wins."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise DataError(folder.parent, f"cannot be written ({error.strerror})", "choose another --cache") from None
    try:
        rows = _build(crop, grid, temporary)
        table = {"crop": crop.name, "names": [label.name for label in crop.labels], "states": rows}
        (temporary / "table.json").write_text(json.dumps(table))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "table.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(crop: Crop, grid: Grid, folder: Path) -> list[list[int]]:
    """Write codes.npy and counts.npy; return the state row of each code. Memory is bounded by one block."""
    checksums = checksums_in(folder.parents[1])
    readers = [ArrayReader(label.path, ChunkCache(64 * 2**20, checksums)) for label in crop.labels]
    codes = np.lib.format.open_memmap(folder / "wide.npy", mode="w+", dtype=np.uint16, shape=grid.shape_zyx)
    rows: dict[bytes, int] = {}
    counts: dict[VoxelsZYX, NDArray[np.int64]] = {}
    for box in blocks(grid.shape_zyx, BUILD_BLOCK):
        local = np.zeros(box.shape_zyx, dtype=np.int64)
        local_rows: list[bytes] = [b""]
        for label, reader in zip(crop.labels, readers, strict=True):
            key = local * 3 + _states(label, reader, crop.grid, grid.crop(box))
            used = np.flatnonzero(np.bincount(key.ravel(), minlength=1))
            local_rows = [local_rows[k // 3] + bytes([k % 3]) for k in used.tolist()]
            lookup = np.zeros(int(used[-1]) + 1, dtype=np.int64)
            lookup[used] = np.arange(len(used))
            local = lookup[key]
        lookup = np.array([rows.setdefault(row, len(rows)) for row in local_rows])
        if len(rows) > MAX_CODES:
            raise DataError(crop.name, f"more than {MAX_CODES} combinations of labels", "check its label arrays")
        block = lookup[local].astype(np.uint16)
        codes[box.slices] = block
        for part in blocks(box.shape_zyx, INDEX_BLOCK):
            counts[part.shift(box.start).start] = np.bincount(block[part.slices].ravel())
    table = np.zeros((len(counts), len(rows)), dtype=np.uint32)
    for row, box in enumerate(index_blocks(grid.shape_zyx)):
        table[row, : len(counts[box.start])] = counts[box.start]
    np.save(folder / "counts.npy", table)
    _narrow(codes, folder, np.dtype(np.uint8 if len(rows) <= 256 else np.uint16))
    return [list(row) for row in rows]


def _narrow(wide: NDArray[np.uint16], folder: Path, dtype: np.dtype[Any]) -> None:
    narrow = np.lib.format.open_memmap(folder / "codes.npy", mode="w+", dtype=dtype, shape=wide.shape)
    for start in range(0, wide.shape[0], BUILD_BLOCK[0]):
        narrow[start : start + BUILD_BLOCK[0]] = wide[start : start + BUILD_BLOCK[0]]
    narrow.flush()
    (folder / "wide.npy").unlink()


def _states(label: LabelArray, reader: ArrayReader, source: Grid, target: Grid) -> NDArray[np.int64]:
    """Return the state of one class on `target`: present where it fills at least half of what is known there."""
    offset = target.aligned_with(source)
    if offset is not None:
        return _decode(label, reader.read(Box.whole(target.shape_zyx).shift(offset)))
    covering = source.covering(target).clip(Box.whole(source.shape_zyx))
    states = _decode(label, reader.read(covering))
    share = np.stack([states == PRESENT, states == UNKNOWN]).astype(np.float32)
    present, unknown = resample(share, source.crop(covering), target, area=True)
    known = 1 - unknown
    filled = np.where(present >= 0.5 * known - 1e-5, PRESENT, ABSENT)
    return np.where(known >= 0.5 - 1e-5, filled, UNKNOWN)


def _decode(label: LabelArray, values: NDArray[Any]) -> NDArray[np.int64]:
    states = np.where(values != label.absent, PRESENT, ABSENT)
    return states if label.unknown is None else np.where(values == label.unknown, UNKNOWN, states)
