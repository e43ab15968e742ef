"""Augmentation: EM and codes move as one, the unknown fills what comes in from outside, no global state changes."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from test_planner import tiny_facts_plan

from autoseg.geometry import Box, NmZYX, VoxelsZYX
from autoseg.schema import Augmentation
from autoseg.train.augment import augment
from autoseg.train.defects import smooth_noise
from autoseg.train.warp import (
    Frame,
    Shift,
    Warp,
    apply_warp,
    draw_warp,
    place_patch,
    read_box,
    rotation_matrix,
    spline_weights,
)

PRESETS = ("none", "flips", "light", "fib-sem", "sstem")
SPATIAL: dict[str, Any] = {
    "rotation_probability": 1.0,
    "scale_probability": 1.0,
    "elastic_probability": 1.0,
    "elastic_sigma": 8.0,
    "elastic_magnitude": 3.0,
}
GREY_NAMES = [
    name
    for name in Augmentation.__struct_fields__
    if name.endswith("_probability") and name.split("_")[0] not in ("rotation", "scale", "elastic", "misalign")
]
GREY: dict[str, Any] = dict.fromkeys(GREY_NAMES, 0.0)
CUBES: NmZYX = (8.0, 8.0, 8.0)
SECTIONS: NmZYX = (40.0, 8.0, 8.0)


def preset(name: str, **changes: Any) -> Augmentation:
    """Return a preset as the planner writes it, with changes."""
    plan = tiny_facts_plan({"augmentation.preset": name})
    return msgspec.structs.replace(plan.augmentation, **changes)


SETS = {name: preset(name) for name in PRESETS}


def changed(name: str = "none", **changes: Any) -> Augmentation:
    return msgspec.structs.replace(SETS[name], **changes)


def run(
    plan: Augmentation,
    frame: Frame,
    seed: int,
    codes: NDArray[Any] | None = None,
) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any]]:
    """Return (image, codes, codes before) of a patch whose image equals its codes in every channel."""
    rng = np.random.default_rng(seed)
    warp = draw_warp(plan, frame, rng)
    if codes is None:
        codes = ramp(warp.read_zyx)
    image = np.repeat(codes[None].astype(np.float32), frame.input_slices, axis=0)
    out, moved = augment(image.copy(), codes.copy(), plan, warp, frame, rng)
    return out, moved, codes


def ramp(shape: VoxelsZYX) -> NDArray[np.int16]:
    """Return codes from 1 that grow by 7, 3 and 5 a voxel along z, y and x: a shift of half a voxel shows."""
    z, y, x = np.indices(shape)
    return (1 + 7 * z + 3 * y + 5 * x).astype(np.int16)


def assert_together(image_ZYX: NDArray[np.float32], codes_ZYX: NDArray[Any]) -> None:
    """The image is interpolated, codes take the nearest voxel: they differ by at most half a voxel."""
    inside = codes_ZYX > 0
    assert inside.all(), "what was read is enough for every voxel of the patch"
    difference = image_ZYX - codes_ZYX
    assert np.abs(difference.mean()) < 2.5, "a shift of one voxel is 3, 5 or 7"
    assert np.percentile(np.abs(difference), 98) <= (7 + 3 + 5) / 2 + 0.5


# ---- together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "frame",
    [
        Frame((1, 32, 32), SECTIONS, 1),
        Frame((1, 32, 32), SECTIONS, 5),
        Frame((4, 32, 24), SECTIONS, 1),
        Frame((16, 16, 16), CUBES, 1),
    ],
)
def test_image_and_codes_leave_as_a_patch_and_move_together(name: str, frame: Frame) -> None:
    plan = changed(name, **GREY, misalign_probability=0.0)
    for seed in range(12):
        image, codes, _ = run(plan, frame, seed)
        assert image.shape == (frame.input_slices, *frame.patch_zyx)
        assert codes.shape == frame.patch_zyx
        assert image.dtype == np.float32
        assert codes.dtype == np.int16
        assert_together(image[frame.input_slices // 2], codes)


@pytest.mark.parametrize(
    "changes",
    [
        SPATIAL,
        {"rotation_probability": 1.0},
        {"elastic_probability": 1.0},
        {"scale_probability": 1.0},
        {"misalign_probability": 1.0, "misalign_slip_share": 0.0},
        SPATIAL | {"misalign_probability": 1.0, "misalign_slip_share": 0.0},
    ],
)
@pytest.mark.parametrize(
    "frame",
    [Frame((1, 48, 48), SECTIONS, 3), Frame((4, 32, 32), SECTIONS, 1), Frame((16, 16, 16), (8.0, 8.0, 10.0), 1)],
)
def test_every_warp_moves_image_and_codes_together(changes: dict[str, Any], frame: Frame) -> None:
    plan = changed(**(GREY | changes))
    if frame.solid and "rotation_probability" in changes and "misalign_probability" in changes:
        plan = msgspec.structs.replace(plan, rotation_degrees=0.0)  # across the cut, nothing lies between two values
        plan = msgspec.structs.replace(plan, elastic_probability=0.0, scale_probability=0.0)
    moved_somewhere = 0
    for seed in range(8):
        image, codes, before = run(plan, frame, seed)
        assert_together(image[frame.input_slices // 2], codes)
        margin = [(a - b) // 2 for a, b in zip(before.shape, frame.patch_zyx, strict=True)]
        if min(margin) >= 0:
            same = before[tuple(slice(m, m + n) for m, n in zip(margin, frame.patch_zyx, strict=True))]
            moved_somewhere += not np.array_equal(same, codes)
        else:
            moved_somewhere += 1
    assert moved_somewhere >= (3 if frame.input_slices > 1 else 6)


def test_the_brightest_class_of_the_em_is_the_code_after_any_warp() -> None:
    """An asymmetric pattern: one channel of EM a class, so that argmax over them must be the code."""
    rng = np.random.default_rng(3)
    frame = Frame((12, 24, 20), (8.0, 8.0, 10.0), 1)
    plan = changed(**(GREY | SPATIAL | {"scale_range": (0.9, 1.1)}))
    for seed in range(4):
        warp = draw_warp(plan, frame, np.random.default_rng(seed))
        fields = ndimage.gaussian_filter(rng.standard_normal((4, *warp.read_zyx)), (0, 5, 5, 5))
        codes = np.argmax(fields, axis=0).astype(np.uint8)
        images = [(codes == k).astype(np.float32)[None] for k in range(4)]
        moved = [apply_warp(image, codes + np.uint8(1), warp, frame) for image in images]
        winner = np.argmax(np.stack([image[0] for image, _ in moved]), axis=0)
        agree = winner + 1 == moved[0][1]
        assert agree.mean() > 0.97, "they differ only where two classes meet"
        assert len(np.unique(moved[0][1])) >= 3


# ---- rotations ----------------------------------------------------------------------------------------------


def turned(image: NDArray[Any], codes: NDArray[Any], degrees: tuple[float, float, float], frame: Frame) -> Any:
    """Return (image, codes) turned about x, y and z; only the patch is read, so corners may come from outside."""
    radians = [math.radians(d) for d in degrees]
    matrix = rotation_matrix((radians[0], radians[1], radians[2]), frame.voxel_size_nm)
    return apply_warp(image, codes, Warp(matrix, None, None, frame.patch_zyx), frame)


@pytest.mark.parametrize("edge", [16, 17])
@pytest.mark.parametrize(("axis", "plane"), [(0, (2, 1)), (1, (2, 0)), (2, (1, 0))])
@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_a_rotation_by_right_angles_is_that_of_numpy(
    edge: int, axis: int, plane: tuple[int, int], quarters: int
) -> None:
    """`axis` counts z, y, x; the angles count x, y, z."""
    frame = Frame((edge, edge, edge), CUBES, 1)
    rng = np.random.default_rng(edge)
    image = rng.standard_normal((1, edge, edge, edge)).astype(np.float32)
    codes = rng.integers(1, 200, (edge, edge, edge)).astype(np.uint8)
    degrees = [0.0, 0.0, 0.0]
    degrees[2 - axis] = 90.0 * quarters
    moved, labels = turned(image, codes, (degrees[0], degrees[1], degrees[2]), frame)
    inner = (slice(1, -1),) * 3  # rounding may take the outermost voxel from outside
    expected = {q: np.rot90(codes, q, plane) for q in (quarters, -quarters)}
    matches = [q for q, e in expected.items() if np.array_equal(labels[inner], e[inner])]
    assert matches, "one sense of rotation, the same for EM and codes"
    np.testing.assert_allclose(moved[0][inner], np.rot90(image[0], matches[0], plane)[inner], atol=2e-4)
    if quarters in (1, -1):
        assert matches == [quarters], "positive angles turn from the later axis to the earlier one"


def test_within_sections_a_right_angle_is_that_of_numpy_too() -> None:
    frame = Frame((3, 20, 20), SECTIONS, 1)
    codes = np.random.default_rng(0).integers(1, 9, (3, 20, 20)).astype(np.uint8)
    _, labels = turned(codes[None].astype(np.float32), codes, (0.0, 0.0, 90.0), frame)
    assert np.array_equal(labels[:, 1:-1, 1:-1], np.rot90(codes, 1, (2, 1))[:, 1:-1, 1:-1])


def test_lengths_in_nm_survive_a_rotation_of_voxels_that_are_not_cubic() -> None:
    """A ball in nm stays that ball; were voxels turned, it would become an ellipsoid along other axes."""
    size: NmZYX = (10.0, 8.0, 8.0)
    frame = Frame((24, 32, 32), size, 1)
    offsets = [(np.arange(n) - (n - 1) / 2) * v for n, v in zip(frame.patch_zyx, size, strict=True)]
    z, y, x = np.meshgrid(*offsets, indexing="ij")
    ball = 1 + (z**2 + y**2 + x**2 < 80**2).astype(np.uint8)
    for degrees in ((30.0, 0.0, 0.0), (0.0, 50.0, 0.0), (20.0, 40.0, 75.0)):
        _, labels = turned(ball[None].astype(np.float32), ball, degrees, frame)
        assert (labels != ball)[labels > 0].mean() < 0.02, "only at the surface"
    stick = 1 + ((abs(z) < 60) & (abs(y) < 12) & (abs(x) < 12)).astype(np.uint8)
    _, labels = turned(stick[None].astype(np.float32), stick, (90.0, 0.0, 0.0), frame)
    long = [np.ptp(np.argwhere(labels == 2)[:, a]) * v for a, v in enumerate(size)]
    assert long[1] == pytest.approx(120, abs=17), "120 nm along z became 120 nm along y"
    assert long[0] < 35


@settings(max_examples=20)
@given(st.tuples(*[st.floats(-3.2, 3.2)] * 3), st.sampled_from([CUBES, (8.0, 10.0, 9.0)]))
def test_a_rotation_keeps_volumes_and_its_inverse_is_its_transpose_in_nm(
    angles: tuple[float, float, float], size: NmZYX
) -> None:
    matrix = rotation_matrix(angles, size)
    assert np.linalg.det(matrix) == pytest.approx(1)
    in_nm = matrix * np.array(size)[:, None] / np.array(size)[None, :]
    np.testing.assert_allclose(in_nm @ in_nm.T, np.eye(3), atol=1e-9)


@pytest.mark.parametrize("frame", [Frame((8, 16, 20), CUBES, 1), Frame((1, 24, 24), SECTIONS, 1)])
def test_warps_equal_scipys_interpolation(frame: Frame) -> None:
    plan = changed(**(GREY | SPATIAL))
    for seed in range(3):
        warp = draw_warp(plan, frame, np.random.default_rng(seed))
        assert warp.matrix is not None
        assert warp.bend_AZYX is not None
        image = np.random.default_rng(9).standard_normal((1, *warp.read_zyx)).astype(np.float32)
        half = (np.array(frame.patch_zyx) - 1) / 2
        offsets = np.stack(
            np.meshgrid(*[np.arange(n) - h for n, h in zip(frame.patch_zyx, half, strict=True)], indexing="ij")
        )
        places = np.tensordot(warp.matrix, offsets, (1, 0))
        places[3 - len(warp.bend_AZYX) :] += warp.bend_AZYX
        places += ((np.array(warp.read_zyx) - 1) / 2).reshape(3, 1, 1, 1)
        expected = ndimage.map_coordinates(image[0], places, order=1, mode="nearest")
        found, _ = apply_warp(image, np.ones(warp.read_zyx, np.uint8), warp, frame)
        np.testing.assert_allclose(found[0], expected, atol=2e-3)


def test_bending_displaces_by_the_magnitude_that_the_plan_states() -> None:
    plan = changed(elastic_probability=1.0, elastic_sigma=6.0, elastic_magnitude=2.0)
    frame = Frame((32, 64, 64), CUBES, 1)
    bends = [draw_warp(plan, frame, np.random.default_rng(seed)).bend_AZYX for seed in range(12)]
    field = np.array(bends)
    assert field.std() == pytest.approx(2.0, rel=0.15)
    assert np.abs(field).max() <= 6.0
    assert np.abs(np.diff(field, axis=-1)).std() < 2.0 / 3, "neighbours move alike"
    np.testing.assert_allclose(spline_weights(40, 7.3).sum(axis=1), 1, atol=1e-5)


def test_what_a_warp_brings_in_from_outside_is_unknown() -> None:
    """Codes have no 0 inside, so a 0 after the warp comes from outside."""
    plan = changed(**(GREY | SPATIAL), scale_range=(0.4, 1.0))
    frame = Frame((1, 32, 32), SECTIONS, 1)
    found = []
    for seed in range(8):
        warp = draw_warp(plan, frame, np.random.default_rng(seed))._replace(read_zyx=(1, 32, 32))
        codes = np.full((1, 32, 32), 3, dtype=np.uint8)  # less than the warp needs
        found.append(apply_warp(codes[None].astype(np.float32), codes, warp, frame)[1])
    assert set(np.unique(found)) == {0, 3}


def test_a_thin_or_anisotropic_patch_is_warped_within_its_sections() -> None:
    plan = changed(**(GREY | SPATIAL))
    frame = Frame((4, 24, 24), SECTIONS, 1)
    rng = np.random.default_rng(0)
    warp = draw_warp(plan, frame, rng)
    assert warp.read_zyx[0] == 4
    codes = np.broadcast_to(np.arange(1, 5, dtype=np.uint8)[:, None, None], warp.read_zyx).copy()
    _, moved = augment(codes[None].astype(np.float32), codes, plan, warp, frame, rng)
    for z in range(4):
        assert set(np.unique(moved[z])) == {z + 1}
    solid = draw_warp(plan, Frame((8, 24, 24), CUBES, 1), np.random.default_rng(0))
    assert solid.read_zyx[0] > 8


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, 24, 32), (8, 16, 16), (16, 16, 16), (3, 5, 7)]),
    st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)),
)
def test_a_warped_patch_keeps_the_voxel_that_it_is_centred_on(seed: int, patch: VoxelsZYX, shape: VoxelsZYX) -> None:
    rng = np.random.default_rng(seed)
    frame = Frame(patch, CUBES, 1)
    plan = changed(rotation_probability=0.7, scale_probability=0.5, scale_range=(0.7, 1.4))
    voxel = tuple(int(rng.integers(n)) for n in shape)
    warp = draw_warp(plan, frame, rng)
    box = place_patch(voxel, patch, shape, rng, warp)  # type: ignore[arg-type]
    assert box.shape_zyx == patch
    whole = read_box(box, warp)
    assert whole.shape_zyx == warp.read_zyx
    assert [a + b for a, b in zip(*whole, strict=True)] == [a + b for a, b in zip(*box, strict=True)]
    codes = np.ones(warp.read_zyx, dtype=np.uint8)
    at = tuple(v - a for v, a in zip(voxel, whole.start, strict=True))
    assert all(0 <= i < n for i, n in zip(at, codes.shape, strict=True)), "the voxel is read"
    matrix = np.eye(3) if warp.matrix is None else warp.matrix
    middle = np.array(box.start) + (np.array(patch) - 1) / 2
    inside = np.linalg.inv(matrix) @ (np.array(voxel) - middle)
    assert (np.abs(inside) <= np.array(patch) / 2 + 1e-6).all(), "and it is in the patch"


# ---- mirrors and turns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_mirrors_and_turns_keep_every_voxel(name: str) -> None:
    still = {f"{kind}_probability": 0.0 for kind in ("rotation", "scale", "elastic", "misalign")}
    plan = changed(name, **GREY, **still, transpose_z=True)
    unchanged = 0
    for seed in range(20):
        codes = np.random.default_rng(seed).integers(0, 9, (8, 8, 8)).astype(np.uint8)
        image, moved, before = run(plan, Frame((8, 8, 8), CUBES, 1), seed, codes=codes)
        assert np.array_equal(image[0], moved)
        assert sorted(moved.ravel()) == sorted(before.ravel())
        unchanged += np.array_equal(moved, before)
    assert unchanged < 20


def test_mirrors_and_right_angles_copy_nothing() -> None:
    plan = changed("flips", transpose_z=True)
    image, codes = np.zeros((1, 8, 8, 8), np.float32), np.zeros((8, 8, 8), np.uint8)
    frame, none = Frame((8, 8, 8), CUBES, 1), Warp(None, None, None, (8, 8, 8))
    for seed in range(10):
        out, moved = augment(image, codes, plan, none, frame, np.random.default_rng(seed))
        assert np.shares_memory(out, image)
        assert np.shares_memory(moved, codes)


def test_mirrors_and_turns_reach_every_orientation_that_they_can() -> None:
    plan = changed("flips", transpose_z=True)
    codes = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    frame = Frame((2, 2, 2), CUBES, 1)
    seen = {run(plan, frame, seed, codes=codes)[1].tobytes() for seed in range(400)}
    assert len(seen) == 32, "two of the three swaps: 8 mirrors times 4 orders of the axes"


def test_mirroring_z_of_a_2_5d_patch_mirrors_its_channels() -> None:
    plan = changed(flip=True)
    codes = np.zeros((1, 4, 4), dtype=np.uint8)
    image = np.arange(5, dtype=np.float32)[:, None, None, None] * np.ones((5, 1, 4, 4), dtype=np.float32)
    frame, none = Frame((1, 4, 4), SECTIONS, 5), Warp(None, None, None, (1, 4, 4))
    drawn = [augment(image, codes, plan, none, frame, np.random.default_rng(s))[0] for s in range(30)]
    assert {tuple(one[:, 0, 0, 0]) for one in drawn} == {(0, 1, 2, 3, 4), (4, 3, 2, 1, 0)}


def test_without_any_augmentation_nothing_changes() -> None:
    image, codes, before = run(SETS["none"], Frame((4, 16, 16), SECTIONS, 1), 3)
    assert np.array_equal(codes, before)
    assert np.array_equal(image[0], before)


# ---- grey values and defects --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", GREY_NAMES)
@pytest.mark.parametrize("frame", [Frame((6, 16, 16), SECTIONS, 1), Frame((1, 16, 16), SECTIONS, 5)])
def test_every_defect_of_the_image_changes_the_image_alone(field: str, frame: Frame) -> None:
    plan = changed("sstem", **(GREY | {"rotation_probability": 0.0, "flip": False, "right_angles": False}))
    plan = msgspec.structs.replace(
        plan, scale_probability=0.0, elastic_probability=0.0, misalign_probability=0.0, **{field: 1.0}
    )
    noise = np.random.default_rng(0).standard_normal((frame.input_slices, *frame.patch_zyx)).astype(np.float32)
    codes = ramp(frame.patch_zyx)
    none = Warp(None, None, None, frame.patch_zyx)
    image, moved = augment(noise.copy(), codes.copy(), plan, none, frame, np.random.default_rng(1))
    assert np.array_equal(moved, codes)
    assert np.isfinite(image).all()
    assert image.dtype == np.float32
    assert image.shape == noise.shape
    assert not np.allclose(image, noise)


def stack(num: int = 8, edge: int = 24, seed: int = 0) -> NDArray[np.float32]:
    """Return sections of noise whose means tell them apart: 10, 11, 12, ..."""
    noise = np.random.default_rng(seed).standard_normal((1, num, edge, edge)) * 0.1
    return (noise + 10 + np.arange(num)[None, :, None, None]).astype(np.float32)


def defect(plan: Augmentation, image: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Return sections after the defects of that plan; the input stays."""
    channels, depth, height, width = image.shape
    patch = (depth, height, width)
    frame, codes = Frame(patch, SECTIONS, channels), np.ones(patch, np.uint8)
    out, _ = augment(image.copy(), codes, plan, Warp(None, None, None, patch), frame, np.random.default_rng(seed))
    return out.reshape(-1, height, width)


