"""How thick and how large a class is, measured in seeded boxes of the label codes where the class lies.

Thickness is twice the distance from the ridge of the mask to the background, at each voxel that of the widest ball
that holds it (bumps of the surface have small balls of their own, inside larger ones). A ball that reaches beyond what
was read says nothing, so a box is widened, at a coarser step, until most balls fit or the crop ends::

    ....#######....     distance  1 2 3 4 3 2 1      ridge: the 4; seven voxels thick
    where sections lie far apart, in the plane of the section: a 37 nm membrane has no thickness along 50 nm steps

Instances are the connected components of the mask, or the ids of an instance label; those that the border of the
box cuts have no size and are counted apart. A measurement is kept beside the codes it was made from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cc3d
import edt
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.data.classes import PRESENT, UNKNOWN
from autoseg.data.codes import CropCodes, index_blocks
from autoseg.data.dataset import LabelArray
from autoseg.data.store import ArrayReader, ChunkCache, checksums_in
from autoseg.errors import DataError
from autoseg.geometry import Box, NmZYX, VoxelsZYX
from autoseg.schema import ClassShape, Quantiles, write_atomically

SHAPES_VERSION = 1
THICKNESS_VOXELS = 2**21  # 128³
INSTANCE_VOXELS = 2**23  # a crop of 200³ whole
STEPS = (1, 2, 4)
SECTIONS_APART = 3.0
KEPT_VALUES = 1024
MIN_DRAWN, MAX_DRAWN, PAIRS = 256, 1024, 2**25


class ShapeSample(NamedTuple):
    """What one crop says of one class; the values are sorted and thinned to a bounded number."""

    thickness_nm: tuple[float, ...]
    num_drawn: int
    num_drawn_cut: int
    instance_nm3: tuple[float, ...]
    num_instances: int
    num_instances_cut: int
    num_voxels: int


def sections_apart(voxel_size_nm: NmZYX) -> tuple[bool, bool, bool]:
    """Return for each axis whether its step is too coarse beside the finest for a distance across it."""
    z, y, x = (v >= SECTIONS_APART * min(voxel_size_nm) for v in voxel_size_nm)
    return z, y, x


def thickness(
    mask_ZYX: NDArray[np.bool_], voxel_size_nm: NmZYX, unknown_ZYX: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float64], int]:
    """Return (local thickness in nm at evenly drawn voxels of the mask, number of drawn voxels that have none).

    A voxel has none where the widest ball around it leaves what is known.
    Source: Hildebrand and Rüegsegger 1997, J Microsc 185:67, the widest ball inside the body that holds the voxel.
    """
    apart = sections_apart(voxel_size_nm)
    axes = [axis for axis in range(3) if not apart[axis] and mask_ZYX.shape[axis] > 1]
    if not axes or not mask_ZYX.any():
        return np.zeros(0), 0
    far = 1e3 * sum(n * v for n, v in zip(mask_ZYX.shape, voxel_size_nm, strict=True))
    sampling = [voxel_size_nm[axis] if axis in axes else far for axis in range(3)]
    part = _bounding(mask_ZYX)
    hidden = np.zeros(part.shape_zyx, dtype=bool) if unknown_ZYX is None else unknown_ZYX[part.slices]
    body = mask_ZYX[part.slices] | hidden
    if body.all():
        return np.zeros(0), 1
    distance: NDArray[np.float32] = edt.edt(body, anisotropy=sampling)
    highest = ndimage.maximum_filter(distance, size=[3 if axis in axes else 1 for axis in range(3)])
    ridge = np.argwhere(body & (distance >= highest))
    radius = distance[tuple(ridge.T)].astype(np.float64)
    fits = radius < _to_border(ridge + part.start, mask_ZYX.shape, voxel_size_nm, axes) * (1 - 1e-6)
    if hidden.any():
        to_unknown = edt.edt(~hidden, anisotropy=sampling)
        fits &= radius < to_unknown[tuple(ridge.T)] * (1 - 1e-6)
    width = np.where(fits, _across(distance, ridge, radius, voxel_size_nm, axes), np.inf)
    drawn = np.flatnonzero(mask_ZYX[part.slices])
    count = min(len(drawn), max(MIN_DRAWN, min(MAX_DRAWN, PAIRS // len(ridge))))
    drawn = drawn[((np.arange(count) + 0.5) * len(drawn) / count).astype(np.intp)]
    voxels = np.stack(np.unravel_index(drawn, part.shape_zyx), axis=1)
    values = _widest(voxels * sampling, ridge * sampling, radius, width)
    return values[np.isfinite(values)], int(np.isinf(values).sum())


def _widest(
    points_NA: NDArray[np.float64],
    centres_RA: NDArray[np.float64],
    radius_R: NDArray[np.float64],
    width_R: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return for each point the width of the largest ball that holds it; nan where none does."""
    order = np.argsort(-radius_R, kind="stable")
    centres, square, width = centres_RA[order].astype(np.float32), radius_R[order] ** 2, width_R[order]
    out = np.full(len(points_NA), np.nan)
    for i, point in enumerate(points_NA.astype(np.float32)):
        away = centres - point
        inside = np.einsum("ra,ra->r", away, away) < square
        first = int(inside.argmax())
        if inside[first]:
            out[i] = width[first]
    return out


