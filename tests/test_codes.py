"""Label codes: they say exactly what was annotated, and their cache is a cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import crop_path, em_path, listing, shapes, write_label, write_multiscale
from test_classes import tables

from autoseg.data import codes as codes_module
from autoseg.data import coding, store
from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, Logic
from autoseg.data.codes import CropCodes, default_cache, index_blocks, open_codes
from autoseg.data.dataset import Crop, open_dataset
from autoseg.data.resample import resample
from autoseg.data.store import sidecar
from autoseg.errors import DataError
from autoseg.geometry import Grid, NmZYX, VoxelsZYX, blocks
from autoseg.schema import ClassEntry, ClassTable, encode

SIZE_NM = (4.0, 4.0, 4.0)
BIG_ID = 2**63
States = dict[str, NDArray[np.uint8]]


def write_crop(
    root: Path, shape: VoxelsZYX, seed: int = 0, size: NmZYX = SIZE_NM, chunk: VoxelsZYX | None = None
) -> tuple[Crop, States]:
    """Write crop `a/crop1` with every kind of annotation; return it and the state of each class, voxel by voxel.

    ::

        mito   semantic, 255 is unknown          ids    instances up to 2^63, where 255 is an ordinary id
        pm     semantic, present nowhere         part   instances of which some are counted as unknown (255)
    """
    rng = np.random.default_rng(seed)
    grid = Grid(shape, size, (2.0, -2.0, 0.0))
    crop = crop_path(root, "a", "crop1")
    write_multiscale(em_path(root, "a"), [(grid, np.full(shape, 9, np.uint8))])
    mito = rng.choice(np.array([0, 1, 255], np.uint8), shape)
    ids = rng.choice(np.array([0, 1, 255, 256, BIG_ID], np.uint64), shape)
    part = rng.choice(np.array([0, 7, 255], np.uint16), shape)
    write_label(crop, "mito", mito, grid, unknown=255, chunk_zyx=chunk)
    write_label(crop, "ids", ids, grid, instance=True, unknown=255, chunk_zyx=chunk)
    write_label(crop, "part", part, grid, instance=True, unknown=255, counted_unknown=3, chunk_zyx=chunk)
    write_label(crop, "pm", np.zeros(shape, np.uint8), grid, unknown=255, chunk_zyx=chunk)
    states = {
        "ids": np.where(ids != 0, PRESENT, ABSENT),
        "mito": np.where(mito == 255, UNKNOWN, mito),
        "part": np.where(part == 255, UNKNOWN, part != 0),
        "pm": np.zeros(shape),
    }
    (found,) = open_dataset(root).crops
    return found, {name: values.astype(np.uint8) for name, values in states.items()}


def write_classes(root: Path, names: list[str]) -> None:
    (root / "classes.json").write_bytes(encode(ClassTable(classes=tuple(ClassEntry(name=name) for name in names))))


def plain(crop: Crop) -> Logic:
    """Return logic by which nothing follows from any class of the crop."""
    return Logic(ClassTable(classes=tuple(ClassEntry(name=label.name) for label in crop.labels)))


def decoded(codes: CropCodes) -> States:
    """Return the state of each class by looking every voxel's code up."""
    return {name: codes.states_CK[:, k][codes.codes_ZYX] for k, name in enumerate(codes.names)}


def check_counts(codes: CropCodes) -> None:
    """Compare the counts of every index block, and their sum, with loops."""
    parts = index_blocks(codes.grid.shape_zyx)
    assert codes.counts_BC.shape == (len(parts), len(codes.states_CK))
    for box, counts in zip(parts, codes.counts_BC, strict=True):
        block = codes.codes_ZYX[box.slices]
        assert counts.tolist() == [int((block == code).sum()) for code in range(len(codes.states_CK))]
    assert codes.histogram_C.sum() == codes.codes_ZYX.size


# ---- what they say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 20, 70), (9, 65, 64)])
def test_codes_and_states_reproduce_every_class_exactly(tmp_path: Path, shape: VoxelsZYX) -> None:
    crop, truth = write_crop(tmp_path / "data", shape)
    codes = open_codes(crop, SIZE_NM, tmp_path / "cache")
    assert codes.names == ("ids", "mito", "part", "pm")
    assert codes.grid == crop.grid
    found = decoded(codes)
    for name, states in truth.items():
        np.testing.assert_array_equal(found[name], states, err_msg=name)
    check_counts(codes)


