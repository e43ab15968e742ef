"""What to predict: crops of a data set, an OME-Zarr volume, or a TIFF or HDF5 file; each with its exact grid."""

from __future__ import annotations

import glob
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autoseg.data import store
from autoseg.data.convert import VOXEL_SIZE_TOLERANCE
from autoseg.data.dataset import Dataset
from autoseg.data.formats import Volume, open_volume
from autoseg.data.writer import write_em
from autoseg.errors import DataError
from autoseg.geometry import HAIR, Box, Grid, NmZYX
from autoseg.schema import Plan, Split


class Region(NamedTuple):
    """A box of one EM volume to predict; `name` is the folder of its labels in the output, "" for a volume.

    `copy_of` says which state of which file `em` is a scratch copy of; None if `em` is the user's own.
    `remark`: where its voxel size is from, if the user should know.
    """

    name: str
    em: Path
    grid: Grid
    copy_of: str | None = None
    remark: str = ""


def crop_regions(split: Split, dataset: Dataset, which: str) -> list[Region]:
    """Return the crops named by `validate`, `all` or by number or name such as "3,a/crop7"; `split` is the run's."""
    validate = {region.crop for region in split.validate}
    if which == "validate":
        chosen = [crop for crop in dataset.crops if crop.name in validate]
        if not chosen:
            raise DataError(dataset.root, "none of its crops validated this run", "use --crops all")
    elif which == "all":
        chosen = list(dataset.crops)
    else:
        wanted = {_the_crop(dataset, word.strip(), which) for word in which.split(",")}
        chosen = [crop for crop in dataset.crops if crop.name in wanted]
    return [Region(crop.name, crop.em, crop.grid) for crop in chosen]


def _the_crop(dataset: Dataset, word: str, which: str) -> str:
    """Return the name of the one crop of that number, or of that name `volume/cropN`."""
    wanted = word if "/" in word else f"crop{word}"
    found = [crop.name for crop in dataset.crops if wanted in (crop.name, crop.name.rsplit("/", 1)[1])]
    if not found:
        raise DataError(f"--crops {which}", f"no {wanted} in {dataset.root}", "use validate, all or N,N")
    if len(found) > 1:
        raise DataError(f"--crops {which}", f"{word} is {' and '.join(found)}", f"name the one, such as {found[0]}")
    return found[0]


def volume_regions(dataset: Dataset) -> list[Region]:
    """Return the EM volumes of a data set without crops, whole."""
    found = [Region(name, em, store.open_multiscale(em).levels[0].grid) for name, em in dataset.volumes.items()]
    if not found:
        raise DataError(dataset.root, "holds no EM volume", "import one with `autoseg import`")
    return found


def file_region(plan: Plan, spec: str, scratch: Path, voxel_size_nm: NmZYX | None = None) -> Region:
    """Return the EM of a zarr group, or of a TIFF, HDF5, NIfTI, npy or PNG file copied into `scratch` first.

    `voxel_size_nm` is for a file that declares a wrong one; without it, a file that declares none is taken to have
    that of the EM the plan was made for. The copy belongs to the caller alone, who removes it when done (`drop_copy`):
    it is cheap to make again beside the prediction.
    """
    path = Path(spec)
    if path.is_dir():
        if voxel_size_nm:
            raise DataError("--voxel-size-nm", f"{spec} is a zarr, which says its own", "correct its .zattrs instead")
        group = path if _is_multiscale(path) else _find_multiscale(path)
        return Region("", group, store.open_multiscale(group).levels[0].grid)
    with open_volume(spec) as volume:
        voxel_size = voxel_size_nm or volume.voxel_size_nm or plan.em_voxel_size_nm
        remark = _size_remark(volume, voxel_size_nm, plan.em_voxel_size_nm)
        scratch.mkdir(parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(prefix="em-", dir=scratch))
        try:
            write_em(volume, copy, voxel_size)
            grid = store.open_multiscale(copy).levels[0].grid
            return Region("", copy, grid, _identity(spec, voxel_size), remark)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise


def _size_remark(volume: Volume, given_nm: NmZYX | None, learnt_nm: NmZYX) -> str:
    """Return what the user should know about the voxel size of a file, "" if it is as expected."""
    declared, name = volume.voxel_size_nm, volume.name
    if declared is None:
        return "" if given_nm else f"{name} declares no voxel size: {_nm(learnt_nm)} assumed, as in training"
    if np.allclose(declared, given_nm or learnt_nm, rtol=VOXEL_SIZE_TOLERANCE):
        return ""
    if given_nm:
        return f"{name} declares {_nm(declared)}; --voxel-size-nm was taken"
    learnt = f"the run learnt from EM of {_nm(learnt_nm)}"
    return f"{name} declares {_nm(declared)}, {learnt}: pass --voxel-size-nm if the file is wrong"