def test_missing_sections_are_whole_or_beyond_a_straight_cut_and_as_many_as_the_plan_says() -> None:
    image = stack()
    whole = changed(missing_section_probability=1.0, missing_partial_share=0.0, missing_sections_max=3)
    counts = {int(sum(not s.any() for s in defect(whole, image, seed))) for seed in range(40)}
    assert counts == {1, 2, 3}
    part = changed(missing_section_probability=1.0, missing_partial_share=1.0, missing_area_range=(0.25, 0.75))
    for seed in range(20):
        after = defect(part, image, seed)
        gone = after == 0
        areas = gone.mean(axis=(1, 2))[gone.any(axis=(1, 2))]
        assert len(areas) in (1, 2)
        assert ((areas > 0.2) & (areas < 0.8)).all()
        assert np.array_equal(after[~gone], image[0][~gone]), "the rest stays"


def test_a_lost_section_is_a_copy_of_its_neighbour() -> None:
    for seed in range(10):
        after, image = defect(changed(lost_section_probability=1.0), stack(), seed), stack()[0]
        (lost,) = np.flatnonzero((after != image).any(axis=(1, 2)))
        neighbours = [i for i in (lost - 1, lost + 1) if 0 <= i < len(image)]
        assert any(np.array_equal(after[lost], image[i]) for i in neighbours)


