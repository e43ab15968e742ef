"""Tests of the synthetic data set: it is a pure function, in nm, consistent and not trivial."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.data.synthetic import ATOMS, MITO_MEM_NM, PM_NM, SyntheticVolume, synthesize

CUBE_VOXELS, CUBE_NM = (96, 96, 96), (8.0, 8.0, 8.0)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def cubes() -> list[SyntheticVolume]:
    return [synthesize(CUBE_VOXELS, CUBE_NM, seed) for seed in SEEDS]


def is_any(volume: SyntheticVolume, *names: str) -> NDArray[np.bool_]:
    return np.isin(volume.atom_ZYX, [ATOMS.index(name) for name in names])


def test_same_arguments_give_same_bytes_and_another_seed_does_not(
    cubes: list[SyntheticVolume],
) -> None:
    again = synthesize(CUBE_VOXELS, CUBE_NM, SEEDS[0])
    assert again.em_ZYX.tobytes() == cubes[0].em_ZYX.tobytes()
    assert again.atom_ZYX.tobytes() == cubes[0].atom_ZYX.tobytes()
    for name, ids in again.instances_ZYX.items():
        assert ids.tobytes() == cubes[0].instances_ZYX[name].tobytes()
    assert (cubes[1].atom_ZYX != cubes[0].atom_ZYX).mean() > 0.3
    assert (cubes[1].em_ZYX != cubes[0].em_ZYX).mean() > 0.9


def test_global_random_state_is_neither_read_nor_changed(cubes: list[SyntheticVolume]) -> None:
    before = np.random.get_state(legacy=False)
    volume = synthesize((16, 32, 32), CUBE_NM, 3)
    after = np.random.get_state(legacy=False)
    assert before["state"]["pos"] == after["state"]["pos"]
    assert np.array_equal(before["state"]["key"], after["state"]["key"])
    np.random.random(7)
    assert np.array_equal(volume.em_ZYX, synthesize((16, 32, 32), CUBE_NM, 3).em_ZYX)


@pytest.mark.parametrize("case", range(len(SEEDS)))
def test_every_atom_is_there_in_quantity(cubes: list[SyntheticVolume], case: int) -> None:
    counts = np.bincount(cubes[case].atom_ZYX.ravel(), minlength=len(ATOMS))
    assert len(counts) == len(ATOMS)
    # The least that 50 seeds gave was 6396 voxels, of mito_lum.
    assert counts.min() > 3000, dict(zip(ATOMS, counts.tolist(), strict=True))


@pytest.mark.parametrize("case", range(len(SEEDS)))
def test_instances_agree_with_atoms(cubes: list[SyntheticVolume], case: int) -> None:
    volume = cubes[case]
    mito, nuc, cell = (volume.instances_ZYX[name] for name in ("mito", "nuc", "cell"))
    nucleus = is_any(volume, "ne_mem", "ne_lum", "hchrom", "echrom", "nucpl")
    assert np.array_equal(mito > 0, is_any(volume, "mito_mem", "mito_lum"))
    assert np.array_equal(nuc > 0, nucleus)
    assert np.array_equal(cell > 0, ~is_any(volume, "ecs"))
    for ids in (mito, nuc, cell):
        present = np.unique(ids[ids > 0])
        assert np.array_equal(present, np.arange(1, ids.max() + 1))
        for value in present:
            assert ndimage.label(ids == value, np.ones((3, 3, 3), bool))[1] == 1
    # Cells, mitochondria and nuclei keep apart, so ids never meet.
    for ids in (mito, nuc, cell):
        assert ndimage.label(ids > 0)[1] >= ids.max()


def test_membranes_close_around_what_they_bound(cubes: list[SyntheticVolume]) -> None:
    faces = ndimage.generate_binary_structure(3, 1)
    for volume in cubes:
        for inside, wall in (
            (("mito_lum",), ("mito_mem",)),
            (("er_lum",), ("er_mem",)),
            (("ne_lum", "hchrom", "echrom", "nucpl"), ("ne_mem",)),
        ):
            body = is_any(volume, *inside)
            touched = ndimage.binary_dilation(body, faces) & ~body
            assert not (touched & ~is_any(volume, *wall)).any(), inside
        outside = ndimage.binary_dilation(is_any(volume, "ecs"), faces)
        assert not (outside & ~is_any(volume, "ecs", "pm")).any()


def test_coarse_sections_hold_every_atom() -> None:
    volume = synthesize((24, 160, 160), (40.0, 8.0, 8.0), 0)
    assert volume.em_ZYX.dtype == volume.atom_ZYX.dtype == np.uint8
    assert volume.em_ZYX.shape == volume.atom_ZYX.shape == (24, 160, 160)
    assert set(volume.instances_ZYX) == {"mito", "nuc", "cell"}
    for ids in volume.instances_ZYX.values():
        assert ids.dtype == np.uint16
        assert ids.shape == (24, 160, 160)
    assert set(np.unique(volume.atom_ZYX)) == set(range(len(ATOMS)))


def test_voxel_size_samples_the_same_scene() -> None:
    fine = synthesize((60, 80, 80), (8.0, 8.0, 8.0), 5)
    coarse = synthesize((12, 80, 80), (40.0, 8.0, 8.0), 5)
    # Centres of 40 nm sections coincide with those of every fifth 8 nm section.
    assert (fine.atom_ZYX[2::5] == coarse.atom_ZYX).mean() > 0.9999


@pytest.mark.parametrize("voxel_nm", [8.0, 5.5])
def test_membranes_are_as_thick_in_nm_at_any_voxel_size(voxel_nm: float) -> None:
    voxels = round(700 / voxel_nm)
    volume = synthesize((voxels,) * 3, (voxel_nm,) * 3, 0)
    for wall, within, thickness_nm in (
        ("pm", "cyto", PM_NM),
        ("mito_mem", "mito_lum", MITO_MEM_NM),
    ):
        beyond = is_any(volume, "ecs") if wall == "pm" else ~is_any(volume, "mito_mem", "mito_lum")
        to_beyond = ndimage.distance_transform_edt(~beyond, sampling=voxel_nm)
        last = is_any(volume, wall) & ndimage.binary_dilation(is_any(volume, within))
        # The transform measures centre to centre, so from half a voxel beyond the surface.
        through = float(np.median(to_beyond[last]))
        assert abs(through - thickness_nm) < 5, (wall, through)


def test_intensity_alone_does_badly(cubes: list[SyntheticVolume]) -> None:
    scores = []
    for volume in cubes:
        total = np.bincount(volume.em_ZYX.ravel(), minlength=256)
        for index in range(len(ATOMS)):
            inside = np.bincount(volume.em_ZYX[volume.atom_ZYX == index], minlength=256)
            # The best of all thresholds, chosen on the truth itself, keeping either side.
            for step in (1, -1):
                kept, kept_of_all = inside[::step].cumsum(), total[::step].cumsum()
                scores.append((2 * kept / (kept_of_all + inside.sum())).max())
    # Measured: 0.27, most of it from ecs (0.80), cyto (0.65) and pm (0.46).
    assert np.mean(np.max(np.reshape(scores, (-1, 2)), axis=1)) < 0.35