def _nm(size_nm: NmZYX) -> str:
    return " x ".join(f"{v:g}" for v in size_nm) + " nm"


def drop_copy(region: Region) -> None:
    """Remove the EM of a region if it is a copy that `file_region` made, never the user's own."""
    if region.copy_of is not None:
        shutil.rmtree(region.em, ignore_errors=True)


def files_of(spec: str) -> list[Path]:
    """Return the files that FILE, FILE:key or a glob names; none if they are not there."""
    spec = os.path.expanduser(spec)
    file = spec if os.path.exists(spec) else spec.rsplit(":", 1)[0]
    return [Path(file)] if os.path.exists(file) else [Path(found) for found in sorted(glob.glob(file, recursive=True))]


def cut_roi(region: Region, roi_nm: Sequence[tuple[float, float]]) -> Region:
    """Return the part of the region inside the box given as (start, stop) in nm for z, y, x.

    A voxel belongs to it whose centre is not below start, and below stop: a box of n voxels' lengths holds n.
    """
    start, stop = [], []
    for (low, high), corner, v, n in zip(
        roi_nm, region.grid.corner_nm, region.grid.voxel_size_nm, region.grid.shape_zyx, strict=True
    ):
        if not low < high:
            raise DataError("--roi-nm", f"{low:g}:{high:g}", "write start:stop with start below stop")
        start.append(min(max(math.ceil((low - corner) / v - 0.5 - HAIR), 0), n))
        stop.append(min(max(math.ceil((high - corner) / v - 0.5 - HAIR), 0), n))
    box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    if box.num_voxels == 0:
        extent = " ".join(f"{c:g}:{c + e:g}" for c, e in zip(region.grid.corner_nm, region.grid.extent_nm, strict=True))
        raise DataError("--roi-nm", "lies outside the volume", f"it spans {extent} nm")
    return region._replace(grid=region.grid.crop(box))


def _is_multiscale(path: Path) -> bool:
    attributes = store.read_attributes(path)
    return "multiscales" in attributes or "multiscales" in attributes.get("ome", {})


def _find_multiscale(path: Path) -> Path:
    """Return the only EM group below a zarr container, so that `--volume x.zarr` works."""
    below = (f"{folder}/{file}" for folder in ("recon-*/em/*", "*") for file in (".zattrs", "zarr.json"))
    found = [
        group for group in sorted({p.parent for pattern in below for p in path.glob(pattern)}) if _is_multiscale(group)
    ]
    if not found:
        raise _no_image(path)
    if len(found) > 1:
        names = ", ".join(str(p.relative_to(path)) for p in found[:5])
        raise DataError(path, f"holds {len(found)} images: {names}", f"pass one of them, such as {found[0]}")
    return found[0]


def _no_image(path: Path) -> DataError:
    """Return what keeps a folder from being an OME-Zarr image; raise the fault of its arrays if they have one."""
    arrays = [file.parent for pattern in (".zarray", "*/.zarray") for file in sorted(path.glob(pattern))]
    for array in arrays:
        store.read_layout(array)
    if path in arrays and _is_multiscale(path.parent):
        return DataError(path, "is one resolution of an image", f"pass the folder around it: {path.parent}")
    if arrays:
        what = "holds voxels, but not how large they are (no OME-Zarr metadata: `multiscales` in .zattrs)"
        return DataError(path, what, "save it as OME-Zarr, or as TIFF or HDF5 and pass --voxel-size-nm")
    what = "holds no OME-Zarr image: a folder with .zattrs and, in s0, s1, ..., the voxels"
    return DataError(
        path, what, "pass the folder of one, such as x.zarr/recon-1/em/fibsem-uint8, or a TIFF or HDF5 file"
    )


def _identity(spec: str, voxel_size_nm: NmZYX) -> str:
    """Return what tells this content of the files from another: paths, sizes, times."""
    status = [(os.path.abspath(file), os.stat(file)) for file in files_of(spec)]
    stamps = [(file, s.st_size, s.st_mtime_ns) for file, s in status]
    return repr((os.path.abspath(spec), voxel_size_nm, stamps))
