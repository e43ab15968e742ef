"""What a crop looks like in a few seeded boxes: grey values and thickness of each class, and how labels sit on the EM.

How labels sit on the EM is the mutual information of label code and grey value near label boundaries, with the labels
moved by -3..3 voxels along z, y and x::

    moved by    -2  -1   0  +1  +2            labels in their place: the peak is at 0
    information  .  :   |   :   .

It needs no rule of which class is dark, and an outline drawn one voxel too wide on all sides leaves the peak at 0,
where the gradient under the outline would have two. Cost depends on the number of boxes, never on the crop.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from autoseg.data import store
from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, States
from autoseg.data.codes import CropCodes, index_blocks
from autoseg.data.dataset import Crop
from autoseg.data.em import stored_level
from autoseg.data.resample import resample
from autoseg.geometry import Box, Grid, VoxelsZYX
from autoseg.schema import write_atomically

TRAITS_VERSION = 2
BOX_EDGE: VoxelsZYX = (16, 96, 96)
NUM_BOXES, MAX_BOXES = 8, 16  # those on label boundaries; with those that show rare classes
REACH = 3
BAND = 2  # voxels from a label boundary
NUM_POINTS = 2000
MIN_POINTS, MIN_BOUNDARY = 500, 100
NUM_BINS = 8
SUSPICIOUS = 1.05  # gain along one axis from which all shifts are tried
FLAT_FROM = 3.0  # sections this many times thicker than their pixels have no boundaries along z
MAX_CODES_IN_BOX = 512
MAX_GREYS = 2**16
CACHE_BYTES = 64 * 2**20

Shift = tuple[int, int, int]
Rng = np.random.Generator


class ClassTraits(NamedTuple):
    """One class in the boxes of a crop; thickness in the plane, None without a boundary."""

    voxels: int
    grey: float
    thickness_nm: float | None


class Fit(NamedTuple):
    """The move of the labels, in voxels, that fits the EM best; its information over that of no move; t of the gain."""

    move_zyx: Shift
    gain: float
    t: float
    boxes: int


class CropTraits(NamedTuple):
    """What the boxes of one crop show; `num_greys` counts different grey values, shares are of voxels."""

    name: str
    volume: str
    num_voxels: int
    num_greys: int
    darkest_share: float
    brightest_share: float
    classes: dict[str, ClassTraits]
    fit: Fit | None


class _Sample(NamedTuple):
    """One box: codes renumbered from 0, the states of those codes, and grey values."""

    codes_ZYX: NDArray[np.intp]
    states_CK: States
    grey_ZYX: NDArray[Any]


def remembered(crop: Crop, codes: CropCodes, digest: str) -> CropTraits:
    """Return what `measure` does, kept beside the codes; `digest` stands for the stored EM and labels of the crop."""
    meaning = repr((TRAITS_VERSION, digest, crop.name, crop.volume))
    path = codes.folder / f"traits-{hashlib.sha256(meaning.encode()).hexdigest()[:24]}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=CropTraits)
    except (OSError, ValueError):
        traits = measure(crop, codes)
    with contextlib.suppress(OSError):
        if codes.folder.is_dir():
            write_atomically(path, msgspec.json.encode(traits))
    return traits


def measure(crop: Crop, codes: CropCodes, seed: int = 0) -> CropTraits:
    """Return what seeded boxes of a crop show; boxes whose EM was not fetched are left out."""
    digest = hashlib.sha256(f"{seed}/{crop.name}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))
    samples = list(_samples(crop, codes, rng))
    greys = [sample.grey_ZYX[::2, ::2, ::2].ravel() for sample in samples]
    grey = np.concatenate(greys)[: MAX_GREYS * 16] if greys else np.zeros(0)
    values, counts = np.unique(grey, return_counts=True)
    flat = codes.grid.voxel_size_nm[0] >= FLAT_FROM * min(codes.grid.voxel_size_nm[1:])
    return CropTraits(
        name=crop.name,
        volume=crop.volume,
        num_voxels=int(grey.size),
        num_greys=len(values),
        darkest_share=float(counts[0] / grey.size) if grey.size else 0.0,
        brightest_share=float(counts[-1] / grey.size) if grey.size else 0.0,
        classes=_class_traits(samples, codes),
        fit=_fit(samples, flat, rng) if len(values) > 1 else None,
    )


def _samples(crop: Crop, codes: CropCodes, rng: Rng) -> Iterator[_Sample]:
    multiscale, cache = store.open_multiscale(crop.em), store.ChunkCache(CACHE_BYTES)
    order = multiscale.levels_for(codes.grid.voxel_size_nm)
    levels = [(level.grid, store.ArrayReader(level.path, cache)) for level in order]
    for box in _boxes(codes, rng):
        (source, array), _ = stored_level(levels, codes.grid.crop(box))
        grey = _grey(array, source, codes.grid.crop(box))
        local = np.asarray(codes.codes_ZYX[box.slices])
        used = np.flatnonzero(np.bincount(local.ravel()))
        if grey is None or len(used) > MAX_CODES_IN_BOX:
            continue
        lookup = np.zeros(int(used[-1]) + 1, dtype=np.intp)
        lookup[used] = np.arange(len(used))
        yield _Sample(lookup[local], codes.states_CK[used], grey)


def _grey(array: store.ArrayReader, source: Grid, grid: Grid) -> NDArray[Any] | None:
    """Return grey values on `grid`, None where part of it was not fetched."""
    offset = grid.aligned_with(source)
    box = source.covering(grid) if offset is None else Box.whole(grid.shape_zyx).shift(offset)
    inside = box.clip(Box.whole(array.shape_zyx))
    if inside.num_voxels == 0 or not array.stored_mask(inside).all():
        return None
    if offset is not None:
        return array.read(box) if inside == box else None
    grey = resample(array.read(inside).astype(np.float32), source.crop(inside), grid, area=False)
    return np.rint(grey) if array.dtype.kind in "ui" else grey


def _boxes(codes: CropCodes, rng: Rng) -> list[Box]:
    """Return boxes on blocks of several codes, then some for classes that these do not show, then any."""
    blocks = index_blocks(codes.grid.shape_zyx)
    order = rng.permutation(len(blocks))
    mixed = (codes.counts_BC > 0).sum(axis=1)[order] > 1
    chosen: list[int] = [*order[mixed][:NUM_BOXES].tolist(), *order[~mixed][: NUM_BOXES // 4].tolist()]
    present_BK = codes.counts_BC @ (codes.states_CK == PRESENT).astype(np.int64)
    for k in range(present_BK.shape[1]):
        holders = order[present_BK[order, k] > 0]
        if len(chosen) < MAX_BOXES and len(holders) and not present_BK[chosen, k].any():
            chosen.append(int(holders[0]))
    edge = tuple(min(e, n) for e, n in zip(BOX_EDGE, codes.grid.shape_zyx, strict=True))
    found: dict[Box, None] = {}
    for index in chosen:
        block = blocks[index]
        z, y, x = (
            min(max((a + b - e) // 2, 0), n - e)
            for a, b, e, n in zip(block.start, block.stop, edge, codes.grid.shape_zyx, strict=True)
        )
        found[Box((z, y, x), (z + edge[0], y + edge[1], x + edge[2]))] = None
    return list(found)


def _class_traits(samples: list[_Sample], codes: CropCodes) -> dict[str, ClassTraits]:
    num = len(codes.names)
    voxels, greys, faces_y, faces_x = np.zeros(num), np.zeros(num), np.zeros(num), np.zeros(num)
    for sample in samples:
        present = (sample.states_CK == PRESENT).astype(np.float64)
        flat = sample.codes_ZYX.ravel()
        voxels += np.bincount(flat, minlength=len(present)) @ present
        greys += np.bincount(flat, weights=sample.grey_ZYX.ravel(), minlength=len(present)) @ present
        faces_y += _faces(sample, 1)
        faces_x += _faces(sample, 2)
    _, size_y, size_x = codes.grid.voxel_size_nm
    outline = faces_y * size_x + faces_x * size_y
    return {
        name: ClassTraits(
            voxels=int(voxels[k]),
            grey=float(greys[k] / voxels[k]),
            thickness_nm=float(2 * voxels[k] * size_y * size_x / outline[k]) if outline[k] else None,
        )
        for k, name in enumerate(codes.names)
        if voxels[k]
    }


def _faces(sample: _Sample, axis: int) -> NDArray[np.float64]:
    """Return for each class how many neighbours along an axis are one present, one absent."""
    present, absent = ((sample.states_CK == state).astype(np.float64) for state in (PRESENT, ABSENT))
    low, high = _neighbours(sample.codes_ZYX, axis)
    num = len(present)
    pairs = np.bincount((low * num + high).ravel(), minlength=num * num).reshape(num, num).astype(np.float64)
    faces: NDArray[np.float64] = (present * (pairs @ absent) + absent * (pairs @ present)).sum(axis=0)
    return faces


def _neighbours(volume: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    length = volume.shape[axis]
    return volume.take(range(length - 1), axis), volume.take(range(1, length), axis)


# ---- how labels sit on the EM -------------------------------------------------------------------------------


class _Points(NamedTuple):
    """Voxels near label boundaries: codes, positions in the flat box, and the binned grey values they move over."""

    codes_N: NDArray[np.intp]
    where_N: NDArray[np.intp]
    bins: NDArray[np.intp]
    step_zyx: NDArray[np.intp]


def _fit(samples: list[_Sample], flat: bool, rng: Rng) -> Fit | None:
    """Return the move of the labels that fits best, None where too few boxes hold boundaries to tell."""
    if not samples:
        return None
    reach = tuple(min(REACH, (n - 1) // 4) for n in samples[0].codes_ZYX.shape)
    near = [points for sample in samples if (points := _points(sample, reach, flat, rng)) is not None]
    if len(near) < 2:
        return None
    axes = [
        tuple(k if axis == a else 0 for a in range(3))
        for axis in range(3)
        for k in range(-reach[axis], 1 + reach[axis])
    ]
    moves = np.array(sorted(set(axes), key=lambda move: (move != (0, 0, 0), move)))
    gains = np.array([_information(points, moves) for points in near])
    mean = gains.mean(axis=0)
    if mean.max() > SUSPICIOUS * mean[0]:
        cube = itertools.product(*(range(-r, r + 1) for r in reach))
        moves = np.array(sorted(cube, key=lambda move: (move != (0, 0, 0), move)))
        gains = np.array([_information(points, moves) for points in near])
        mean = gains.mean(axis=0)
    best = int(mean.argmax())
    gain = gains[:, best] - gains[:, 0]
    error = float(gain.std(ddof=1)) / np.sqrt(len(gain))
    z, y, x = moves[best].tolist()
    t = float(gain.mean() / max(error, 1e-9))
    return Fit((z, y, x), float(mean[best] / max(mean[0], 1e-9)), t, len(near))


def _points(sample: _Sample, reach: tuple[int, ...], flat: bool, rng: Rng) -> _Points | None:
    """Draw voxels within a band around label boundaries, such that every move stays in the box."""
    codes, states = sample.codes_ZYX, sample.states_CK
    present, absent = ((states == state).astype(np.float32) for state in (PRESENT, ABSENT))
    differ = (present @ absent.T + absent @ present.T) > 0
    edge = np.zeros(codes.shape, dtype=bool)
    for axis in (1, 2) if flat else (0, 1, 2):
        low, high = _neighbours(codes, axis)
        edge[tuple(slice(0, n - (axis == a)) for a, n in enumerate(codes.shape))] |= differ[low, high]
    found = np.flatnonzero(edge)
    if len(found) < MIN_BOUNDARY:
        return None
    drawn = found[rng.integers(0, len(found), NUM_POINTS)]
    band = np.array([0 if flat else BAND, BAND, BAND])
    spots = np.stack(np.unravel_index(drawn, codes.shape), axis=1) + rng.integers(-band, band + 1, (NUM_POINTS, 3))
    margin = np.array(reach)
    spots = spots[((spots >= margin) & (spots < np.array(codes.shape) - margin)).all(axis=1)]
    local = codes[tuple(spots.T)]
    known = (states != UNKNOWN).any(axis=1)[local]
    local, spots = local[known], spots[known]
    if len(spots) < MIN_POINTS:
        return None
    cuts = np.quantile(sample.grey_ZYX[::2, ::2, ::2], np.linspace(0, 1, NUM_BINS + 1)[1:-1])
    bins = np.searchsorted(cuts, sample.grey_ZYX.ravel()).astype(np.intp)
    step = np.array([codes.shape[1] * codes.shape[2], codes.shape[2], 1])
    return _Points(np.unique(local, return_inverse=True)[1].ravel(), spots @ step, bins, step)


def _information(points: _Points, moves_M3: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the mutual information, in nats, of code and grey value for each move of the labels."""
    num_codes, num_moves = int(points.codes_N.max()) + 1, len(moves_M3)
    grey_MN = points.bins[points.where_N + (moves_M3 @ points.step_zyx)[:, None]]
    cells = (np.arange(num_moves)[:, None] * num_codes + points.codes_N) * NUM_BINS + grey_MN
    joint = np.bincount(cells.ravel(), minlength=num_moves * num_codes * NUM_BINS)
    share = joint.reshape(num_moves, num_codes, NUM_BINS) / len(points.codes_N)
    by_code, by_grey = share.sum(axis=2), share.sum(axis=1)
    entropy = xlogy(by_code, by_code).sum(axis=1) + xlogy(by_grey, by_grey).sum(axis=1)
    information: NDArray[np.float64] = xlogy(share, share).sum(axis=(1, 2)) - entropy
    return information
