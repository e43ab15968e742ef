"""Label codes: everything that was annotated in a crop, as one small integer per voxel.

Code c stands for one combination of annotated states; `states_CK[c, k]` says absent, present or unknown for
class k. A patch reads one array instead of K, augmentation moves one, and every class frequency is a bincount::

    mito_mem  0 0 1 1 0        codes  0 0 1 1 2        states   mito_mem  er
    er        0 0 0 0 1   -->                               0:  absent    absent
                                                            1:  present   absent
                                                            2:  absent    present

At another voxel size a class is present where it fills half of the voxel, and logic does not hold there: three parts
that fill a third each are absent, and what they compose is present. So logic completes the rows of the codes at the
annotation's own voxel size, and what follows is coarsened like what was annotated::

    mito_mem  1 0 0     1 of 3, absent         labels -> own codes -> rows completed -> coarse codes
    mito_lum  0 1 0     1 of 3, absent                   no class table     its Logic
    mito_ribo 0 0 1     1 of 3, absent
    mito      1 1 1     3 of 3, present

Code volumes lie in a sidecar cache. Their key is what the values of the annotation mean, where its files lie, the
name, size and time of each file, and the voxel size; not the bytes: data that was moved or touched is encoded anew.
The codes at the annotation's own voxel size hold what was annotated and do not depend on the class table. Those at
another hold every class of the table, and its `Logic` is part of their key: editing the table rebuilds these, from
the former, and reads no label array. Deleting the cache, or one entry, is always safe. An open crop holds no memory
map and no file: each look at its codes maps them anew, so that a worker can hold a thousand.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.classes import Logic, States
from autoseg.data.coding import INDEX_BLOCK, CodeWriter, Fine, encode_codes, encode_labels
from autoseg.data.dataset import Crop
from autoseg.data.store import alone, checksums_in
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX
from autoseg.schema import write_atomically

CODES_VERSION = 3
ATTEMPTS = 10
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError)
DELETING = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)  # what a cache that is deleted meanwhile looks like


class _Stored(NamedTuple):
    """An array in a file: mapped when looked at."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    def map(self) -> NDArray[Any]:
        return np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=self.shape)


class CropCodes(NamedTuple):
    """The annotation of one crop at one voxel size, and the voxels of each code.

    `logic` is what completed it, None if the states are those annotated. `undeclared`: of the crop's own codes, the
    voxels by class whose value its annotation does not declare; they are present.
    """

    grid: Grid
    names: tuple[str, ...]
    states_CK: States
    histogram_C: NDArray[np.int64]
    crop: Crop
    folder: Path
    stored_codes: _Stored
    stored_counts: _Stored
    undeclared: dict[str, int]
    logic: Logic | None = None

    @property
    def codes_ZYX(self) -> NDArray[Any]:
        """Return the code of each voxel, as a fresh memory map (about 50 µs); take it once per patch."""
        return self._look(self.stored_codes)

    @property
    def counts_BC(self) -> NDArray[Any]:
        """Return how often each code occurs in each index block (uint32), as a fresh memory map."""
        return self._look(self.stored_counts)

    def _look(self, stored: _Stored) -> NDArray[Any]:
        """Map the array; if the cache was removed meanwhile, build it again from the same labels."""
        for _ in range(ATTEMPTS):
            try:
                return stored.map()
            except FileNotFoundError:
                again = open_codes(self.crop, self.grid.voxel_size_nm, self.folder.parent.parent, self.logic)
            if again.folder != self.folder or not np.array_equal(again.states_CK, self.states_CK):
                raise DataError(self.crop.name, "its labels changed while they were in use", "start again")
        raise _removed(self.folder)


