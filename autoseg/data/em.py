"""EM at the voxel size a network wants, as the numbers it wants.

Grey values become network input by one rule, fixed per dtype or per volume, never per patch: a dark patch stays dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data import store
from autoseg.data.resample import resample
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, NmZYX
from autoseg.schema import Intensity, Normalization

CHUNK_CACHE_BYTES = 128 * 2**20  # decoded EM that a process keeps
SAMPLED_CHUNKS, SAMPLED_VOXELS = 64, 2**16  # voxels of each chunk
PADDING_SHARE = 0.02
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


def measure_intensity(array: store.ArrayReader, seed: int = 0) -> tuple[Intensity, float]:
    """Return (grey values, share of chunks that are stored) from a seeded sample of stored chunks.

    Exact zeros that fill more than 2 % of the sample are padding and do not count.
    """
    stored = np.argwhere(array.stored_chunks)
    if len(stored) == 0:
        raise DataError(array.path, "not one chunk of the EM is stored", "fetch the EM of this volume")
    rng = np.random.Generator(np.random.Philox(seed))
    chosen = rng.permutation(len(stored))[:SAMPLED_CHUNKS]
    whole = Box.whole(array.shape_zyx)
    parts = []
    for z, y, x in stored[np.sort(chosen)].tolist():
        start = (z * array.chunk_zyx[0], y * array.chunk_zyx[1], x * array.chunk_zyx[2])
        stop = tuple(a + c for a, c in zip(start, array.chunk_zyx, strict=True))
        box = Box(start, (stop[0], stop[1], stop[2])).clip(whole)
        parts.append(array.read(box).ravel()[:: max(1, box.num_voxels // SAMPLED_VOXELS)].copy())
    grey = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(grey).all():
        raise DataError(array.path, "holds NaN or infinite grey values", "replace them by a finite value")
    inside = grey[grey != 0]
    if inside.size and np.mean(grey == 0) > PADDING_SHARE:
        grey = inside
    low, median, high = np.percentile(grey, [0.5, 50, 99.5])
    found = Intensity(
        minimum=float(grey.min()),
        p0_5=float(low),
        p50=float(median),
        p99_5=float(high),
        maximum=float(grey.max()),
        mean=float(grey.mean()),
        sd=float(grey.std()),
        num_voxels=int(grey.size),
    )
    return found, float(array.stored_chunks.mean())


def make_normalizer(how: Normalization, em: Path, multiscale: store.Multiscale, cache: store.ChunkCache) -> Normalizer:
    """Return the normalizer of a volume: by dtype, integers become [0, 1]; by volume, as planned if it is known."""
    array = finest_stored(multiscale, cache)
    path, dtype = array.path, array.dtype
    if how.kind == "dtype":
        if dtype.kind not in "ui":
            raise DataError(path, f"dtype {dtype} has no range to normalise by", "--set normalization.kind=volume")
        info = np.iinfo(dtype)
        return Normalizer(float(info.min), float(info.max) - float(info.min))
    looks = (volume_name(em), str(dtype), multiscale.levels[0].grid.shape_zyx)
    known = [v for v in how.volumes if (v.name, v.dtype, v.shape_zyx) == looks]
    grey = known[0] if known else measure_intensity(array)[0]
    return Normalizer(grey.mean, max(grey.sd, 1e-6))


def volume_name(em: Path) -> str:
    """Return the name of the volume that holds this EM: that of its zarr."""
    return next((folder.stem for folder in (em, *em.parents) if folder.suffix == ".zarr"), em.name)


def finest_stored(multiscale: store.Multiscale, cache: store.ChunkCache) -> store.ArrayReader:
    """Return the finest level of which anything was fetched; the finest of all if nothing was."""
    arrays = [store.ArrayReader(level.path, cache) for level in multiscale.levels]
    return next((array for array in arrays if array.any_stored), arrays[0])


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
