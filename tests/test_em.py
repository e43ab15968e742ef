"""EM as network input: one rule per volume, grids meet by centres, nothing made up where nothing was fetched."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import write_multiscale

from autoseg.data import store
from autoseg.data.em import (
    EmReader,
    Normalizer,
    finest_stored,
    make_normalizer,
    make_probe,
    measured_anew,
    read_input,
    volume_name,
)
from autoseg.data.greys import measure_intensity
from autoseg.errors import DataError
from autoseg.geometry import Box, Grid, NmZYX, VoxelsZYX
from autoseg.schema import Normalization, VolumeGrey

SIZE: NmZYX = (8.0, 4.0, 4.0)
SHAPE: VoxelsZYX = (8, 32, 32)
GRID = Grid(SHAPE, SIZE, (16.0, -2.0, 0.0))
KINDS: tuple[Any, ...] = ("dtype", "volume")
BY_VOLUME = Normalization(kind="volume", volumes=())


def write_em(path: Path, voxels: NDArray[Any], grid: Grid = GRID, chunk: VoxelsZYX = (4, 8, 8)) -> Path:
    return write_multiscale(path / "em", [(grid, voxels)], chunk_zyx=chunk)


def textured(seed: int = 0, dtype: Any = np.uint8) -> NDArray[Any]:
    """Return grey values without a zero, so that none looks like padding."""
    return np.random.default_rng(seed).integers(1, 250, SHAPE).astype(dtype)


def reader_of(path: Path, kind: Any = "dtype", size: NmZYX = SIZE) -> EmReader:
    return EmReader(path, size, Normalization(kind=kind, volumes=()), store.ChunkCache(2**24))


def normalizer_of(em: Path, kind: Any) -> Normalizer:
    how = Normalization(kind=kind, volumes=())
    return make_normalizer(how, em, store.open_multiscale(em), store.ChunkCache(2**24))


def array_of(path: Path, level: int = 0) -> store.ArrayReader:
    return store.ArrayReader(path / f"s{level}", store.ChunkCache(2**24))


def drop_chunk(path: Path, z: int, y: int, x: int, level: int = 0) -> None:
    (path / f"s{level}/{z}/{y}/{x}").unlink()


# ---- normalisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_dark_patch_stays_dark(tmp_path: Path, kind: Any) -> None:
    """A voxel has one network input whatever box it is read in: nothing is normalised per patch."""
    grey = textured()
    grey[2:6, 8:24, 8:24] = np.minimum(grey[2:6, 8:24, 8:24], 20)
    em = reader_of(write_em(tmp_path, grey), kind)
    whole, valid = em.read(GRID)
    assert valid is None
    dark = Box((2, 8, 8), (6, 24, 24))
    for box in (dark, Box((3, 10, 9), (4, 11, 10)), Box((0, 0, 0), (8, 32, 12))):
        part, _ = em.read(GRID.crop(box))
        assert np.array_equal(part, whole[box.slices])
    assert whole[dark.slices].max() < np.median(whole) - 0.2


@given(st.tuples(*[st.integers(-3, 6)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
@settings(max_examples=30)
def test_any_box_is_a_part_of_the_whole_and_outside_is_invalid_zero(
    tmp_path_factory: pytest.TempPathFactory, start: VoxelsZYX, shape: VoxelsZYX
) -> None:
    grey = textured()
    em = reader_of(write_em(tmp_path_factory.mktemp("box"), grey), "volume")
    normalizer = normalizer_of(em.multiscale.path, "volume")
    box = Box(start, (start[0] + shape[0], start[1] + shape[1], start[2] + shape[2]))
    found, valid = em.read(GRID.crop(box))
    inside = box.clip(Box.whole(SHAPE))
    expected, there = np.zeros(shape, np.float32), np.zeros(shape, bool)
    expected[inside.relative_to(box).slices] = normalizer(grey[inside.slices])
    there[inside.relative_to(box).slices] = True
    assert np.array_equal(found, expected)
    assert np.array_equal(np.ones(shape, bool) if valid is None else valid, there)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(np.uint8, 0, 255), (np.uint16, 0, 65535), (np.int16, -32768, 32767)]
)
def test_by_dtype_the_range_becomes_0_to_1(tmp_path: Path, dtype: Any, low: int, high: int) -> None:
    path = write_em(tmp_path, textured(dtype=dtype))
    normalizer = normalizer_of(path, "dtype")
    np.testing.assert_allclose(normalizer(np.array([low, high], dtype)), [0, 1], atol=1e-6)


def test_by_volume_the_mean_is_0_and_the_sd_1(tmp_path: Path) -> None:
    grey = textured(dtype=np.float32) * 7 - 300
    whole, _ = reader_of(write_em(tmp_path, grey), "volume").read(GRID)
    assert float(whole.mean()) == pytest.approx(0, abs=1e-4)
    assert float(whole.std()) == pytest.approx(1, abs=1e-4)


def test_by_volume_contrast_and_offset_of_the_microscope_do_not_matter(tmp_path: Path) -> None:
    grey = textured(dtype=np.float32)
    first, _ = reader_of(write_em(tmp_path / "a", grey), "volume").read(GRID)
    second, _ = reader_of(write_em(tmp_path / "b", grey * 31 + 1000), "volume").read(GRID)
    np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_inverted_polarity_mirrors_the_input_and_loses_nothing(tmp_path: Path, kind: Any) -> None:
    """Dark membranes or bright ones: the same structure, mirrored at the centre of the range or at the mean."""
    grey = textured()
    first, _ = reader_of(write_em(tmp_path / "a", grey), kind).read(GRID)
    second, valid = reader_of(write_em(tmp_path / "b", 255 - grey), kind).read(GRID)
    assert valid is None
    centre = 0.5 if kind == "dtype" else 0.0
    np.testing.assert_allclose(first - centre, centre - second, atol=1e-5)


def test_a_constant_volume_is_finite(tmp_path: Path) -> None:
    whole, _ = reader_of(write_em(tmp_path, np.full(SHAPE, 7, np.uint8)), "volume").read(GRID)
    assert np.array_equal(whole, np.zeros(SHAPE))


def test_floats_have_no_range_to_normalise_by(tmp_path: Path) -> None:
    path = write_em(tmp_path, textured(dtype=np.float32))
    with pytest.raises(DataError, match=r"s0: dtype float32 has no range.*normalization\.kind=volume"):
        normalizer_of(path, "dtype")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_grey_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    grey = textured(dtype=np.float32)
    grey[1, 2, 3] = bad
    with pytest.raises(DataError, match="s0: holds NaN or infinite"):
        measure_intensity(array_of(write_em(tmp_path, grey)))


# ---- what is measured ---------------------------------------------------------------------------------------


def test_intensity_is_measured_over_what_is_stored(tmp_path: Path) -> None:
    grey = textured()
    path = write_em(tmp_path, grey)
    drop_chunk(path, 1, 3, 3)
    found, stored, *_ = measure_intensity(array_of(path))
    there = np.ones(SHAPE, bool)
    there[4:, 24:, 24:] = False
    assert stored == 31 / 32
    assert found.num_voxels == there.sum()
    assert found.mean == pytest.approx(grey[there].mean())
    assert found.sd == pytest.approx(grey[there].std())
    assert (found.minimum, found.maximum) == (grey[there].min(), grey[there].max())
    assert (found.p0_5, found.p50, found.p99_5) == pytest.approx(tuple(np.percentile(grey[there], [0.5, 50, 99.5])))


def test_by_volume_a_planned_volume_keeps_its_numbers_whatever_is_fetched_later(tmp_path: Path) -> None:
    grey = textured()
    grey[4:] //= 2
    em = write_em(tmp_path / "v.zarr", grey)
    looks: dict[str, Any] = {"name": "v", "dtype": "uint8", "shape_zyx": SHAPE}
    planned = VolumeGrey(**looks, mean=100.0, sd=20.0)

    def of(volume: VolumeGrey) -> Normalizer:
        how = Normalization(kind="volume", volumes=(volume,))
        return make_normalizer(how, em, store.open_multiscale(em), store.ChunkCache(2**24))

    assert of(planned) == Normalizer(100.0, 20.0)
    for other in ({"name": "w"}, {"dtype": "uint16"}, {"shape_zyx": (1, 2, 3)}):
        assert of(VolumeGrey(**(looks | other), mean=100.0, sd=20.0)) == normalizer_of(em, "volume")


PLANNED = Normalizer(100.0, 20.0)


def write_two_levels(folder: Path, name: str, fine: NDArray[Any]) -> Path:
    half = fine.reshape(8, 16, 2, 16, 2).mean(axis=(2, 4)).astype(fine.dtype)
    levels = [(GRID, fine), (GRID.at_voxel_size((8.0, 8.0, 8.0)), half)]
    return write_multiscale(folder / f"{name}.zarr/em", levels, chunk_zyx=(4, 8, 8))


def plan_volume(em: Path) -> Normalization:
    """Return a plan that measured this volume as it is now, with numbers that no measurement would give."""
    multiscale = store.open_multiscale(em)
    grid, array = finest_stored(multiscale, store.ChunkCache(0))
    probe = make_probe(array, grid, GRID.crop(Box((1, 2, 3), (8, 30, 30))), measure_intensity(array))
    looks: dict[str, Any] = {"name": volume_name(em), "dtype": str(array.dtype), "shape_zyx": grid.shape_zyx}
    return Normalization(kind="volume", volumes=(VolumeGrey(**looks, mean=100.0, sd=20.0, probe=probe),))


def planned_normalizer(how: Normalization, em: Path) -> Normalizer:
    found = make_normalizer(how, em, store.open_multiscale(em), store.ChunkCache(2**24))
    assert (measured_anew(how, [em, em], store.ChunkCache(0)) == []) == (found == PLANNED)
    return found


def test_a_finer_level_that_is_fetched_later_changes_no_input(tmp_path: Path) -> None:
    em = write_two_levels(tmp_path, "v", textured())
    (em / "s0").rename(tmp_path / "s0")
    how = plan_volume(em)
    size = (8.0, 8.0, 8.0)
    before, _ = EmReader(em, size, how, store.ChunkCache(2**24)).read(GRID.at_voxel_size(size))
    (tmp_path / "s0").rename(em / "s0")
    after, _ = EmReader(em, size, how, store.ChunkCache(2**24)).read(GRID.at_voxel_size(size))
    assert np.array_equal(before, after)
    assert planned_normalizer(how, em) == PLANNED


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.dtype(">u2")])
def test_chunks_that_are_fetched_later_or_lost_elsewhere_change_no_input(tmp_path: Path, dtype: Any) -> None:
    em = write_two_levels(tmp_path, "v", textured(dtype=dtype))
    chunks = sorted(path for path in (em / "s0").glob("*/*/*") if path.is_file())
    for chunk in chunks[5:]:
        chunk.rename(tmp_path / "-".join(chunk.parts[-3:]))
    how = plan_volume(em)
    for chunk in chunks[5:]:
        (tmp_path / "-".join(chunk.parts[-3:])).rename(chunk)
    assert planned_normalizer(how, em) == PLANNED
    for chunk in chunks:
        chunk.unlink()
        assert planned_normalizer(how, em) == PLANNED


def test_another_volume_of_the_same_name_dtype_and_shape_is_measured_and_named(tmp_path: Path) -> None:
    how = plan_volume(write_two_levels(tmp_path / "a", "raw", textured()))
    other = write_two_levels(tmp_path / "b", "raw", textured(seed=1) // 2)
    assert planned_normalizer(how, other) == normalizer_of(other, "volume")
    assert measured_anew(how, [other], store.ChunkCache(0)) == [other]
    assert measured_anew(Normalization(kind="dtype", volumes=how.volumes), [other], store.ChunkCache(0)) == []


def test_the_planned_volume_is_known_by_another_name_and_in_other_chunks(tmp_path: Path) -> None:
    """A TIFF that was imported and is then predicted is the same volume, whatever it is called there."""
    grey = textured()
    how = plan_volume(write_two_levels(tmp_path / "a", "vnc", grey))
    again = write_multiscale(tmp_path / "b/copy.zarr/em", [(GRID, grey)], chunk_zyx=(8, 32, 5))
    assert planned_normalizer(how, again) == PLANNED


def test_a_volume_that_may_be_the_planned_one_but_lacks_its_level_is_refused(tmp_path: Path) -> None:
    em = write_two_levels(tmp_path, "v", textured())
    how = plan_volume(em)
    elsewhere = tmp_path / "w.zarr"
    shutil.copytree(tmp_path / "v.zarr", elsewhere)
    for folder in (em, elsewhere / "em"):
        shutil.rmtree(folder / "s0")
    with pytest.raises(DataError, match=r"v\.zarr/em: looks like v of the plan, of which a level of \(8, 32, 32\)"):
        planned_normalizer(how, em)
    assert planned_normalizer(how, elsewhere / "em") == normalizer_of(elsewhere / "em", "volume")
    longer = Grid((16, 16, 16), (8.0, 8.0, 8.0), (0.0, 0.0, 0.0))
    other = write_multiscale(tmp_path / "b/v.zarr/em", [(longer, np.full((16, 16, 16), 7, np.uint8))])
    assert planned_normalizer(how, other) == normalizer_of(other, "volume")


def test_where_the_known_voxels_are_not_fetched_a_volume_is_known_by_name_dtype_and_shape(tmp_path: Path) -> None:
    """As where only the EM under other crops of it was fetched."""
    how = plan_volume(write_two_levels(tmp_path, "v", textured()))
    for name, dtype, expected in (("v", np.uint8, True), ("w", np.uint8, False), ("v", np.uint16, False)):
        other = write_two_levels(tmp_path / f"{name}{dtype.__name__}", name, textured(seed=1, dtype=dtype))
        assert planned_normalizer(how, other) != PLANNED
        for chunk in (other / "s0").glob("*/1/*"):
            chunk.unlink()
        assert (planned_normalizer(how, other) == PLANNED) == expected


def test_sampled_chunks_that_cannot_be_decoded_are_passed_over_and_named(tmp_path: Path) -> None:
    grey = textured()
    path = write_em(tmp_path, grey)
    (path / "s0/1/2/3").write_bytes(b"")
    found = measure_intensity(array_of(path))
    there = np.ones(SHAPE, bool)
    there[4:, 16:24, 24:] = False
    assert found.intensity.mean == pytest.approx(grey[there].mean())
    assert (found.num_sampled, len(found.damaged)) == (32, 1)
    assert found.damaged[0].startswith("the chunk 1/2/3 cannot be decoded")
    for chunk in list((path / "s0").glob("0/*/*"))[:6]:
        chunk.write_bytes(b"\0")
    with pytest.raises(DataError, match=r"s0: 7 of 32 sampled chunks cannot be used, first: the chunk 0/.*restore"):
        measure_intensity(array_of(path))


def test_one_damaged_chunk_of_few_is_passed_over_but_not_the_only_one(tmp_path: Path) -> None:
    path = write_em(tmp_path, textured(), chunk=(8, 32, 16))
    (path / "s0/0/0/1").write_bytes(b"")
    assert len(measure_intensity(array_of(path)).damaged) == 1
    (path / "s0/0/0/0").unlink()
    with pytest.raises(DataError, match="1 of 1 sampled chunks"):
        measure_intensity(array_of(path))


def test_padding_does_not_count_but_a_few_black_voxels_do(tmp_path: Path) -> None:
    grey = textured()
    few = grey.copy()
    few[0, 0, :9] = 0
    assert measure_intensity(array_of(write_em(tmp_path / "few", few))).intensity.minimum == 0
    padded = grey.copy()
    padded[:, :4] = 0  # half of each chunk: a chunk of zeros alone might not be stored
    found = measure_intensity(array_of(write_em(tmp_path / "padded", padded))).intensity
    assert found.minimum >= 1
    assert found.mean == pytest.approx(grey[:, 4:].mean())


def test_a_large_volume_is_sampled_the_same_way_every_time(tmp_path: Path) -> None:
    path = write_em(tmp_path, textured(), chunk=(2, 4, 4))
    first = measure_intensity(array_of(path)).intensity
    assert first.num_voxels == 64 * 2 * 4 * 4 < np.prod(SHAPE)
    assert measure_intensity(array_of(path)).intensity == first
    assert measure_intensity(array_of(path), seed=1).intensity != first


def test_em_that_was_never_fetched_is_named(tmp_path: Path) -> None:
    path = write_em(tmp_path, np.zeros(SHAPE, np.uint8))
    for chunk in (path / "s0").glob("*/*/*"):
        chunk.unlink()
    with pytest.raises(DataError, match="s0: not one chunk of the EM is stored"):
        reader_of(path, "volume")


# ---- what is not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_never_fetched_is_invalid_and_zero(tmp_path: Path, kind: Any) -> None:
    """A fill of 0 would be the blackest grey there is; the network gets 0 and the loss hears it is not real."""
    grey = textured()
    path = write_em(tmp_path, grey)
    full, _ = reader_of(path, kind).read(GRID)
    drop_chunk(path, 0, 1, 2)
    em = reader_of(path, "dtype")
    hole = Box((0, 8, 16), (4, 16, 24))
    found, valid = em.read(GRID)
    expected = np.ones(SHAPE, bool)
    expected[hole.slices] = False
    assert not em.complete
    assert np.array_equal(valid, expected)
    assert (found[hole.slices] == 0).all()
    if kind == "dtype":
        assert np.array_equal(found[expected], full[expected])


def test_a_black_chunk_that_was_stored_is_valid(tmp_path: Path) -> None:
    grey = textured()
    path = write_em(tmp_path, grey)
    metadata = json.loads((path / "s0/.zarray").read_text())
    (path / "s0/.zarray").write_text(json.dumps(metadata | {"fill_value": 9}))  # else zarr 3 stores no chunk of zeros
    black = Box((0, 8, 16), (4, 16, 24))
    store.open_for_update(path / "s0")[black.slices] = 0
    found, valid = reader_of(path).read(GRID)
    assert valid is None
    assert (found[black.slices] == 0).all()


@pytest.mark.parametrize("size", [(8.0, 2.0, 2.0), (8.0, 8.0, 8.0), (8.0, 6.0, 5.0), (16.0, 4.0, 4.0), (5.0, 4.0, 4.0)])
def test_at_the_edge_and_beside_a_hole_nothing_is_mixed_with_what_is_not_there(tmp_path: Path, size: NmZYX) -> None:
    """A constant volume reads as that constant wherever it is valid, up to its last voxel and around a hole."""
    path = write_em(tmp_path, np.full(SHAPE, 100, np.uint8))
    drop_chunk(path, 0, 1, 2)
    target = GRID.at_voxel_size(size)
    found, valid = reader_of(path, size=size).read(target.crop(Box.whole(target.shape_zyx).grow((1, 2, 2))))
    assert valid is not None
    assert valid.any()
    np.testing.assert_allclose(found[valid], 100 / 255, rtol=1e-5)
    assert (found[~valid] == 0).all()
    assert not valid[0].any(), "the margin is outside"
    assert not valid[:, :, -1].any()
    inner = valid[1:-1, 2:-2, 2:-2]
    hole = GRID.crop(Box((0, 8, 16), (4, 16, 24)))
    for index in np.ndindex(*inner.shape):
        share = 1.0
        for axis in range(3):
            low = target.corner_nm[axis] + index[axis] * size[axis]
            high = min(low + size[axis], hole.corner_nm[axis] + hole.extent_nm[axis])
            covered = high - max(low, hole.corner_nm[axis])
            share *= max(0.0, covered) / size[axis]
        if share > 0.51:
            assert not inner[index]
        elif share < 1e-6:
            assert inner[index]


# ---- other voxel sizes --------------------------------------------------------------------------------------


def physical(grid: Grid) -> NDArray[np.float32]:
    """Return a ramp in nm, so that a value says where its voxel's centre is."""
    z, y, x = (o + np.arange(n) * v for o, n, v in zip(grid.origin_nm, grid.shape_zyx, grid.voxel_size_nm, strict=True))
    return (z[:, None, None] * 3 + y[:, None] * 2 + x - 50).astype(np.float32)