def test_the_section_that_is_predicted_is_never_missing_or_lost() -> None:
    image = np.ascontiguousarray(stack(5).reshape(5, 1, 24, 24))
    for field in ("missing_section_probability", "lost_section_probability"):
        plan = changed(**{field: 1.0}, missing_partial_share=0.0)
        hit = set()
        for seed in range(60):
            after = defect(plan, image, seed)
            hit |= set(np.flatnonzero((after != image[:, 0]).any(axis=(1, 2))).tolist())
        assert hit == {0, 1, 3, 4}
        alone = defect(plan, image[:1], 0)
        assert np.array_equal(alone, image[0]), "a single section has no neighbour to tell what it was"


def test_a_slip_moves_the_em_of_one_section_and_a_translation_all_from_there_with_their_codes() -> None:
    frame = Frame((6, 8, 8), SECTIONS, 1)
    codes = ramp((6, 14, 14))
    image = codes[None].astype(np.float32)
    middle = (slice(None), slice(3, 11), slice(3, 11))
    off = (slice(None), slice(5, 13), slice(0, 8))
    slip, labels = apply_warp(image, codes, Warp(None, None, Shift(2, 2, -3, True), (6, 14, 14)), frame)
    assert np.array_equal(labels, codes[middle])
    assert np.array_equal(slip[0][2], codes[off][2])
    assert np.array_equal(np.delete(slip[0], 2, 0), np.delete(codes[middle], 2, 0))
    moved, labels = apply_warp(image, codes, Warp(None, None, Shift(2, 2, -3, False), (6, 14, 14)), frame)
    assert np.array_equal(labels[:2], codes[middle][:2])
    assert np.array_equal(labels[2:], codes[off][2:])
    assert np.array_equal(moved[0], labels)


