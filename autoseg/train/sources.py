"""One crop to learn from: where each class lies in it, a voxel of it at random, EM and codes of a box.

Nothing of a crop stays open or in memory but its index: for each class the blocks that hold it, and how many of
its voxels they hold, so that a voxel is found by one search and one look at a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.data.codes import CropCodes, index_blocks
from autoseg.data.coding import INDEX_BLOCK
from autoseg.data.em import EmReader, read_input
from autoseg.data.islands import seen_in
from autoseg.data.store import ArrayReader, ChunkCache
from autoseg.errors import DataError
from autoseg.geometry import HAIR, Box, Grid, NmZYX, VoxelsZYX

Codes = NDArray[Any]
Rounding = Literal["inwards", "nearest", "outwards"]


class BlockIndex(NamedTuple):
    """For each column (a class) its blocks and, up to and with each of them, the number of its voxels."""

    first: NDArray[np.int64]
    blocks: NDArray[np.uint32]
    cumulative: NDArray[np.unsignedinteger[Any]]

    def column(self, column: int) -> slice:
        """Return which entries belong to that column."""
        return slice(int(self.first[column]), int(self.first[column + 1]))


class Source(NamedTuple):
    """A crop of the training split: `region` may teach, but nothing in the `hidden` boxes.

    `gaps`: of the EM under it not all was fetched.
    """

    region: Box
    hidden: tuple[Box, ...]
    gaps: bool
    codes: CropCodes
    to_global: Codes
    em: EmReader
    block_index: BlockIndex
    layers: NDArray[np.int64]

    @property
    def blocks_zyx(self) -> VoxelsZYX:
        """Return how many index blocks lie along each axis."""
        z, y, x = (-(-n // b) for n, b in zip(self.codes.grid.shape_zyx, INDEX_BLOCK, strict=True))
        return z, y, x


def usable_counts(codes: CropCodes, region: Box, hidden: tuple[Box, ...], em: EmReader | None = None) -> NDArray[Any]:
    """Return `counts_BC` of the voxels in the region that are not hidden; blocks at a border are counted anew.

    With `em`, voxels under EM that was never fetched do not count either: a patch there would be wholly unknown.
    """
    counts, shape = codes.counts_BC, codes.grid.shape_zyx
    if region == Box.whole(shape) and not hidden and em is None:
        return counts
    counts, volume = np.array(counts), codes.codes_ZYX
    for number, box in enumerate(index_blocks(shape)):
        inside = region.clip(box)
        unseen = [h.clip(inside) for h in hidden if h.clip(inside).num_voxels]
        if any(part == inside for part in unseen) or inside.num_voxels == 0:
            counts[number] = 0
            continue
        stored = None if em is None else em.stored_on(codes.grid.crop(inside))
        if inside == box and not unseen and stored is None:
            continue
        seen = np.ones(inside.shape_zyx, dtype=bool) if stored is None else stored
        for part in unseen:
            seen[part.relative_to(inside).slices] = False
        counts[number] = np.bincount(volume[inside.slices][seen], minlength=counts.shape[1])
    return counts


def build_index(counts_BC: NDArray[Any], holds_CK: NDArray[np.bool_]) -> BlockIndex:
    """Return the index of the columns: in column k count the codes for which `holds_CK` is true."""
    counts_KB = np.rint(holds_CK.T.astype(np.float64) @ counts_BC.T.astype(np.float64)).astype(np.int64)
    column, block = np.nonzero(counts_KB)
    first = np.searchsorted(column, np.arange(len(counts_KB) + 1))
    cumulative = np.cumsum(counts_KB, axis=1)[column, block]
    small = cumulative.max(initial=0) < 2**32
    return BlockIndex(first, block.astype(np.uint32), cumulative.astype(np.uint32 if small else np.uint64))


def index_layers(grid: Grid, em: EmReader) -> NDArray[np.int64]:
    """Return for each row of index blocks along z, and one past the end, in which layer of EM chunks it starts."""
    level = em.multiscale.level_for(grid.voxel_size_nm)
    depth_nm = ArrayReader(level.path, ChunkCache(0)).chunk_zyx[0] * level.grid.voxel_size_nm[0]
    rows = np.arange(-(-grid.shape_zyx[0] // INDEX_BLOCK[0])) * INDEX_BLOCK[0] * grid.voxel_size_nm[0]
    layer: NDArray[np.int64] = np.floor((grid.corner_nm[0] + rows - level.grid.corner_nm[0]) / depth_nm + 1e-6).astype(
        np.int64
    )
    return np.append(layer, layer[-1] + 1)


def draw_layer(source: Source, column: int, rng: np.random.Generator) -> int:
    """Return a layer of EM chunks, each as likely as it holds voxels of that column."""
    entries = source.block_index.column(column)
    cumulative = source.block_index.cumulative[entries]
    block = source.block_index.blocks[entries][np.searchsorted(cumulative, rng.integers(cumulative[-1]), side="right")]
    _, ny, nx = source.blocks_zyx
    return int(source.layers[int(block) // (ny * nx)])


def draw_voxel(
    source: Source,
    codes_ZYX: Codes,
    column: int,
    wanted: NDArray[np.bool_],
    layer: int | None,
    rng: np.random.Generator,
) -> VoxelsZYX:
    """Return a voxel of that column (global codes for which `wanted` is true), within the layer if one is given."""
    entries = source.block_index.column(column)
    cumulative, blocks = source.block_index.cumulative[entries], source.block_index.blocks[entries]
    low, high = 0, int(cumulative[-1])
    if layer is not None:
        _, ny, nx = source.blocks_zyx
        rows = np.searchsorted(source.layers, [layer, layer + 1]) * ny * nx
        first, last = np.searchsorted(blocks, rows)
        low, high = int(cumulative[first - 1]) if first else 0, int(cumulative[last - 1])
    number = int(blocks[np.searchsorted(cumulative, low + int(rng.integers(high - low)), side="right")])
    box = index_blocks(source.codes.grid.shape_zyx)[number].clip(source.region)
    hits = np.take(wanted[source.to_global], codes_ZYX[box.slices], mode="clip")
    for hidden in source.hidden:
        hits[hidden.clip(box).relative_to(box).slices] = False
    stored = source.em.stored_on(source.codes.grid.crop(box)) if source.gaps else None
    found = np.flatnonzero(hits if stored is None else hits & stored)
    if len(found) == 0:
        what = "damaged code cache (its counts are wrong)"
        raise DataError(source.codes.folder, what, "delete this folder; it is built anew")
    z, y, x = np.unravel_index(found[rng.integers(len(found))], box.shape_zyx)
    return int(z) + box.start[0], int(y) + box.start[1], int(x) + box.start[2]


def read_source(source: Source, codes_ZYX: Codes, box: Box, input_slices: int) -> tuple[NDArray[np.float32], Codes]:
    """Return (EM with channels first, global codes) of that box of the code grid; unknown where nothing may teach."""
    inside = source.region.clip(box)
    known = np.take(source.to_global, codes_ZYX[inside.slices], mode="clip")
    codes = known
    if inside != box:
        codes = np.zeros(box.shape_zyx, dtype=known.dtype)
        codes[inside.relative_to(box).slices] = known
    for hidden in source.hidden:
        codes[hidden.clip(box).relative_to(box).slices] = 0
    image, valid = read_input(source.em, source.codes.grid, box, input_slices)
    if valid is not None:
        codes[~valid] = 0
    return image, codes


def validated_box(region: Box, grid: Grid, target: Grid) -> Box:
    """Return the voxels of `target`, the codes of a crop, that validate for a region in voxels of its labels."""
    return scale_box(region, grid, target, "nearest")


class Held(NamedTuple):
    """Where regions of one EM validate: as they were drawn, and as the voxels of the plan's size that validate.

    ::

        labels of a    |--|--|--|--|        validates, drawn from voxel 1 on
        codes of a     |-----|=====|        this voxel validates
        codes of b      |~~~~~|~~~~~|       both are hidden
    """

    grids: tuple[Grid, ...]
    low_nm: NDArray[np.float64]
    high_nm: NDArray[np.float64]


def held_on(regions: Sequence[tuple[Grid, Box]], voxel_size_nm: NmZYX) -> Held:
    """Return where these boxes of label grids validate, to be asked for each of a thousand crops."""
    grids = []
    for grid, box in regions:
        coarse = grid.at_voxel_size(voxel_size_nm)
        grids += [grid.crop(box), coarse.crop(validated_box(box, grid, coarse))]
    low = np.array([grid.corner_nm for grid in grids]).reshape(-1, 3)
    return Held(tuple(grids), low, low + np.array([grid.extent_nm for grid in grids]).reshape(-1, 3))


def hide(held: Held, codes_grid: Grid) -> tuple[Box, ...]:
    """Return the boxes of codes that share EM with what validates."""
    low = np.array(codes_grid.corner_nm)
    near = ((held.low_nm < low + codes_grid.extent_nm) & (held.high_nm > low)).all(axis=1)
    seen = [seen_in(codes_grid, held.grids[i]) for i in np.flatnonzero(near)]
    return tuple(dict.fromkeys(box for box in seen if box.num_voxels))


def scale_box(box: Box, grid: Grid, target: Grid, rounding: Rounding) -> Box:
    """Return a box of one grid on another of the same corner; where it reaches the end of one, so it does of the other.

    Training rounds inwards and hides what validates rounded outwards, so that no voxel of either grid is on both sides.
    Only `inwards` may leave nothing of a box.
    """
    start, stop = [], []
    for axis in range(3):
        ratio, length = grid.voxel_size_nm[axis] / target.voxel_size_nm[axis], target.shape_zyx[axis]
        low, high = (min(place[axis] * ratio, length) for place in box)
        high = length if box.stop[axis] >= grid.shape_zyx[axis] else high
        first, last = {
            "inwards": (math.ceil(low - HAIR), math.floor(high + HAIR)),
            "nearest": (round(low), round(high)),
            "outwards": (math.floor(low + HAIR), math.ceil(high - HAIR)),
        }[rounding]
        if last <= first and rounding != "inwards":
            first = min(math.floor(low + HAIR), length - 1)
            last = first + 1
        start.append(first)
        stop.append(max(first, last))
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
