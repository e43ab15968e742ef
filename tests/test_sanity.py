"""Label sanity: what is broken on purpose is found and named, what is right raises no alarm.

Ground truth is synthetic and exact, so "right" is known; labels are moved, exchanged and emptied, EM inverted,
clipped and replaced. The measured parts are checked against slow, obvious versions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from strategies import crop_path, em_path, write_label, write_multiscale

from autoseg.data import traits
from autoseg.data.codes import CropCodes, index_blocks, open_codes
from autoseg.data.convert import import_arrays
from autoseg.data.dataset import Crop, open_dataset
from autoseg.data.sanity import find
from autoseg.data.synthetic import ATOMS, synthesize
from autoseg.data.traits import ClassTraits, CropTraits, measure
from autoseg.data.writer import ImportRequest
from autoseg.geometry import Box, Grid, VoxelsZYX
from autoseg.plan import fingerprint
from autoseg.report import data_tables, terminal
from autoseg.schema import ClassCount, CropFacts, Finding, Fingerprint, Intensity, VolumeFacts

SHAPE: VoxelsZYX = (40, 144, 144)
CUBIC, SECTIONS = (8.0, 8.0, 8.0), (40.0, 8.0, 8.0)
VALUES = {name: (i + 1,) for i, name in enumerate(ATOMS)} | {"mito": (3, 4), "nuc": tuple(range(7, 12))}
MOVES = [move for k in (-2, -1, 1, 2) for move in ((k, 0, 0), (0, k, 0), (0, 0, k))]


def import_cells(data: Path, name: str, em: NDArray[np.uint8], labels: NDArray[np.uint8], size: Any = CUBIC) -> None:
    """Import one synthetic volume as a crop that annotates every class."""
    request = ImportRequest(data=data, name=name, em="em", labels="labels", values=VALUES, voxel_size_nm=size)
    import_arrays(request, {"em": em, "labels": labels})


@pytest.fixture(scope="module")
def cells() -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Three isotropic volumes and one of sections: EM and labels (0 is unused)."""
    made = {f"cells{seed}": synthesize(SHAPE, CUBIC, seed) for seed in (1, 2, 3)}
    made["sections"] = synthesize((16, 144, 144), SECTIONS, 4)
    return {name: (volume.em_ZYX, volume.atom_ZYX + np.uint8(1)) for name, volume in made.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cells: Mapping[str, Any]) -> Path:
    root = tmp_path_factory.mktemp("sane")
    for name, (em, labels) in cells.items():
        import_cells(root, name, em, labels, SECTIONS if name == "sections" else CUBIC)
    return root


@pytest.fixture(scope="module")
def measured(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fingerprint, list[CropTraits]]:
    cache = tmp_path_factory.mktemp("cache")
    crops = open_dataset(data).crops
    return fingerprint(data, cache), [measure(crop, open_codes(crop, crop.grid.voxel_size_nm, cache)) for crop in crops]


class CodesInMemory(CropCodes):
    """Codes and counts that are arrays instead of files."""

    def _look(self, stored: Any) -> NDArray[Any]:
        return np.asarray(stored)


def moved(codes: CropCodes, move: VoxelsZYX) -> CropCodes:
    """Return the codes as if drawn `move` voxels further on; what would leave the EM is cut off."""
    shape = codes.grid.shape_zyx
    start = tuple(max(0, -m) for m in move)
    stop = tuple(n - max(0, m) for n, m in zip(shape, move, strict=True))
    part = np.ascontiguousarray(codes.codes_ZYX[Box(start, stop).slices])
    grid = codes.grid.crop(Box(start, stop))
    origin = tuple(o + m * v for o, m, v in zip(grid.origin_nm, move, grid.voxel_size_nm, strict=True))
    num = len(codes.states_CK)
    counts = np.array([np.bincount(part[b.slices].ravel(), minlength=num) for b in index_blocks(part.shape)], np.uint32)
    there = codes._replace(grid=grid._replace(origin_nm=origin), histogram_C=counts.sum(axis=0))
    return CodesInMemory(*there._replace(stored_codes=part, stored_counts=counts))  # type: ignore[arg-type]


