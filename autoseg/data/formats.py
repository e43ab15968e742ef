"""Volumes in people's files: TIFF, HDF5, NIfTI, npy and PNG, read and written slab by slab."""

import glob
import gzip
import itertools
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4
from xml.etree import ElementTree

import numpy as np
from numpy.typing import DTypeLike, NDArray

from autoseg.errors import DataError

if TYPE_CHECKING:
    import tifffile

Zyx = tuple[int, int, int]
VoxelNm = tuple[float, float, float]
_Matches = dict[tuple[str, ...], str]

_MAX_PLANE_BYTES = 2**34
_MAX_VOLUME_BYTES = 2**50
_BIGTIFF_BYTES = 3_500_000_000
_OME_DTYPES = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64")
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
_WILDCARDS = re.compile(r"\*\*/|(?:\*|\?|\[!?\]?[^\]]*\])+")


@dataclass(slots=True)
class Volume:
    """Hold an open array of axes z, y, x that is read slab by slab; refuse what cannot be an image."""

    name: str
    shape_zyx: Zyx
    dtype: np.dtype[Any]
    voxel_size_nm: VoxelNm | None
    _fetch: Callable[[int, int], NDArray[Any]] | None = field(repr=False)
    _files: ExitStack = field(default_factory=ExitStack, repr=False)
    stored_dtype: np.dtype[Any] = field(init=False)

    def __post_init__(self) -> None:
        """Settle the dtype; raise DataError for an empty, monstrous or non-numeric array."""
        self.stored_dtype = np.dtype(self.dtype).newbyteorder("=")
        self.dtype = _plain_dtype(self.name, self.stored_dtype)
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
        with _door(self.name):
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


def open_volume(spec: str | Path) -> Volume:
    """Open FILE, FILE:key or a glob of 2D slices as one volume; raise DataError saying what to do."""
    file, key = _split_key(str(spec))
    if not _is_glob(file):
        return _open_file(file, key)
    paths = list(_matches(file).values())
    return _open_file(paths[0], key) if len(paths) == 1 else _open_stack(file, paths)


def in_memory(name: str, array_ZYX: NDArray[Any]) -> Volume:  # noqa: N803
    """Return an array of axes z, y, x as a volume."""
    z, y, x = array_ZYX.shape
    return Volume(name, (z, y, x), array_ZYX.dtype, None, lambda start, stop: array_ZYX[start:stop])


def expand_globs(em: str, others: Mapping[str, str]) -> list[dict[str, str]]:
    """Pair the volumes of globs by what `*` matched, one dict a volume; raise DataError for one unpaired."""
    file, key = _split_key(em)
    alone = [{"em": em, **others, "match": ""}]
    if not _is_glob(file):
        return alone
    ems = _matches(file)
    is_stack = _is_slice(next(iter(ems.values())), key)
    specs = {"em": {groups: _joined(path, key) for groups, path in ems.items()}}
    for name, spec in others.items():
        other, other_key = _split_key(spec)
        if _is_glob(other):
            found = _matches(other)
            _refuse_unpaired(ems, found, other)
            _refuse_unpaired(found, ems, file)
            specs[name] = {groups: _joined(path, other_key) for groups, path in found.items()}
        elif not is_stack:
            what = f"is one {name} file for the several volumes of {em}"
            raise DataError(spec, what, "put a * where the volumes' names differ")
    if is_stack:
        return alone
    names = {groups: "_".join(groups).replace("/", "_") for groups in ems}
    if len(set(names.values())) < len(names):
        raise DataError(em, "its wildcards match several files by the same text", "use a single *")
    return [
        {name: found[groups] for name, found in specs.items()} | {"match": match} for groups, match in names.items()
    ]


def write_tiff(
    path: Path,
    shape_zyx: Zyx,
    dtype: DTypeLike,
    slabs: Iterable[NDArray[Any]],
    voxel_size_nm: VoxelNm,
) -> None:
    """Stream slabs (planes, y, x) into a zlib OME-TIFF, all or nothing; raise DataError if it cannot be."""
    import tifffile

    stored = _plain_dtype(path, dtype)
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
    shape_zyx: Zyx,
    dtypes: Mapping[str, DTypeLike],
    slabs: Iterable[Mapping[str, NDArray[Any]]],
    voxel_size_nm: VoxelNm,
) -> None:
    """Stream slabs {key: (planes, y, x)} into gzip datasets of one file; raise DataError if it cannot be."""
    import h5py  # type: ignore[import-untyped]

    stored = {key: _plain_dtype(path, dtype) for key, dtype in dtypes.items()}
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
                file[key][start : start + len(planes)] = planes