def test_codes_are_narrow_and_no_two_mean_the_same(tmp_path: Path) -> None:
    crop, _ = write_crop(tmp_path / "data", (5, 20, 70))
    codes = open_codes(crop, SIZE_NM, tmp_path / "cache")
    assert codes.codes_ZYX.dtype == np.uint8
    assert len({bytes(row) for row in codes.states_CK}) == len(codes.states_CK) == 2 * 3 * 3
    assert codes.histogram_C.min() > 0, "no code without a voxel"


@pytest.mark.parametrize("num", [8, 9, 16, 17, 26])
def test_many_classes_in_one_block(tmp_path: Path, num: int) -> None:
    """Independent classes: more than 8 take two bytes of flags, more than 256 combinations two bytes a voxel."""
    shape, root = (3, 40, 64), tmp_path / "data"
    grid = Grid(shape, SIZE_NM, (0.0, 0.0, 0.0))
    write_multiscale(em_path(root, "a"), [(grid, np.ones(shape, np.uint8))])
    truth = np.random.default_rng(num).integers(0, 3, (num, *shape)).astype(np.uint8)
    for k, values in enumerate(truth):
        write_label(crop_path(root, "a", "crop1"), f"c{k:02}", values, grid, unknown=2)
    write_classes(root, [f"c{k:02}" for k in range(num)])
    codes = open_codes(open_dataset(root).crops[0], SIZE_NM, tmp_path / "cache")
    assert codes.codes_ZYX.dtype == np.uint16
    found = decoded(codes)
    assert all(np.array_equal(found[f"c{k:02}"], truth[k]) for k in range(num))
    check_counts(codes)


def test_two_bytes_where_the_first_blocks_took_one(tmp_path: Path) -> None:
    """Nine classes that overlap at random in the last sections only."""
    shape, root = (9, 32, 64), tmp_path / "data"
    grid = Grid(shape, SIZE_NM, (0.0, 0.0, 0.0))
    write_multiscale(em_path(root, "a"), [(grid, np.ones(shape, np.uint8))])
    truth = np.random.default_rng(0).integers(0, 2, (10, *shape)).astype(np.uint8)
    truth[1:, :6] = 0
    for k, values in enumerate(truth):
        write_label(crop_path(root, "a", "crop1"), f"c{k}", values, grid, chunk_zyx=(2, 32, 64))
    write_classes(root, [f"c{k}" for k in range(10)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "LEAST_BLOCK", (1, 1, 1))
        codes = open_codes(open_dataset(root).crops[0], SIZE_NM, tmp_path / "cache")
    assert codes.codes_ZYX.dtype == np.uint16
    found = decoded(codes)
    assert all(np.array_equal(found[f"c{k}"], truth[k]) for k in range(10))
    assert sorted(os.listdir(codes.folder)) == ["codes.npy", "counts.npy", "table.json"]


def test_too_many_combinations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crop, _ = write_crop(tmp_path / "data", (5, 20, 70))
    monkeypatch.setattr(coding, "MAX_CODES", 17)
    with pytest.raises(DataError, match="a/crop1: more than 17 combinations of labels"):
        open_codes(crop, SIZE_NM, tmp_path / "cache")


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 200), st.integers(1, 200)))
def test_index_blocks_are_computed_from_their_place(shape: VoxelsZYX) -> None:
    parts = index_blocks(shape)
    expected = list(blocks(shape, coding.INDEX_BLOCK))
    assert list(parts) == expected
    assert len(parts) == len(expected)
    assert parts[-1] == expected[-1]
    with pytest.raises(IndexError):
        parts[len(expected)]


@pytest.mark.parametrize("chunk", [(8, 16, 16), (9, 13, 31), (1, 70, 90)])
def test_each_chunk_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: VoxelsZYX) -> None:
    crop, _ = write_crop(tmp_path / "data", (17, 70, 90), chunk=chunk)
    loaded: list[tuple[str, VoxelsZYX]] = []
    get = store.ChunkCache.get

    def counted(cache: store.ChunkCache, key: tuple[str, VoxelsZYX], load: Any) -> Any:
        if key not in cache._chunks:
            loaded.append(key)
        return get(cache, key, load)

    monkeypatch.setattr(store.ChunkCache, "get", counted)
    open_codes(crop, SIZE_NM, tmp_path / "cache")
    assert len(loaded) == len(set(loaded))
    names = {Path(path).parent.name for path, _ in loaded}
    assert {"ids", "mito", "part"} <= names


