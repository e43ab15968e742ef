"""An open volume: what it is, and its planes slab by slab."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from autoseg.errors import DataError
from autoseg.geometry import NmZYX, VoxelsZYX

_MAX_PLANE_BYTES = 2**34
_MAX_VOLUME_BYTES = 2**50


@dataclass(slots=True)
class Volume:
    """Hold an open array of axes z, y, x that is read slab by slab; refuse what cannot be an image."""

    name: str
    shape_zyx: VoxelsZYX
    dtype: np.dtype[Any]
    voxel_size_nm: NmZYX | None
    _fetch: Callable[[int, int], NDArray[Any]] | None = field(repr=False)
    _files: ExitStack = field(default_factory=ExitStack, repr=False)
    is_palette: bool = False
    stored_dtype: np.dtype[Any] = field(init=False)

    def __post_init__(self) -> None:
        """Settle the dtype; raise DataError for an empty, monstrous or non-numeric array."""
        self.stored_dtype = np.dtype(self.dtype).newbyteorder("=")
        self.dtype = plain_dtype(self.name, self.stored_dtype)
        plane = math.prod(self.shape_zyx[1:]) * self.dtype.itemsize
        size = self.shape_zyx[0] * plane
        if min(self.shape_zyx) < 1:
            raise DataError(self.name, f"is empty, of shape {self.shape_zyx}", "export the volume again")
        if plane > _MAX_PLANE_BYTES or size > _MAX_VOLUME_BYTES:
            what = f"declares a shape of {self.shape_zyx} {self.dtype}, beyond 16 GiB a plane or 1 PiB in all"
            raise DataError(self.name, what, "check its header, or cut it into smaller volumes")

    def read(self, z_start: int, z_stop: int) -> NDArray[Any]:
        """Return planes z_start to z_stop, shape (planes, y, x), C-contiguous; raise DataError if damaged."""
        if self._fetch is None or not 0 <= z_start < z_stop <= self.shape_zyx[0]:
            raise ValueError(f"{self.name}: no planes {z_start}:{z_stop} to read")
        with reading(self.name):
            slab = self._fetch(z_start, z_stop)
            if slab.shape != (z_stop - z_start, *self.shape_zyx[1:]):
                raise ValueError(f"planes {z_start}:{z_stop} have shape {slab.shape}")
            return np.require(slab, self.dtype, ["C", "W", "E"])

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._fetch = None
        self._files.close()

    def __enter__(self) -> Self:
        """Return this volume."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


def in_memory(name: str, array_ZYX: NDArray[Any]) -> Volume:
    """Return an array of axes z, y, x as a volume."""
    z, y, x = array_ZYX.shape
    return Volume(name, (z, y, x), array_ZYX.dtype, None, lambda start, stop: array_ZYX[start:stop])


def from_array(name: str, source: Any, dtype: Any, voxel_size_nm: NmZYX | None, is_xyz: bool = False) -> Volume:
    """Wrap what slices like an array of axes z, y, x (or x, y, z); raise DataError unless it is 2D or 3D."""
    shape = tuple(source.shape)[:: -1 if is_xyz else 1]
    kept = list(range(len(shape)))
    for axis in kept[-1:] + kept[:-1]:
        if len(kept) > 3 and shape[axis] == 1:
            kept.remove(axis)
    if len(kept) not in (2, 3):
        raise DataError(name, f"has shape {shape}", "save one channel of one time point, 2D or 3D")

    def fetch(start: int, stop: int) -> NDArray[Any]:
        index = [slice(None) if axis in kept else 0 for axis in range(len(shape))]
        if len(kept) == 3:
            index[kept[0]] = slice(start, stop)
        block = np.asarray(source[tuple(index[:: -1 if is_xyz else 1])])
        block = block.T if is_xyz else block
        return block if len(kept) == 3 else block[None]

    z, y, x = (1, *(shape[axis] for axis in kept))[-3:]
    return Volume(name, (z, y, x), dtype, voxel_size_nm, fetch)


def by_plane(plane: Callable[[int], NDArray[Any]]) -> Callable[[int, int], NDArray[Any]]:
    """Return a reader of slabs from a reader of planes, each (y, x)."""
    return lambda start, stop: np.stack([plane(at) for at in range(start, stop)])


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn all that a file library raises, and the errors it only logs, into one DataError."""
    complaints: list[str] = []

    def hush(record: logging.LogRecord) -> bool:
        # tifffile logs lost pages as errors and goes on; a broken vendor tag costs no pixel
        if record.levelno >= logging.ERROR and "TiffTag" not in record.getMessage():
            complaints.append(record.getMessage())
        return False

    logger = logging.getLogger("tifffile")
    logger.addFilter(hush)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        if complaints:
            raise ValueError(complaints[0])
    except DataError:
        raise
    except Exception as error:
        remedy = "check that it is complete and opens elsewhere, or export it again"
        raise DataError(where, f"cannot be read ({reason(error)})", remedy) from error
    finally:
        logger.removeFilter(hush)


def reason(error: Exception) -> str:
    """Return one line that says what a library raised."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def plain_dtype(where: str | Path, dtype: DTypeLike) -> np.dtype[Any]:
    """Return the native dtype that holds such voxels, bool as uint8; raise DataError unless they are real."""
    stored = np.dtype(dtype).newbyteorder("=")
    if stored.kind not in "buif" or stored.itemsize > 8:
        raise DataError(where, f"holds voxels of type {stored}", "save one channel of whole or real numbers")
    return np.dtype(np.uint8) if stored.kind == "b" else stored
