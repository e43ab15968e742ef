"""Crops in space: which share voxels of one EM, how a plane cuts them, what of a box is seen by another crop.

Crops that share voxels of one EM are an island: they go to one side of a split together, or are cut at one plane::

    +--------+              crops a and b overlap, c stands alone:
    | a   +--+-----+        {a, b} and {c} are the islands
    +-----+--+     |  +---+
          |     b  |  | c |
          +--------+  +---+
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from autoseg.geometry import Box, Grid, VoxelsZYX, part_length
from autoseg.schema import Region, Split

TOUCHING = 1e-3  # of a voxel: less than that is rounding, not overlap


class SplitCrop(NamedTuple):
    """What the split rule looks at: where a crop is from, and its annotated voxels that hold each class.

    `volume` is one per EM. Crops without a grid overlap no other. `outer_start_zyx` says for each axis whether the
    crop's start, rather than its end, is nearer to the end of its EM. `along` says for each class how many of its
    voxels lie in each part of y, and of x (geometry.part_length); a class that is not in it may lie anywhere.
    """

    name: str
    volume: str
    shape_zyx: VoxelsZYX
    present: Mapping[str, int]
    declared: str | None
    outer_start_zyx: tuple[bool, bool, bool] = (False, False, False)
    grid: Grid | None = None
    along: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = MappingProxyType({})

    @property
    def num_voxels(self) -> int:
        """Return the volume of the crop in its own voxels."""
        return math.prod(self.shape_zyx)


class Leaks(NamedTuple):
    """Validation regions, and voxels of them, that training sees too."""

    regions: int
    voxels: int


Island = list[SplitCrop]


def islands(crops: Sequence[SplitCrop]) -> list[Island]:
    """Return the crops in groups that share no voxel of EM with each other, by name."""
    groups: list[Island] = []
    for crop in sorted(crops, key=lambda c: c.name):
        touching = [group for group in groups if any(_overlap(crop, other) for other in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(member for group in touching for member in group), crop])
    return sorted((sorted(group, key=lambda c: c.name) for group in groups), key=lambda group: group[0].name)


def count_leaks(split: Split, crops: Sequence[SplitCrop]) -> Leaks:
    """Return what of the validation regions training sees; by volumes, every voxel of an EM that is on both sides."""
    by_name = {crop.name: crop for crop in crops}
    trained = [(by_name[region.crop], region.box(by_name[region.crop].shape_zyx)) for region in split.train]
    volumes = {crop.volume for crop, _ in trained}
    found = []
    for region in split.validate:
        crop = by_name[region.crop]
        box = region.box(crop.shape_zyx)
        if split.rule == "volumes" and crop.volume in volumes:
            found.append(box.num_voxels)
        else:
            found.append(_covered(box, [_seen_in(crop, *other) for other in trained]))
    return Leaks(sum(n > 0 for n in found), sum(found))


def least_in(crop: SplitCrop, region: Region, name: str) -> int:
    """Return how many voxels of a class a region holds for certain, by the parts that lie in it whole."""
    total = least = crop.present.get(name, 0)
    for parts, size, n, start, stop in _cut_axes(crop, region, name):
        inside = sum(parts[-(-start // size) : None if stop == n else stop // size])
        least -= total - inside
    return max(0, least)


def most_in(crop: SplitCrop, region: Region, name: str) -> int:
    """Return how many voxels of a class a region may hold, by the parts that it touches."""
    axes = _cut_axes(crop, region, name)
    touched = [sum(parts[start // size : -(-stop // size)]) for parts, size, _, start, stop in axes]
    return min([crop.present.get(name, 0), *touched])


def holders(regions: Sequence[Region], crops: Sequence[SplitCrop]) -> dict[str, set[str]]:
    """Return for each class the crops in which these regions may hold it; classes that none holds are left out."""
    by_name = {crop.name: crop for crop in crops}
    found: dict[str, set[str]] = {}
    for region in regions:
        crop = by_name[region.crop]
        for name in crop.present:
            if most_in(crop, region, name) > 0:
                found.setdefault(name, set()).add(crop.name)
    return found


def _cut_axes(crop: SplitCrop, region: Region, name: str) -> Iterator[tuple[tuple[int, ...], int, int, int, int]]:
    """Yield (voxels of a class by part, voxels of a part, length, start, stop) of the axes that a region cuts."""
    box = region.box(crop.shape_zyx)
    for axis, parts in zip((1, 2), crop.along.get(name, ((), ())), strict=True):
        n, start, stop = crop.shape_zyx[axis], box.start[axis], box.stop[axis]
        if parts and (start, stop) != (0, n):
            yield parts, part_length(n), n, start, stop


def grid_of(crop: SplitCrop) -> Grid:
    """Return where a crop lies; one without a grid has voxels of 1 nm at the origin."""
    return crop.grid or Grid(crop.shape_zyx, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


def frame_of(island: Island) -> tuple[int, float, float]:
    """Return (longest in-plane axis, its start, its length) of the box around all crops of an island, in nm."""
    grids = [grid_of(crop) for crop in island]
    ends = [
        (min(g.corner_nm[axis] for g in grids), max(g.corner_nm[axis] + g.extent_nm[axis] for g in grids))
        for axis in range(3)
    ]
    axis = 1 if ends[1][1] - ends[1][0] >= ends[2][1] - ends[2][0] else 2
    return axis, ends[axis][0], ends[axis][1] - ends[axis][0]


def cut(island: Island, axis: int, low_nm: float, high_nm: float) -> tuple[list[Region], list[Region]]:
    """Return (what lies outside the slab between two planes, what lies in it); voxels that a plane cuts are in none."""
    learnt, held_out = [], []
    for crop in island:
        learnt += _between(crop, axis, -math.inf, low_nm) + _between(crop, axis, high_nm, math.inf)
        held_out += _between(crop, axis, low_nm, high_nm)
    return learnt, held_out


def _between(crop: SplitCrop, axis: int, low_nm: float, high_nm: float) -> list[Region]:
    grid, length = grid_of(crop), crop.shape_zyx[axis]
    corner, size = grid.corner_nm[axis], grid.voxel_size_nm[axis]
    first, last = (min(max((nm - corner) / size, 0), length) for nm in (low_nm, high_nm))
    start, stop = [0, 0, 0], list(crop.shape_zyx)
    start[axis], stop[axis] = math.ceil(first - TOUCHING), math.floor(last + TOUCHING)
    if start[axis] >= stop[axis]:
        return []
    if stop[axis] - start[axis] == length:
        return [Region(crop=crop.name)]
    return [Region(crop=crop.name, box_zyx=((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))]


def _overlap(a: SplitCrop, b: SplitCrop) -> bool:
    return a.volume == b.volume and _seen_in(a, b, Box.whole(b.shape_zyx)).num_voxels > 0


def _seen_in(crop: SplitCrop, other: SplitCrop, box: Box) -> Box:
    """Return which voxels of a crop share EM with a box of another; those touched by a hair's breadth do not."""
    if crop.name == other.name:
        return box
    if crop.volume != other.volume or crop.grid is None or other.grid is None:
        return Box((0, 0, 0), (0, 0, 0))
    return seen_in(crop.grid, other.grid.crop(box))


def seen_in(grid: Grid, inner: Grid) -> Box:
    """Return which voxels of a grid share space with another; those touched by a hair's breadth do not."""
    start, stop = [], []
    sides = zip(grid.corner_nm, grid.voxel_size_nm, inner.corner_nm, inner.extent_nm, strict=True)
    for corner, size, low, extent in sides:
        start.append(math.floor((low - corner) / size + TOUCHING))
        stop.append(math.ceil((low + extent - corner) / size - TOUCHING))
    found = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    return found.clip(Box.whole(grid.shape_zyx))


def _covered(box: Box, others: Sequence[Box], axis: int = 0) -> int:
    """Return how many voxels of a box lie in the union of the others, by sweeping axis after axis."""
    inside = [part for other in others if (part := other.clip(box)).num_voxels > 0]
    if axis == 3:
        return 1 if inside else 0
    edges = sorted({edge for part in inside for edge in (part.start[axis], part.stop[axis])})
    total = 0
    for low, high in itertools.pairwise(edges):
        active = [part for part in inside if part.start[axis] <= low and part.stop[axis] >= high]
        total += (high - low) * _covered(box, active, axis + 1) if active else 0
    return total