@pytest.mark.parametrize("section", [1, 2, 3, 4])
def test_in_2_5d_codes_follow_the_slice_in_the_middle(section: int) -> None:
    frame = Frame((1, 8, 8), SECTIONS, 5)
    codes = ramp((1, 12, 12))
    image = np.repeat(codes[None].astype(np.float32), 5, axis=0)
    shift = Shift(section, 1, 2, slip=False)
    moved, labels = apply_warp(image, codes, Warp(None, None, shift, (1, 12, 12)), frame)
    assert np.array_equal(moved[2], labels)
    assert not np.array_equal(moved[0], moved[4])


def test_a_slip_spares_the_slice_that_is_predicted() -> None:
    plan = changed(misalign_probability=1.0, misalign_slip_share=1.0, misalign_max=4)
    drawn = [draw_warp(plan, Frame((1, 8, 8), SECTIONS, 5), np.random.default_rng(s)).shift for s in range(80)]
    assert {shift.section for shift in drawn if shift} == {0, 1, 3, 4}


def test_drift_is_along_the_milling_axis_and_of_the_sd_that_the_plan_states() -> None:
    flat = np.zeros((1, 40, 12, 12), np.float32)
    plan = changed(drift_probability=1.0, drift_sd=0.5, drift_length=4.0)
    drawn = np.array([defect(plan, flat, seed) for seed in range(60)])
    assert np.ptp(drawn, axis=(2, 3)).max() == 0, "a face is shifted as a whole"
    assert drawn.std() == pytest.approx(0.5, rel=0.15)
    steps = np.abs(np.diff(drawn[:, :, 0, 0], axis=1)).mean()
    assert 0 < steps < 0.25, "it wanders"
    along_x = msgspec.structs.replace(plan, milling_axis="x")
    assert np.ptp(defect(along_x, flat, 0), axis=(0, 1)).max() == 0


