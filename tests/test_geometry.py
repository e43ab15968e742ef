"""Boxes, grids and tiles: covered, inside, disjoint, and centres, corners and extents that agree at any voxel size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids, shapes, voxel_sizes

from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX, annotated_share, blocks, tile_starts, tiles

CORNERS = st.tuples(st.integers(-6, 6), st.integers(-6, 6), st.integers(-6, 6))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    start, shape = draw(CORNERS), draw(shapes(6))
    return Box(start, (start[0] + shape[0], start[1] + shape[1], start[2] + shape[2]))


def voxels(box: Box) -> set[VoxelsZYX]:
    """Return every voxel of a box, the slow and obvious way."""
    (z0, y0, x0), (z1, y1, x1) = box
    return {(z, y, x) for z in range(z0, z1) for y in range(y0, y1) for x in range(x0, x1)}


# ---- Box ----------------------------------------------------------------------------------------------------


@given(boxes(), boxes())
def test_clip_keeps_exactly_the_common_voxels(a: Box, b: Box) -> None:
    clipped = a.clip(b)
    assert voxels(clipped) == voxels(a) & voxels(b)
    assert clipped.num_voxels == len(voxels(a) & voxels(b))
    assert min(clipped.shape_zyx) >= 0
    assert all(start <= stop for start, stop in zip(clipped.start, clipped.stop, strict=True))


@given(boxes(), CORNERS)
def test_shift_moves_every_voxel_and_back(box: Box, by: VoxelsZYX) -> None:
    assert voxels(box.shift(by)) == {(z + by[0], y + by[1], x + by[2]) for z, y, x in voxels(box)}
    assert box.shift(by).relative_to(Box(by, by)) == box


@given(boxes(), st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)))
def test_grow_adds_the_margin_on_both_sides(box: Box, by: VoxelsZYX) -> None:
    grown = box.grow(by)
    assert grown.shape_zyx == tuple(n + 2 * m for n, m in zip(box.shape_zyx, by, strict=True))
    assert grown.clip(box) == box


@given(boxes(), boxes())
def test_relative_to_indexes_the_same_voxels_of_the_outer_array(a: Box, b: Box) -> None:
    inner = a.clip(b)
    array = np.zeros(b.shape_zyx, dtype=bool)
    array[inner.relative_to(b).slices] = True
    found = {(int(z) + b.start[0], int(y) + b.start[1], int(x) + b.start[2]) for z, y, x in np.argwhere(array)}
    assert found == voxels(a) & voxels(b)


# ---- tiles and blocks ---------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 200), st.floats(0, 0.95))
def test_tile_starts_cover_overlap_enough_and_end_at_the_end(length: int, tile: int, overlap: float) -> None:
    starts = tile_starts(length, tile, overlap)
    if tile >= length:
        assert starts == [0]
        return
    assert starts[0] == 0
    assert starts[-1] + tile == length
    steps = np.diff(starts)
    assert (steps >= 1).all(), "a tile is predicted twice"
    # At least the overlap asked for, except that a step is never below one voxel.
    assert steps.max() <= max(1, math.floor(tile * (1 - overlap) + 1e-9))


@given(st.integers(2, 400), st.integers(1, 200), st.floats(0, 0.9))
def test_no_more_tiles_than_needed(length: int, tile: int, overlap: float) -> None:
    starts = tile_starts(length, tile, overlap)
    step = max(1, int(tile * (1 - overlap)))
    fewer = len(starts) - 1
    assert fewer == 0 or (fewer - 1) * step + tile < length


@given(shapes(20), shapes(24), st.floats(0, 0.9))
def test_tiles_cover_every_voxel_and_stay_inside(shape: VoxelsZYX, tile: VoxelsZYX, overlap: float) -> None:
    covered = np.zeros(shape, dtype=int)
    for box in tiles(shape, tile, overlap):
        assert box.clip(Box.whole(shape)) == box
        assert box.shape_zyx == tuple(min(t, n) for t, n in zip(tile, shape, strict=True))
        covered[box.slices] += 1
    assert covered.min() >= 1


@given(shapes(20), shapes(24))
def test_blocks_partition_the_array(shape: VoxelsZYX, block: VoxelsZYX) -> None:
    owned = np.zeros(shape, dtype=int)
    starts = []
    for box in blocks(shape, block):
        owned[box.slices] += 1
        starts.append(box.start)
        assert all(a % b == 0 for a, b in zip(box.start, block, strict=True)), "blocks start on the chunk grid"
    assert (owned == 1).all()
    assert starts == sorted(starts), "raster order"


# ---- Grid ---------------------------------------------------------------------------------------------------


@given(grids())
def test_corner_centre_and_extent_agree(grid: Grid) -> None:
    for axis in range(3):
        size, count = grid.voxel_size_nm[axis], grid.shape_zyx[axis]
        last_centre = grid.origin_nm[axis] + (count - 1) * size
        assert grid.corner_nm[axis] == pytest.approx(grid.origin_nm[axis] - size / 2, abs=1e-6)
        assert grid.corner_nm[axis] + grid.extent_nm[axis] == pytest.approx(last_centre + size / 2, abs=1e-6)


def test_coarse_crop_of_fine_em_has_its_centre_at_12_nm() -> None:
    """A 32 nm crop at the corner of 8 nm EM has translation 12 = (32 - 8) / 2, as CellMap's manifests say."""
    em = Grid((64, 64, 64), (8.0, 8.0, 8.0), (0.0, 0.0, 0.0))
    crop = em.at_voxel_size((32.0, 32.0, 32.0))
    assert crop == Grid((16, 16, 16), (32.0, 32.0, 32.0), (12.0, 12.0, 12.0))
    assert em.covering(crop) == Box.whole(em.shape_zyx)
    assert em.covering(crop.crop(Box((1, 0, 3), (2, 1, 5)))) == Box((4, 0, 12), (8, 4, 20))
    assert crop.aligned_with(em) is None