def write_ramp(path: Path) -> tuple[Path, list[Grid]]:
    """Write a pyramid of that ramp: s1 halves y and x, s2 halves all; each level has its own centre translation."""
    sizes: list[NmZYX] = [(8.0, 4.0, 4.0), (8.0, 8.0, 8.0), (16.0, 16.0, 16.0)]
    levels = [GRID.at_voxel_size(size) for size in sizes]
    assert levels[2].origin_nm == (20.0, 4.0, 6.0)
    return write_multiscale(path / "em", [(level, physical(level)) for level in levels]), levels


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(
    "size",
    [(8.0, 4.0, 4.0), (8.0, 8.0, 8.0), (16.0, 16.0, 16.0), (8.0, 6.0, 5.0), (4.0, 2.0, 2.0), (13.92, 12.0, 12.0)],
)
def test_every_level_gives_the_same_physical_values(tmp_path: Path, level: int, size: NmZYX) -> None:
    """Whatever level the plan's voxel size picks and whatever grid is asked for, a place keeps its value."""
    path, levels = write_ramp(tmp_path)
    em = reader_of(path, "volume", levels[level].voxel_size_nm)
    normalizer = normalizer_of(path, "volume")
    target = GRID.at_voxel_size(size)
    margin = [math.ceil(8 / v) for v in size]
    inner = target.crop(Box.whole(target.shape_zyx).grow((-margin[0], -margin[1], -margin[2])))
    assert min(inner.shape_zyx) >= 1
    found, valid = em.read(inner)
    assert valid is None or valid.all()
    in_nm = found.astype(np.float64) * normalizer.scale + normalizer.offset
    # A window that cuts source voxels sees steps instead of the ramp: off by at most a quarter of a source voxel.
    ratios = np.divide(size, levels[level].voxel_size_nm)
    cut = (ratios > 1) & (ratios != np.rint(ratios))
    steps = np.array([3.0, 2.0, 1.0]) * levels[level].voxel_size_nm / 4
    np.testing.assert_allclose(in_nm, physical(inner), atol=0.02 + float(steps[cut].sum()))