def test_stripes_run_along_the_beam_and_continue_from_face_to_face() -> None:
    flat = np.zeros((1, 12, 20, 60), np.float32)
    plan = changed(stripe_probability=1.0, stripe_sd=0.3, stripe_width=2.0, drift_length=6.0)
    drawn = np.array([defect(plan, flat, seed) for seed in range(30)])
    assert np.ptp(drawn, axis=2).max() == 0
    assert drawn.std() == pytest.approx(0.3, rel=0.15)
    across = np.abs(np.diff(drawn, axis=3)).mean()
    from_face_to_face = np.abs(np.diff(drawn, axis=1)).mean()
    assert from_face_to_face < across


def test_jitter_shifts_each_face_by_a_fraction_of_a_voxel() -> None:
    slope = np.broadcast_to(np.arange(32, dtype=np.float32), (1, 10, 32, 32)).copy()
    plan = changed(jitter_probability=1.0, jitter_sd=0.5)
    moved = defect(plan, slope, 1)
    shifts = (moved - slope[0])[:, 3:-3, 3:-3]
    assert np.ptp(shifts, axis=(1, 2)).max() < 1e-3
    assert 0.2 < shifts[:, 0, 0].std() < 1.0
    deep = np.ascontiguousarray(slope.reshape(10, 1, 32, 32)[:5])
    assert np.allclose(defect(plan, deep, 1)[2], deep[2, 0], atol=1e-4), "the slice that is predicted stays"


