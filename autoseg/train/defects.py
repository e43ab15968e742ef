"""What goes wrong when a volume is cut and imaged, done to the EM of a patch; labels stay as they are.

Block-face milling (FIB-SEM), along the milling axis::

    drift    grey values wander from face to face           stripes  curtains along the beam, from face to face alike
    jitter   each face lies a fraction of a voxel off

Serial sections (ssTEM), along z::

    missing  blank, wholly or beyond a straight cut         lost     a copy of its neighbour
    defocus  blurred                                        contrast of its own, and brightness

A patch is a stack of sections here, in 2.5D the channels; the section that is predicted (`spared`) is never lost,
missing or jittered. A missing section is 0, as EM that was never fetched.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn.functional import grid_sample

from autoseg.schema import Augmentation

Sections = NDArray[np.float32]


def mill(sections_SYX: Sections, plan: Augmentation, spared: int | None, rng: np.random.Generator) -> Sections:
    """Return the sections with drift, stripes and jitter, where they are drawn."""
    drifts, stripes, jitters = rng.random(3) < (
        plan.drift_probability,
        plan.stripe_probability,
        plan.jitter_probability,
    )
    if not (drifts or stripes or jitters):
        return sections_SYX
    axis = "zyx".index(plan.milling_axis)
    faces = np.moveaxis(sections_SYX, axis, 0)
    if jitters and len(faces) > 1:
        faces = _jitter(faces, plan.jitter_sd, spared if axis == 0 else None, rng)
    if drifts:
        faces = faces + plan.drift_sd * smooth_noise((len(faces),), (plan.drift_length,), rng)[:, None, None]
    if stripes:
        widths = (plan.drift_length, plan.stripe_width)
        profile = smooth_noise((len(faces), faces.shape[2]), widths, rng)
        faces = faces + plan.stripe_sd * profile[:, None, :]
    return np.moveaxis(faces, 0, axis)


def cut(sections_SYX: Sections, plan: Augmentation, spared: int | None, rng: np.random.Generator) -> Sections:
    """Return the sections with those defects of serial sections that are drawn; changes its argument."""
    loses, misses, blurs, varies = rng.random(4) < (
        plan.lost_section_probability,
        plan.missing_section_probability,
        plan.defocus_probability,
        plan.section_contrast_probability,
    )
    num = len(sections_SYX)
    if varies:
        factor, offset = _contrasts(num, plan, rng)
        mean = sections_SYX.mean(axis=(1, 2), keepdims=True)
        sections_SYX = (sections_SYX - mean) * factor + (mean + offset)
    if blurs:
        for section in _some(num, plan.defocus_sections_max, None, rng):
            sigma = rng.uniform(*plan.defocus_sigma_range)
            sections_SYX[section] = ndimage.gaussian_filter(sections_SYX[section], sigma)
    if loses:
        for section in _some(num, 1, spared, rng):
            neighbour = section + (1 if section == 0 or (section < num - 1 and rng.random() < 0.5) else -1)
            sections_SYX[section] = sections_SYX[neighbour]
    if misses:
        for section in _some(num, plan.missing_sections_max, spared, rng):
            sections_SYX[section][_missing(sections_SYX.shape[1:], plan, rng)] = 0
    return sections_SYX


def smooth_noise(shape: tuple[int, ...], widths: tuple[float, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return Gaussian noise of sd 1, smooth over that many samples (sd of a Gaussian) along each axis."""
    reach = [int(np.ceil(3 * width)) for width in widths]
    noise = rng.standard_normal([n + 2 * r for n, r in zip(shape, reach, strict=True)], np.float32)
    for axis, (n, r, width) in enumerate(zip(shape, reach, widths, strict=True)):
        if width <= 0:
            continue
        kernel = np.exp(-0.5 * (np.arange(-r, r + 1) / width) ** 2)
        noise = ndimage.correlate1d(noise, kernel / np.sqrt((kernel**2).sum()), axis)
        noise = np.take(noise, np.arange(r, r + n), axis)
    return noise.astype(np.float32)


def _some(num: int, most: int, spared: int | None, rng: np.random.Generator) -> list[int]:
    """Return from one to `most` sections, at most half of those there are; none where it would be the only one."""
    others = [section for section in range(num) if section != spared]
    if num == 1 and spared is not None:
        return []
    count = min(int(rng.integers(1, most + 1)), max(1, len(others) // 2))
    return [int(section) for section in rng.choice(others, count, replace=False)]


def _missing(shape_yx: tuple[int, ...], plan: Augmentation, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return which pixels of a section are missing: all, or the given share of it beyond a straight cut."""
    if rng.random() >= plan.missing_partial_share:
        return np.ones(shape_yx, dtype=bool)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.arange(n)[:, None] if i == 0 else np.arange(n)[None, :] for i, n in enumerate(shape_yx))
    along = np.sin(angle) * y + np.cos(angle) * x
    missing: NDArray[np.bool_] = along <= np.quantile(along, rng.uniform(*plan.missing_area_range))
    return missing


def _contrasts(
    num: int, plan: Augmentation, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    low, high = plan.section_contrast_range
    factor = rng.uniform(low, high, (num, 1, 1)).astype(np.float32)
    return factor, (plan.section_brightness_sd * rng.standard_normal((num, 1, 1))).astype(np.float32)


def _jitter(faces_MUV: Sections, sd: float, spared: int | None, rng: np.random.Generator) -> Sections:
    """Return the faces, each shifted in its plane by its own fraction of voxels, at most two."""
    num, height, width = faces_MUV.shape
    shift = np.clip(rng.normal(0, sd, (num, 2)), -2, 2).astype(np.float32)
    if spared is not None:
        shift[spared] = 0
    u, v = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    grid = np.empty((num, height, width, 2), np.float32)
    grid[..., 0] = (v[None, None, :] + shift[:, 1, None, None]) * np.float32(2 / max(1, width - 1)) - 1
    grid[..., 1] = (u[None, :, None] + shift[:, 0, None, None]) * np.float32(2 / max(1, height - 1)) - 1
    faces = torch.from_numpy(np.ascontiguousarray(faces_MUV))[:, None]
    moved: Sections = grid_sample(
        faces, torch.from_numpy(grid), mode="bilinear", padding_mode="border", align_corners=True
    )[:, 0].numpy()
    return moved