def test_the_level_read_is_the_coarsest_that_is_fine_enough(tmp_path: Path) -> None:
    path, levels = write_ramp(tmp_path)
    for size, level in [
        (SIZE, 0),
        ((8.0, 7.0, 8.0), 0),
        ((8.0, 8.0, 8.0), 1),
        ((40.0, 40.0, 40.0), 2),
        ((2.0,) * 3, 0),
    ]:
        em = reader_of(path, "volume", (size[0], size[1], size[2]))
        exact, _ = em.read(levels[level])
        normalizer = normalizer_of(path, "volume")
        assert np.array_equal(exact, normalizer(physical(levels[level])))
        assert em.grid == levels[0]


def test_a_volume_of_which_only_coarse_levels_were_fetched_can_be_used(tmp_path: Path) -> None:
    """The challenge's fetch-data leaves out levels finer than a crop: metadata is there, chunks are not."""
    path, levels = write_ramp(tmp_path)
    for chunk in (path / "s0").glob("*/*/*"):
        chunk.unlink()
    found, valid = reader_of(path, "volume", levels[1].voxel_size_nm).read(levels[1])
    assert valid is None
    assert float(found.std()) == pytest.approx(1, abs=1e-3)


# ---- levels that were fetched -------------------------------------------------------------------------------