def default_cache() -> Path:
    """Return the folder of the code cache if the user names none."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "autoseg"


class _Entry(NamedTuple):
    """One folder of the cache: codes of these classes on that grid."""

    crop: Crop
    grid: Grid
    names: tuple[str, ...]
    folder: Path


def open_codes(crop: Crop, voxel_size_nm: NmZYX, cache: Path, logic: Logic | None = None) -> CropCodes:
    """Return the label codes of a crop at that voxel size, from the cache or built into it.

    With `logic` they speak of every class of its table: what was annotated and what follows. Without it they are the
    annotation as it stands, which there is at the crop's own voxel size alone.
    """
    grid = crop.grid.at_voxel_size(voxel_size_nm)
    key = _content_key(crop)
    annotated = tuple(label.name for label in crop.labels)
    own = _Entry(crop, crop.grid, annotated, cache / "codes" / _entry_name(key, crop.grid))

    def from_labels(writer: CodeWriter) -> None:
        encode_labels(crop, writer, checksums_in(cache))

    if grid == crop.grid:
        return _completed(_opened(own, from_labels), logic)
    if logic is None:
        raise ValueError(f"{crop.name} at {voxel_size_nm} nm needs logic: nothing follows from coarse states")

    def from_codes(writer: CodeWriter) -> None:
        fine = _completed(_opened(own, from_labels), logic)
        encode_codes(Fine(fine.grid, lambda box: fine.codes_ZYX[box.slices], fine.states_CK), grid, writer)

    other = _Entry(crop, grid, logic.names, cache / "codes" / _entry_name(key + logic.key, grid))
    return _opened(other, from_codes)._replace(logic=logic)


def _completed(codes: CropCodes, logic: Logic | None) -> CropCodes:
    """Return the same codes with what follows from the annotation, for all classes of the table."""
    if logic is None:
        return codes
    states, _ = logic.complete(logic.rows(codes.states_CK, codes.names))
    return codes._replace(names=logic.names, states_CK=states, logic=logic)


def _opened(entry: _Entry, encode: Callable[[CodeWriter], None]) -> CropCodes:
    for _ in range(ATTEMPTS):
        if not entry.folder.exists():
            _build_into(entry, encode)
        try:
            return _read_entry(entry)
        except FileNotFoundError:  # somebody is deleting it, or began to
            shutil.rmtree(entry.folder, ignore_errors=True)
        except DAMAGE as error:
            what = f"damaged code cache ({error})"
            raise DataError(entry.folder, what, "delete this folder; it is built anew") from None
    raise _removed(entry.folder)


def _removed(folder: Path) -> DataError:
    return DataError(folder, f"was removed {ATTEMPTS} times while it was in use", "stop what deletes the cache")


def _read_entry(entry: _Entry) -> CropCodes:
    crop, grid, names, folder = entry
    table = json.loads((folder / "table.json").read_bytes())
    states, histogram = np.array(table["states"], dtype=np.uint8), np.array(table["voxels"], dtype=np.int64)
    codes, counts = _header(folder / "codes.npy"), _header(folder / "counts.npy")
    expected = (grid.shape_zyx, (len(index_blocks(grid.shape_zyx)), len(states)), (len(states), len(names)))
    if (codes.shape, counts.shape, states.shape) != expected:
        raise ValueError(f"shapes {codes.shape}, {counts.shape}, {states.shape} instead of {expected}")
    if tuple(table["names"]) != names:
        raise ValueError(f"classes {', '.join(table['names'])} instead of {', '.join(names)}")
    if codes.dtype != (np.uint8 if len(states) <= 256 else np.uint16) or counts.dtype != np.uint32:
        raise ValueError(f"dtypes {codes.dtype}, {counts.dtype}")
    if histogram.shape != (len(states),) or (histogram < 1).any() or histogram.sum() != math.prod(grid.shape_zyx):
        raise ValueError(f"{histogram.sum()} voxels are counted instead of {math.prod(grid.shape_zyx)}")
    undeclared = {str(name): int(n) for name, n in table["undeclared"].items()}
    return CropCodes(grid, names, states, histogram, crop, folder, codes, counts, undeclared)


def _header(path: Path) -> _Stored:
    """Read where the array of a .npy file lies; ValueError unless the file is exactly as long as that says."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
        raise ValueError(f"{path.name} is no plain array")
    length = path.stat().st_size
    if length != array.offset + array.nbytes:
        raise ValueError(f"{path.name} has {length} bytes instead of {array.offset + array.nbytes}")
    return _Stored(path, array.dtype, array.shape, array.offset)


