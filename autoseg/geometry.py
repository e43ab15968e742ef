"""Boxes, grids and tiles. Indices are voxels, lengths are nanometres; both in the order z, y, x.

A grid puts voxel i of an axis at its CENTRE, as OME-NGFF translations do::

    corner_nm      origin_nm
       |               |
       +-------o-------+-------o-------+-------o-------+
               |<- voxel_size_nm ->|
       |<------------------ extent_nm ---------------->|

so two grids of different voxel size that cover the same tissue share corner and extent, not origin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

VoxelsZYX = tuple[int, int, int]
NmZYX = tuple[float, float, float]
ALIKE_WITHIN = 0.05
HAIR = 1e-6  # of a voxel: less is no part of it


def alike(*sizes_nm: float) -> bool:
    """Return whether axes of these voxel sizes can be swapped: tissue is stretched by at most a twentieth then."""
    return max(sizes_nm) <= (1 + ALIKE_WITHIN) * min(sizes_nm)


def cube_edge_nm(voxel_size_nm: NmZYX) -> float:
    """Return the edge of the cube that is as large as a voxel."""
    return math.prod(voxel_size_nm) ** (1 / 3)


def coarser_voxel_size(voxel_size_nm: NmZYX, shape_zyx: VoxelsZYX) -> NmZYX:
    """Return the voxel size of the next level of a pyramid: axes that are not yet coarser than the finest double.

    An axis of one voxel cannot be halved, so it must not hold back the others either.
    """
    finest = min(v for v, n in zip(voxel_size_nm, shape_zyx, strict=True) if n > 1)
    z, y, x = (2 * v if v < 1.5 * finest and n > 1 else v for v, n in zip(voxel_size_nm, shape_zyx, strict=True))
    return z, y, x


class Box(NamedTuple):
    """A half-open box of voxels, `start` inside and `stop` outside."""

    start: VoxelsZYX
    stop: VoxelsZYX

    @classmethod
    def whole(cls, shape_zyx: VoxelsZYX) -> Box:
        """Return the box of an array of that shape."""
        return cls((0, 0, 0), shape_zyx)

    @property
    def shape_zyx(self) -> VoxelsZYX:
        """Edge lengths in voxels; never negative."""
        z, y, x = (max(0, b - a) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    @property
    def num_voxels(self) -> int:
        """Return the volume in voxels."""
        return math.prod(self.shape_zyx)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Return the index expression of this box in an array whose voxel 0 is the box's origin."""
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def shift(self, by_zyx: VoxelsZYX) -> Box:
        """Return the box moved by whole voxels."""
        (z0, y0, x0), (z1, y1, x1), (dz, dy, dx) = self.start, self.stop, by_zyx
        return Box((z0 + dz, y0 + dy, x0 + dx), (z1 + dz, y1 + dy, x1 + dx))

    def grow(self, by_zyx: VoxelsZYX) -> Box:
        """Return the box with a margin of that many voxels on both sides of each axis."""
        (z0, y0, x0), (z1, y1, x1), (dz, dy, dx) = self.start, self.stop, by_zyx
        return Box((z0 - dz, y0 - dy, x0 - dx), (z1 + dz, y1 + dy, x1 + dx))

    def clip(self, bounds: Box) -> Box:
        """Return the part inside `bounds`; empty boxes keep shape 0, not a negative one."""
        z0, y0, x0 = (max(a, b) for a, b in zip(self.start, bounds.start, strict=True))
        z1, y1, x1 = (min(a, b) for a, b in zip(self.stop, bounds.stop, strict=True))
        return Box((z0, y0, x0), (max(z0, z1), max(y0, y1), max(x0, x1)))

    def relative_to(self, outer: Box) -> Box:
        """Return the same voxels counted from the start of `outer`."""
        z, y, x = outer.start
        return self.shift((-z, -y, -x))


