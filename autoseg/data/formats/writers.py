"""Write volumes slab by slab into OME-TIFF and HDF5, all or nothing."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import DTypeLike, NDArray

from autoseg.data.formats.volume import plain_dtype, reason
from autoseg.errors import DataError
from autoseg.geometry import NmZYX, VoxelsZYX

_BIGTIFF_BYTES = 3_500_000_000
_OME_DTYPES = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64")


def write_tiff(
    path: Path,
    shape_zyx: VoxelsZYX,
    dtype: DTypeLike,
    slabs: Iterable[NDArray[Any]],
    voxel_size_nm: NmZYX,
) -> None:
    """Stream slabs (planes, y, x) into a zlib OME-TIFF, all or nothing; raise DataError if it cannot be."""
    import tifffile

    stored = plain_dtype(path, dtype)
    if stored.name not in _OME_DTYPES:
        remedy = f"write HDF5, or one of {', '.join(_OME_DTYPES)}"
        raise DataError(path, f"OME-TIFF has no type {stored}", remedy)
    metadata: dict[str, Any] = {"axes": "ZYX"}
    for axis, size in zip("ZYX", voxel_size_nm, strict=True):
        metadata |= {f"PhysicalSize{axis}": float(size), f"PhysicalSize{axis}Unit": "nm"}
    big = math.prod(shape_zyx) * stored.itemsize > _BIGTIFF_BYTES
    fitting = _fitting(({"": slab} for slab in slabs), shape_zyx, {"": stored})
    planes = (plane for _, slab in fitting for plane in slab[""])
    with _replacing(path) as part, tifffile.TiffWriter(part, bigtiff=big, ome=True) as writer:
        writer.write(
            planes,
            shape=shape_zyx,
            dtype=stored,
            photometric="minisblack",
            compression="zlib",
            compressionargs={"level": 4},
            metadata=metadata,
        )
        # tifffile stops at the last plane it needs: run on, so that one too many is noticed
        for _ in fitting:
            pass


def write_hdf5(
    path: Path,
    shape_zyx: VoxelsZYX,
    dtypes: Mapping[str, DTypeLike],
    slabs: Iterable[Mapping[str, NDArray[Any]]],
    voxel_size_nm: NmZYX,
    attributes: Mapping[str, Mapping[str, Any]] = {},
) -> None:
    """Stream slabs {key: (planes, y, x)} into gzip datasets of one file; raise DataError if it cannot be.

    `attributes` are of some datasets, beside the voxel size, which all have.
    """
    import h5py

    stored = {key: plain_dtype(path, dtype) for key, dtype in dtypes.items()}
    with _replacing(path) as part, h5py.File(part, "x") as file:
        for start, slab in _fitting(slabs, shape_zyx, stored):
            for key, planes in slab.items():
                if start == 0:
                    # chunks as thick as a slab, or each slab would compress its chunks anew
                    chunks = tuple(map(min, planes.shape, (16, 128, 128)))
                    how = {"chunks": chunks, "compression": "gzip", "shuffle": True}
                    made = file.create_dataset(key, shape_zyx, stored[key], **how)
                    made.attrs["resolution"] = voxel_size_nm
                    made.attrs["element_size_um"] = [size / 1e3 for size in voxel_size_nm]
                    made.attrs.update(attributes.get(key, {}))
                file[key][start : start + len(planes)] = planes


def _fitting(
    slabs: Iterable[Mapping[str, NDArray[Any]]], shape_zyx: VoxelsZYX, dtypes: Mapping[str, np.dtype[Any]]
) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Yield (first plane, slabs by key) in the stored dtype; raise ValueError unless they fill the shape."""
    start = 0
    for slab in slabs:
        shapes = {planes.shape for planes in slab.values()}
        shape = shapes.pop() if len(shapes) == 1 else ()
        if slab.keys() != dtypes.keys() or len(shape) != 3 or shape[1:] != tuple(shape_zyx[1:]):
            given = {key: planes.shape for key, planes in slab.items()}
            raise ValueError(f"slabs {given} do not fit {list(dtypes)} of shape {shape_zyx}")
        if start + shape[0] > shape_zyx[0]:
            raise ValueError(f"slabs run past the last of {shape_zyx[0]} planes")
        if shape[0]:
            yield start, {key: planes.astype(dtypes[key], "C", "safe") for key, planes in slab.items()}
        start += shape[0]
    if start != shape_zyx[0]:
        raise ValueError(f"slabs hold {start} of {shape_zyx[0]} planes")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give the name of a new file beside path that takes its place when all went well, else vanishes."""
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        what = f"cannot be written ({reason(error)})"
        raise DataError(path, what, "check that the folder exists, is writable and has space") from error
    finally:
        part.unlink(missing_ok=True)