class IndexBlocks:
    """The index blocks of a code volume in raster order, each computed when asked for."""

    def __init__(self, shape_zyx: VoxelsZYX) -> None:
        self._shape = shape_zyx
        self._counts = [-(-n // b) for n, b in zip(shape_zyx, INDEX_BLOCK, strict=True)]

    def __len__(self) -> int:
        return math.prod(self._counts)

    def __iter__(self) -> Iterator[Box]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Box:
        place = range(len(self))[index]
        _, ny, nx = self._counts
        start = [i * b for i, b in zip((place // (ny * nx), place // nx % ny, place % nx), INDEX_BLOCK, strict=True)]
        stop = [a + b for a, b in zip(start, INDEX_BLOCK, strict=True)]
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        return box.clip(Box.whole(self._shape))


def index_blocks(shape_zyx: VoxelsZYX) -> IndexBlocks:
    """Return the index blocks of a code volume, in the order of the rows of `counts_BC`."""
    return IndexBlocks(shape_zyx)


def _content_key(crop: Crop) -> bytes:
    """Return a digest of what its values mean, where the annotation lies, and name, size and time of its files."""
    digest = hashlib.sha256(repr((CODES_VERSION, crop.grid)).encode())
    if any(crop.start_zyx):
        digest.update(repr(crop.start_zyx).encode())
    for label in crop.labels:
        digest.update(repr((label.name, label.instance, label.absent, label.unknown, label.present)).encode())
        digest.update(str(label.path.resolve()).encode())
        try:
            digest.update(repr(sorted(_files(str(label.path), ""))).encode())
        except OSError as error:
            raise DataError(label.path, f"cannot be listed ({error.strerror})", "restore it") from None
    return digest.digest()


def _files(folder: str, below: str) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(entry.path, f"{below}{entry.name}/")
            else:
                status = entry.stat()
                yield f"{below}{entry.name}", status.st_size, status.st_mtime_ns


def _entry_name(key: bytes, grid: Grid) -> str:
    return hashlib.sha256(key + repr(grid).encode()).hexdigest()[:32]


def _build_into(entry: _Entry, encode: Callable[[CodeWriter], None]) -> None:
    """Build in a temporary folder and rename it; processes that want the same entry wait for the first.

    Where files cannot be locked two may build at once; then the first to finish wins.
    """
    folder = entry.folder
    for _ in range(ATTEMPTS):
        with alone(folder.with_name(f".lock-{folder.name}"), "choose another --cache") as held:
            for left in folder.parent.glob(f".building-{folder.name}-*") if held else ():  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
            if folder.exists():
                return
            temporary = folder.with_name(f".building-{folder.name}-{secrets.token_hex(8)}")
            try:
                temporary.mkdir(parents=True)  # not by mkdtemp: others may share the cache
                _build(entry, temporary, encode)
                os.rename(temporary, folder)
                return
            except OSError as error:
                if (folder / "table.json").exists():
                    return
                if error.errno not in DELETING:
                    raise DataError(folder.parent, f"cannot be written ({error})", "choose another --cache") from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    raise _removed(folder)


def _build(entry: _Entry, folder: Path, encode: Callable[[CodeWriter], None]) -> None:
    writer = CodeWriter(folder, entry.grid.shape_zyx, entry.crop.name)
    encode(writer)
    states, histogram = writer.finish()
    table = {
        "crop": entry.crop.name,
        "names": entry.names,
        "states": states.tolist(),
        "voxels": histogram.tolist(),
        "undeclared": writer.undeclared,
    }
    write_atomically(folder / "table.json", json.dumps(table).encode())