def _bounding(mask_ZYX: NDArray[np.bool_]) -> Box:
    """Return the box of the mask with one voxel around it, inside the array."""
    (found,) = ndimage.find_objects(mask_ZYX.view(np.uint8))
    z, y, x = found
    whole = Box.whole(_zyx(mask_ZYX.shape))
    return Box((z.start, y.start, x.start), (z.stop, y.stop, x.stop)).grow((1, 1, 1)).clip(whole)


def _to_border(
    voxels_NA: NDArray[np.intp], shape: Sequence[int], voxel_size_nm: NmZYX, axes: list[int]
) -> NDArray[np.float64]:
    """Return for each voxel the distance in nm to the first centre outside, along the axes that count."""
    steps = [
        np.minimum(voxels_NA[:, axis] + 1, shape[axis] - voxels_NA[:, axis]) * voxel_size_nm[axis] for axis in axes
    ]
    nearest: NDArray[np.float64] = np.min(steps, axis=0)
    return nearest


def _across(
    distance_ZYX: NDArray[np.float32],
    ridge_NA: NDArray[np.intp],
    found_N: NDArray[np.float64],
    voxel_size_nm: NmZYX,
    axes: list[int],
) -> NDArray[np.float64]:
    """Return the thickness at the ridge: twice the distance, but layers counted where they lie flat along an axis.

    In an odd number of layers the middle one is a ridge, and twice its distance is one layer too many.
    """
    padded = np.pad(distance_ZYX, 1, mode="edge").astype(np.float64)
    falls = np.zeros((2, len(axes), len(found_N)))  # to the nearer and the farther side, in steps
    for i, axis in enumerate(axes):
        below, above = ridge_NA + 1, ridge_NA + 1
        below[:, axis] -= 1
        above[:, axis] += 1
        sides = [padded[tuple(below.T)], padded[tuple(above.T)]]
        falls[:, i] = np.sort((found_N - sides) / voxel_size_nm[axis], axis=0)
    middle = falls.min(axis=0) > 1 - 1e-4
    level = np.abs(falls).max(axis=0) < 1e-4
    step = np.asarray(voxel_size_nm)[axes]
    odd = middle & (level.sum(axis=0) == len(axes) - 1)
    layers: NDArray[np.float64] = 2 * found_N - (odd * step[:, None]).sum(axis=0)
    return layers


