"""Read TIFF, HDF5, NIfTI, npy and PNG files as volumes of axes z, y, x."""

import gzip
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from autoseg.data.formats.volume import Volume, by_plane, from_array, reading
from autoseg.errors import DataError
from autoseg.geometry import NmZYX

if TYPE_CHECKING:
    import tifffile

TIFF_ENDS, PNG_ENDS = (".tif", ".tiff", ".btf", ".tf8"), (".png",)
_PNG_DTYPES = {"1": "bool", "L": "uint8", "P": "uint8", "I;16": "uint16", "I": "int32"}
_UNIT_NM = {
    **dict.fromkeys(("pm", "picometer"), 1e-3),
    **dict.fromkeys(("å", "angstrom"), 0.1),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "\\u00b5m", "micron", "microns"), 1e3),
    **dict.fromkeys(("micrometer", "micrometre"), 1e3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e6),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e7),
    **dict.fromkeys(("m", "meter", "metre"), 1e9),
}


def open_file(path: str, key: str | None = None) -> Volume:
    """Open one file; raise DataError if it is not there, of no known kind, or damaged."""
    if os.path.isdir(path):
        raise DataError(path, "is a folder", "name a file in it, or its slices by a glob such as '*.png'")
    if not os.path.exists(path):
        raise DataError(path, "no such file", "check the path; only HDF5 files take FILE:key")
    opener = next((opener for ends, opener in _OPENERS.items() if path.lower().endswith(ends)), None)
    if opener is None:
        known = " ".join(itertools.chain.from_iterable(_OPENERS))
        raise DataError(path, "is of no kind that can be read", f"convert it to one of {known}")
    with ExitStack() as files:
        with reading(joined(path, key)):
            volume = opener(path, key, files)
        volume._files = files.pop_all()
    return volume


def joined(path: str, key: str | None) -> str:
    """Return FILE or FILE:key, as a user types it."""
    return path if key is None else f"{path}:{key}"


class _Mapped:
    """An array that is mapped only while it is read: pages of a lasting map would pile up in memory."""

    def __init__(self, open_map: Callable[[], NDArray[Any]]) -> None:
        array = open_map()
        self.shape, self.dtype = array.shape, array.dtype
        self._open_map = open_map

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return np.array(self._open_map()[index], order="C")


def _open_npy(path: str, _: str | None, files: ExitStack) -> Volume:
    array = _Mapped(lambda: np.lib.format.open_memmap(path, mode="r"))
    return from_array(path, array, array.dtype, None)


def _open_nifti(path: str, _: str | None, files: ExitStack) -> Volume:
    from nibabel.loadsave import load

    if path.lower().endswith(".gz"):
        # the checksum stands at the end, where reading voxels alone never arrives
        with gzip.open(path) as packed:
            while packed.read(2**22):
                pass
    # kept open, or every slab of a .nii.gz would be unpacked from the start of the file
    image: Any = load(path, mmap=False, keep_file_open=True)
    source, header = image.dataobj, image.header
    first_voxel = np.asarray(source[(slice(0, 1),) * len(source.shape)])
    voxel = _declared(header.get_zooms()[2::-1], [header.get_xyzt_units()[0]] * 3)
    return from_array(path, source, first_voxel.dtype, voxel, is_xyz=True)


def _open_png(path: str, _: str | None, files: ExitStack) -> Volume:
    from PIL.PngImagePlugin import PngImageFile

    # not Image.open, which takes a plane beyond 89 megapixels for an attack
    image = files.enter_context(PngImageFile(path))
    if image.mode not in _PNG_DTYPES or getattr(image, "n_frames", 1) > 1:
        what = f"has shape {image.size[::-1]} of mode {image.mode}"
        raise DataError(path, what, "save one channel, as 8 or 16 bit greyscale")
    width, height = image.size
    dtype = np.dtype(_PNG_DTYPES[image.mode])
    fetch = by_plane(lambda _: np.asarray(image))
    return Volume(path, (1, height, width), dtype, None, fetch, is_palette=image.mode == "P")


