"""EM at the voxel size a network wants, as the numbers it wants.

Grey values become network input by one rule, fixed per dtype or per volume, never per patch: a dark patch stays dark.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data import store
from autoseg.data.greys import Measured, measure_intensity, middle
from autoseg.data.resample import resample
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, NmZYX
from autoseg.schema import Normalization, Probe, VolumeGrey

CHUNK_CACHE_BYTES = 128 * 2**20  # decoded EM that a process keeps
MIN_SHARE_OF_BEST = 0.5


class Normalizer(NamedTuple):
    """Network input = (grey value - offset) / scale."""

    offset: float
    scale: float

    def __call__(self, grey: NDArray[Any]) -> NDArray[np.float32]:
        """Return the network input of these grey values, same shape."""
        out: NDArray[np.float32] = grey.astype(np.float32)
        out -= np.float32(self.offset)
        out *= np.float32(1 / self.scale)
        return out


# ---- which volume is it -------------------------------------------------------------------------------------


def make_probe(array: store.ArrayReader, grid: Grid, crop: Grid, found: Measured) -> Probe:
    """Return voxels by which a volume is known again: in the middle of a crop, where checksums guard them.

    Where the level that was measured is not stored there, those of a sampled chunk.
    """
    box = middle(grid.covering(crop).clip(Box.whole(grid.shape_zyx)))
    if box.num_voxels == 0 or array.coverage(box) < 1:
        box = found.probe_box
    return Probe(
        shape_zyx=grid.shape_zyx,
        voxel_size_nm=grid.voxel_size_nm,
        start_zyx=box.start,
        stop_zyx=box.stop,
        crc32=_crc32(array.read(box)),
    )


def _crc32(values: NDArray[Any]) -> int:
    little = values.astype(values.dtype.newbyteorder("<"))
    return zlib.crc32(little.tobytes(), zlib.crc32(little.dtype.str.encode()))


def planned_grey(
    how: Normalization, em: Path, multiscale: store.Multiscale, cache: store.ChunkCache
) -> VolumeGrey | None:
    """Return the entry of the plan that is this volume, None if none is: then its grey values are its own.

    A volume is known by voxels of the level that was measured, whatever its name and whichever levels it has now::

        the same voxels             the planned volume, whatever was fetched since and wherever it lies
        other voxels                another volume, though it may have the same name
        these are not fetched       the planned volume if name, dtype and shape of the level are the same
        that level is not there     another volume, unless name and extent are the same: DataError

    Entries of earlier versions have no such voxels: as if they were not fetched.
    """
    name = volume_name(em)
    for grey in sorted(how.volumes, key=lambda grey: grey.name != name):
        shape = grey.shape_zyx if grey.probe is None else grey.probe.shape_zyx
        level = next((level for level in multiscale.levels if level.grid.shape_zyx == shape), None)
        if level is not None:
            array = store.ArrayReader(level.path, cache)
            same = None if grey.probe is None else _holds(grey.probe, array)
            if same or (same is None and (grey.name, grey.dtype) == (name, str(array.dtype))):
                return grey
        elif grey.name == name and grey.probe is not None and _same_extent(grey.probe, multiscale.levels[0].grid):
            what = f"looks like {name} of the plan, of which a level of {shape} voxels was measured that is not there"
            raise DataError(em, what, "restore the level, or plan anew; rename it if it is another volume")
    return None


def _holds(probe: Probe, array: store.ArrayReader) -> bool | None:
    """Return whether the level has these voxels, None if they were not fetched."""
    box = Box(probe.start_zyx, probe.stop_zyx)
    return _crc32(array.read(box)) == probe.crc32 if array.coverage(box) == 1 else None


def _same_extent(probe: Probe, grid: Grid) -> bool:
    """Return whether both are as long along each axis, within a voxel of the coarser: levels are cut to whole ones."""
    sizes = zip(probe.shape_zyx, probe.voxel_size_nm, grid.extent_nm, grid.voxel_size_nm, strict=True)
    return all(abs(n * v - extent) <= max(v, w) for n, v, extent, w in sizes)


def make_normalizer(how: Normalization, em: Path, multiscale: store.Multiscale, cache: store.ChunkCache) -> Normalizer:
    """Return the normalizer of a volume: by dtype, integers become [0, 1]; by volume, as planned if it is known."""
    _, array = finest_stored(multiscale, cache)
    if how.kind == "dtype":
        if array.dtype.kind not in "ui":
            what = f"dtype {array.dtype} has no range to normalise by"
            raise DataError(array.path, what, "--set normalization.kind=volume")
        info = np.iinfo(array.dtype)
        return Normalizer(float(info.min), float(info.max) - float(info.min))
    grey = planned_grey(how, em, multiscale, cache) or measure_intensity(array).intensity
    return Normalizer(grey.mean, max(grey.sd, 1e-6))


def measured_anew(how: Normalization, ems: Iterable[Path], cache: store.ChunkCache) -> list[Path]:
    """Return the EM volumes that are none of the plan's, of which the grey values are their own."""
    if how.kind == "dtype":
        return []
    return [em for em in dict.fromkeys(ems) if planned_grey(how, em, store.open_multiscale(em), cache) is None]