def instance_sizes(labels_ZYX: NDArray[np.unsignedinteger[Any]]) -> tuple[NDArray[np.int64], int]:
    """Return (voxels of each object that lies wholly inside, number of objects that touch the border); 0 is none."""
    parts = [np.unique(part, return_counts=True) for part in np.array_split(labels_ZYX, len(labels_ZYX))]
    ids, which = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    sizes = np.zeros(len(ids), dtype=np.int64)
    np.add.at(sizes, which, np.concatenate([part[1] for part in parts]))
    faces = [np.take(labels_ZYX, [0, -1], axis=axis).ravel() for axis in range(3) if labels_ZYX.shape[axis] > 1]
    cut = np.isin(ids, np.unique(np.concatenate(faces))) if faces else np.zeros(len(ids), dtype=bool)
    whole: NDArray[np.int64] = sizes[(ids != 0) & ~cut].astype(np.int64)
    return whole, int(((ids != 0) & cut).sum())


def measure_shape(codes: CropCodes, states_C: NDArray[np.uint8], source: LabelArray | None, seed: str) -> ShapeSample:
    """Return thickness and instances of the class with these states by code; `source` holds its ids if it has any.

    Kept beside the codes; what cannot be read there, or written, is measured.
    """
    meaning = repr((SHAPES_VERSION, THICKNESS_VOXELS, INSTANCE_VOXELS, seed, source and source.name, states_C.tolist()))
    path = codes.folder / f"shape-{hashlib.sha256(meaning.encode()).hexdigest()[:24]}.json"
    try:
        stored = json.loads(path.read_bytes())
        return ShapeSample(tuple(stored.pop("thickness_nm")), instance_nm3=tuple(stored.pop("instance_nm3")), **stored)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        sample = _measure(codes, states_C, source, seed)
    try:
        if codes.folder.is_dir():
            write_atomically(path, json.dumps(sample._asdict()).encode())
    except OSError:
        pass
    return sample


def _measure(codes: CropCodes, states_C: NDArray[np.uint8], source: LabelArray | None, seed: str) -> ShapeSample:
    centre = _centre(codes, states_C, seed)
    codes_ZYX, values, cut, num_voxels = codes.codes_ZYX, np.zeros(0), 0, 0
    for box, steps in _thickness_boxes(codes, centre):
        z, y, x = (v * s for v, s in zip(codes.grid.voxel_size_nm, steps, strict=True))
        picked = codes_ZYX[tuple(slice(a, b, s) for a, b, s in zip(box.start, box.stop, steps, strict=True))]
        states = states_C[picked]
        values, cut = thickness(states == PRESENT, (z, y, x), states == UNKNOWN)
        num_voxels += states.size
        if len(values) >= max(1, cut):
            break
    box = _box_around(centre, codes.grid.shape_zyx, codes.grid.voxel_size_nm, INSTANCE_VOXELS)
    mask = states_C[codes_ZYX[box.slices]] == PRESENT
    if source is None:
        labels = cc3d.connected_components(mask)
    else:
        chunks = ChunkCache(0, checksums_in(codes.folder.parents[1]))
        labels = np.where(mask, ArrayReader(source.path, chunks).read(box), 0)
    sizes, num_cut = instance_sizes(labels)
    return ShapeSample(
        _thin(values),
        len(values) + cut,
        cut,
        _thin(sizes * math.prod(codes.grid.voxel_size_nm)),
        len(sizes),
        num_cut,
        num_voxels + mask.size,
    )