def write_fetched(path: Path) -> tuple[Path, list[Grid]]:
    """Write two levels as they are fetched for two crops: s0 for the left one only, s1 for both.

    Chunks of s1 reach twice as far as those of s0, so s1 always holds more of the surroundings.
    """
    fine = Grid((8, 32, 64), (4.0, 4.0, 4.0), (0.0, 0.0, 0.0))
    levels = [fine, fine.at_voxel_size((8.0, 8.0, 8.0))]
    em = write_multiscale(path / "em", [(level, physical(level)) for level in levels], chunk_zyx=(8, 16, 16))
    for chunk in em.glob("s0/0/*/[123]"):
        chunk.unlink()
    return em, levels


def test_a_level_not_fetched_under_a_crop_is_passed_over_for_a_coarser_one(tmp_path: Path) -> None:
    em, (fine, _) = write_fetched(tmp_path)
    reader = EmReader(em, fine.voxel_size_nm, BY_VOLUME, store.ChunkCache(2**24))
    normalizer = normalizer_of(em, "volume")
    left, right = fine.crop(Box((0, 0, 0), (8, 16, 16))), fine.crop(Box((0, 0, 40), (8, 16, 56)))
    found, valid = reader.read(left)
    assert valid is None
    assert np.array_equal(found, normalizer(physical(left))), "s0, voxel by voxel"
    found, valid = reader.read(right)
    assert valid is None or valid.all(), "s1 is there"
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(found[inner], normalizer(physical(right))[inner], atol=1e-4)


