"""Augmentation of one patch, by batchgenerators behind this one door.

batchgenerators draws from the global generators of numpy and `random`; the door saves their state, seeds them for
this patch alone, and restores them. Spatial warps move EM and codes once; flips are views.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from batchgenerators.augmentations.color_augmentations import augment_contrast, augment_gamma
from batchgenerators.augmentations.noise_augmentations import augment_gaussian_blur, augment_gaussian_noise
from batchgenerators.augmentations.spatial_transformations import augment_spatial
from numpy.typing import NDArray

from autoseg.geometry import VoxelsZYX
from autoseg.schema import Augmentation

Image = NDArray[np.float32]
Codes = NDArray[np.int32]


class Warp(NamedTuple):
    """The spatial transform drawn for a patch, and how much must be read to carry it out."""

    rotates: bool
    scales: bool
    bends: bool
    read_zyx: VoxelsZYX


def draw_warp(plan: Augmentation, patch_zyx: VoxelsZYX, isotropic: bool, rng: np.random.Generator) -> Warp:
    """Decide on rotation, scaling and bending; return the box to read, the patch itself if there is none.

    A thin or anisotropic patch is warped within its sections; only an isotropic one also in z.
    """
    rotates, scales, bends = (
        bool(rng.random() < p) for p in (plan.rotation_probability, plan.scale_probability, plan.elastic_probability)
    )
    if not (rotates or scales or bends):
        return Warp(False, False, False, patch_zyx)
    z, y, x = patch_zyx
    factor = 1 / plan.scale_range[0] if scales else 1.0
    margin = 2 * math.ceil(3 * plan.elastic_magnitude) if bends else 0
    if isotropic and z > 1:
        diagonal = math.hypot(z, y, x) if rotates else 0.0
        edges = [math.ceil(max(n, diagonal) * factor) + margin for n in (z, y, x)]
        return Warp(rotates, scales, bends, (edges[0], edges[1], edges[2]))
    diagonal = math.hypot(y, x) if rotates else 0.0
    ey, ex = (math.ceil(max(n, diagonal) * factor) + margin for n in (y, x))
    return Warp(rotates, scales, bends, (z, ey, ex))


def augment(
    image_CZYX: Image, codes_ZYX: Codes, plan: Augmentation, warp: Warp, patch_zyx: VoxelsZYX, seed: int
) -> tuple[Image, Codes]:
    """Return the augmented (image, codes); both come in the size that `draw_warp` asked for, and leave as a patch.

    Code 0 (everything unknown) fills what a warp brings in from outside.
    """
    with _seeded(seed):
        if warp.rotates or warp.scales or warp.bends:
            image_CZYX, codes_ZYX = _warp(image_CZYX, codes_ZYX, plan, warp, patch_zyx)
        image_CZYX, codes_ZYX = _mirror(image_CZYX, codes_ZYX, plan)
        image_CZYX = _lose_section(_shade(np.ascontiguousarray(image_CZYX), plan), plan)
    return np.ascontiguousarray(image_CZYX), np.ascontiguousarray(codes_ZYX)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002 - the library draws from it
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def _warp(
    image_CZYX: Image, codes_ZYX: Codes, plan: Augmentation, warp: Warp, patch_zyx: VoxelsZYX
) -> tuple[Image, Codes]:
    """Warp in 3D if the read box grew in z, else within sections with z folded into the channels."""
    solid = warp.read_zyx[0] > patch_zyx[0] > 1
    channels, depth = image_CZYX.shape[:2]
    data: NDArray[Any] = image_CZYX[None] if solid else image_CZYX.reshape(1, channels * depth, *image_CZYX.shape[2:])
    labels: NDArray[Any] = codes_ZYX[None, None] if solid else codes_ZYX[None]
    size = patch_zyx if solid else patch_zyx[1:]
    angle = math.radians(plan.rotation_degrees)
    data, labels = augment_spatial(
        data,
        labels.astype(np.float32),
        size,
        do_elastic_deform=warp.bends,
        alpha=(0.0, _elastic_alpha(plan, len(size))),
        sigma=(plan.elastic_sigma, plan.elastic_sigma),
        do_rotation=warp.rotates,
        angle_x=(-angle, angle),
        angle_y=(-angle, angle),
        angle_z=(-angle, angle),
        do_scale=warp.scales,
        scale=(1 / plan.scale_range[1], 1 / plan.scale_range[0]),
        border_mode_data="nearest",
        order_data=1,
        border_mode_seg="constant",
        border_cval_seg=0,
        order_seg=0,
        random_crop=False,
    )
    return (
        data.reshape(channels, -1, *patch_zyx[1:]).astype(np.float32, copy=False),
        labels.reshape(-1, *patch_zyx[1:]).astype(np.int32),
    )


def _elastic_alpha(plan: Augmentation, dims: int) -> float:
    """Return the library's factor that displaces by `elastic_magnitude` voxels (standard deviation).

    It smooths uniform noise of variance 1/3 by a Gaussian, which leaves 1 / (2 sqrt(pi) sigma) of the sd per axis.
    """
    spread = math.pow(2 * math.sqrt(math.pi) * plan.elastic_sigma, dims / 2)
    return plan.elastic_magnitude * math.sqrt(3) * spread


def _mirror(image_CZYX: Image, codes_ZYX: Codes, plan: Augmentation) -> tuple[Image, Codes]:
    if plan.flip:
        flipped = [axis for axis in (-3, -2, -1) if np.random.random() < 0.5]  # noqa: NPY002
        if -3 in flipped and image_CZYX.shape[0] > 1:
            image_CZYX = image_CZYX[::-1]  # 2.5D: the slices are the channels
        axes = tuple(axis for axis in flipped if axis != -3 or image_CZYX.shape[0] == 1)
        image_CZYX, codes_ZYX = np.flip(image_CZYX, axes), np.flip(codes_ZYX, axes)
    if plan.right_angles and codes_ZYX.shape[1] == codes_ZYX.shape[2] and np.random.random() < 0.5:  # noqa: NPY002
        image_CZYX, codes_ZYX = np.swapaxes(image_CZYX, -1, -2), np.swapaxes(codes_ZYX, -1, -2)
    if plan.transpose_z and codes_ZYX.shape[0] == codes_ZYX.shape[1] and np.random.random() < 0.5:  # noqa: NPY002
        image_CZYX, codes_ZYX = np.swapaxes(image_CZYX, -3, -2), np.swapaxes(codes_ZYX, -3, -2)
    return image_CZYX, codes_ZYX


def _shade(image_CZYX: Image, plan: Augmentation) -> Image:
    """Change grey values; the image comes normalised, so a brightness of 1 is one standard deviation."""
    if np.random.random() < plan.contrast_probability:  # noqa: NPY002
        image_CZYX = augment_contrast(image_CZYX, plan.contrast_range, preserve_range=False, per_channel=False)
        image_CZYX = image_CZYX + np.float32(np.random.normal(0, plan.brightness_sd))  # noqa: NPY002
    if np.random.random() < plan.gamma_probability:  # noqa: NPY002
        image_CZYX = augment_gamma(image_CZYX, plan.gamma_range, retain_stats=True)
    if np.random.random() < plan.blur_probability:  # noqa: NPY002
        image_CZYX = _within_sections(image_CZYX, plan)
    if np.random.random() < plan.noise_probability:  # noqa: NPY002
        image_CZYX = augment_gaussian_noise(image_CZYX, (0, plan.noise_sd_max), per_channel=False)
    return image_CZYX.astype(np.float32, copy=False)


def _within_sections(image_CZYX: Image, plan: Augmentation) -> Image:
    sections = image_CZYX.reshape(-1, *image_CZYX.shape[2:])
    blurred = augment_gaussian_blur(sections, plan.blur_sigma_range, per_channel=False)
    return np.asarray(blurred, dtype=np.float32).reshape(image_CZYX.shape)


def _lose_section(image_CZYX: Image, plan: Augmentation) -> Image:
    """Blank one section that is not the only one: ssTEM loses sections, the labels stay."""
    channels, depth = image_CZYX.shape[:2]
    if channels * depth == 1 or np.random.random() >= plan.missing_section_probability:  # noqa: NPY002
        return image_CZYX
    sections = image_CZYX.reshape(channels * depth, *image_CZYX.shape[2:]).copy()
    lost = [i for i in range(channels * depth) if channels == 1 or i != channels // 2]
    sections[lost[np.random.randint(len(lost))]] = 0  # noqa: NPY002
    return sections.reshape(image_CZYX.shape)
