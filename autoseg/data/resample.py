"""Move voxels between grids, axis by axis: linear where it enlarges, area-averaged where it shrinks.

Grids meet by voxel centres. Each axis is one small matrix of weights, so a volume costs three products. Where target
voxels are whole groups of source voxels, sums of integers do the same for labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.geometry import Grid

Factors = tuple[int | None, int | None, int | None]


def axis_weights(
    source: tuple[int, float, float], target: tuple[int, float, float], *, area: bool
) -> NDArray[np.float32] | None:
    """Return the weights (target length, source length) for axes given as (length, voxel size, origin) in nm.

    Rows sum to 1. A target voxel that reaches beyond the source averages what lies inside; one that lies outside
    takes the border. `area` averages over the target voxel also when it is smaller than the source's (labels);
    otherwise enlarging is linear (EM). None is the identity.
    """
    n_source, v_source, o_source = source
    n_target, v_target, o_target = target
    centres = (o_target + np.arange(n_target) * v_target - o_source) / v_source
    ratio = v_target / v_source
    if abs(ratio - 1) < 1e-6 and n_source == n_target and np.abs(centres - np.arange(n_source)).max() < 1e-3:
        return None
    cells = np.arange(n_source)[None, :]
    clamped = np.clip(centres, 0, n_source - 1)[:, None]
    if ratio > 1 + 1e-6 or area:
        low, high = centres[:, None] - ratio / 2, centres[:, None] + ratio / 2
        weights = np.clip(np.minimum(high, cells + 0.5) - np.maximum(low, cells - 0.5), 0, None)
        outside = weights.sum(axis=1) < 1e-6
        weights[outside] = cells == np.rint(clamped[outside])
    else:
        weights = np.clip(1 - np.abs(clamped - cells), 0, None)
    normalised: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised


def resample(volume_XZYX: NDArray[np.float32], source: Grid, target: Grid, *, area: bool) -> NDArray[np.float32]:
    """Return the volume on `target`; the last three axes are z, y, x, any before them are kept."""
    out = volume_XZYX
    for axis in range(3):
        weights = axis_weights(
            (source.shape_zyx[axis], source.voxel_size_nm[axis], source.origin_nm[axis]),
            (target.shape_zyx[axis], target.voxel_size_nm[axis], target.origin_nm[axis]),
            area=area,
        )
        if weights is not None:
            position = out.ndim - 3 + axis
            out = np.moveaxis(np.tensordot(weights, out, axes=(1, position)), 0, position)
    return np.ascontiguousarray(out, dtype=np.float32)


def whole_factors(source: Grid, target: Grid) -> Factors:
    """Return for each axis how many source voxels make one target voxel, None where those are not whole voxels.

    The last target voxel may hold fewer: the source may end inside it.
    """
    factors: list[int | None] = []
    for n, m, v, w, c, d in zip(
        source.shape_zyx,
        target.shape_zyx,
        source.voxel_size_nm,
        target.voxel_size_nm,
        source.corner_nm,
        target.corner_nm,
        strict=True,
    ):
        factor = round(w / v)
        whole = factor >= 1 and abs(w / v - factor) < 1e-6 * factor and abs(d - c) < 1e-3 * v
        factors.append(factor if whole and -(-n // factor) == m else None)
    return factors[0], factors[1], factors[2]


def block_sums(values_ZYX: NDArray[Any], factors: Factors) -> NDArray[Any]:
    """Return the sums of groups of that many voxels along each axis that has a factor, in the dtype of the values."""
    out = values_ZYX
    for axis, factor in enumerate(factors):
        if factor is None or factor == 1:
            continue
        before = (slice(None),) * axis
        total = out[(*before, slice(0, None, factor))].copy()
        for i in range(1, factor):
            part = out[(*before, slice(i, None, factor))]
            total[(*before, slice(0, part.shape[axis]))] += part
        out = total
    return out


def mean_of_sums(sums_ZYX: NDArray[np.float32], source: Grid, target: Grid, factors: Factors) -> NDArray[np.float32]:
    """Return the area means on `target` from the sums that `block_sums` made of voxels on `source`."""
    out, shape, size, origin = sums_ZYX, [0, 0, 0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for axis, factor in enumerate(factors):
        grid = source if factor is None else target
        shape[axis], size[axis], origin[axis] = grid.shape_zyx[axis], grid.voxel_size_nm[axis], grid.origin_nm[axis]
        if factor is not None and factor > 1:
            held = np.minimum(factor, source.shape_zyx[axis] - np.arange(shape[axis]) * factor).astype(np.float32)
            out = out / held.reshape([-1 if a == axis else 1 for a in range(3)])
    between = Grid((shape[0], shape[1], shape[2]), (size[0], size[1], size[2]), (origin[0], origin[1], origin[2]))
    return resample(out, between, target, area=True)