def test_what_lies_around_a_crop_does_not_change_its_level(tmp_path: Path) -> None:
    """A patch at the edge of a crop reads the level of the crop, also where a coarser level holds more of the patch."""
    em, (fine, _) = write_fetched(tmp_path)
    reader = EmReader(em, fine.voxel_size_nm, BY_VOLUME, store.ChunkCache(2**24))
    crop = fine.crop(Box((0, 0, 0), (8, 16, 16)))
    whole, _ = reader.read(crop)
    box = Box((0, 0, 12), (8, 16, 44))
    image, valid = read_input(reader, crop, box, 1)
    assert valid is not None
    assert np.array_equal(valid, np.broadcast_to(np.arange(12, 44) < 16, box.shape_zyx))
    assert np.array_equal(image[0][..., :4], whole[..., 12:])
    assert (image[0][~valid] == 0).all()


def test_a_few_chunks_that_are_missing_are_masked_rather_than_read_coarser(tmp_path: Path) -> None:
    em, (fine, _) = write_fetched(tmp_path)
    reader = EmReader(em, fine.voxel_size_nm, BY_VOLUME, store.ChunkCache(2**24))
    grid = fine.crop(Box((0, 0, 0), (8, 32, 24)))
    found, valid = reader.read(grid)
    assert valid is not None, "two thirds are stored at s0, the rest is not made up"
    assert valid.mean() == pytest.approx(2 / 3)
    assert np.array_equal(found[valid], normalizer_of(em, "volume")(physical(grid))[valid])