def test_one_huge_chunk_is_encoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its codes are those of small chunks; it takes the memory of the chunk, of its flags and a little more."""
    shape = (96, 130, 128)
    monkeypatch.setattr(coding, "MOST_VOXELS", 2**17)
    mask = (np.random.default_rng(0).random(shape) < 0.3).astype(np.uint8)
    grid = Grid(shape, SIZE_NM, (0.0, 0.0, 0.0))
    peaks: list[int] = []
    found: list[States] = []
    for name, chunk in (("small", (32, 64, 64)), ("huge", shape)):
        write_multiscale(em_path(tmp_path / name, "a"), [(grid, mask)])
        for label in ("er", "mito", "pm"):
            write_label(crop_path(tmp_path / name, "a", "crop1"), label, mask, grid, chunk_zyx=chunk)
        (crop,) = open_dataset(tmp_path / name).crops
        tracemalloc.start()
        codes = open_codes(crop, SIZE_NM, tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        found.append(decoded(codes))
    for label in ("er", "mito", "pm"):
        np.testing.assert_array_equal(found[0][label], found[1][label])
    assert peaks[1] - peaks[0] < 2.2 * mask.nbytes


def test_a_chunk_that_was_never_stored_is_absent(tmp_path: Path) -> None:
    """An annotated class is dense: where nothing was written it is 0, absent, and not unknown."""
    root = tmp_path / "data"
    crop, truth = write_crop(root, (4, 16, 16), chunk=(4, 8, 8))
    (crop.labels[1].path / "0/1/0").unlink()
    codes = open_codes(crop, SIZE_NM, tmp_path / "cache")
    truth["mito"][:, 8:, :8] = ABSENT
    np.testing.assert_array_equal(decoded(codes)["mito"], truth["mito"])


def test_built_in_blocks_equals_built_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crop, _ = write_crop(tmp_path / "data", (17, 70, 90), chunk=(9, 13, 31))
    for size in (SIZE_NM, (8.0, 6.0, 4.0)):
        whole = open_codes(crop, size, tmp_path / "whole", plain(crop))
        monkeypatch.setattr(coding, "LEAST_BLOCK", (4, 4, 4))
        monkeypatch.setattr(coding, "COARSE_BLOCK", (10, 20, 30))
        in_blocks = open_codes(crop, size, tmp_path / "blocks", plain(crop))
        monkeypatch.undo()
        first, second = decoded(whole), decoded(in_blocks)
        for name in whole.names:
            np.testing.assert_array_equal(first[name], second[name])
        check_counts(in_blocks)


# ---- at a coarser voxel size --------------------------------------------------------------------------------


def coarse_by_loops(states: NDArray[np.uint8], factor: VoxelsZYX) -> NDArray[np.uint8]:
    """Return present where it fills at least half of what is known, unknown where less than half is known."""
    out = np.zeros([round(n / f) or 1 for n, f in zip(states.shape, factor, strict=True)], np.uint8)
    for index in np.ndindex(*out.shape):
        part = states[tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factor, strict=True))].ravel()
        known = part[part != UNKNOWN]
        if 2 * len(known) < len(part):
            out[index] = UNKNOWN
        else:
            out[index] = PRESENT if 2 * (known == PRESENT).sum() >= len(known) and len(known) else ABSENT
    return out


def test_label_arrays_are_read_once_for_all_voxel_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crop, _ = write_crop(tmp_path / "data", (8, 16, 16))
    expected = decoded(open_codes(crop, (8.0, 8.0, 8.0), tmp_path / "one", plain(crop)))

    def unreadable(*_: Any) -> None:
        raise AssertionError("read again")

    open_codes(crop, SIZE_NM, tmp_path / "two")
    monkeypatch.setattr(codes_module, "encode_labels", unreadable)
    found = decoded(open_codes(crop, (8.0, 8.0, 8.0), tmp_path / "two", plain(crop)))
    for name, states in expected.items():
        np.testing.assert_array_equal(found[name], states)


def by_shares(states: NDArray[np.uint8], source: Grid, target: Grid) -> NDArray[np.uint8]:
    """Return the same rule for one class over the whole crop, at any ratio of voxel sizes."""
    present, unknown = (
        resample((states == state).astype(np.float32), source, target, area=True) for state in (PRESENT, UNKNOWN)
    )
    filled = np.where(present >= 0.5 * (1 - unknown) - 1e-5, PRESENT, ABSENT)
    return np.where(unknown <= 0.5 + 1e-5, filled, UNKNOWN).astype(np.uint8)


@settings(max_examples=25)
@given(
    shape=shapes(14),
    size=st.tuples(*[st.sampled_from([1.74, 2.0, 3.3, 4.0, 6.0, 8.0, 12.0, 32.0])] * 3),
    block=st.integers(3, 20),
)
def test_any_other_voxel_size_follows_the_same_rule(
    tmp_path_factory: pytest.TempPathFactory, shape: VoxelsZYX, size: NmZYX, block: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("other")
    crop, truth = write_crop(tmp_path / "data", shape, block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coding, "COARSE_BLOCK", (block, block, block))
        codes = open_codes(crop, size, tmp_path / "cache", plain(crop))
    found = decoded(codes)
    for name, states in truth.items():
        np.testing.assert_array_equal(found[name], by_shares(states, crop.grid, codes.grid), err_msg=name)
    check_counts(codes)


@settings(max_examples=25)
@given(shape=shapes(9), factor=st.tuples(*[st.integers(1, 4)] * 3), seed=st.integers(0, 9))
def test_coarser_is_present_where_it_fills_half_of_what_is_known(
    tmp_path_factory: pytest.TempPathFactory, shape: VoxelsZYX, factor: VoxelsZYX, seed: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("coarse")
    crop, truth = write_crop(tmp_path / "data", shape, seed)
    size = (4.0 * factor[0], 4.0 * factor[1], 4.0 * factor[2])
    codes = open_codes(crop, size, tmp_path / "cache", plain(crop))
    found = decoded(codes)
    for name, states in truth.items():
        np.testing.assert_array_equal(found[name], coarse_by_loops(states, factor), err_msg=name)
    check_counts(codes)


@settings(max_examples=40)
@given(
    table=tables(),
    shape=shapes(6),
    factor=st.tuples(*[st.integers(1, 3)] * 3).filter(lambda factor: factor != (1, 1, 1)),
    data=st.data(),
)
def test_what_follows_is_coarsened_like_what_was_annotated(
    tmp_path_factory: pytest.TempPathFactory,
    table: ClassTable,
    shape: VoxelsZYX,
    factor: VoxelsZYX,
    data: st.DataObject,
) -> None:
    """Every class at every coarse voxel, derived or annotated: half of what is known of it in the voxels there."""
    root, rng = tmp_path_factory.mktemp("derived"), np.random.default_rng(data.draw(st.integers(0, 9)))
    logic, grid = Logic(table), Grid(shape, SIZE_NM, (0.0, 0.0, 0.0))
    annotated = sorted(data.draw(st.sets(st.sampled_from(logic.names), min_size=1)))
    write_multiscale(em_path(root, "a"), [(grid, np.ones(shape, np.uint8))])
    labels = np.stack([rng.choice([ABSENT, ABSENT, PRESENT, UNKNOWN], shape).astype(np.uint8) for _ in annotated])
    for name, values in zip(annotated, labels, strict=True):
        write_label(crop_path(root, "a", "crop1"), name, values, grid, unknown=UNKNOWN)
    (root / "classes.json").write_bytes(encode(table))
    (crop,) = open_dataset(root).crops
    size = (4.0 * factor[0], 4.0 * factor[1], 4.0 * factor[2])
    codes = open_codes(crop, size, root / "cache", logic)
    check_counts(codes)
    found, fine = decoded(codes), decoded(open_codes(crop, SIZE_NM, root / "cache", logic))
    completed, _ = logic.complete(logic.rows(labels.reshape(len(annotated), -1).T, annotated))
    for k, name in enumerate(logic.names):
        np.testing.assert_array_equal(fine[name], completed[:, k].reshape(shape), err_msg=name)
        np.testing.assert_array_equal(found[name], coarse_by_loops(fine[name], factor), err_msg=name)


@pytest.mark.parametrize("size", [8.0, 16.0])
def test_a_composite_fills_the_coarse_voxel_that_none_of_its_parts_fills(tmp_path: Path, size: float) -> None:
    root, shape = tmp_path / "data", (8, 8, 8)
    grid, third = Grid(shape, SIZE_NM, (0.0, 0.0, 0.0)), np.arange(512).reshape(shape) % 3
    write_multiscale(em_path(root, "a"), [(grid, np.ones(shape, np.uint8))])
    parts = ("mito_mem", "mito_lum", "mito_ribo")
    for i, name in enumerate(parts):
        write_label(crop_path(root, "a", "crop1"), name, (third == i).astype(np.uint8), grid)
    dataset = open_dataset(root)
    found = decoded(open_codes(dataset.crops[0], (size,) * 3, tmp_path / "cache", Logic(dataset.table)))
    assert (found["mito"] == PRESENT).all()
    assert all((found[name] == ABSENT).any() for name in parts)
    assert (found["ecs"] == ABSENT).all()


def test_coarse_states_without_logic_are_refused(tmp_path: Path) -> None:
    """Whoever got them would draw conclusions from them that do not hold."""
    crop, _ = write_crop(tmp_path / "data", (4, 8, 8))
    with pytest.raises(ValueError, match=r"a/crop1 at .* needs logic"):
        open_codes(crop, (8.0, 8.0, 8.0), tmp_path / "cache")


def test_a_membrane_one_voxel_thick_survives_halving(tmp_path: Path) -> None:
    """A majority over codes would erase it: each coarse voxel is half membrane."""
    root, shape = tmp_path / "data", (1, 8, 8)
    grid = Grid(shape, SIZE_NM, (0.0, 0.0, 0.0))
    write_multiscale(em_path(root, "a"), [(grid, np.ones(shape, np.uint8))])
    membrane = np.zeros(shape, np.uint8)
    membrane[:, 3, :] = 1
    write_label(crop_path(root, "a", "crop1"), "pm", membrane, grid)
    (crop,) = open_dataset(root).crops
    codes = open_codes(crop, (4.0, 8.0, 8.0), tmp_path / "cache", plain(crop))
    assert decoded(codes)["pm"][0].tolist() == [[0] * 4, [1] * 4, [0] * 4, [0] * 4]
    assert codes.grid.origin_nm == (0.0, 2.0, 2.0)


def test_a_finer_voxel_size_repeats_labels(tmp_path: Path) -> None:
    crop, truth = write_crop(tmp_path / "data", (2, 3, 4))
    codes = open_codes(crop, (2.0, 4.0, 1.0), tmp_path / "cache", plain(crop))
    for name, states in truth.items():
        np.testing.assert_array_equal(decoded(codes)[name], states.repeat(2, axis=0).repeat(4, axis=2))


# ---- the cache ----------------------------------------------------------------------------------------------


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(codes_module, "_build", build)


def entries(cache: Path) -> list[str]:
    return sorted(os.listdir(cache / "codes"))


def test_a_second_opening_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crop, truth = write_crop(tmp_path / "data", (4, 8, 8))
    open_codes(crop, SIZE_NM, tmp_path / "cache")
    forbid_building(monkeypatch)
    codes = open_codes(crop, SIZE_NM, tmp_path / "cache")
    assert np.array_equal(decoded(codes)["mito"], truth["mito"])
    with pytest.raises(AssertionError, match="built again"):
        open_codes(crop, (8.0, 8.0, 8.0), tmp_path / "cache", plain(crop))


def test_another_class_table_reads_no_label_array_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was annotated stays; what follows from it at another voxel size is made anew, and both are kept."""
    root, cache, coarse = tmp_path / "data", tmp_path / "cache", (8.0, 8.0, 8.0)
    crop, truth = write_crop(root, (4, 8, 8))
    open_codes(crop, coarse, cache, plain(crop))
    parts = ClassEntry(name="ids"), ClassEntry(name="part")
    whole = Logic(ClassTable(classes=(*parts, ClassEntry(name="whole", components=("ids", "part")))))
    with monkeypatch.context() as patch:
        patch.setattr(codes_module, "encode_labels", lambda *_: pytest.fail("labels were read again"))
        own, other = open_codes(crop, SIZE_NM, cache, whole), open_codes(crop, coarse, cache, whole)
    assert len(entries(cache)) == 3
    present = (truth["ids"] == PRESENT) | (truth["part"] == PRESENT)
    assert np.array_equal(decoded(own)["whole"] == PRESENT, present)
    assert other.names == ("ids", "part", "whole")
    forbid_building(monkeypatch)
    for logic in (plain(crop), whole):
        open_codes(crop, SIZE_NM, cache, logic)
        open_codes(crop, coarse, cache, logic)