class Grid(NamedTuple):
    """Where an array lies in space: voxel (0, 0, 0) has its centre at `origin_nm`."""

    shape_zyx: VoxelsZYX
    voxel_size_nm: NmZYX
    origin_nm: NmZYX

    @property
    def corner_nm(self) -> NmZYX:
        """Return the outer corner of voxel (0, 0, 0)."""
        z, y, x = (o - v / 2 for o, v in zip(self.origin_nm, self.voxel_size_nm, strict=True))
        return z, y, x

    @property
    def extent_nm(self) -> NmZYX:
        """Return the edge lengths of the whole array in nm."""
        z, y, x = (n * v for n, v in zip(self.shape_zyx, self.voxel_size_nm, strict=True))
        return z, y, x

    def at_voxel_size(self, voxel_size_nm: NmZYX) -> Grid:
        """Return the grid of that voxel size with the same corner and (rounded to voxels) extent."""
        if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(voxel_size_nm, self.voxel_size_nm, strict=True)):
            return self
        z, y, x = (max(1, round(e / v)) for e, v in zip(self.extent_nm, voxel_size_nm, strict=True))
        oz, oy, ox = (c + v / 2 for c, v in zip(self.corner_nm, voxel_size_nm, strict=True))
        return Grid((z, y, x), voxel_size_nm, (oz, oy, ox))

    def crop(self, box: Box) -> Grid:
        """Return the grid of the sub-array `box`."""
        oz, oy, ox = (o + a * v for o, a, v in zip(self.origin_nm, box.start, self.voxel_size_nm, strict=True))
        return Grid(box.shape_zyx, self.voxel_size_nm, (oz, oy, ox))

    def aligned_with(self, other: Grid) -> VoxelsZYX | None:
        """Return the whole-voxel offset of this grid's voxel 0 in `other`, or None if it is not one."""
        offset = []
        for a, b, v, w in zip(self.origin_nm, other.origin_nm, self.voxel_size_nm, other.voxel_size_nm, strict=True):
            shift = (a - b) / w
            if not math.isclose(v, w, rel_tol=1e-6) or abs(shift - round(shift)) > 1e-3:
                return None
            offset.append(round(shift))
        return offset[0], offset[1], offset[2]

    def covering(self, other: Grid) -> Box:
        """Return the smallest box of this grid that covers `other`; it may reach outside this grid."""
        start, stop = [], []
        for c, e, corner, v in zip(other.corner_nm, other.extent_nm, self.corner_nm, self.voxel_size_nm, strict=True):
            start.append(math.floor((c - corner) / v + HAIR))
            stop.append(math.ceil((c + e - corner) / v - HAIR))
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def annotated_share(extent_nm: NmZYX, patch_zyx: VoxelsZYX, voxel_size_nm: NmZYX) -> float:
    """Return which share of a patch lies in an annotated box of that extent, at best, from 0 to 1.

    A patch that fits is placed inside; one that is wider than the box along an axis is centred on it.
    """
    share = 1.0
    for extent, patch, size in zip(extent_nm, patch_zyx, voxel_size_nm, strict=True):
        share *= min(1.0, max(1, round(extent / size)) / patch)
    return share


def part_length(length: int) -> int:
    """Return the voxels of one of the parts in which an axis is counted: 64, or a sixteenth of a short axis."""
    return 64 if length >= 256 else max(1, math.ceil(length / 16))


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Return starts of tiles that cover `length`, neighbours overlapping by at least that fraction.

    The last tile ends at `length`; a tile longer than `length` starts at 0.
    """
    if tile >= length:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    count = math.ceil((length - tile) / step) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tiles(shape_zyx: VoxelsZYX, tile_zyx: VoxelsZYX, overlap: float) -> Iterator[Box]:
    """Yield tiles in raster order that cover an array of that shape and stay inside it."""
    axes = (tile_starts(n, t, overlap) for n, t in zip(shape_zyx, tile_zyx, strict=True))
    for z, y, x in itertools.product(*axes):
        stop = tuple(min(a + t, n) for a, t, n in zip((z, y, x), tile_zyx, shape_zyx, strict=True))
        yield Box((z, y, x), (stop[0], stop[1], stop[2]))


def blocks(shape_zyx: VoxelsZYX, block_zyx: VoxelsZYX) -> Iterator[Box]:
    """Yield disjoint blocks in raster order whose union is the array; those at the far end are smaller."""
    whole = Box.whole(shape_zyx)
    axes = (range(0, n, b) for n, b in zip(shape_zyx, block_zyx, strict=True))
    for z, y, x in itertools.product(*axes):
        yield Box((z, y, x), (z + block_zyx[0], y + block_zyx[1], x + block_zyx[2])).clip(whole)
