"""Move voxels between grids, axis by axis: linear where it enlarges, area-averaged where it shrinks.

Grids meet by voxel centres. Each axis is one small matrix of weights, so a volume costs three products.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoseg.geometry import Grid


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