def _centre(codes: CropCodes, states_C: NDArray[np.uint8], seed: str) -> VoxelsZYX:
    """Return the middle of an index block, drawn by how many voxels of the class it holds."""
    present_B = codes.counts_BC[:, states_C == PRESENT].sum(axis=1, dtype=np.int64)
    if not present_B.any():
        raise DataError(codes.folder, "holds no voxel of a class that should lie there", "delete this folder")
    rng = np.random.Generator(np.random.Philox(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")))
    drawn = np.searchsorted(np.cumsum(present_B), rng.random() * present_B.sum(), side="right")
    block = index_blocks(codes.grid.shape_zyx)[min(int(drawn), len(present_B) - 1)]
    return _zyx([(a + b) // 2 for a, b in zip(block.start, block.stop, strict=True)])


def _thickness_boxes(codes: CropCodes, centre: VoxelsZYX) -> Iterator[tuple[Box, VoxelsZYX]]:
    """Yield (box, step along each axis), wider and coarser, until a box is the whole crop."""
    shape, size = codes.grid.shape_zyx, codes.grid.voxel_size_nm
    for step in STEPS:
        steps = _zyx([1 if apart else step for apart in sections_apart(size)])
        box = _box_around(centre, shape, size, THICKNESS_VOXELS * math.prod(steps))
        yield box, steps
        if box == Box.whole(shape):
            return


def _box_around(centre: VoxelsZYX, shape_zyx: VoxelsZYX, voxel_size_nm: NmZYX, num_voxels: int) -> Box:
    """Return the box around that voxel, inside the array, that is a cube in nm as far as the array allows."""
    start, stop = [0, 0, 0], [0, 0, 0]
    left = float(num_voxels)
    order = sorted(range(3), key=lambda axis: shape_zyx[axis] * voxel_size_nm[axis])
    for i, axis in enumerate(order):  # the shortest axis first: what it leaves goes to the others
        edge_nm = (left * math.prod(voxel_size_nm[a] for a in order[i:])) ** (1 / (3 - i))
        edge = min(shape_zyx[axis], max(1, int(edge_nm / voxel_size_nm[axis] + 1e-6)))
        start[axis] = min(max(0, centre[axis] - edge // 2), shape_zyx[axis] - edge)
        stop[axis] = start[axis] + edge
        left /= edge
    return Box(_zyx(start), _zyx(stop))


def pool_shape(name: str, samples: Sequence[ShapeSample], *, in_plane: bool) -> ClassShape:
    """Return the shape of a class from its crops; each crop weighs alike in the quantiles."""
    drawn = sum(sample.num_drawn for sample in samples)
    return ClassShape(
        name=name,
        thickness_nm=_quantiles([sample.thickness_nm for sample in samples]),
        in_plane=in_plane,
        thickness_cut_share=sum(sample.num_drawn_cut for sample in samples) / drawn if drawn else 0.0,
        num_instances=sum(sample.num_instances for sample in samples),
        num_instances_cut=sum(sample.num_instances_cut for sample in samples),
        instance_nm3=_quantiles([sample.instance_nm3 for sample in samples]),
        sampled_crops=len(samples),
        sampled_voxels=sum(sample.num_voxels for sample in samples),
    )


def _quantiles(values: Sequence[Sequence[float]]) -> Quantiles | None:
    filled = [np.asarray(part, dtype=np.float64) for part in values if len(part)]
    if not filled:
        return None
    pooled = np.concatenate(filled)
    weights = np.concatenate([np.full(len(part), 1 / len(part)) for part in filled])
    order = np.argsort(pooled, kind="stable")
    share = np.cumsum(weights[order]) - weights[order] / 2
    p10, p50, p90 = np.interp(np.array([0.1, 0.5, 0.9]) * len(filled), share, pooled[order])
    return Quantiles(p10=round(float(p10), 3), p50=round(float(p50), 3), p90=round(float(p90), 3))


def _thin(values: NDArray[Any]) -> tuple[float, ...]:
    """Return the values sorted; of many, a bounded number at even ranks."""
    ordered = np.sort(values).astype(np.float64)
    if len(ordered) > KEPT_VALUES:
        ordered = ordered[((np.arange(KEPT_VALUES) + 0.5) * len(ordered) / KEPT_VALUES).astype(np.intp)]
    return tuple(round(value, 3) for value in ordered.tolist())


def _zyx(values: Sequence[int]) -> VoxelsZYX:
    z, y, x = (int(v) for v in values)
    return z, y, x