def _open_hdf5(path: str, key: str | None, files: ExitStack) -> Volume:
    import h5py

    file = files.enter_context(h5py.File(path, "r"))
    found = None if key is None else file.get(key)
    if not isinstance(found, h5py.Dataset):
        keys: list[str] = []
        file.visititems(lambda key, item: keys.append(key) if getattr(item, "ndim", 0) > 1 else None)
        if key is not None or len(keys) != 1:
            what = f"has no dataset {key!r}" if key is not None else f"holds {len(keys)} image datasets"
            raise DataError(path, what, f"name one as FILE:key; it holds {', '.join(keys) or 'none'}")
        key, found = keys[0], file[keys[0]]
    voxel = None
    for attribute, unit in (("voxel_size_nm_zyx", "nm"), ("resolution", "nm"), ("element_size_um", "um")):
        voxel = voxel or _declared(found.attrs.get(attribute), [unit] * 3)
    return from_array(f"{path}:{key}", found, found.dtype, voxel)


def _open_tiff(path: str, _: str | None, files: ExitStack) -> Volume:
    import tifffile

    tif = files.enter_context(tifffile.TiffFile(path))
    first, num_pages = tif.pages.first, len(tif.pages)
    # a slice of a multi-file OME set describes the whole set: here it stands for itself
    is_of_set = "FileName=" in (tif.ome_metadata or "")
    is_plane = num_pages == 1 and first.ndim == 2 and (is_of_set or tif.series[0].ndim == 2)
    if not is_plane and len(tif.series) != 1:
        shapes = ", ".join(str(series.shape) for series in tif.series)
        raise DataError(path, f"holds {len(tif.series)} images ({shapes})", "save the one you mean alone")
    image = first if is_plane else tif.series[0]
    if not re.fullmatch("[^CS]?YX", image.axes) or image.dtype is None:
        what = f"has axes {image.axes} of shape {image.shape} and type {image.dtype}"
        raise DataError(path, what, "save one channel and one time point as a greyscale stack")
    z, y, x = (1, *image.shape)[-3:]
    pages: Sequence[Any] = [first] if is_plane else tif.series[0].pages
    if num_pages > z and len(tif.series[0].levels) == 1:
        raise DataError(path, f"holds {num_pages} pages but declares {z} planes", "export it again")
    if len(pages) == z:
        _whole(pages[z - 1])
        fetch = by_plane(lambda at: _whole(pages[at]).asarray())
        return Volume(path, (z, y, x), image.dtype, _tiff_voxel(tif), fetch)
    if (offset := tif.series[0].dataoffset) is None:
        raise DataError(path, f"holds {num_pages} pages for {z} planes", "export it again, one page a plane")
    # ImageJ describes a stack beyond 4 GB by its first page alone
    stored = image.dtype.newbyteorder(tif.byteorder)
    array = _Mapped(lambda: np.memmap(path, stored, "r", offset, (z, y, x)))
    return from_array(path, array, stored, _tiff_voxel(tif))


def _whole(page: "tifffile.TiffPage | tifffile.TiffFrame | None") -> "tifffile.TiffPage | tifffile.TiffFrame":
    """Return the page; raise ValueError for one that is not all there: tifffile would fill in zeros."""
    if page is None:
        raise ValueError("a plane lies in no page")
    ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends, default=0) > page.parent.filehandle.size:
        raise ValueError("the file is cut off")
    return page


def _tiff_voxel(tif: "tifffile.TiffFile") -> NmZYX | None:
    if tif.is_ome and tif.ome_metadata:
        # expat itself stops entity bombs, and ElementTree opens no external entity
        pixels = ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels")  # noqa: S314
        given = {} if pixels is None else pixels.attrib
        units = [given.get(f"PhysicalSize{axis}Unit", "um") for axis in "ZYX"]
        return _declared([given.get(f"PhysicalSize{axis}") for axis in "ZYX"], units)
    info = tif.imagej_metadata if tif.is_imagej else None
    if not info:
        return None
    x, y = (pixels and 1 / pixels for pixels in tif.pages.first.resolution)
    return _declared([info.get("spacing"), y, x], [str(info.get("unit"))] * 3)


def _declared(sizes: Any, units: Sequence[str]) -> NmZYX | None:
    """Return what a file declares of z, y, x in nm, or None if that makes no sense."""
    try:
        z, y, x = (float(size) * _UNIT_NM[unit.lower()] for size, unit in zip(sizes, units, strict=True))
    except (TypeError, ValueError, KeyError):
        return None
    return (z, y, x) if all(0 < size < math.inf for size in (z, y, x)) else None


_OPENERS: dict[tuple[str, ...], Callable[[str, str | None, ExitStack], Volume]] = {
    TIFF_ENDS: _open_tiff,
    (".h5", ".hdf5", ".hdf", ".he5"): _open_hdf5,
    (".nii", ".nii.gz"): _open_nifti,
    (".npy",): _open_npy,
    PNG_ENDS: _open_png,
}
