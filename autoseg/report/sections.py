"""One section of a scored crop as arrays: EM, truth, unknown and prediction, read through `autoseg.data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data import store
from autoseg.data.classes import PRESENT, UNKNOWN, Logic
from autoseg.data.codes import CropCodes, open_codes
from autoseg.data.dataset import Crop, Dataset
from autoseg.data.em import EmReader
from autoseg.errors import DataError
from autoseg.geometry import Box
from autoseg.schema import Normalization, Region

CACHE_BYTES = 128 * 2**20
MAX_SIDE = 512
Flags = NDArray[np.bool_]


class Section(NamedTuple):
    """One z section of the scored box of a crop, at most MAX_SIDE pixels a side; flags are (classes, y, x)."""

    z: int
    num_sections: int
    shape_yx: tuple[int, int]
    pixel_nm: tuple[float, float]
    em_YX: NDArray[np.uint8]
    truth_CYX: Flags
    unknown_CYX: Flags
    predicted_CYX: Flags
    partial: bool


def read_section(
    dataset: Dataset, name: str, classes: Sequence[str], prediction: Path, scored: Region, cache: Path
) -> Section:
    """Return the section with most annotated foreground of the region that was scored."""
    crop = dataset.crop(name)
    logic = Logic(dataset.table)
    codes = open_codes(crop, crop.grid.voxel_size_nm, cache, logic)
    states = codes.states_CK[:, logic.columns(classes)]
    present_C = (states == PRESENT).sum(axis=1)
    whole = Box.whole(crop.grid.shape_zyx)
    box = scored.box(crop.grid.shape_zyx).clip(whole)
    z = _richest(codes, box, present_C)
    flat = Box((z, *box.start[1:]), (z + 1, *box.stop[1:]))
    states_YXC = states[np.asarray(codes.codes_ZYX[flat.slices])[0]]
    predicted = np.stack([_read_prediction(prediction / name / label / "s0", crop, flat) for label in classes])
    step = max(1, -(-max(flat.shape_zyx[1:]) // MAX_SIDE))
    v = crop.grid.voxel_size_nm
    truth_CYX, unknown_CYX = (np.moveaxis(states_YXC == state, -1, 0) for state in (PRESENT, UNKNOWN))
    return Section(
        z=z,
        num_sections=crop.grid.shape_zyx[0],
        shape_yx=(flat.shape_zyx[1], flat.shape_zyx[2]),
        pixel_nm=(v[1] * step, v[2] * step),
        em_YX=_grey(crop, flat, step),
        truth_CYX=_every(truth_CYX, step),
        unknown_CYX=_every(unknown_CYX, step),
        predicted_CYX=_every(predicted, step),
        partial=box != whole,
    )


def _richest(codes: CropCodes, box: Box, present_C: NDArray[Any]) -> int:
    """Return the z with most voxels times classes that are present; the middle one where nothing is."""
    sums = []
    for z in range(box.start[0], box.stop[0]):
        plane = np.asarray(codes.codes_ZYX[z, box.slices[1], box.slices[2]])
        sums.append(int(np.bincount(plane.ravel(), minlength=len(present_C)) @ present_C))
    return box.start[0] + (int(np.argmax(sums)) if any(sums) else len(sums) // 2)


def _read_prediction(path: Path, crop: Crop, box: Box) -> Flags:
    if not path.is_dir():
        raise DataError(path, "is not there", "predict this crop again, then evaluate")
    reader = store.ArrayReader(path, store.ChunkCache(CACHE_BYTES))
    if reader.shape_zyx != crop.grid.shape_zyx:
        raise DataError(path, f"has shape {reader.shape_zyx}, the crop {crop.grid.shape_zyx}", "predict it again")
    flags: Flags = reader.read(box)[0] > 0
    return flags


def _grey(crop: Crop, box: Box, step: int) -> NDArray[np.uint8]:
    """Return the EM stretched from its 0.5 to its 99.5 percentile, in 64 greys: fewer bytes, nothing visible lost."""
    cache = store.ChunkCache(CACHE_BYTES)
    voxel_size = crop.grid.voxel_size_nm
    level = store.open_multiscale(crop.em).level_for(voxel_size)
    integer = store.ArrayReader(level.path, cache).dtype.kind in "ui"
    reader = EmReader(crop.em, voxel_size, Normalization(kind="dtype" if integer else "volume", volumes=()), cache)
    values, valid = reader.read(crop.grid.crop(box))
    plane = values[0]
    inside = plane if valid is None else plane[valid[0]]
    low, high = np.percentile(inside, [0.5, 99.5]) if inside.size else (0.0, 1.0)
    grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1)
    y, x = (-n % step for n in grey.shape)
    blocks = np.pad(grey, ((0, y), (0, x)), mode="edge")
    height, width = (n // step for n in blocks.shape)
    small = blocks.reshape(height, step, width, step).mean(axis=(1, 3))
    grey_64: NDArray[np.uint8] = (np.rint(small * 63) * (255 / 63)).astype(np.uint8)
    return grey_64


def _every(flags_CYX: Flags, step: int) -> Flags:
    """Return each step-th pixel, on the same pixels as the block means of the EM."""
    return flags_CYX[:, ::step, ::step]