def test_sections_out_of_focus_and_of_their_own_contrast() -> None:
    image = stack(10, 32)
    blurred = defect(changed(defocus_probability=1.0, defocus_sections_max=3), image, 2)
    sharp = [np.array_equal(a, b) for a, b in zip(blurred, image[0], strict=True)]
    assert 7 <= sum(sharp) <= 9
    assert all(b.std() < 0.7 * a.std() for a, b, same in zip(image[0], blurred, sharp, strict=True) if not same)
    plan = changed(section_contrast_probability=1.0, section_contrast_range=(0.5, 2.0), section_brightness_sd=0.2)
    varied = defect(plan, image, 2)
    ratio = varied.std(axis=(1, 2)) / image[0].std(axis=(1, 2))
    assert ratio.min() >= 0.5 - 1e-4
    assert ratio.max() <= 2.0 + 1e-4
    assert ratio.std() > 0.1
    assert 0.05 < (varied.mean(axis=(1, 2)) - image[0].mean(axis=(1, 2))).std() < 0.6


def test_smooth_noise_has_unit_variance_and_the_width_asked_for() -> None:
    rough, smooth = (smooth_noise((20000,), (width,), np.random.default_rng(0)) for width in (0.0, 10.0))
    assert rough.std() == pytest.approx(1, rel=0.05)
    assert smooth.std() == pytest.approx(1, rel=0.1)
    assert np.corrcoef(smooth[:-10], smooth[10:])[0, 1] == pytest.approx(math.exp(-1 / 4), abs=0.06)
    assert abs(np.corrcoef(rough[:-10], rough[10:])[0, 1]) < 0.05


# ---- determinism --------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(PRESETS))
def test_the_same_seed_gives_the_same_patch_and_global_generators_keep_their_state(seed: int, name: str) -> None:
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()
    plan = changed(name, rotation_probability=0.5, noise_probability=0.5, blur_probability=0.5)
    frame = Frame((2, 16, 16), SECTIONS, 1)
    first = run(plan, frame, seed)
    assert random.getstate() == before[0]
    after: Any = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after, strict=True))
    random.seed(99)
    again = run(plan, frame, seed)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_global_generators_are_restored_when_augmentation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("autoseg.train.augment.augment_gaussian_noise", fail)
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    with pytest.raises(RuntimeError):
        run(changed(noise_probability=1.0), Frame((1, 8, 8), SECTIONS, 1), 0)
    assert np.random.random() == expected


def test_a_patch_without_a_warp_is_read_as_it_is() -> None:
    warp = draw_warp(SETS["flips"], Frame((4, 16, 16), CUBES, 1), np.random.default_rng(0))
    assert warp == Warp(None, None, None, (4, 16, 16))
    assert read_box(Box((1, 2, 3), (5, 18, 19)), warp) == Box((1, 2, 3), (5, 18, 19))