def volume_name(em: Path) -> str:
    """Return the name of the volume that holds this EM: that of its zarr."""
    return next((folder.stem for folder in (em, *em.parents) if folder.suffix == ".zarr"), em.name)


def finest_stored(multiscale: store.Multiscale, cache: store.ChunkCache) -> tuple[Grid, store.ArrayReader]:
    """Return the finest level of which anything was fetched; the finest of all if nothing was."""
    levels = [(level.grid, store.ArrayReader(level.path, cache)) for level in multiscale.levels]
    return next((level for level in levels if level[1].any_stored), levels[0])


def stored_level(
    levels: Sequence[tuple[Grid, store.ArrayReader]], core: Grid
) -> tuple[tuple[Grid, store.ArrayReader], float]:
    """Return (the first of `levels` that is stored under `core`, which share of it is stored there).

    `levels` begin with the one that suits best. One of which less than half is stored of what another level holds
    there is passed over: fetching leaves out levels, crop by crop.
    """
    shares: list[float] = []
    for grid, array in levels:
        shares.append(array.coverage(grid.covering(core)))
        if shares[-1] == 1:
            break
    best = max(shares)
    chosen = next(i for i, share in enumerate(shares) if share >= best * MIN_SHARE_OF_BEST)
    return levels[chosen], shares[chosen]


class EmReader:
    """Reads one EM volume on any grid; where the volume ends or was never fetched, the input is 0 and not valid."""

    def __init__(self, em: Path, voxel_size_nm: NmZYX, how: Normalization, cache: store.ChunkCache) -> None:
        self.multiscale = store.open_multiscale(em)
        self._levels = [
            (level.grid, store.ArrayReader(level.path, cache)) for level in self.multiscale.levels_for(voxel_size_nm)
        ]
        self._level_grid, self._array = self._levels[0]
        self._normalize = make_normalizer(how, em, self.multiscale, cache)

    @cached_property
    def complete(self) -> bool:
        """Return whether all of the level that suits is stored."""
        return bool(self._array.stored_chunks.all())

    def complete_on(self, grid: Grid) -> bool:
        """Return whether all EM under `grid` was fetched, at the level that would be read for it."""
        return stored_level(self._levels, grid)[1] == 1

    def stored_on(self, grid: Grid) -> NDArray[np.bool_] | None:
        """Return which voxels of `grid` lie in EM that was fetched; None for all."""
        return valid_voxels(self._levels, grid)

    @property
    def grid(self) -> Grid:
        """Return where the finest level lies."""
        return self.multiscale.levels[0].grid

    def read(self, grid: Grid, core: Grid | None = None) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Return (network input, which voxels are valid or None for all) on `grid`, both z, y, x.

        The level is chosen by what is stored under `core`, the part of `grid` that matters; all of it if None.
        """
        (level_grid, array), _ = stored_level(self._levels, core or grid)
        offset = grid.aligned_with(level_grid)
        box = Box.whole(grid.shape_zyx).shift(offset) if offset else level_grid.covering(grid).grow((1, 1, 1))
        grey = self._normalize(array.read(box))
        valid = None if array.coverage(box) == 1 else array.stored_mask(box)
        if valid is not None:
            grey[~valid] = 0
        if offset is not None:
            return grey, valid
        source = level_grid.crop(box)
        grey = resample(grey, source, grid, area=False)
        if valid is not None:  # divide by the share that is real, so that the zeros beside it do not darken the edge
            real = valid.astype(np.float32)
            grey /= np.maximum(resample(real, source, grid, area=False), 1e-3)
            valid = resample(real, source, grid, area=True) > 0.5
            grey[~valid] = 0
        return grey, valid


def read_input(
    em: EmReader, grid: Grid, box: Box, input_slices: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Return (network input (channels, z, y, x), valid voxels or None for all) of a box of `grid`, maybe outside it.

    With several input slices (2.5D) the box is one section thick and its neighbours become channels.
    """
    reach = input_slices // 2
    inside = box.clip(Box.whole(grid.shape_zyx))
    core = grid.crop(inside if inside.num_voxels else box)
    grey, valid = em.read(grid.crop(box.grow((reach, 0, 0))), core)
    if valid is not None:
        valid = valid[reach : valid.shape[0] - reach]
    return (grey[:, None] if reach else grey[None]), valid


def valid_voxels(levels: Sequence[tuple[Grid, store.ArrayReader]], grid: Grid) -> NDArray[np.bool_] | None:
    """Return which voxels of `grid` lie in stored chunks of the level that `EmReader` would read; None for all."""
    (level_grid, array), share = stored_level(levels, grid)
    if share == 1:
        return None
    box = level_grid.covering(grid)
    stored = array.stored_mask(box)
    if grid.aligned_with(level_grid) is not None:
        return stored
    return resample(stored.astype(np.float32), level_grid.crop(box), grid, area=True) > 0.5