def _fitting(
    slabs: Iterable[Mapping[str, NDArray[Any]]], shape_zyx: Zyx, dtypes: Mapping[str, np.dtype[Any]]
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
        what = f"cannot be written ({_reason(error)})"
        raise DataError(path, what, "check that the folder exists, is writable and has space") from error
    finally:
        part.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Return one line that says what a library raised."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _door(where: str) -> Iterator[None]:
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
        raise DataError(where, f"cannot be read ({_reason(error)})", remedy) from error
    finally:
        logger.removeFilter(hush)


def _plain_dtype(where: str | Path, dtype: DTypeLike) -> np.dtype[Any]:
    """Return the native dtype that holds such voxels, bool as uint8; raise DataError unless they are real."""
    stored = np.dtype(dtype).newbyteorder("=")
    if stored.kind not in "buif" or stored.itemsize > 8:
        raise DataError(where, f"holds voxels of type {stored}", "save one channel of whole or real numbers")
    return np.dtype(np.uint8) if stored.kind == "b" else stored


def _split_key(spec: str) -> tuple[str, str | None]:
    """Split FILE.h5:key; any other colon belongs to the path."""
    found = re.fullmatch(r"(.+?\.(?:h5|hdf5|hdf|he5)):(.+)", spec, re.IGNORECASE)
    file, key = found.groups() if found else (spec, None)
    return str(Path(file).expanduser()), key


def _joined(path: str, key: str | None) -> str:
    return path if key is None else f"{path}:{key}"


def _is_glob(file: str) -> bool:
    return glob.has_magic(file) and not os.path.exists(file)


def _natural(text: str) -> list[str | int]:
    """Return a sort key in which slice_2 comes before slice_10."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"([0-9]+)", text))]


def _matches(pattern: str) -> _Matches:
    """Return {what each run of wildcards matched: file} in natural order; raise DataError for no file."""
    pattern = pattern.replace(os.sep, "/")
    regex, end = "", 0
    for found in _WILDCARDS.finditer(pattern):
        group = "(.*/|)" if found[0] == "**/" else "(.*)" if "**" in found[0] else "([^/]*)"
        regex += re.escape(pattern[end : found.start()]) + group
        end = found.end()
    regex += re.escape(pattern[end:])
    matches = {}
    for path in sorted(glob.glob(pattern, recursive=True), key=lambda path: (_natural(path), path)):
        if match := re.fullmatch(regex, path.replace(os.sep, "/"), re.IGNORECASE | re.DOTALL):
            matches[match.groups()] = path
    if not matches:
        raise DataError(pattern, "matches no file", "check the folder and the spelling")
    return matches


def _refuse_unpaired(files: _Matches, partners: _Matches, pattern: str) -> None:
    for groups, path in files.items():
        if groups not in partners:
            what = f"has no partner in {pattern}, where * would be {'_'.join(groups)!r}"
            raise DataError(path, what, "add the missing file, or write globs whose * match the same text")


def _is_slice(path: str, key: str | None) -> bool:
    if not path.lower().endswith((*_TIFF, *_PNG)):
        return False
    with _open_file(path, key) as volume:
        return volume.shape_zyx[0] == 1


def _open_file(path: str, key: str | None = None) -> Volume:
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
        with _door(_joined(path, key)):
            volume = opener(path, key, files)
        volume._files = files.pop_all()
    return volume


def _open_stack(pattern: str, paths: Sequence[str]) -> Volume:
    """Open 2D files of one shape and dtype as the planes of one volume; raise DataError for an odd one."""
    with _open_file(paths[0]) as first:
        alike = f"{paths[0]} is {first.stored_dtype} of {first.shape_zyx[1:]}"
    for path in paths:
        with _open_file(path) as one:
            if one.shape_zyx[0] != 1 or not path.lower().endswith((*_TIFF, *_PNG)):
                what = f"is a volume of shape {one.shape_zyx}, but {pattern} should be a stack of slices"
                raise DataError(path, what, "name a single volume, or match 2D TIFF or PNG files only")
            if one.shape_zyx != first.shape_zyx or one.stored_dtype != first.stored_dtype:
                what = f"is {one.stored_dtype} of {one.shape_zyx[1:]}, {alike}"
                raise DataError(path, what, "save all slices alike, or narrow the glob")

    def plane(at: int) -> NDArray[Any]:
        with _open_file(paths[at]) as volume:
            return volume.read(0, 1).squeeze(0)

    shape = (len(paths), *first.shape_zyx[1:])
    return Volume(pattern, shape, first.stored_dtype, first.voxel_size_nm, _by_plane(plane))


def _by_plane(plane: Callable[[int], NDArray[Any]]) -> Callable[[int, int], NDArray[Any]]:
    """Return a reader of slabs from a reader of planes, each (y, x)."""
    return lambda start, stop: np.stack([plane(at) for at in range(start, stop)])


def _from_array(name: str, source: Any, dtype: Any, voxel_size_nm: VoxelNm | None, is_xyz: bool = False) -> Volume:
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


def _open_npy(path: str, _: str | None, files: ExitStack) -> Volume:
    array = np.lib.format.open_memmap(path, mode="r")
    return _from_array(path, array, array.dtype, None)


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
    return _from_array(path, source, first_voxel.dtype, voxel, is_xyz=True)


def _open_png(path: str, _: str | None, files: ExitStack) -> Volume:
    from PIL.PngImagePlugin import PngImageFile

    # not Image.open, which takes a plane beyond 89 megapixels for an attack
    image = files.enter_context(PngImageFile(path))
    if image.mode not in _PNG_DTYPES or getattr(image, "n_frames", 1) > 1:
        what = f"has shape {image.size[::-1]} of mode {image.mode}"
        raise DataError(path, what, "save one channel, as 8 or 16 bit greyscale")
    width, height = image.size
    dtype = np.dtype(_PNG_DTYPES[image.mode])
    return Volume(path, (1, height, width), dtype, None, _by_plane(lambda _: np.asarray(image)))


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
    return _from_array(f"{path}:{key}", found, found.dtype, voxel)


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
        fetch = _by_plane(lambda at: _whole(pages[at]).asarray())
        return Volume(path, (z, y, x), image.dtype, _tiff_voxel(tif), fetch)
    if (offset := tif.series[0].dataoffset) is None:
        raise DataError(path, f"holds {num_pages} pages for {z} planes", "export it again, one page a plane")
    # ImageJ describes a stack beyond 4 GB by its first page alone
    stored = image.dtype.newbyteorder(tif.byteorder)
    array = np.memmap(path, stored, "r", offset, (z, y, x))
    return _from_array(path, array, stored, _tiff_voxel(tif))


def _whole(page: "tifffile.TiffPage | tifffile.TiffFrame | None") -> "tifffile.TiffPage | tifffile.TiffFrame":
    """Return the page; raise ValueError for one that is not all there: tifffile would fill in zeros."""
    if page is None:
        raise ValueError("a plane lies in no page")
    ends = map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends, default=0) > page.parent.filehandle.size:
        raise ValueError("the file is cut off")
    return page


def _tiff_voxel(tif: "tifffile.TiffFile") -> VoxelNm | None:
    if tif.is_ome and tif.ome_metadata:
        pixels = ElementTree.fromstring(tif.ome_metadata).find(".//{*}Pixels")
        given = {} if pixels is None else pixels.attrib
        units = [given.get(f"PhysicalSize{axis}Unit", "um") for axis in "ZYX"]
        return _declared([given.get(f"PhysicalSize{axis}") for axis in "ZYX"], units)
    info = tif.imagej_metadata if tif.is_imagej else None
    if not info:
        return None
    x, y = (pixels and 1 / pixels for pixels in tif.pages.first.resolution)
    return _declared([info.get("spacing"), y, x], [str(info.get("unit"))] * 3)


def _declared(sizes: Any, units: Sequence[str]) -> VoxelNm | None:
    """Return what a file declares of z, y, x in nm, or None if that makes no sense."""
    try:
        z, y, x = (float(size) * _UNIT_NM[unit.lower()] for size, unit in zip(sizes, units, strict=True))
    except (TypeError, ValueError, KeyError):
        return None
    return (z, y, x) if all(0 < size < math.inf for size in (z, y, x)) else None


_TIFF, _PNG = (".tif", ".tiff", ".btf", ".tf8"), (".png",)
_OPENERS: dict[tuple[str, ...], Callable[[str, str | None, ExitStack], Volume]] = {
    _TIFF: _open_tiff,
    (".h5", ".hdf5", ".hdf", ".he5"): _open_hdf5,
    (".nii", ".nii.gz"): _open_nifti,
    (".npy",): _open_npy,
    _PNG: _open_png,
}