@settings(max_examples=40)
@given(
    truth=st.sampled_from([(1.74, 2.0, 2.0), (3.48, 4.0, 4.0), (2.62, 2.0, 2.0), (4.0, 4.0, 4.0), (8.0, 8.0, 8.0)]),
    em=st.sampled_from([(3.48, 4.0, 4.0), (5.24, 4.0, 4.0), (4.0, 4.0, 4.0), (1.74, 2.0, 2.0)]),
    shift=st.tuples(*[st.integers(0, 3)] * 3),
)
def test_em_and_ground_truth_meet_by_centres_at_any_voxel_size(
    tmp_path_factory: pytest.TempPathFactory, truth: NmZYX, em: NmZYX, shift: VoxelsZYX
) -> None:
    """Finer or coarser than the EM: a ramp in nm read on the grid of the truth is that ramp at its voxel centres."""
    sizes: list[NmZYX] = [em, (em[0] * 2, em[1] * 2, em[2] * 2)]
    finest = Grid((24, 24, 24), em, (100.0, -30.0, 7.5))
    levels = [finest, finest.at_voxel_size(sizes[1])]
    path = write_multiscale(tmp_path_factory.mktemp("meet") / "em", [(level, physical(level)) for level in levels])
    edge = tuple(finest.corner_nm[axis] + (4 + shift[axis]) * em[axis] + truth[axis] / 2 for axis in range(3))
    grid = Grid((4, 4, 4), truth, (edge[0], edge[1], edge[2]))
    reader = reader_of(path, "volume", truth)
    found, valid = reader.read(grid)
    assert valid is None
    normalizer = normalizer_of(path, "volume")
    read = store.open_multiscale(path).level_for(truth).grid.voxel_size_nm
    ratios = [t / r for t, r in zip(truth, read, strict=True)]
    # an average over 1.15 voxels sits a little beside its centre; half a voxel aside it would be a wrong registration
    beside = [0 if r <= 1 or r == round(r) else 0.125 * v / r for r, v in zip(ratios, read, strict=True)]
    slack = (beside[0] * 3 + beside[1] * 2 + beside[2]) / normalizer.scale
    np.testing.assert_allclose(found, normalizer(physical(grid)), atol=2e-4 + slack)


