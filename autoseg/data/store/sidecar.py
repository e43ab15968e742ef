"""What the stored bytes of an array were when it was fingerprinted: a crc32 per file, in a sidecar beside the data.

A flipped bit in a chunk often decodes to other voxels without an error; against its checksum it cannot pass. One
small file per array in a folder of the cache, never in the data: rows of `ROW` and, at the end, a crc32 of the rows. It
also holds size and time of each file, so that only what changed is read again::

    record   a file that is new            -> its checksum is written down (once it was decoded)
             a file as old as its record   -> nothing is read
             other bytes than recorded     -> DamageError
    read     other bytes than recorded     -> DamageError

An array of which both metadata files and every recorded chunk have another time was written anew, as `autoseg import`
does: its record is void.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.store.layout import Layout, metadata_checksum
from autoseg.errors import DamageError, DataError
from autoseg.geometry import VoxelsZYX

ROW = np.dtype([("file", "<i8"), ("size", "<i8"), ("mtime_ns", "<i8"), ("crc32", "<u4")])
METADATA = -1
FOLDER = "checksums"
ATTEMPTS = 10


class Entry(NamedTuple):
    """One stored file as it was; of the metadata: when the group's and the array's were written, and their crc32."""

    size: int
    mtime_ns: int
    crc32: int


class Recorded:
    """The files of one array as they were: checks bytes, metadata and absence against it."""

    def __init__(self, array: Path, folder: Path, rows: dict[int, Entry]) -> None:
        self.array, self.folder, self.rows = array, folder, rows

    def check_metadata(self) -> None:
        """Raise DamageError if the array's metadata mean something else now."""
        if METADATA in self.rows and self.rows[METADATA].crc32 != metadata_checksum(self.array):
            raise self._damage("its metadata is not what was fingerprinted", "its metadata")

    def check(self, layout: Layout, unit: VoxelsZYX, raw: bytes | None) -> None:
        """Raise DamageError if the bytes of that file (None: there is no file) are not those recorded, if any are."""
        entry = self.rows.get(linear(layout, unit))
        if entry is None:
            return
        name = layout.file_name(unit)
        if raw is None:
            raise self._damage(f"chunk {name} is gone since it was fingerprinted", "the file")
        if len(raw) != entry.size or zlib.crc32(raw) != entry.crc32:
            raise self._damage(f"chunk {name} is not what was fingerprinted", "the file")

    def check_some(self) -> None:
        """Raise DamageError if any chunk was recorded; called where none is stored any more."""
        if set(self.rows) - {METADATA}:
            raise self._damage("not one chunk is stored any more", "the files")

    def _damage(self, what: str, lost: str) -> DamageError:
        return DamageError(self.array, what, f"restore {lost}; if you changed the data yourself, delete {self.folder}")


class Checksums:
    """The sidecar files of all arrays, in one folder of the cache; deleting it is always safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, array: Path, layout: Layout) -> Recorded:
        """Return what was recorded of that array, nothing if it never was or if it was written anew since then.

        DataError for a damaged sidecar.
        """
        path = self._path(array)
        try:
            content = path.read_bytes()
            body, own = content[:-4], content[-4:]
            if zlib.crc32(body).to_bytes(4, "little") != own:
                raise ValueError(f"its own checksum does not fit its {len(content)} bytes")
            table = np.frombuffer(body, ROW).tolist()
        except FileNotFoundError:
            return Recorded(array, self.folder, {})
        except (OSError, ValueError) as error:
            raise DataError(path, f"damaged checksums ({error})", "delete this file; it is written anew") from None
        rows = {file: Entry(size, mtime_ns, crc32) for file, size, mtime_ns, crc32 in table}
        return Recorded(array, self.folder, {} if _written_anew(array, layout, rows) else rows)

    def record(
        self,
        array: Path,
        layout: Layout,
        units: Iterable[VoxelsZYX],
        decode: Callable[[VoxelsZYX, bytes], Any] | None = None,
    ) -> bytes:
        """Record those files that are not yet; return the digest of their bytes and of the metadata, place-free.

        `decode` is called with each new file, to raise DataError for one that holds no chunk.
        """
        known = self.of(array, layout)
        files = _status(array, layout, units)
        rows = dict(known.rows)
        group_time, array_time = _metadata_times(array)
        if METADATA not in rows or rows[METADATA][:2] != (group_time, array_time):
            known.check_metadata()
            rows[METADATA] = Entry(group_time, array_time, metadata_checksum(array))
        for file, (unit, status) in files.items():
            old = rows.get(file)
            if old is not None and status is not None and (old.size, old.mtime_ns) == status:
                continue
            raw = _read(array / layout.file_name(unit)) if status is not None else None
            known.check(layout, unit, raw)
            if raw is None:
                continue
            if old is None and decode is not None:
                decode(unit, raw)
            size, mtime_ns = status or (len(raw), 0)
            rows[file] = Entry(size, mtime_ns, zlib.crc32(raw))
        new = {file: entry for file, entry in rows.items() if known.rows.get(file) != entry}
        if new:
            path = self._path(array)
            with alone(path.with_suffix(".lock"), "choose another --cache"):  # others may have recorded meanwhile
                _write(path, self.of(array, layout).rows | new)
        return _digest(rows, files)

    def _path(self, array: Path) -> Path:
        return self.folder / f"{hashlib.sha256(os.path.abspath(array).encode()).hexdigest()[:32]}.crc"


def checksums_in(cache: Path) -> Checksums:
    """Return the checksums of stored chunks that the cache holds."""
    return Checksums(cache / FOLDER)


@contextlib.contextmanager
def alone(lock: Path, remedy: str) -> Iterator[bool]:
    """Hold a lock file, made for that long; yield whether it is held: not every file system has locks.

    DataError with that remedy where it cannot be made.
    """
    handle = _made(lock, remedy)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _made(lock: Path, remedy: str) -> int | None:
    """Lock that file in its folder, which somebody may be deleting."""
    for attempt in range(ATTEMPTS):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            return _locked(lock)
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or attempt == ATTEMPTS - 1:
                raise DataError(lock.parent, f"cannot be written ({error.strerror})", remedy) from None
    return None


def _locked(path: Path) -> int | None:
    """Return an open, locked file at that path; None where the file system has no locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except OSError:
            os.close(handle)
            return None
        os.close(handle)  # whoever held it is done and removed it


