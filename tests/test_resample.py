"""Resampling: grids meet by voxel centres, against an integral written with loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import grids, shapes

from autoseg.data.resample import axis_weights, resample
from autoseg.geometry import Grid, VoxelsZYX

SIZES = st.sampled_from([1.74, 2.0, 3.0, 4.0, 4.6, 8.0])
Axis = tuple[int, float, float]


def random_volume(shape: VoxelsZYX, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def overlap_nm(a: Axis, i: int, b: Axis, j: int) -> float:
    """Return how much of voxel i of axis a lies in voxel j of axis b."""
    a0, b0 = a[2] + (i - 0.5) * a[1], b[2] + (j - 0.5) * b[1]
    return max(0.0, min(a0 + a[1], b0 + b[1]) - max(a0, b0))


def integrate(values: NDArray[np.float32], source: Axis, target: Axis) -> list[float]:
    """Return the mean of the source under each target voxel; beyond the ends, the nearest source voxel."""
    means = []
    for i in range(target[0]):
        lengths = [overlap_nm(target, i, source, j) for j in range(source[0])]
        if sum(lengths) > 1e-9:
            means.append(sum(w * float(v) for w, v in zip(lengths, values, strict=True)) / sum(lengths))
        else:
            means.append(float(values[0] if target[2] + i * target[1] < source[2] else values[-1]))
    return means


@given(grids(largest=6), st.booleans())
def test_the_same_grid_is_the_identity_bit_for_bit(grid: Grid, area: bool) -> None:
    volume = random_volume(grid.shape_zyx)
    assert np.array_equal(resample(volume, grid, grid, area=area), volume)


@given(grids(largest=7), grids(largest=7), st.booleans())
def test_a_constant_stays_constant_wherever_the_target_lies(source: Grid, target: Grid, area: bool) -> None:
    out = resample(np.full(source.shape_zyx, 0.7, np.float32), source, target, area=area)
    assert out.shape == target.shape_zyx
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, 0.7, rtol=1e-5)


@given(
    shapes(8), st.tuples(SIZES, SIZES, SIZES), st.tuples(*[st.integers(1, 4)] * 3), st.tuples(*[st.floats(-2, 2)] * 3)
)
def test_a_ramp_is_exact_when_enlarged(
    shape: VoxelsZYX, size: tuple[float, float, float], factor: VoxelsZYX, slope: tuple[float, float, float]
) -> None:
    """f(z, y, x) sampled at source centres comes back as f at target centres, inside the outermost centres."""
    source = Grid(shape, size, (10.0, -3.0, 0.5))
    target = source.at_voxel_size((size[0] / factor[0], size[1] / factor[1], size[2] / factor[2]))

    def ramp(grid: Grid) -> NDArray[np.float64]:
        """Evaluate at voxel centres, clamped to the outermost source centres."""
        total = np.zeros(grid.shape_zyx)
        for axis in range(3):
            centres = grid.origin_nm[axis] + np.arange(grid.shape_zyx[axis]) * grid.voxel_size_nm[axis]
            last = source.origin_nm[axis] + (shape[axis] - 1) * size[axis]
            clamped = np.clip(centres, source.origin_nm[axis], last)
            total += slope[axis] * clamped.reshape([-1 if a == axis else 1 for a in range(3)])
        return total

    found = resample(ramp(source).astype(np.float32), source, target, area=False)
    np.testing.assert_allclose(found, ramp(target), atol=1e-3)


@given(shapes(4), st.tuples(*[st.integers(1, 4)] * 3), st.booleans())
def test_whole_factors_average_blocks(shape: VoxelsZYX, factor: VoxelsZYX, area: bool) -> None:
    fine = tuple(n * f for n, f in zip(shape, factor, strict=True))
    source = Grid((fine[0], fine[1], fine[2]), (2.0, 3.0, 1.74), (5.0, 0.0, -1.0))
    size = tuple(v * f for v, f in zip(source.voxel_size_nm, factor, strict=True))
    target = source.at_voxel_size((size[0], size[1], size[2]))
    assert target.shape_zyx == shape
    volume = random_volume(source.shape_zyx)
    blocks = volume.reshape(shape[0], factor[0], shape[1], factor[1], shape[2], factor[2])
    np.testing.assert_allclose(resample(volume, source, target, area=area), blocks.mean(axis=(1, 3, 5)), rtol=1e-5)


@given(st.integers(1, 12), SIZES, st.integers(1, 12), SIZES, st.floats(-20, 20))
@settings(max_examples=150)
def test_area_mean_is_the_integral_for_any_offset(
    n_source: int, v_source: float, n_target: int, v_target: float, offset: float
) -> None:
    """At any ratio and any fraction of a voxel; a target voxel that reaches out averages what lies inside."""
    source, target = (n_source, v_source, 0.0), (n_target, v_target, round(offset, 2))
    values = random_volume((1, 1, n_source), seed=n_source)[0, 0]
    weights = axis_weights(source, target, area=True)
    found = values if weights is None else weights @ values
    np.testing.assert_allclose(found, integrate(values, source, target), atol=1e-4)


@given(st.integers(2, 12), SIZES, st.floats(0, 1))
def test_linear_between_two_centres(n: int, size: float, fraction: float) -> None:
    """Shifted by a fraction of a voxel at the same voxel size: the two neighbours, by distance."""
    values = random_volume((1, 1, n))[0, 0]
    weights = axis_weights((n, size, 0.0), (n - 1, size, fraction * size), area=False)
    assert weights is not None
    np.testing.assert_allclose(weights @ values, (1 - fraction) * values[:-1] + fraction * values[1:], atol=1e-5)


def test_a_last_voxel_that_reaches_beyond_the_source_holds_only_what_is_there() -> None:
    """7 voxels halved give 4; the fourth lies over the seventh alone, not over a mixture with the sixth."""
    source = Grid((1, 1, 7), (8.0, 8.0, 8.0), (0.0, 0.0, 0.0))
    target = source.at_voxel_size((8.0, 8.0, 16.0))
    assert target.shape_zyx == (1, 1, 4)
    volume = np.array([[[0, 0, 0, 0, 0, 0, 1]]], np.float32)
    assert resample(volume, source, target, area=True).ravel() == pytest.approx([0, 0, 0, 1])


def test_leading_axes_are_kept() -> None:
    source = Grid((2, 4, 6), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    target = source.at_voxel_size((2.0, 2.0, 3.0))
    stack = np.stack([random_volume(source.shape_zyx, seed) for seed in range(3)])
    out = resample(stack, source, target, area=True)
    assert out.shape == (3, 1, 2, 2)
    for i in range(3):
        np.testing.assert_array_equal(out[i], resample(stack[i], source, target, area=True))
