r"""Rotation, scaling, bending and misalignment of a patch: EM and codes move once, on one grid, whatever the classes.

A warp is drawn before the patch is read, so that exactly what it needs is read::

      +--------------+ read
      |     /\       |          u  offset of a voxel of the patch from its centre
      |    /  \      |          matrix @ u + bend(u)  offset in what was read, which has the same centre
      |   /    \     |
      |   \ patch    |          lengths are turned in nm, not in voxels: S^-1 R S
      |    \  / /    |
      |     \/ /     |          a misalignment shifts all sections from one on, before anything else
      +--------------+

EM is interpolated linearly, codes take the nearest voxel, and what comes from outside is code 0, unknown. Thin or
anisotropic patches are warped within their sections. `torch.nn.functional.grid_sample` does it: batchgenerators'
augment_spatial gives the same and took 3 (3D) to 19 (2D) times as long.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import grid_sample

from autoseg.geometry import Box, NmZYX, VoxelsZYX
from autoseg.schema import Augmentation

ISOTROPIC_WITHIN = 1.5
BEND_SD_MAX = 3.0
Image = NDArray[np.float32]
Codes = NDArray[Any]


class Frame(NamedTuple):
    """What every patch of a plan has in common."""

    patch_zyx: VoxelsZYX
    voxel_size_nm: NmZYX
    input_slices: int

    @property
    def solid(self) -> bool:
        """Return whether patches may be turned out of their sections."""
        sizes = self.voxel_size_nm
        return self.patch_zyx[0] > 1 and max(sizes) < ISOTROPIC_WITHIN * min(sizes)

    @property
    def num_sections(self) -> int:
        """Return how many sections of EM a patch has, as z or as channels."""
        return self.patch_zyx[0] * self.input_slices


class Shift(NamedTuple):
    """All sections from `section` on lie that far off, in voxels; a slip is of that section, and of its EM, alone."""

    section: int
    y: int
    x: int
    slip: bool


class Warp(NamedTuple):
    """The spatial transform drawn for a patch, and the box that must be read to carry it out."""

    matrix: NDArray[np.float64] | None
    bend_AZYX: NDArray[np.float32] | None
    shift: Shift | None
    read_zyx: VoxelsZYX


def draw_warp(plan: Augmentation, frame: Frame, rng: np.random.Generator) -> Warp:
    """Draw rotation, scaling, bending and misalignment; with none of them, the patch itself is read."""
    turns, scales, bends, shifts = rng.random(4) < (
        plan.rotation_probability,
        plan.scale_probability,
        plan.elastic_probability,
        plan.misalign_probability,
    )
    patch = frame.patch_zyx
    matrix = bend = None
    read = patch
    if turns or scales or bends:
        matrix = _rotation(plan.rotation_degrees if turns else 0.0, frame, rng)
        if scales:
            low, high = np.log(plan.scale_range)
            zoom = math.exp(rng.uniform(low, high))
            matrix = matrix / (zoom if frame.solid else np.array([[1.0], [zoom], [zoom]]))
        bend = _bend(plan, frame, rng) if bends else None
        half = (np.array(patch) - 1) / 2
        reach = np.abs(matrix) @ half
        if bend is not None:
            reach[3 - len(bend) :] += np.abs(bend).reshape(len(bend), -1).max(axis=1)
        read = _grown(patch, np.ceil(reach - half - 1e-6))
    shift = _draw_shift(plan, frame, rng) if shifts and frame.num_sections > 1 else None
    if shift is not None:
        margin = max(abs(shift.y), abs(shift.x))
        read = _grown(read, np.array([0, margin, margin]))
    return Warp(matrix, bend, shift, read)


def _grown(shape_zyx: VoxelsZYX, margin_zyx: NDArray[Any]) -> VoxelsZYX:
    z, y, x = (max(1, n + 2 * int(m)) for n, m in zip(shape_zyx, margin_zyx, strict=True))
    return z, y, x


def _rotation(degrees: float, frame: Frame, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the rotation about x, y and z (about z alone unless solid) by up to that angle, in voxels."""
    angles = np.radians(rng.uniform(-degrees, degrees, 3) if degrees else np.zeros(3))
    if not frame.solid:
        angles[:2] = 0
    return rotation_matrix((angles[0], angles[1], angles[2]), frame.voxel_size_nm)


def rotation_matrix(about_xyz: tuple[float, float, float], voxel_size_nm: NmZYX) -> NDArray[np.float64]:
    """Return the matrix on offsets (z, y, x) in voxels that turns by these angles in nm, about z first."""
    matrix = np.eye(3)
    for angle, (a, b) in zip(about_xyz, ((0, 1), (0, 2), (1, 2)), strict=True):
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    size = np.array(voxel_size_nm)
    turned: NDArray[np.float64] = matrix * size[None, :] / size[:, None]
    return turned