# ---- what the network is given ------------------------------------------------------------------------------


def test_one_slice_is_one_channel_in_place(tmp_path: Path) -> None:
    em = reader_of(write_em(tmp_path, textured()))
    whole, _ = em.read(GRID)
    box = Box((1, 2, 3), (4, 9, 11))
    image, valid = read_input(em, GRID, box, 1)
    assert valid is None
    assert np.array_equal(image, whole[box.slices][None])


@pytest.mark.parametrize("z", [0, 3, 7])
def test_neighbouring_slices_become_channels_and_validity_is_the_centre_slices(tmp_path: Path, z: int) -> None:
    em = reader_of(write_em(tmp_path, textured()))
    whole, _ = em.read(GRID)
    image, valid = read_input(em, GRID, Box((z, 4, 4), (z + 1, 12, 16)), 5)
    assert image.shape == (5, 1, 8, 12)
    for channel, section in enumerate(range(z - 2, z + 3)):
        expected = whole[section, 4:12, 4:16] if 0 <= section < 8 else np.zeros((8, 12))
        assert np.array_equal(image[channel, 0], expected)
    assert valid is None or (valid.shape == (1, 8, 12) and valid.all())


def test_a_normalizer_is_an_affine_map() -> None:
    assert Normalizer(10.0, 2.0)(np.array([10, 14], np.uint8)).tolist() == [0.0, 2.0]