def test_a_changed_chunk_is_seen(tmp_path: Path) -> None:
    crop, truth = write_crop(tmp_path / "data", (4, 16, 16), chunk=(4, 8, 8))
    before = decoded(open_codes(crop, SIZE_NM, tmp_path / "cache"))
    mito = crop.labels[1].path
    shutil.copy(mito / "0/1/1", mito / "0/0/0")
    after = decoded(open_codes(crop, SIZE_NM, tmp_path / "cache"))
    truth["mito"][:, :8, :8] = truth["mito"][:, 8:, 8:]
    assert not np.array_equal(before["mito"], after["mito"])
    np.testing.assert_array_equal(after["mito"], truth["mito"])
    assert len(entries(tmp_path / "cache")) == 2


def test_a_changed_meaning_of_values_is_seen(tmp_path: Path) -> None:
    """Whoever declares 255 no longer unknown gets other codes, though no voxel changed."""
    root = tmp_path / "data"
    crop, _ = write_crop(root, (4, 8, 8))
    open_codes(crop, SIZE_NM, tmp_path / "cache")
    attributes = crop_path(root, "a", "crop1") / "mito/.zattrs"
    content = json.loads(attributes.read_text())
    del content["cellmap"]["annotation"]["annotation_type"]["encoding"]["unknown"]
    attributes.write_text(json.dumps(content))
    states = decoded(open_codes(open_dataset(root).crops[0], SIZE_NM, tmp_path / "cache"))["mito"]
    assert set(np.unique(states)) == {ABSENT, PRESENT}


