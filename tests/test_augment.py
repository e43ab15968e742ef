"""Augmentation: EM and codes move as one, the unknown fills what comes in from outside, no global state changes."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_planner import tiny_facts_plan

from autoseg.geometry import VoxelsZYX
from autoseg.schema import Augmentation
from autoseg.train.augment import augment, draw_warp

PRESETS = ("none", "flips", "light", "fib-sem", "sstem")
SPATIAL: dict[str, Any] = {
    "rotation_probability": 1.0,
    "scale_probability": 1.0,
    "elastic_probability": 1.0,
    "elastic_sigma": 8.0,
    "elastic_magnitude": 3.0,
}
GREY: dict[str, Any] = {
    "contrast_probability": 0.0,
    "gamma_probability": 0.0,
    "noise_probability": 0.0,
    "blur_probability": 0.0,
    "missing_section_probability": 0.0,
    "brightness_sd": 0.0,
}


def preset(name: str, **changes: Any) -> Augmentation:
    """Return a preset as the planner writes it, with changes."""
    plan = tiny_facts_plan({"augmentation.preset": name})
    return msgspec.structs.replace(plan.augmentation, **changes)


SETS = {name: preset(name) for name in PRESETS}


def run(
    plan: Augmentation,
    patch: VoxelsZYX,
    seed: int,
    channels: int = 1,
    isotropic: bool = False,
    codes: NDArray[np.int32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
    """Return (image, codes, codes before) of a patch whose image equals its codes in every channel."""
    warp = draw_warp(plan, patch, isotropic, np.random.default_rng(seed))
    if codes is None:
        codes = ramp(warp.read_zyx)
    image = np.repeat(codes[None].astype(np.float32), channels, axis=0)
    out, moved = augment(image.copy(), codes.copy(), plan, warp, patch, seed)
    return out, moved, codes


def ramp(shape: VoxelsZYX) -> NDArray[np.int32]:
    """Return codes from 1 that grow by 7, 3 and 5 a voxel along z, y and x: a shift of half a voxel shows."""
    z, y, x = np.indices(shape)
    return (1 + 7 * z + 3 * y + 5 * x).astype(np.int32)


def assert_together(image_ZYX: NDArray[np.float32], codes_ZYX: NDArray[np.int32]) -> None:
    """The image is interpolated, codes take the nearest voxel: they differ by at most half a voxel."""
    inside = codes_ZYX > 0
    assert inside.mean() > 0.8
    difference = (image_ZYX - codes_ZYX)[inside]
    assert np.abs(difference.mean()) < 2.5, "a shift of one voxel is 3, 5 or 7"
    assert np.percentile(np.abs(difference), 98) <= (7 + 3 + 5) / 2 + 0.5


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("patch", "channels"), [((1, 32, 32), 1), ((1, 32, 32), 5), ((4, 32, 24), 1), ((16, 16, 16), 1)]
)
def test_image_and_codes_leave_as_a_patch_and_move_together(name: str, patch: VoxelsZYX, channels: int) -> None:
    plan = msgspec.structs.replace(SETS[name], **GREY)
    for seed in range(12):
        image, codes, _ = run(plan, patch, seed, channels, isotropic=patch == (16, 16, 16))
        assert image.shape == (channels, *patch)
        assert codes.shape == patch
        assert image.dtype == np.float32
        assert codes.dtype == np.int32
        assert_together(image[channels // 2], codes)


@pytest.mark.parametrize(
    "changes", [SPATIAL, {"rotation_probability": 1.0}, {"elastic_probability": 1.0}, {"scale_probability": 1.0}]
)
@pytest.mark.parametrize(("patch", "isotropic"), [((1, 48, 48), False), ((4, 32, 32), False), ((16, 16, 16), True)])
def test_every_warp_moves_image_and_codes_together(changes: dict[str, Any], patch: VoxelsZYX, isotropic: bool) -> None:
    plan = msgspec.structs.replace(SETS["none"], **(GREY | changes))
    moved_somewhere = 0
    for seed in range(6):
        image, codes, before = run(plan, patch, seed, isotropic=isotropic)
        assert_together(image[0], codes)
        margin = [(a - b) // 2 for a, b in zip(before.shape, patch, strict=True)]
        same = before[tuple(slice(m, m + n) for m, n in zip(margin, patch, strict=True))]
        moved_somewhere += not np.array_equal(same, codes)
    assert moved_somewhere >= 5


@pytest.mark.parametrize("name", PRESETS)
def test_mirrors_and_turns_keep_every_voxel(name: str) -> None:
    plan = msgspec.structs.replace(
        SETS[name], **GREY, rotation_probability=0.0, scale_probability=0.0, elastic_probability=0.0, transpose_z=True
    )
    unchanged = 0
    for seed in range(20):
        codes = np.random.default_rng(seed).integers(0, 9, (8, 8, 8)).astype(np.int32)
        image, moved, before = run(plan, (8, 8, 8), seed, codes=codes)
        assert np.array_equal(image[0], moved)
        assert sorted(moved.ravel()) == sorted(before.ravel())
        unchanged += np.array_equal(moved, before)
    assert unchanged < 20


def test_without_any_augmentation_nothing_changes() -> None:
    image, codes, before = run(SETS["none"], (4, 16, 16), 3)
    assert np.array_equal(codes, before)
    assert np.array_equal(image[0], before)


def test_codes_do_not_change_with_grey_values() -> None:
    plan = msgspec.structs.replace(
        SETS["none"],
        contrast_probability=1.0,
        brightness_sd=0.5,
        gamma_probability=1.0,
        noise_probability=1.0,
        blur_probability=1.0,
        missing_section_probability=1.0,
    )
    image, codes, before = run(plan, (4, 16, 16), 1)
    assert np.array_equal(codes, before)
    assert not np.allclose(image[0], before)
    assert np.isfinite(image).all()
    lost = [z for z in range(4) if not image[0, z].any()]
    assert len(lost) == 1, "exactly one section of four is lost"


def test_the_section_that_is_predicted_is_never_the_one_that_gets_lost() -> None:
    plan = msgspec.structs.replace(SETS["none"], missing_section_probability=1.0)
    lost = set()
    for seed in range(40):
        image, _, _ = run(plan, (1, 16, 16), seed, channels=5)
        lost |= {c for c in range(5) if not image[c].any()}
    assert lost == {0, 1, 3, 4}
    alone, _, _ = run(plan, (1, 16, 16), 0, channels=1)
    assert alone.any()


def test_mirroring_z_of_a_2_5d_patch_mirrors_its_channels() -> None:
    plan = msgspec.structs.replace(SETS["none"], flip=True)
    codes = np.zeros((1, 4, 4), dtype=np.int32)
    image = np.arange(5, dtype=np.float32)[:, None, None, None] * np.ones((5, 1, 4, 4), dtype=np.float32)
    warp = draw_warp(plan, (1, 4, 4), False, np.random.default_rng(0))
    orders = {tuple(augment(image, codes, plan, warp, (1, 4, 4), seed)[0][:, 0, 0, 0]) for seed in range(30)}
    assert orders == {(0, 1, 2, 3, 4), (4, 3, 2, 1, 0)}


def test_what_a_warp_brings_in_from_outside_is_unknown() -> None:
    """Codes have no 0 inside, so a 0 after the warp comes from outside."""
    plan = msgspec.structs.replace(SETS["none"], **(GREY | SPATIAL), scale_range=(0.4, 1.0))
    warp = draw_warp(plan, (1, 32, 32), False, np.random.default_rng(0))
    small = warp._replace(read_zyx=(1, 32, 32))  # less than it needs, so that something must come from outside
    codes = np.full((1, 32, 32), 3, dtype=np.int32)
    found = [augment(codes[None].astype(np.float32), codes, plan, small, (1, 32, 32), s)[1] for s in range(8)]
    assert set(np.unique(found)) <= {0, 3}
    assert (np.array(found) == 0).any()


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(PRESETS))
def test_the_same_seed_gives_the_same_patch_and_global_generators_keep_their_state(seed: int, name: str) -> None:
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()
    plan = msgspec.structs.replace(SETS[name], rotation_probability=0.5, noise_probability=0.5, blur_probability=0.5)
    first = run(plan, (2, 16, 16), seed)
    assert random.getstate() == before[0]
    after: Any = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after, strict=True))
    random.seed(99)
    again = run(plan, (2, 16, 16), seed)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_global_generators_are_restored_when_augmentation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("autoseg.train.augment.augment_gaussian_noise", fail)
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    with pytest.raises(RuntimeError):
        run(msgspec.structs.replace(SETS["none"], noise_probability=1.0), (1, 8, 8), 0)
    assert np.random.random() == expected


def test_a_thin_or_anisotropic_patch_is_warped_within_its_sections() -> None:
    plan = msgspec.structs.replace(SETS["none"], **(GREY | SPATIAL))
    codes_of = np.arange(1, 5, dtype=np.int32)[:, None, None]
    warp = draw_warp(plan, (4, 24, 24), False, np.random.default_rng(0))
    assert warp.read_zyx[0] == 4
    codes = np.broadcast_to(codes_of, warp.read_zyx).copy()
    _, moved = augment(codes[None].astype(np.float32), codes, plan, warp, (4, 24, 24), 0)
    for z in range(4):
        assert set(np.unique(moved[z])) <= {0, z + 1}
    solid = draw_warp(plan, (8, 24, 24), True, np.random.default_rng(0))
    assert solid.read_zyx[0] > 8
