"""Augmentation of one patch, in its order; batchgenerators behind this one door.

::

    read -> misalign, warp -> grey values -> milling or section defects -> mirrors and right angles (views)

batchgenerators draws from the global generators of numpy and `random`; the door saves their state, seeds them for
this patch alone, and restores them. EM and codes move once, together; grey values and defects are of the EM alone.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from batchgenerators.augmentations.color_augmentations import augment_contrast, augment_gamma
from batchgenerators.augmentations.noise_augmentations import augment_gaussian_blur, augment_gaussian_noise
from numpy.typing import NDArray

from autoseg.schema import Augmentation
from autoseg.train.defects import cut, mill
from autoseg.train.warp import Frame, Warp, apply_warp

Image = NDArray[np.float32]
Codes = NDArray[Any]


def augment(
    image_CZYX: Image, codes_ZYX: Codes, plan: Augmentation, warp: Warp, frame: Frame, rng: np.random.Generator
) -> tuple[Image, Codes]:
    """Return the augmented (image, codes), maybe as views; both come in the size that `draw_warp` asked for.

    Code 0 (everything unknown) fills what a warp brings in from outside. The image that is passed may be changed.
    """
    image_CZYX, codes_ZYX = apply_warp(image_CZYX, codes_ZYX, warp, frame)
    image_CZYX = _shade(image_CZYX, plan, rng)
    channels, depth = image_CZYX.shape[:2]
    spared = channels // 2 if depth == 1 else None
    sections = image_CZYX.reshape(channels * depth, *image_CZYX.shape[2:])
    sections = cut(mill(sections, plan, spared, rng), plan, spared, rng)
    return _mirror(sections.reshape(image_CZYX.shape), codes_ZYX, plan, rng)


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


def _mirror(image_CZYX: Image, codes_ZYX: Codes, plan: Augmentation, rng: np.random.Generator) -> tuple[Image, Codes]:
    """Return views: mirrored along any axes, y and x swapped, z and y swapped."""
    mirror_z, mirror_y, mirror_x, swap_yx, swap_zy = (rng.random(5) < 0.5).tolist()
    if plan.flip:
        if mirror_z and image_CZYX.shape[0] > 1:
            image_CZYX = image_CZYX[::-1]  # 2.5D: the slices are the channels
        elif mirror_z:
            image_CZYX, codes_ZYX = image_CZYX[:, ::-1], codes_ZYX[::-1]
        y, x = slice(None, None, -1 if mirror_y else 1), slice(None, None, -1 if mirror_x else 1)
        image_CZYX, codes_ZYX = image_CZYX[:, :, y, x], codes_ZYX[:, y, x]
    if plan.right_angles and swap_yx and codes_ZYX.shape[1] == codes_ZYX.shape[2]:
        image_CZYX, codes_ZYX = np.swapaxes(image_CZYX, -1, -2), np.swapaxes(codes_ZYX, -1, -2)
    if plan.transpose_z and swap_zy and codes_ZYX.shape[0] == codes_ZYX.shape[1]:
        image_CZYX, codes_ZYX = np.swapaxes(image_CZYX, -3, -2), np.swapaxes(codes_ZYX, -3, -2)
    return image_CZYX, codes_ZYX


def _shade(image_CZYX: Image, plan: Augmentation, rng: np.random.Generator) -> Image:
    """Change contrast, brightness, gamma, blur and noise; brightness and noise in units of the network input."""
    contrast, gamma, blur, noise = rng.random(4) < (
        plan.contrast_probability,
        plan.gamma_probability,
        plan.blur_probability,
        plan.noise_probability,
    )
    brightness = np.float32(rng.normal(0, plan.brightness_sd))
    if not (contrast or gamma or blur or noise):
        return image_CZYX
    with _seeded(int(rng.integers(2**32))):
        if contrast:
            image_CZYX = augment_contrast(image_CZYX, plan.contrast_range, preserve_range=False, per_channel=False)
            image_CZYX += brightness
        if gamma:
            image_CZYX = augment_gamma(image_CZYX, plan.gamma_range, retain_stats=True)
        if blur:
            image_CZYX = _within_sections(image_CZYX, plan)
        if noise:
            image_CZYX = augment_gaussian_noise(image_CZYX, (0, plan.noise_sd_max), per_channel=False)
    return image_CZYX.astype(np.float32, copy=False)


def _within_sections(image_CZYX: Image, plan: Augmentation) -> Image:
    sections = image_CZYX.reshape(-1, *image_CZYX.shape[2:])
    blurred = augment_gaussian_blur(sections, plan.blur_sigma_range, per_channel=False)
    return np.asarray(blurred, dtype=np.float32).reshape(image_CZYX.shape)