def test_fine_crop_of_coarse_em_has_its_centre_at_minus_1_nm() -> None:
    """2 nm truth on 4 nm EM has translation -1 = (2 - 4) / 2."""
    em = Grid((8, 8, 8), (4.0, 4.0, 4.0), (0.0, 0.0, 0.0))
    assert em.at_voxel_size((2.0, 2.0, 2.0)) == Grid((16, 16, 16), (2.0, 2.0, 2.0), (-1.0, -1.0, -1.0))


def test_fractional_voxel_size_of_a_real_manifest() -> None:
    """Crop 557: 1.74 x 2 x 2 nm truth on 3.48 x 4 x 4 nm EM, z translation 23837.13 = 6850 * 3.48 - 0.87."""
    em = Grid((8000, 4000, 4000), (3.48, 4.0, 4.0), (0.0, 0.0, 0.0))
    crop = Grid((600, 600, 600), (1.74, 2.0, 2.0), (23837.13, 3999.0, 3999.0))
    assert em.covering(crop) == Box((6850, 1000, 1000), (7150, 1300, 1300))
    half = crop.at_voxel_size((3.48, 4.0, 4.0))
    assert half.shape_zyx == (300, 300, 300)
    assert half.aligned_with(em) == (6850, 1000, 1000)


@given(grids(), voxel_sizes())
def test_at_voxel_size_keeps_the_corner_and_the_extent_to_half_a_voxel(grid: Grid, size: NmZYX) -> None:
    other = grid.at_voxel_size(size)
    assert other.voxel_size_nm == pytest.approx(size)
    assert other.corner_nm == pytest.approx(grid.corner_nm, abs=1e-6)
    for axis in range(3):
        difference = abs(other.extent_nm[axis] - grid.extent_nm[axis])
        assert difference <= size[axis] / 2 + 1e-6 or other.shape_zyx[axis] == 1
    assert min(other.shape_zyx) >= 1


@given(grids(largest=6), CORNERS)
def test_aligned_with_returns_the_shift_that_crop_made(grid: Grid, start: VoxelsZYX) -> None:
    part = grid.crop(Box(start, (start[0] + 1, start[1] + 2, start[2] + 3)))
    assert part.aligned_with(grid) == start
    assert grid.aligned_with(grid) == (0, 0, 0)


@given(grids(), st.integers(0, 2), st.floats(0.01, 0.99))
def test_a_fraction_of_a_voxel_is_not_aligned(grid: Grid, axis: int, fraction: float) -> None:
    origin = list(grid.origin_nm)
    origin[axis] += fraction * grid.voxel_size_nm[axis]
    assert Grid(grid.shape_zyx, grid.voxel_size_nm, (origin[0], origin[1], origin[2])).aligned_with(grid) is None


@given(grids(), grids(largest=8))
def test_covering_is_the_smallest_box_that_covers(grid: Grid, other: Grid) -> None:
    part = grid.crop(grid.covering(other))
    for axis in range(3):
        size = grid.voxel_size_nm[axis]
        slack = 2e-6 * size + 1e-6
        before = other.corner_nm[axis] - part.corner_nm[axis]
        after = part.corner_nm[axis] + part.extent_nm[axis] - other.corner_nm[axis] - other.extent_nm[axis]
        assert -slack <= before < size + slack
        assert -slack <= after < size + slack


@given(grids(largest=9), voxel_sizes())
def test_a_box_covers_itself_at_any_voxel_size(grid: Grid, size: NmZYX) -> None:
    """What is read for one's own grid is the whole array, without a stray border from rounding."""
    assert grid.covering(grid) == Box.whole(grid.shape_zyx)
    other = grid.at_voxel_size(size)
    assert other.covering(other) == Box.whole(other.shape_zyx)


@given(grids(largest=9), st.tuples(*[st.integers(1, 7)] * 3), voxel_sizes())
def test_the_annotated_share_is_that_of_the_best_place_for_a_patch(grid: Grid, patch: VoxelsZYX, size: NmZYX) -> None:
    """Slide the patch along each axis of the crop at that voxel size, over its ends too."""
    best = 1.0
    for n, p in zip(grid.at_voxel_size(size).shape_zyx, patch, strict=True):
        best *= max(len(set(range(n)) & set(range(a, a + p))) for a in range(-p, n + 1)) / p
    share = annotated_share(grid.extent_nm, patch, size)
    assert share == pytest.approx(best)
    assert (share == 1) == all(n >= p for n, p in zip(grid.at_voxel_size(size).shape_zyx, patch, strict=True))


def test_a_patch_of_many_sections_is_mostly_unknown_in_a_crop_of_few() -> None:
    assert annotated_share((5 * 50.0, 2000.0, 2000.0), (20, 128, 128), (50.0, 4.6, 4.6)) == pytest.approx(0.25)
    assert annotated_share((5 * 50.0, 2000.0, 2000.0), (1, 435, 870), (50.0, 4.6, 4.6)) == pytest.approx(0.5)