def _bend(plan: Augmentation, frame: Frame, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return smooth displacements in voxels (axes, z, y, x), of sd `elastic_magnitude`, cut at three of them.

    Cubic splines through white noise; knots lie as far apart as makes the spline as wide as a Gaussian of
    `elastic_sigma`. Unless solid all sections of a patch are bent alike, along y and x.
    """
    shape = frame.patch_zyx if frame.solid else (1, *frame.patch_zyx[1:])
    step = max(1.0, plan.elastic_sigma * math.sqrt(3))
    weights = [spline_weights(n, step) if n > 1 else np.ones((1, 1), np.float32) for n in shape]
    num_axes = 3 if frame.solid else 2
    noise = rng.standard_normal((num_axes, *(w.shape[1] for w in weights)), np.float32)
    bend = np.einsum("zi,aiyx->azyx", weights[0], noise)
    bend = np.matmul(np.matmul(weights[1], bend), weights[2].T)
    spread = math.prod(float(np.sqrt((w**2).sum(axis=1).mean())) for w in weights)
    largest = BEND_SD_MAX * plan.elastic_magnitude
    cut: NDArray[np.float32] = np.clip(bend * np.float32(plan.elastic_magnitude / spread), -largest, largest)
    return cut.astype(np.float32, copy=False)


def spline_weights(length: int, step: float) -> NDArray[np.float32]:
    """Return the weights (length, knots) of cubic B-splines with knots `step` voxels apart; rows sum to 1."""
    places = np.arange(length) / step + 1
    t = np.abs(places[:, None] - np.arange(math.ceil((length - 1) / step) + 3))
    weights: NDArray[np.float64] = np.where(t < 1, (4 - 6 * t**2 + 3 * t**3) / 6, np.maximum(2 - t, 0) ** 3 / 6)
    return weights.astype(np.float32)


def _draw_shift(plan: Augmentation, frame: Frame, rng: np.random.Generator) -> Shift | None:
    """Draw a misalignment; it never slips the one section of a 2.5D patch that is predicted."""
    num, centre = frame.num_sections, frame.input_slices // 2
    slip = bool(rng.random() < plan.misalign_slip_share)
    section = int(rng.integers(0 if slip else 1, num))
    y, x = (int(v) for v in rng.integers(-plan.misalign_max, plan.misalign_max + 1, 2))
    if slip and frame.input_slices > 1 and section == centre:
        return None
    return Shift(section, y, x, slip)


def place_patch(
    voxel: VoxelsZYX, patch_zyx: VoxelsZYX, shape_zyx: VoxelsZYX, rng: np.random.Generator, warp: Warp | None = None
) -> Box:
    """Return a patch that holds the voxel in its inner half, moved inside the crop as far as it keeps the voxel."""
    inner = [p // 4 + int(rng.integers(max(1, p // 2 + p % 2))) for p in patch_zyx]
    if warp is None or warp.matrix is None:
        free = [v - i for v, i in zip(voxel, inner, strict=True)]
        start = _held(free, patch_zyx, shape_zyx)
    else:
        half = (np.array(patch_zyx) - 1) / 2
        wished = np.rint(np.array(voxel) - half - warp.matrix @ (np.array(inner) - half)).astype(int)
        held = np.array(_held(wished.tolist(), patch_zyx, shape_zyx))
        back = np.linalg.inv(warp.matrix)
        for share in (1.0, 0.75, 0.5, 0.25, 0.0):
            start = np.rint(wished + share * (held - wished)).astype(int).tolist()
            if (np.abs(back @ (np.array(voxel) - start - half)) <= half + 1e-6).all():
                break
    z, y, x = start
    return Box((z, y, x), (z + patch_zyx[0], y + patch_zyx[1], x + patch_zyx[2]))


def _held(start: list[int], patch_zyx: VoxelsZYX, shape_zyx: VoxelsZYX) -> list[int]:
    """Return the start moved so that the patch lies inside the crop; one that does not fit is centred."""
    return [
        (n - p) // 2 if p >= n else min(max(first, 0), n - p)
        for first, p, n in zip(start, patch_zyx, shape_zyx, strict=True)
    ]


def read_box(patch: Box, warp: Warp) -> Box:
    """Return what must be read for that patch; both have the same centre."""
    z, y, x = ((r - p) // 2 for r, p in zip(warp.read_zyx, patch.shape_zyx, strict=True))
    return patch.grow((z, y, x))


def apply_warp(image_CZYX: Image, codes_ZYX: Codes, warp: Warp, frame: Frame) -> tuple[Image, Codes]:
    """Return (EM, codes) of the patch from what `read_box` asked for."""
    if warp.shift is not None:
        image_CZYX, codes_ZYX = _misalign(image_CZYX, codes_ZYX, warp.shift)
    if warp.matrix is None:
        return image_CZYX, codes_ZYX
    channels, depth = image_CZYX.shape[:2]
    axes = (0, 1, 2) if frame.solid else (1, 2)
    places = _places(warp, frame, codes_ZYX.shape)
    grid = np.empty((1, *places[0].shape, len(axes)), np.float32)
    for i, a in enumerate(axes):
        np.multiply(places[i], np.float32(2 / max(1, codes_ZYX.shape[a] - 1)), out=grid[0, ..., len(axes) - 1 - i])
    grid -= 1
    image = torch.from_numpy(np.ascontiguousarray(image_CZYX))
    image = image[None] if frame.solid else image.reshape(1, channels * depth, *image.shape[2:])
    image = grid_sample(image, torch.from_numpy(grid), mode="bilinear", padding_mode="border", align_corners=True)
    volume = codes_ZYX[None] if frame.solid else codes_ZYX
    codes = _nearest(volume, places)
    return image.numpy().reshape(channels, *frame.patch_zyx), codes.reshape(frame.patch_zyx)


def _places(warp: Warp, frame: Frame, read_zyx: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Return where each voxel of the patch is taken from, in voxels of what was read: an array for each axis."""
    assert warp.matrix is not None
    axes = (0, 1, 2) if frame.solid else (1, 2)
    offsets = [
        (np.arange(frame.patch_zyx[a], dtype=np.float32) - np.float32((frame.patch_zyx[a] - 1) / 2)).reshape(
            [-1 if b == a else 1 for b in axes]
        )
        for a in axes
    ]
    places = []
    for i, a in enumerate(axes):
        terms = [np.float32(warp.matrix[a, b]) * offset for b, offset in zip(axes, offsets, strict=True)]
        terms[-1] = terms[-1] + np.float32((read_zyx[a] - 1) / 2)
        place = terms[0] + (terms[1] if len(terms) == 2 else terms[1] + terms[2])  # small arrays first
        if warp.bend_AZYX is not None:
            place += warp.bend_AZYX[i] if frame.solid else warp.bend_AZYX[i, 0]
        places.append(place)
    return places


def _nearest(volume: Codes, places: list[NDArray[np.float32]]) -> Codes:
    """Return the values at the nearest voxels, the first axis kept; 0 for what lies outside."""
    sizes = volume.shape[1:]
    index = np.zeros(places[0].shape, np.int64)
    outside = np.zeros(0, bool)
    for place, size in zip(places, sizes, strict=True):
        nearest = np.rint(place)
        if nearest.min() < 0 or nearest.max() > size - 1:
            beyond = (nearest < 0) | (nearest > size - 1)
            outside = beyond if outside.size == 0 else outside | beyond
            np.clip(nearest, 0, size - 1, out=nearest)
        index *= size
        index += nearest.astype(np.int64)
    found = np.take(volume.reshape(len(volume), -1), index, axis=1, mode="clip")
    if outside.size:
        found[:, outside] = 0
    return found


def _misalign(image_CZYX: Image, codes_ZYX: Codes, shift: Shift) -> tuple[Image, Codes]:
    """Return both without the margin that was read for the shift; the EM from its section on is moved, codes as well.

    With several input slices the codes are those of the slice in the middle.
    """
    margin = max(abs(shift.y), abs(shift.x))
    channels, depth, height, width = image_CZYX.shape
    sections = image_CZYX.reshape(channels * depth, height, width)
    number = np.arange(len(sections))
    moved = number == shift.section if shift.slip else number >= shift.section
    of_codes = moved[channels // 2 : channels // 2 + depth] & (not shift.slip)
    image, codes = (
        _shifted(volume, which, shift, margin) for volume, which in ((sections, moved), (codes_ZYX, of_codes))
    )
    return image.reshape(channels, depth, *image.shape[1:]), codes


def _shifted(sections_SYX: NDArray[Any], moved_S: NDArray[np.bool_], shift: Shift, margin: int) -> NDArray[Any]:
    _, height, width = sections_SYX.shape
    out = sections_SYX[:, margin : height - margin, margin : width - margin].copy()
    y, x = margin + shift.y, margin + shift.x
    window = (slice(y, y + out.shape[1]), slice(x, x + out.shape[2]))
    out[moved_S] = sections_SYX[(moved_S, *window)]
    return out