# ---- nothing wrong ------------------------------------------------------------------------------------------


def test_right_labels_raise_no_alarm(measured: tuple[Fingerprint, list[CropTraits]]) -> None:
    facts, _ = measured
    assert facts.findings == ()


def test_twenty_draws_of_boxes_raise_no_alarm(
    data: Path, measured: tuple[Fingerprint, list[CropTraits]], tmp_path: Path
) -> None:
    facts, _ = measured
    crops = open_dataset(data).crops
    opened = [(crop, open_codes(crop, crop.grid.voxel_size_nm, tmp_path)) for crop in crops]
    for seed in range(1, 6):
        found = find(facts.crops, facts.volumes, [measure(crop, codes, seed) for crop, codes in opened])
        assert found == []


def test_the_same_crop_gives_the_same_traits_whatever_stands_beside_it(data: Path, tmp_path: Path) -> None:
    crops = open_dataset(data).crops
    codes = open_codes(crops[1], crops[1].grid.voxel_size_nm, tmp_path)
    assert measure(crops[1], codes) == measure(crops[1], codes)
    assert measure(crops[1], codes, seed=1) != measure(crops[1], codes)


def test_traits_are_kept_for_the_stored_bytes_that_they_were_measured_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crop = open_dataset(data).crops[0]
    codes = open_codes(crop, crop.grid.voxel_size_nm, tmp_path)
    first = traits.remembered(crop, codes, "a")
    assert first == measure(crop, codes)
    other = first._replace(num_greys=1)
    monkeypatch.setattr(traits, "measure", lambda crop, codes: other)
    assert traits.remembered(crop, codes, "a") == first
    assert traits.remembered(crop, codes, "b") == other
    (codes.folder / "traits-damaged.json").write_bytes(b"{")
    for path in codes.folder.glob("traits-*.json"):
        path.write_bytes(b"{")
    assert traits.remembered(crop, codes, "a") == other


# ---- shifted ------------------------------------------------------------------------------------------------


def shifts(data: Path, facts: Fingerprint, cache: Path, move: VoxelsZYX) -> list[list[Finding]]:
    """Return for each crop what is found when its labels are moved."""
    found = []
    for crop in open_dataset(data).crops:
        codes = moved(open_codes(crop, crop.grid.voxel_size_nm, cache), move)
        found.append(find([], facts.volumes, [measure(crop, codes)]))
    return found


@pytest.mark.parametrize("move", MOVES)
def test_labels_moved_by_one_or_two_voxels_are_found_with_the_way_back(
    data: Path, measured: tuple[Fingerprint, list[CropTraits]], tmp_path: Path, move: VoxelsZYX
) -> None:
    for name, findings in zip(("1", "2", "3", "sections"), shifts(data, measured[0], tmp_path, move), strict=True):
        (finding,) = findings
        assert finding.kind == "shifted"
        assert [finding.numbers[axis] for axis in "zyx"] == [-m for m in move], name
        assert finding.where.endswith(name) or name in finding.where


def test_a_diagonal_shift_is_found(data: Path, measured: tuple[Fingerprint, list[CropTraits]], tmp_path: Path) -> None:
    for findings in shifts(data, measured[0], tmp_path, (1, -1, 2)):
        assert [[f.numbers[axis] for axis in "zyx"] for f in findings] == [[-1, 1, -2]]