def test_nothing_is_ever_written_into_data(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_crop(root, (4, 16, 16), chunk=(4, 8, 8))
    before = listing(root)
    (crop,) = open_dataset(root).crops
    for size in (SIZE_NM, (8.0, 8.0, 8.0)):
        codes = open_codes(crop, size, tmp_path / "cache", plain(crop))
        assert codes.codes_ZYX.size
    assert listing(root) == before
    with pytest.raises(ValueError, match="read-only"):
        codes.codes_ZYX[0, 0, 0] = 1


def test_a_build_that_fails_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crop, _ = write_crop(tmp_path / "data", (4, 16, 16), chunk=(4, 8, 8))
    chunk = crop.labels[0].path / "0/1/1"
    good = chunk.read_bytes()
    chunk.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"a/a\.zarr.*/ids/s0"):
        open_codes(crop, SIZE_NM, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    chunk.write_bytes(good)
    open_codes(crop, SIZE_NM, tmp_path / "cache")


def _open_at_the_same_time(root: str, cache: str, barrier: Any, results: Any) -> None:
    (crop,) = open_dataset(Path(root)).crops
    build, built = codes_module._build, []

    def counted(*arguments: Any) -> None:
        built.append(1)
        build(*arguments)

    codes_module._build = counted
    barrier.wait(60)
    codes = open_codes(crop, (8.0, 8.0, 8.0), Path(cache), plain(crop))
    results.put((len(built), codes.names, int(codes.codes_ZYX.sum()), codes.histogram_C.tolist()))


def test_processes_that_want_the_same_entry_build_it_once(tmp_path: Path) -> None:
    """Three at once, at a voxel size that needs two entries: its own and the one it is made from."""
    write_crop(tmp_path / "data", (33, 64, 64))
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(3), spawn.Queue()
    arguments = (str(tmp_path / "data"), str(tmp_path / "cache"), barrier, results)
    processes = [spawn.Process(target=_open_at_the_same_time, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sum(built for built, *_ in found) == 2
    assert found[0][1:] == found[1][1:] == found[2][1:]
    assert len(entries(tmp_path / "cache")) == 2, "no temporary folder and no lock is left"
    check_counts(open_codes(open_dataset(tmp_path / "data").crops[0], SIZE_NM, tmp_path / "cache"))


def test_where_files_cannot_be_locked_the_second_takes_the_entry_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same race, made certain: another process finishes while this one builds."""
    crop, truth = write_crop(tmp_path / "data", (4, 8, 8))
    cache, build = tmp_path / "cache", codes_module._build

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(codes_module, "_build", build)
        open_codes(crop, SIZE_NM, cache)
        return build(*arguments)

    monkeypatch.setattr(codes_module, "_build", overtaken)
    monkeypatch.setattr(sidecar, "_locked", lambda path: None)
    assert np.array_equal(decoded(open_codes(crop, SIZE_NM, cache))["mito"], truth["mito"])
    assert len(entries(cache)) == 1


def test_what_a_killed_build_left_is_cleared_away(tmp_path: Path) -> None:
    crop, _ = write_crop(tmp_path / "data", (4, 8, 8))
    open_codes(crop, SIZE_NM, tmp_path / "cache")
    (entry,) = (tmp_path / "cache/codes").iterdir()
    left = entry.rename(entry.with_name(f".building-{entry.name}-killed"))
    (left / "table.json").unlink()
    (entry.with_name(f".lock-{entry.name}")).touch()
    open_codes(crop, SIZE_NM, tmp_path / "cache")
    assert entries(tmp_path / "cache") == [entry.name]


def test_a_cache_may_be_removed_while_it_is_in_use(tmp_path: Path) -> None:
    crop, truth = write_crop(tmp_path / "data", (5, 20, 70))
    codes = open_codes(crop, SIZE_NM, tmp_path / "cache")
    counts = np.array(codes.counts_BC)
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(decoded(codes)["mito"], truth["mito"])
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(codes.counts_BC, counts)
    shutil.rmtree(tmp_path / "cache")
    os.utime(crop.labels[1].path / "0/0/0", (1, 1))
    with pytest.raises(DataError, match="a/crop1: its labels changed while they were in use"):
        decoded(codes)


def test_completed_coarse_codes_survive_the_removal_of_their_cache(tmp_path: Path) -> None:
    crop, _ = write_crop(tmp_path / "data", (5, 20, 70))
    logic = Logic(ClassTable(classes=(ClassEntry(name="mito"), ClassEntry(name="whole", components=("mito",)))))
    for size in (SIZE_NM, (8.0, 8.0, 8.0)):
        codes = open_codes(crop, size, tmp_path / "cache", logic)
        before = decoded(codes)
        shutil.rmtree(tmp_path / "cache")
        assert np.array_equal(decoded(codes)["whole"], before["whole"])


def _use_a_cache(root: str, cache: str, seconds: float, deletes: bool, results: Any) -> None:
    (crop,) = open_dataset(Path(root)).crops
    end, sums, logic = time.monotonic() + seconds, set(), plain(crop)
    while time.monotonic() < end:
        if deletes:
            time.sleep(0.3)
            shutil.rmtree(cache, ignore_errors=True)
        else:
            for edge in (4.0, 8.0):
                codes = open_codes(crop, (edge, edge, edge), Path(cache), logic)
                states = codes.states_CK[codes.codes_ZYX]  # the order of codes may differ, what they say may not
                sums.add((edge, int(states.astype(np.int64).sum())))
    results.put(sorted(sums))


def test_deleting_the_cache_is_safe_while_others_use_it(tmp_path: Path) -> None:
    write_crop(tmp_path / "data", (8, 32, 32))
    spawn = multiprocessing.get_context("spawn")
    results, arguments = spawn.Queue(), (str(tmp_path / "data"), str(tmp_path / "cache"), 4.0)
    processes = [spawn.Process(target=_use_a_cache, args=(*arguments, i == 0, results)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = sorted(results.get(timeout=10) for _ in processes)
    assert found[0] == []
    assert found[1] == found[2]
    assert len(found[1]) == 2


def test_an_entry_that_is_being_deleted_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race made certain: gone after it was found, gone while it is built, gone while it is locked."""
    crop, truth = write_crop(tmp_path / "data", (4, 8, 8))
    cache = tmp_path / "cache"
    open_codes(crop, SIZE_NM, cache)
    for module, name in ((codes_module, "_read_entry"), (codes_module, "_build"), (sidecar, "_locked")):
        real = getattr(module, name)

        def deleted(*arguments: Any, real: Any = real, module: Any = module, name: str = name) -> Any:
            monkeypatch.setattr(module, name, real)
            shutil.rmtree(cache)
            return real(*arguments)

        monkeypatch.setattr(module, name, deleted)
        assert np.array_equal(decoded(open_codes(crop, SIZE_NM, cache))["mito"], truth["mito"])
        shutil.rmtree(cache / "codes")
        cache.mkdir(exist_ok=True)


@pytest.mark.parametrize("gone", ["codes.npy", "counts.npy", "table.json"])
def test_an_entry_of_which_a_part_was_deleted_is_built_again(tmp_path: Path, gone: str) -> None:
    crop, truth = write_crop(tmp_path / "data", (4, 8, 8))
    (open_codes(crop, SIZE_NM, tmp_path / "cache").folder / gone).unlink()
    assert np.array_equal(decoded(open_codes(crop, SIZE_NM, tmp_path / "cache"))["mito"], truth["mito"])


def test_others_may_read_a_cache_that_they_share(tmp_path: Path) -> None:
    crop, _ = write_crop(tmp_path / "data", (4, 8, 8))
    before = os.umask(0o027)
    try:
        codes = open_codes(crop, SIZE_NM, tmp_path / "cache")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (codes.folder, *codes.folder.iterdir())}
    assert modes == {codes.folder.name: 0o750, "codes.npy": 0o640, "counts.npy": 0o640, "table.json": 0o644}


def test_an_open_crop_holds_no_file(tmp_path: Path) -> None:
    crop, _ = write_crop(tmp_path / "data", (5, 20, 70))
    open_codes(crop, SIZE_NM, tmp_path / "cache")
    before = len(os.listdir("/proc/self/fd"))
    held = [open_codes(crop, SIZE_NM, tmp_path / "cache") for _ in range(20)]
    assert sum(int(codes.codes_ZYX[0, 0, 0]) for codes in held) >= 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crop, _ = write_crop(tmp_path / "data", (4, 8, 8))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DataError, match=r"GiB are free: make room, or choose another --cache"):
        open_codes(crop, SIZE_NM, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def other_table(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "codes truncated": lambda entry: truncate(entry / "codes.npy"),
    "codes empty": lambda entry: (entry / "codes.npy").write_bytes(b""),
    "codes of another shape": lambda entry: np.save(entry / "codes.npy", np.zeros((2, 2, 2), np.uint8)),
    "codes pickled": lambda entry: np.save(entry / "codes.npy", np.array([{}]), allow_pickle=True),
    "counts truncated": lambda entry: truncate(entry / "counts.npy"),
    "counts empty": lambda entry: (entry / "counts.npy").write_bytes(b""),
    "counts of another shape": lambda entry: np.save(entry / "counts.npy", np.zeros((1, 1), np.uint32)),
    "table truncated": lambda entry: truncate(entry / "table.json"),
    "counted voxels too few": lambda entry: other_table(entry / "table.json", voxels=[1] * 18),
    "codes longer than they say": lambda entry: (entry / "codes.npy").write_bytes(
        (entry / "codes.npy").read_bytes() + b"more"
    ),
    "table a list": lambda entry: (entry / "table.json").write_text("[1]"),
    "table without states": lambda entry: (entry / "table.json").write_text('{"names": []}'),
    "states ragged": lambda entry: other_table(entry / "table.json", states=[[0], [1, 2]]),
    "states out of range": lambda entry: other_table(entry / "table.json", states=[[-1]]),
    "states too few": lambda entry: other_table(entry / "table.json", states=[[0, 0, 0, 0]]),
    "names a number": lambda entry: other_table(entry / "table.json", names=7),
    "names too few": lambda entry: other_table(entry / "table.json", names=["mito"]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_named_and_deleting_it_is_enough(tmp_path: Path, damage: Any) -> None:
    crop, truth = write_crop(tmp_path / "data", (4, 8, 8))
    cache = tmp_path / "cache"
    open_codes(crop, SIZE_NM, cache)
    (entry,) = (cache / "codes").iterdir()
    damage(entry)
    with pytest.raises(DataError, match=f"{entry.name}: damaged code cache.*: delete this folder") as caught:
        open_codes(crop, SIZE_NM, cache)
    assert len(str(caught.value).splitlines()) == 1
    shutil.rmtree(entry)
    assert np.array_equal(decoded(open_codes(crop, SIZE_NM, cache))["mito"], truth["mito"])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    crop, _ = write_crop(tmp_path / "data", (2, 4, 4))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache.*: choose another --cache"):
        open_codes(crop, SIZE_NM, tmp_path / "cache")


def test_the_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "autoseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home/.cache/autoseg"