def linear(layout: Layout, unit: VoxelsZYX) -> int:
    """Return the number of that file in raster order."""
    _, ny, nx = layout.unit_counts
    return (unit[0] * ny + unit[1]) * nx + unit[2]


_Files = dict[int, tuple[VoxelsZYX, tuple[int, int] | None]]


def _status(array: Path, layout: Layout, units: Iterable[VoxelsZYX]) -> _Files:
    """Return (index, (size, mtime) or None if not stored) of each file."""
    found: _Files = {}
    root = str(array)
    for unit in units:
        try:
            status = os.stat(f"{root}/{layout.file_name(unit)}")
            found[linear(layout, unit)] = (unit, (status.st_size, status.st_mtime_ns))
        except (FileNotFoundError, NotADirectoryError):
            found[linear(layout, unit)] = (unit, None)
    return found


def _written_anew(array: Path, layout: Layout, before: dict[int, Entry]) -> bool:
    """Return whether both metadata files and every recorded chunk have another time; damage does not do that."""
    group_time, array_time = _metadata_times(array)
    if METADATA not in before or before[METADATA].size == group_time or before[METADATA].mtime_ns == array_time:
        return False
    _, ny, nx = layout.unit_counts
    for file, entry in before.items():
        if file != METADATA:
            unit = (file // (ny * nx), file // nx % ny, file % nx)
            if _time(f"{array}/{layout.file_name(unit)}") == entry.mtime_ns:
                return False
    return True


def _metadata_times(array: Path) -> tuple[int, int]:
    """Return when the metadata of the multiscale group and of the array (two files: the sum) were written, or 0."""
    return (
        _time(f"{array.parent}/.zattrs") or _time(f"{array.parent}/zarr.json"),
        (_time(f"{array}/.zarray") or _time(f"{array}/zarr.json")) + _time(f"{array}/.zattrs"),
    )


def _time(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "restore the file") from None


def _digest(rows: dict[int, Entry], files: _Files) -> bytes:
    chosen = [(file, rows[file].size, rows[file].crc32) for file in sorted(files) if file in rows]
    return hashlib.sha256(repr((rows[METADATA].crc32, chosen)).encode()).digest()


def _write(path: Path, rows: dict[int, Entry]) -> None:
    """Write the table so that a reader sees the old one or the new one."""
    table: NDArray[Any] = np.array([(file, *entry) for file, entry in sorted(rows.items())], ROW)
    content = table.tobytes() + zlib.crc32(table.tobytes()).to_bytes(4, "little")
    for attempt in range(ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                os.fchmod(handle, 0o644)  # others may share the cache
            os.replace(temporary, path)
            return
        except OSError as error:  # of a folder that somebody deletes, once more
            if not isinstance(error, FileNotFoundError) or attempt == ATTEMPTS - 1:
                raise DataError(
                    path.parent, f"cannot be written ({error.strerror})", "choose another --cache"
                ) from None