def test_an_outline_drawn_too_wide_on_all_sides_is_no_shift(cells: Mapping[str, Any], tmp_path: Path) -> None:
    """Dilation moves edges by a voxel but the object by none."""
    from scipy import ndimage

    em, labels = cells["cells1"]
    grid = Grid(SHAPE, CUBIC, (4.0, 4.0, 4.0))
    write_multiscale(em_path(tmp_path, "d"), [(grid, em)], chunk_zyx=(64, 64, 64))
    for name in ("mito", "pm", "ecs"):
        wide = ndimage.binary_dilation(np.isin(labels, VALUES[name])).astype(np.uint8)
        write_label(crop_path(tmp_path, "d", "crop1"), name, wide, grid)
    assert [finding.kind for finding in fingerprint(tmp_path, tmp_path / "cache").findings] == []


@pytest.mark.parametrize("offset_nm", [0.0, 8.0])
def test_labels_finer_than_their_em_meet_it_by_centres(
    cells: Mapping[str, Any], tmp_path: Path, offset_nm: float
) -> None:
    """EM at 16 nm under labels at 8 nm: right as it is, found when the labels lie one of their voxels too far in x."""
    em, labels = cells["cells2"]
    fine = Grid(SHAPE, CUBIC, (4.0, 4.0, 4.0))
    z, y, x = (n // 2 for n in SHAPE)
    coarse = em.reshape(z, 2, y, 2, x, 2).mean(axis=(1, 3, 5)).astype(np.uint8)
    write_multiscale(em_path(tmp_path, "d"), [(fine.at_voxel_size((16.0, 16.0, 16.0)), coarse)])
    part = Box((0, 0, 0), (40, 144, 136))
    grid = fine.crop(part)._replace(origin_nm=(4.0, 4.0, 4.0 + offset_nm))
    for name in ATOMS:
        values = (labels == VALUES[name][0]).astype(np.uint8)[part.slices]
        write_label(crop_path(tmp_path, "d", "crop1"), name, values, grid)
    found = fingerprint(tmp_path, tmp_path / "cache").findings
    assert [(f.kind, f.numbers["x"]) for f in found] == ([("shifted", -1)] if offset_nm else [])


def test_information_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    codes, states = rng.integers(0, 3, (16, 40, 41)), np.array([[0], [1], [2]], dtype=np.uint8)
    grey = (codes * 40 + rng.integers(0, 60, codes.shape)).astype(np.uint8)
    points = traits._points(traits._Sample(codes, states, grey), (2, 3, 3), False, rng)
    assert points is not None
    moves = np.array([(0, 0, 0), (1, -2, 3), (-2, 3, 0)])
    for move, found in zip(moves.tolist(), traits._information(points, moves), strict=True):
        pairs: dict[tuple[int, int], int] = {}
        for code, where in zip(points.codes_N.tolist(), points.where_N.tolist(), strict=True):
            spot = np.unravel_index(where, codes.shape)
            bin_ = int(points.bins.reshape(codes.shape)[tuple(a + m for a, m in zip(spot, move, strict=True))])
            pairs[code, bin_] = pairs.get((code, bin_), 0) + 1
        total = sum(pairs.values())
        by_code = {c: sum(n for (a, _), n in pairs.items() if a == c) for c, _ in pairs}
        by_bin = {b: sum(n for (_, a), n in pairs.items() if a == b) for _, b in pairs}
        expected = sum(n / total * np.log(n * total / by_code[c] / by_bin[b]) for (c, b), n in pairs.items())
        assert found == pytest.approx(expected)


def test_points_lie_where_something_is_known_and_every_move_stays_inside() -> None:
    rng = np.random.default_rng(1)
    codes, states = rng.integers(0, 3, (24, 40, 40)), np.array([[0], [1], [2]], dtype=np.uint8)
    points = traits._points(traits._Sample(codes, states, codes.astype(np.uint8)), (3, 3, 3), False, rng)
    assert points is not None
    spots = np.stack(np.unravel_index(points.where_N, codes.shape), axis=1)
    assert (spots >= 3).all()
    assert (spots < np.array(codes.shape) - 3).all()
    assert (codes.ravel()[points.where_N] != 2).all(), "code 2 is unknown"


# ---- traits of classes --------------------------------------------------------------------------------------


def test_thickness_and_grey_of_a_slab_are_its_own(tmp_path: Path) -> None:
    """A sheet of 5 voxels of 4 nm across y, 90 grey values darker: 20 nm thick."""
    grid = Grid((16, 80, 80), (8.0, 4.0, 4.0), (4.0, 2.0, 2.0))
    sheet = np.zeros(grid.shape_zyx, np.uint8)
    sheet[:, 30:35] = 1
    em = np.random.default_rng(0).integers(150, 171, grid.shape_zyx).astype(np.uint8) - 90 * sheet
    write_multiscale(em_path(tmp_path, "d"), [(grid, em)])
    write_label(crop_path(tmp_path, "d", "crop1"), "pm", sheet, grid)
    (crop,) = open_dataset(tmp_path).crops
    found = measure(crop, open_codes(crop, grid.voxel_size_nm, tmp_path / "cache"))
    assert found.classes["pm"].thickness_nm == pytest.approx(20.0)
    assert found.classes["pm"].grey == pytest.approx(em[sheet == 1].mean(), abs=0.2)
    assert found.num_greys == len(np.unique(em))


def test_every_class_of_a_crop_is_seen(measured: tuple[Fingerprint, list[CropTraits]]) -> None:
    facts, found = measured
    for crop, one in zip(facts.crops, found, strict=True):
        present = {name for name in crop.annotated if crop.counts[name].present}
        assert set(one.classes) == present


# ---- swapped, inverted --------------------------------------------------------------------------------------


def exchange(crop: CropTraits, a: str, b: str) -> CropTraits:
    return crop._replace(classes=crop.classes | {a: crop.classes[b], b: crop.classes[a]})


UNLIKE = [("mito_mem", "mito_lum"), ("ecs", "pm"), ("er_lum", "er_mem"), ("ne_mem", "ne_lum"), ("nuc", "mito_mem")]


@pytest.mark.parametrize(("a", "b"), UNLIKE)
@pytest.mark.parametrize("where", range(4))
def test_exchanged_classes_are_found_in_their_crop_only(
    measured: tuple[Fingerprint, list[CropTraits]], where: int, a: str, b: str
) -> None:
    facts, found = measured
    broken = [exchange(crop, a, b) if i == where else crop for i, crop in enumerate(found)]
    findings = [finding for finding in find(facts.crops, facts.volumes, broken) if finding.kind == "swapped"]
    assert {finding.where for finding in findings} == {found[where].name}
    assert any({a, b} <= set(finding.remedy.split()) for finding in findings)


def test_exchanged_folders_on_disk_are_found(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    crop = next((tmp_path / "data/cells2").glob("cells2.zarr/recon-1/labels/groundtruth/crop*"))
    (crop / "mito_mem").rename(crop / "x")
    (crop / "mito_lum").rename(crop / "mito_mem")
    (crop / "x").rename(crop / "mito_lum")
    found = fingerprint(tmp_path / "data", tmp_path / "cache").findings
    assert [(f.where, f.kind) for f in found] == [(f"cells2/{crop.name}", "swapped")]
    assert "folders mito_lum and mito_mem were exchanged" in found[0].remedy


def test_two_crops_alone_cannot_tell_which_is_exchanged(measured: tuple[Fingerprint, list[CropTraits]]) -> None:
    facts, found = measured
    broken = [exchange(found[0], "mito_mem", "mito_lum"), found[1]]
    assert find([], facts.volumes, broken) == []


@pytest.mark.parametrize("others", [("cells1", "cells3"), ("cells1",), ()])
def test_an_inverted_volume_is_named_and_its_classes_are_not_called_exchanged(
    cells: Mapping[str, Any], tmp_path: Path, others: tuple[str, ...]
) -> None:
    """Beside several volumes, beside one (dark membranes tell which of the two), and alone."""
    for name in others:
        import_cells(tmp_path / "data", name, *cells[name])
    em, labels = cells["cells2"]
    import_cells(tmp_path / "data", "cells2", np.uint8(255) - em, labels)
    found = fingerprint(tmp_path / "data", tmp_path / "cache").findings
    assert [(f.where, f.kind) for f in found] == [("cells2", "inverted")]


# ---- EM that is none, labels that are none ------------------------------------------------------------------


def _clip(em: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.maximum(em, np.uint8(np.percentile(em, 60)))


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (lambda em: np.full_like(em, 77), "constant"),
        (lambda em: np.where(em > 128, 255, 1).astype(np.uint8), "few-values"),
        (lambda em: em // 20 + np.uint8(1), "few-values"),
        (_clip, "saturated"),
        (lambda em: 255 - _clip(255 - em), "saturated"),
    ],
)
def test_raw_that_is_no_em_is_named(cells: Mapping[str, Any], tmp_path: Path, broken: Any, kind: str) -> None:
    em, labels = cells["cells1"]
    import_cells(tmp_path / "data", "cells1", broken(em), labels)
    import_cells(tmp_path / "data", "cells2", *cells["cells2"])
    found = [f for f in fingerprint(tmp_path / "data", tmp_path / "cache").findings if f.kind != "inverted"]
    assert [(f.where, f.kind) for f in found] == [("cells1/crop1", kind)]


def test_em_that_was_not_fetched_is_left_out_of_the_boxes(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "cells1", tmp_path / "data/cells1")
    crop = open_dataset(tmp_path / "data").crops[0]
    for chunk in list(em_path(tmp_path / "data", "cells1").glob("s0/*/*/1")) or list(
        em_path(tmp_path / "data", "cells1").glob("s0/*.*.1")
    ):
        chunk.unlink()
    codes = open_codes(crop, crop.grid.voxel_size_nm, tmp_path / "cache")
    found = measure(crop, codes)
    assert found.darkest_share < 0.01, "missing chunks would read as zeros"


def test_a_crop_without_any_em_has_no_traits(data: Path, tmp_path: Path) -> None:
    crop: Crop = open_dataset(data).crops[0]
    codes = open_codes(crop, crop.grid.voxel_size_nm, tmp_path)
    away = codes._replace(grid=codes.grid._replace(origin_nm=(1e6, 1e6, 1e6)))
    found = measure(crop, away)
    assert (found.num_voxels, found.classes, found.fit) == (0, {}, None)


@pytest.mark.parametrize("broken", [False, True])
def test_where_only_a_coarser_level_is_stored_that_is_looked_at(tmp_path: Path, broken: bool) -> None:
    """As the challenge's default fetch leaves many crops; where nothing is whole, that is said."""
    grids = [Grid((32, 96, 96), (8.0,) * 3, (0.0,) * 3), Grid((16, 48, 48), (16.0,) * 3, (4.0,) * 3)]
    mask = np.zeros(grids[0].shape_zyx, np.uint8)
    mask[:, 10:60, 6:60] = 1
    noise = np.random.default_rng(0).normal(0, 10, grids[1].shape_zyx)
    coarse = np.full(grids[1].shape_zyx, 7, np.uint8) if broken else np.uint8(80 + 60 * mask[::2, ::2, ::2] + noise)
    fine = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    em = write_multiscale(em_path(tmp_path, "a"), [(grids[0], fine), (grids[1], coarse)], chunk_zyx=(16, 48, 24))
    write_label(crop_path(tmp_path, "a", "crop1"), "mito", mask, grids[0])
    looks_wrong = ["constant"] if broken else []
    for lost, expected in (("none", looks_wrong), ("s0/*/*/*", looks_wrong), ("s1/0/0/1", ["not-fetched", "unseen"])):
        for chunk in em.glob(lost):
            chunk.unlink()
        found = fingerprint(tmp_path, tmp_path / "cache" / lost[:2]).findings
        assert [finding.kind for finding in found] == expected, lost


def counted(crop: str, **present: int) -> CropFacts:
    counts = {name: ClassCount(absent=1000 - n, present=n, unknown=0) for name, n in present.items()}
    return CropFacts(
        name=crop,
        volume="v",
        shape_zyx=(10, 10, 10),
        voxel_size_nm=CUBIC,
        origin_nm=(0.0, 0.0, 0.0),
        split=None,
        annotated=tuple(present),
        counts=counts,
    )


def test_empty_labels_of_usual_classes_are_one_line_of_information() -> None:
    crops = [counted(f"v/crop{i}", mito=5, pm=7, rare=0) for i in range(5)]
    crops[3] = counted("v/crop3", mito=0, pm=0, rare=4)
    (finding,) = find(crops, [], [])
    assert not finding.alarm
    assert finding.kind == "empty"
    assert finding.numbers == {"labels": 2}
    assert "mito in v/crop3, pm in v/crop3" in finding.what
    assert "rare" not in finding.what, "absent in four of five crops is what rare means"


def test_a_class_that_is_new_in_one_crop_is_not_usual() -> None:
    assert find([counted("v/crop1", mito=5), counted("v/crop2", mito=0)], [], []) == []


# ---- what the user sees -------------------------------------------------------------------------------------


def test_findings_and_contradictions_are_printed_with_names(
    measured: tuple[Fingerprint, list[CropTraits]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    grid = Grid((8, 64, 64), CUBIC, (4.0, 4.0, 4.0))
    rng = np.random.default_rng(0)
    write_multiscale(em_path(tmp_path, "d"), [(grid, rng.integers(1, 250, grid.shape_zyx).astype(np.uint8))])
    nuc = np.zeros(grid.shape_zyx, np.uint8)
    nuc[:, :32] = 1
    write_label(crop_path(tmp_path, "d", "crop1"), "nuc", nuc, grid)
    write_label(crop_path(tmp_path, "d", "crop1"), "hchrom", 1 - nuc, grid)
    facts = fingerprint(tmp_path, tmp_path / "cache")
    alarm = Finding(where="d/crop1", kind="shifted", what="labels are off", numbers={"z": 1.0}, remedy="look at it")
    data_tables.warn(msgspec.structs.replace(facts, findings=(alarm,)), terminal.make_console())
    printed = capsys.readouterr().err
    assert "d/crop1: 16,384 voxels contradict the class table, annotation wins" in printed
    assert "hchrom where nuc is absent (16,384)" in printed
    assert "warning: d/crop1: labels are off: look at it" in printed


def test_the_reading_is_bounded_by_boxes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = traits._grey
    monkeypatch.setattr(traits, "_grey", lambda *a: read.append(a[2].shape_zyx) or real(*a))
    crop = open_dataset(data).crops[0]
    measure(crop, open_codes(crop, crop.grid.voxel_size_nm, tmp_path))
    assert 0 < len(read) <= traits.MAX_BOXES
    assert all(np.prod(shape) <= np.prod(traits.BOX_EDGE) for shape in read)


def test_volumes_with_one_common_class_of_little_contrast_are_not_called_inverted() -> None:
    grey = Intensity(minimum=0, p0_5=1, p50=120, p99_5=250, maximum=255, mean=120, sd=40, num_voxels=10**6)
    volumes = [
        VolumeFacts(
            name=name,
            path=name,
            dtype="uint8",
            shape_zyx=SHAPE,
            voxel_size_nm=CUBIC,
            intensity=grey,
            stored_fraction=1.0,
        )
        for name in "ab"
    ]
    crops = [
        CropTraits(f"{name}/crop1", name, 10**5, 200, 0.0, 0.0, {"mito": ClassTraits(5000, value, 80.0)}, None)
        for name, value in (("a", 116.0), ("b", 124.0))
    ]
    assert find([], volumes, crops) == []
