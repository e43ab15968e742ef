"""The import verb: what was written reads back, its metadata are CellMap's, and an error leaves DATA as it was."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from autoseg import cli
from autoseg.data import convert, store, writer
from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, table_of
from autoseg.data.codes import open_codes
from autoseg.data.convert import Imported, import_arrays, import_volumes
from autoseg.data.dataset import Crop, open_dataset
from autoseg.data.formats import Volume, open_volume
from autoseg.data.store import sidecar
from autoseg.data.writer import ImportRequest
from autoseg.errors import AutosegError, DataError
from autoseg.geometry import Box, Grid, VoxelsZYX

SHAPE = (4, 6, 10)
VOXEL_NM = (40.0, 8.0, 8.0)
VALUES = {"mito": (1, 2), "pm": (3,)}


def volume(high: int, dtype: Any = np.uint8, shape: VoxelsZYX = SHAPE, seed: int = 0) -> NDArray[Any]:
    """Return voxels from 0 to high, every value present."""
    array = np.random.default_rng(seed).integers(0, high + 1, shape).astype(dtype)
    array.ravel()[: high + 1] = np.arange(high + 1)[: array.size]
    return array


def asked(data: Path, **changes: Any) -> ImportRequest:
    """Return a request for `em.npy` and, with `values`, `labels.npy`, both beside DATA."""
    known = {"data": data, "name": "vol", "em": str(data.parent / "em.npy"), "voxel_size_nm": VOXEL_NM}
    known |= {"labels": str(data.parent / "labels.npy"), "values": VALUES} if "values" not in changes else {}
    return ImportRequest(**(known | changes))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """DATA, not made yet, beside the files em.npy and labels.npy."""
    np.save(tmp_path / "em.npy", volume(255))
    np.save(tmp_path / "labels.npy", volume(3))
    return tmp_path / "DATA"


def em_of(data: Path, name: str = "vol") -> store.ArrayReader:
    return store.ArrayReader(open_dataset(data).volumes[name] / "s0", store.ChunkCache(2**20))


def read(array: store.ArrayReader) -> NDArray[Any]:
    return array.read(Box.whole(array.shape_zyx))


def stored(crop: Crop, name: str) -> NDArray[Any]:
    return read(store.ArrayReader(next(x.path for x in crop.labels if x.name == name), store.ChunkCache(2**20)))


def states(crop: Crop, name: str, cache: Path) -> NDArray[Any]:
    """Return absent, present or unknown for each voxel, as training sees it."""
    codes = open_codes(crop, crop.grid.voxel_size_nm, cache)
    return codes.states_CK[codes.codes_ZYX, codes.names.index(name)]


def attributes(path: Path) -> Any:
    return json.loads((path / ".zattrs").read_text())


def snapshot(data: Path) -> dict[str, bytes | None] | None:
    """Return every file and folder below DATA with its bytes; None if there is no DATA."""
    if not data.exists():
        return None
    return {str(p.relative_to(data)): p.read_bytes() if p.is_file() else None for p in sorted(data.rglob("*"))}


# --- what was written reads back ---


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(4, 20)))
    grid = tuple(draw(st.integers(1, min(2, n))) for n in shape)
    cells = range(1, grid[0] * grid[1] * grid[2] + 1)
    crops = draw(st.none() | st.lists(st.sampled_from(cells), min_size=1, unique=True).map(tuple))
    dtype = draw(st.sampled_from(["uint8", "int16", "uint32", "int64"]))
    seed = draw(st.integers(0, 99))
    arrays = {"em": volume(3, "uint16", shape, seed), "labels": volume(3, dtype, shape, seed + 1)}
    arrays["instances nuc"] = volume(3, dtype, shape, seed + 2) * 40
    if draw(st.booleans()):
        arrays["mask"] = volume(1, "uint8", shape, seed + 3)
    changes = {"grid": grid, "crops": crops, "values": draw(st.sampled_from([VALUES, {"er": (1,), "ne": (1, 3)}]))}
    return changes | {"ignore_value": draw(st.sampled_from([None, 0, 2]))}, arrays


@settings(max_examples=20)
@given(case=requests(), slab_bytes=st.sampled_from([1, 300, 2**20]))
def test_crops_read_back_as_the_label_volumes(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[dict[str, Any], dict[str, NDArray[Any]]],
    slab_bytes: int,
) -> None:
    changes, arrays = case
    ignored, values = changes["ignore_value"], changes["values"]
    changes["ignore_value"] = ignored = None if any(ignored in v for v in values.values()) else ignored
    tmp = tmp_path_factory.mktemp("any")
    mask = "mask" if "mask" in arrays else None
    request = asked(tmp / "DATA", labels="labels", instances={"nuc": "nuc"}, mask=mask, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SLAB_BYTES", slab_bytes)
        imported = import_arrays(request, arrays)
    np.testing.assert_array_equal(read(em_of(tmp / "DATA")), arrays["em"])
    boxes = writer.cell_boxes(arrays["em"].shape, request.grid)
    kept = request.crops or range(1, len(boxes) + 1)
    crops = open_dataset(tmp / "DATA").crops
    assert tuple(crop.name for crop in crops) == imported.crops == tuple(f"vol/crop{i + 1}" for i in range(len(kept)))
    whole = Grid(arrays["em"].shape, VOXEL_NM, (0.0, 0.0, 0.0))
    for crop, cell in zip(crops, kept, strict=True):
        box = boxes[cell - 1]
        assert crop.grid == whole.crop(box)
        outside = arrays["mask"][box.slices] == 0 if "mask" in arrays else np.zeros(box.shape_zyx, bool)
        for name in request.classes:
            part = arrays["labels" if name in values else "instances nuc"][box.slices]
            expected = np.where(np.isin(part, values[name]) if name in values else part > 0, PRESENT, ABSENT)
            expected[outside | (part == ignored if name in values and ignored is not None else False)] = UNKNOWN
            np.testing.assert_array_equal(states(crop, name, tmp / "cache"), expected)
            counts = attributes(tmp / f"DATA/vol/vol.zarr/recon-1/labels/groundtruth/{crop.name[4:]}/{name}/s0")
            counted = counts["cellmap"]["annotation"]["complement_counts"]
            assert counted == {"absent": (expected == ABSENT).sum(), "unknown": (expected == UNKNOWN).sum()}


@given(shape=st.tuples(*[st.integers(1, 50)] * 3), grid=st.tuples(*[st.integers(1, 9)] * 3))
def test_cells_tile_the_volume(shape: VoxelsZYX, grid: VoxelsZYX) -> None:
    grid = (min(grid[0], shape[0]), min(grid[1], shape[1]), min(grid[2], shape[2]))
    times = np.zeros(shape, int)
    sizes = []
    for box in writer.cell_boxes(shape, grid):
        times[box.slices] += 1
        sizes.append(box.shape_zyx)
    assert (times == 1).all()
    assert (np.ptp(sizes, axis=0) <= 1).all()


def test_ids_of_64_bits_survive(data: Path) -> None:
    ids = np.zeros(SHAPE, np.uint64)
    ids.ravel()[:4] = [1, 2**53 + 1, 2**63 + 1, 2**64 - 1]
    import_arrays(asked(data, values={}, instances={"neuron": "n"}), {"em": volume(9), "instances neuron": ids})
    np.testing.assert_array_equal(stored(open_dataset(data).crops[0], "neuron"), ids)


@pytest.mark.parametrize(("dtype", "ignored"), [("uint8", None), ("int64", -1)])
def test_an_id_may_equal_unknown_where_nothing_is(data: Path, dtype: str, ignored: int | None, tmp_path: Path) -> None:
    ids = volume(1, dtype) * 255
    ids[0, 0, 0] = 0 if ignored is None else ignored
    request = asked(data, values={}, instances={"mito": "n"}, ignore_value=ignored)
    import_arrays(request, {"em": volume(9), "instances mito": ids})
    np.testing.assert_array_equal(
        states(open_dataset(data).crops[0], "mito", tmp_path / "c"), np.where(ids < 0, UNKNOWN, ids > 0)
    )


def test_without_labels_the_ignore_value_is_an_instance_id(data: Path, tmp_path: Path) -> None:
    ids = volume(3, np.int32) - 1
    request = asked(data, values={}, instances={"mito": "n"}, ignore_value=-1)
    import_arrays(request, {"em": volume(9), "instances mito": ids})
    crop = open_dataset(data).crops[0]
    np.testing.assert_array_equal(states(crop, "mito", tmp_path / "c"), np.where(ids < 0, UNKNOWN, ids > 0))
    assert set(np.unique(stored(crop, "mito")).tolist()) == {0, 1, 2, 2**32 - 1}


# --- EM ---


@pytest.mark.parametrize(
    ("given", "kept", "folder"),
    [
        ("uint8", "uint8", "fibsem-uint8"),
        ("bool", "uint8", "fibsem-uint8"),
        ("int16", "int16", "fibsem-int16"),
        (">u2", "uint16", "fibsem-uint16"),
        ("float64", "float32", "fibsem-float32"),
        ("float16", "float32", "fibsem-float32"),
    ],
)
def test_em_of_any_type_without_labels(data: Path, given: str, kept: str, folder: str) -> None:
    em = volume(1 if given == "bool" else 200).astype(given)
    np.save(data.parent / "em.npy", em)
    assert import_volumes(asked(data, values={})) == Imported(("vol",), (), ())
    array = em_of(data)
    assert array.dtype == kept
    assert array.path.parent.name == folder
    np.testing.assert_array_equal(read(array), em)


def test_black_em_is_stored_and_empty_labels_are_not(data: Path) -> None:
    arrays = {"em": np.zeros(SHAPE, np.uint8), "labels": volume(3)}
    arrays["labels"][:, :, 5:] = 0
    import_arrays(asked(data, grid=(1, 1, 2), crops=(2,)), arrays)
    assert em_of(data).stored_chunks.all()
    label = open_dataset(data).crops[0].labels[0]
    assert not store.ArrayReader(label.path, store.ChunkCache(1)).stored_chunks.any()


@pytest.mark.parametrize(
    ("shape", "voxel_nm", "sizes_nm"),
    [
        ((9, 261, 300), (40.0, 4.0, 4.0), [(40, 4, 4), (40, 8, 8), (40, 16, 16)]),
        ((1, 131, 129), (1.0, 10.0, 10.0), [(1, 10, 10), (1, 20, 20)]),
        ((131, 5, 129), (8.0, 8.0, 8.0), [(8, 8, 8), (16, 16, 16)]),
        ((4, 100, 100), (8.0, 8.0, 8.0), [(8, 8, 8)]),
    ],
)
def test_each_level_holds_the_mean_at_its_centres(
    data: Path, shape: VoxelsZYX, voxel_nm: Any, sizes_nm: list[Any]
) -> None:
    def ramp(grid: Grid) -> NDArray[Any]:
        z, y, x = (
            o + v * np.arange(n) for o, v, n in zip(grid.origin_nm, grid.voxel_size_nm, grid.shape_zyx, strict=True)
        )
        return z[:, None, None] + 3 * y[:, None] + 7 * x

    em = ramp(Grid(shape, voxel_nm, (0.0, 0.0, 0.0))).astype(np.float32)
    import_arrays(asked(data, values={}, voxel_size_nm=voxel_nm, labels=None), {"em": em})
    levels = store.open_multiscale(open_dataset(data).volumes["vol"]).levels
    assert [level.grid.voxel_size_nm for level in levels] == sizes_nm
    for level in levels:
        np.testing.assert_allclose(
            read(store.ArrayReader(level.path, store.ChunkCache(0))), ramp(level.grid), rtol=1e-5
        )


def test_memory_is_bounded_by_slabs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (40, 64, 64)
    np.save(data.parent / "em.npy", volume(9, shape=shape))
    np.save(data.parent / "labels.npy", volume(3, shape=shape))
    depths = []
    whole = Volume.read

    def spy(self: Volume, start: int, stop: int) -> NDArray[Any]:
        depths.append(stop - start)
        return whole(self, start, stop)

    monkeypatch.setattr(Volume, "read", spy)
    monkeypatch.setattr(writer, "SLAB_BYTES", 4 * 64 * 64)
    import_volumes(asked(data, grid=(3, 1, 1)))
    assert max(depths) == 4
    assert em_of(data).chunk_zyx == (4, 64, 64)


# --- metadata ---


def space(name: str, *levels: tuple[list[float], list[float]]) -> list[Any]:
    transforms = [
        [{"type": "scale", "scale": scale}, {"type": "translation", "translation": moved}] for scale, moved in levels
    ]
    return [
        {
            "version": "0.4",
            "name": name,
            "axes": [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"],
            "datasets": [{"path": f"s{i}", "coordinateTransformations": t} for i, t in enumerate(transforms)],
        }
    ]


def test_the_layout_and_its_metadata(data: Path) -> None:
    arrays = {"em": volume(255, shape=(4, 130, 140)), "labels": volume(3, shape=(4, 130, 140))}
    arrays |= {"instances nuc": arrays["labels"].astype(np.uint16), "mask": np.ones_like(arrays["em"])}
    arrays["mask"][0] = 0
    request = asked(data, values={"mito": (1, 2)}, labels="l", instances={"nuc": "n"}, mask="m", grid=(1, 2, 1))
    import_arrays(request._replace(crops=(2,)), arrays)
    root = data / "vol/vol.zarr"
    em, crop = root / "recon-1/em/fibsem-uint8", root / "recon-1/labels/groundtruth/crop1"
    names = {p.relative_to(root).as_posix() for p in root.rglob(".zgroup")}
    groups = ["", "recon-1", "recon-1/em", "recon-1/em/fibsem-uint8", "recon-1/labels", "recon-1/labels/groundtruth"]
    groups += [f"recon-1/labels/groundtruth/crop1{name}" for name in ("", "/mito", "/nuc")]
    assert names == {f"{name}/.zgroup".lstrip("/") for name in groups}
    assert not list(root.rglob("zarr.json"))
    array = json.loads((em / "s0/.zarray").read_text())
    assert {key: array[key] for key in ("zarr_format", "chunks", "dtype", "dimension_separator", "order")} == {
        "zarr_format": 2,
        "chunks": [4, 64, 64],
        "dtype": "|u1",
        "dimension_separator": "/",
        "order": "C",
    }
    scales = ([40.0, 8.0, 8.0], [0.0, 0.0, 0.0]), ([40.0, 16.0, 16.0], [0.0, 4.0, 4.0])
    assert attributes(em) == {"multiscales": space("fibsem-uint8", *scales)}
    here = ([40.0, 8.0, 8.0], [0.0, 65 * 8.0, 0.0])
    for name, kind, encoding in (
        ("mito", "semantic_segmentation", {"absent": 0, "present": 1, "unknown": 255}),
        ("nuc", "instance_segmentation", {"absent": 0, "unknown": 65535}),
    ):
        annotation = {"class_name": name, "annotation_type": {"type": kind, "encoding": encoding}}
        multiscales = space(name, here)
        assert attributes(crop / name) == {"multiscales": multiscales, "cellmap": {"annotation": annotation}}
        absent = int((~np.isin(arrays["labels"][1:, 65:], (1, 2) if name == "mito" else (1, 2, 3))).sum())
        annotation["complement_counts"] = {"absent": absent, "unknown": 65 * 140}
        assert attributes(crop / name / "s0") == {"cellmap": {"annotation": annotation}}
    assert attributes(crop)["cellmap"]["annotation"] == {
        "version": "0.1.1",
        "name": "crop1",
        "description": None,
        "created_by": [],
        "created_with": [],
        "start_date": None,
        "end_date": None,
        "duration_days": None,
        "protocol_uri": None,
        "class_names": ["mito", "nuc"],
    }


# --- files, globs, numbers, splits, classes ---


def test_globs_become_paired_volumes(data: Path) -> None:
    for i in (2, 10):
        for kind, high in (("im", 255), ("lab", 3), ("ins", 9), ("mask", 1)):
            with h5py.File(data.parent / f"vol{i}_{kind}.h5", "w") as file:
                file["main"] = volume(high, seed=i)
    spec = f"{data.parent}/vol*_{{}}.h5:main"
    request = asked(data, em=spec.format("im"), labels=spec.format("lab"), values=VALUES, mask=spec.format("mask"))
    imported = import_volumes(request._replace(instances={"nuc": spec.format("ins")}, validate=(2,)))
    assert imported.datasets == ("vol-2", "vol-10")
    assert imported.crops == ("vol-2/crop1", "vol-10/crop2")
    first, second = open_dataset(data).crops
    assert (first.split, second.split) == ("train", "validate")
    expected = np.where(volume(1, seed=10) > 0, volume(9, seed=10), 255)
    np.testing.assert_array_equal(stored(second, "nuc"), expected)


def test_a_single_2d_image_on_a_grid(data: Path) -> None:
    for name, high in (("em", 255), ("labels", 3)):
        tifffile.imwrite(data.parent / f"{name}.tif", volume(high, shape=(1, 33, 47))[0])
    files = {"em": f"{data.parent}/em.tif", "labels": f"{data.parent}/labels.tif", "values": VALUES}
    assert len(import_volumes(asked(data, **files, grid=(1, 2, 2))).crops) == 4
    shapes = [crop.grid.shape_zyx for crop in open_dataset(data).crops]
    assert shapes == [(1, 16, 24), (1, 16, 23), (1, 17, 24), (1, 17, 23)]


def test_crops_are_numbered_on_from_the_highest_in_data(data: Path) -> None:
    assert import_volumes(asked(data, grid=(1, 2, 2), crops=(4, 2))).crops == ("vol/crop1", "vol/crop2")
    far = data / "vol/vol.zarr/recon-1/labels/groundtruth"
    (far / "crop2").rename(far / "crop41")
    assert import_volumes(asked(data, name="b")).crops == ("b/crop42",)
    elsewhere = '"train","/far/c.zarr","recon-1/em/x","/far/c.zarr","recon-1/labels/groundtruth/crop600/[mito]"'
    (data / "datasplit.csv").write_text(elsewhere)
    assert import_volumes(asked(data, name="c")).crops == ("c/crop601",)
    assert (data / "datasplit.csv").read_text().splitlines()[0] == elsewhere


def test_validate_writes_a_datasplit_that_later_imports_extend(data: Path) -> None:
    import_volumes(asked(data, name="a"))
    assert not (data / "datasplit.csv").exists()
    import_volumes(asked(data, name="b", grid=(1, 1, 3), crops=(1, 3), validate=(2,)))
    import_volumes(asked(data, name="c"))
    import_volumes(asked(data, name="bare", values={}))
    inner = "recon-1/labels/groundtruth"
    assert (data / "datasplit.csv").read_text().splitlines() == [
        f'"{side}","{name}/{name}.zarr","recon-1/em/fibsem-uint8","{name}/{name}.zarr","{inner}/crop{number}/[mito,pm]"'
        for side, name, number in (("train", "a", 1), ("train", "b", 2), ("validate", "b", 3), ("train", "c", 4))
    ]
    dataset = open_dataset(data)
    assert [(crop.name, crop.split) for crop in dataset.crops][2] == ("b/crop3", "validate")
    assert set(dataset.volumes) == {"a", "b", "c", "bare"}


def test_classes_are_declared_as_the_data_has_them(data: Path) -> None:
    arrays = {"em": volume(9), "labels": volume(3), "instances nuc": volume(3), "instances glia": volume(3)}
    before = {entry.name: entry for entry in table_of(data).classes}
    request = asked(data, labels="l", values=VALUES | {"er": (1,)}, instances={"nuc": "n", "glia": "g"})
    remarks = import_arrays(request, arrays).remarks
    assert remarks == (f"glia is not in the class table: registered as a class of this data in {data}/classes.json",)
    after = {entry.name: entry for entry in open_dataset(data).table.classes}
    assert after["glia"].instance
    assert not after["mito"].instance
    assert before["mito"].instance
    assert after["mito"].components == before["mito"].components
    assert [after[name] == before[name] for name in ("pm", "er", "nuc")] == [True] * 3
    own = json.loads((data / "classes.json").read_text())
    assert [entry["name"] for entry in own["classes"]] == ["mito", "glia"]
    own["disjoint"] = [["mito", "glia"]]
    (data / "classes.json").write_text(json.dumps(own))
    request = asked(data, name="b", labels=None, values={}, instances={"mito": "n"})
    remarks = import_arrays(request, {"em": volume(9), "instances mito": volume(3)}).remarks
    assert remarks == (f"mito was declared semantic in {data}/classes.json and is instance from now on",)
    own["classes"][0]["instance"] = True
    assert json.loads((data / "classes.json").read_text()) == own


def test_remarks_name_what_may_be_a_mistake(data: Path) -> None:
    np.save(data.parent / "mask.npy", np.zeros(SHAPE, np.uint8))
    with h5py.File(data.parent / "em.h5", "w") as file:
        file["main"] = volume(255)
        file["main"].attrs["resolution"] = [40, 8, 16]
    request = asked(data, em=f"{data.parent}/em.h5", mask=f"{data.parent}/mask.npy", ignore_value=0)
    assert import_volumes(request._replace(values={"mito": (1,)})).remarks == (
        f"{data.parent}/em.h5:main declares voxels of 40 x 8 x 16 nm (z, y, x); --voxel-size-nm was taken",
        f"{data.parent}/labels.npy: values 2, 3 are not named by --values and count as none of its classes",
        "crop1 holds no annotated voxel",
    )


def test_a_value_outside_the_kept_cells_is_no_mistake(data: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[0, 0, 0], labels[3] = 3, 1
    np.save(data.parent / "labels.npy", labels)
    request = asked(data, values={"mito": (1,), "pm": (3,)}, labels=f"{data.parent}/labels.npy", grid=(2, 1, 1))
    imported = import_volumes(request._replace(crops=(2,)))
    assert imported.cells == (2,)
    assert imported.remarks == (
        "no imported crop holds a voxel of pm: it counts as absent; correct --values if it is there",
    ), "what the kept cells lack is told, not refused"
    assert stored(open_dataset(data).crops[0], "pm").max() == 0
    assert import_volumes(request._replace(name="all")).remarks == (), "one crop of several holds it"


def test_a_class_whose_values_leave_out_those_of_its_parts_is_told_at_import(data: Path) -> None:
    arrays = {"em": volume(9), "labels": volume(3)}
    values = {"cell": (1,), "mito": (2,), "nuc": (3,)}
    assert import_arrays(asked(data, labels="l", values=values), arrays).remarks == (
        "cell contains mito, nuc: voxels of those count as not cell; write --values cell=1,2,3 if cell is all of them",
    )
    for fine in ({"cell": (1, 2), "mito": (2,)}, {"mito": (2,), "nuc": (3,)}, {"mine": (1,), "mito": (2,)}):
        remarks = import_arrays(asked(data, name="-".join(fine), labels="l", values=fine), arrays).remarks
        assert not [remark for remark in remarks if "contains" in remark]


def test_an_ignore_value_outside_the_kept_cells_is_no_mistake(data: Path) -> None:
    ids = np.ones(SHAPE, np.uint8)
    ids[0, 0, 0] = 9
    request = asked(data, values={}, instances={"nuc": "n"}, ignore_value=9, grid=(2, 1, 1), crops=(2,))
    import_arrays(request, {"em": volume(9), "instances nuc": ids})
    assert stored(open_dataset(data).crops[0], "nuc").min() == 1


def test_a_volume_that_only_validates_is_imported_after_one_that_trains(data: Path) -> None:
    import_volumes(asked(data, name="a"))
    import_volumes(asked(data, name="b", validate=(1,)))
    import_volumes(asked(data, name="c", validate=(1,)))
    assert [crop.split for crop in open_dataset(data).crops] == ["train", "validate", "validate"]


def test_two_imports_at_once_lose_no_crop(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the first writes: it waits, or the first would write an older datasplit.csv over its."""
    import_volumes(asked(data, name="old", grid=(1, 1, 2), validate=(1,)))
    begun, genuine = threading.Event(), (sidecar._locked, convert.write_volume)

    def second() -> None:
        import_volumes(asked(data, name="b"))
        begun.set()

    def waits(path: Path) -> int | None:
        begun.set()
        return genuine[0](path)

    def overtaken(*arguments: Any) -> tuple[list[str], Counter[str]]:
        monkeypatch.setattr(convert, "write_volume", genuine[1])
        monkeypatch.setattr(sidecar, "_locked", waits)
        thread.start()
        assert begun.wait(60)
        return genuine[1](*arguments)

    thread = threading.Thread(target=second)
    monkeypatch.setattr(convert, "write_volume", overtaken)
    import_volumes(asked(data, name="a"))
    thread.join()
    names = [crop.name for crop in open_dataset(data).crops]
    assert names == ["old/crop1", "old/crop2", "a/crop3", "b/crop4"]
    assert not list(data.glob(".*")), "no lock and no staging is left"


def test_what_a_killed_import_left_is_cleared_away(data: Path) -> None:
    import_volumes(asked(data, name="a"))
    left = data / ".importing-killed/vol/vol.zarr"
    left.mkdir(parents=True)
    (left / "chunk").write_bytes(b"x")
    (data / ".importing.lock").touch()
    import_volumes(asked(data, name="b"))
    assert not list(data.glob(".*"))


def test_palette_indices_are_labels_but_no_grey_values(data: Path) -> None:
    for z, plane in enumerate(volume(3)):
        image = Image.fromarray(plane).convert("P")
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.save(data.parent / f"{z}.png")
    labels = np.stack([np.asarray(Image.open(data.parent / f"{z}.png")) for z in range(SHAPE[0])])
    spec = f"{data.parent}/*.png"
    pattern = r"\*\.png: holds indices of a colour palette, not grey values: save it as 8 bit greyscale"
    fails(asked(data, em=spec), pattern)
    with open_volume(spec) as indices, pytest.raises(DataError, match=pattern):
        writer.write_em(indices, data / "em", VOXEL_NM)
    import_volumes(asked(data, values={"mito": (1, 2)}, labels=spec))
    np.testing.assert_array_equal(stored(open_dataset(data).crops[0], "mito"), (labels == 1) | (labels == 2))


# --- bad input: one line, and DATA as it was ---

CLASS_TRICKS = ("../x", "a/b", "a\\b", "all", "ALL", "s0", "", ".", "..", "a,b", "[a]", "a b", "a\n", "/a", "µ")
NAME_TRICKS = ("../x", "a/b", "", ".", "..", ".hidden", "a\\b", "x.zarr", "a\n", 'a"b')
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    *(({"voxel_size_nm": size}, "--voxel-size-nm: .*: give three positive") for size in
      [(40.0, 0.0, 8.0), (40.0, -8.0, 8.0), (40.0, float("nan"), 8.0), (float("inf"), 8.0, 8.0), (8.0, 8.0)]),
    *(({"grid": grid}, "--grid: .*: give three numbers") for grid in [(0, 1, 1), (1, -2, 1), (2, 2)]),
    ({"grid": (1, 7, 1)}, "--grid: 7 cells along y, where .*em.npy has 6 voxels: use fewer"),
    ({"grid": (2000, 2000, 2000)}, "--grid: 2000 cells along z"),
    *(({"crops": cells, "grid": (1, 1, 2)}, "--crops: .*: list cells of the grid, 1 to 2") for cells in
      [(3,), (0,), (), (1, 1)]),
    ({"validate": (3,), "grid": (1, 2, 2), "crops": (1, 4)}, r"--validate: crop 3: count .* this import, 1 to 2"),
    *(({"name": name}, "--name: .*: use letters") for name in NAME_TRICKS),
    *(({"labels": "labels.npy", "values": {name: (1,)}}, "--values: .* is no class name: ") for name in CLASS_TRICKS),
    *(({"instances": {name: "labels.npy"}}, "--instances: .* is no class name: use") for name in CLASS_TRICKS),
    ({"instances": {"mito": "labels.npy"}}, "--instances: mito is also in --values: give each class once"),
    ({"labels": None, "values": {"mito": (1,)}}, "--labels: .*--values.*: e.g."),
    ({"labels": "labels.npy", "values": {}}, "--labels: .*--values.*: e.g."),
    ({"labels": "labels.npy", "values": {"mito": ()}}, "--values: class mito has no value: write mito=1"),
    ({"validate": (1,)}, "--validate: leaves no crop to train on: import crops to train on first"),
    ({"grid": (1, 1, 2), "validate": (1, 2)}, "--validate: leaves no crop to train on"),
    ({"ignore_value": 2}, "--ignore-value: 2 is also a value of class mito: name it once"),
    *(({"values": {}, flag: value}, f"--{flag.replace('_', '-')}: there are no labels: add") for flag, value in
      [("mask", "labels.npy"), ("ignore_value", 0), ("crops", (1,)), ("validate", (1,))]),
]  # fmt: skip


def fails(request: ImportRequest, pattern: str) -> AutosegError:
    """Import; return the error after a check that it is one line and DATA did not change."""
    before = snapshot(request.data)
    with pytest.raises(AutosegError) as error:
        import_volumes(request)
    assert snapshot(request.data) == before
    text = str(error.value)
    assert "\n" not in text
    assert error.value.where
    assert error.value.what
    assert error.value.remedy
    assert re.search(pattern, text), text
    return error.value


@pytest.mark.parametrize(("changes", "pattern"), BAD_SETTINGS)
def test_a_setting_that_cannot_be_carried_out(data: Path, changes: dict[str, Any], pattern: str) -> None:
    changes = {key: f"{data.parent}/{value}" if value == "labels.npy" else value for key, value in changes.items()}
    fails(asked(data, **changes), f"^{pattern}")


def save_npy(name: str, make: Callable[[], NDArray[Any]]) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, make())


def float_labels() -> NDArray[Any]:
    return volume(3, np.float32)


def with_negative_ids() -> NDArray[Any]:
    return volume(3, np.int16) - 2


def with_nan() -> NDArray[Any]:
    em = volume(9, np.float32)
    em[2, 3, 4] = np.nan
    return em


BAD_FILES: list[tuple[Callable[[Path], None], dict[str, Any], str]] = [
    (lambda f: (f / "em.npy").unlink(), {}, r"em\.npy: no such file: check the path"),
    (lambda f: (f / "labels.npy").write_bytes(b"?"), {}, r"labels\.npy: cannot be read .*: check that it"),
    (
        save_npy("labels.npy", lambda: volume(3, shape=(4, 6, 11))),
        {},
        r"labels\.npy: labels has shape \(4, 6, 11\), the EM .*em\.npy \(4, 6, 10\) \(z, y, x\): export both",
    ),
    (save_npy("labels.npy", float_labels), {}, r"labels\.npy: labels has dtype float32: save labels as whole numbers"),
    (
        lambda f: None,
        {"values": {"mito": (1,), "pm": (7,)}, "labels": "labels.npy"},
        r"labels\.npy: holds no voxel of value 7, named for class pm: it holds 0, 1, 2, 3; correct --values",
    ),
    (
        lambda f: None,
        {"ignore_value": 7},
        r"labels\.npy: holds no voxel of value 7, named to be ignored: it holds 0, 1, 2, 3; correct --ignore-value",
    ),
    (
        lambda f: None,
        {"labels": None, "values": {}, "instances": {"nuc": "labels.npy"}, "ignore_value": 7},
        r"labels\.npy: holds no voxel of value 7, named to be ignored: correct --ignore-value",
    ),
    (
        save_npy("ids.npy", with_negative_ids),
        {"instances": {"nuc": "ids.npy"}},
        r"ids\.npy: instance id -2: ids are positive",
    ),
    (
        save_npy("ids.npy", lambda: volume(1) * 255),
        {"instances": {"nuc": "ids.npy"}, "mask": "labels.npy"},
        r"ids\.npy: instance id 255, which means unknown in uint8 .*: renumber",
    ),
    (
        save_npy("em.npy", with_nan),
        {},
        r"em\.npy: grey values at z 0 to 3 that are NaN, infinite or beyond float32: replace",
    ),
    (save_npy("em.npy", lambda: volume(9, np.float64) * 1e60), {}, r"em\.npy: grey values .* beyond float32: replace"),
    (save_npy("em.npy", lambda: volume(9, shape=(0, 6, 10))), {}, r"em\.npy: is empty"),
]


@pytest.mark.parametrize(("damage", "changes", "pattern"), BAD_FILES)
@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_that_cannot_be_used(
    data: Path, damage: Callable[[Path], None], changes: dict[str, Any], pattern: str, is_new: bool
) -> None:
    if not is_new:
        import_volumes(asked(data, name="old", grid=(1, 1, 2), validate=(1,)))
    damage(data.parent)
    folder = data.parent

    def here(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: here(item) for key, item in value.items()}
        return f"{folder}/{value}" if isinstance(value, str) and value.endswith(".npy") else value

    fails(asked(data, **here(changes)), pattern)


def test_folders_made_for_data_are_gone_after_an_error(data: Path) -> None:
    save_npy("em.npy", with_nan)(data.parent)
    request = asked(data / "deeper" / "still", em=f"{data.parent}/em.npy", values={})
    with pytest.raises(DataError, match="NaN"):
        import_volumes(request)
    assert not data.exists()


def test_a_name_that_exists_and_a_place_that_cannot_hold_data(data: Path) -> None:
    import_volumes(asked(data))
    fails(asked(data), f"^{data}/vol: exists already: choose another --name")
    file = data.parent / "file"
    file.write_text("mine")
    with pytest.raises(DataError, match=r"file: cannot be written .*: make it a folder"):
        import_volumes(asked(file))
    assert file.read_text() == "mine"
    (data / "classes.json").write_text("{")
    fails(asked(data, name="b"), "classes.json: is not valid JSON")


def test_a_second_volume_that_is_wrong_keeps_the_first_out(data: Path) -> None:
    for i, shape in ((1, SHAPE), (2, (4, 6, 9))):
        np.save(data.parent / f"v{i}_im.npy", volume(9))
        np.save(data.parent / f"v{i}_lab.npy", volume(3, shape=shape))
    request = asked(data, em=f"{data.parent}/v*_im.npy", labels=f"{data.parent}/v*_lab.npy", values=VALUES)
    fails(request, "v2_lab.npy: labels has shape")
    (data.parent / "v2_lab.npy").unlink()
    fails(request, "v2_im.npy: has no partner")


def test_files_that_would_be_called_alike(data: Path) -> None:
    for name in ("v a b", "v a_b"):
        np.save(data.parent / f"{name}.npy", volume(9))
    fails(asked(data, em=f"{data.parent}/v *.npy", values={}), "several files would be called vol-a_b: rename")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("step", range(7))
def test_whatever_fails_leaves_data_as_it_was(
    data: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: int
) -> None:
    import_volumes(asked(data, name="old", grid=(1, 1, 2), validate=(1,)))
    before = snapshot(data)
    calls: Iterator[int] = iter(range(100))

    def failing(inner: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            if next(calls) == step:
                raise error
            return inner(*args, **keywords)

        return call

    # in order: two classes, the EM, classes.json, and the three renames (classes.json, data set, datasplit.csv)
    monkeypatch.setattr(store, "multiscale_attributes", failing(store.multiscale_attributes))
    monkeypatch.setattr(convert, "save", failing(convert.save))
    monkeypatch.setattr(convert, "os", SimpleNamespace(replace=failing(os.replace)))
    request = asked(data, values={"mito": (1,), "own": (3,)}, labels=f"{data.parent}/labels.npy")
    with pytest.raises(DataError if isinstance(error, OSError) else type(error)):
        import_volumes(request)
    monkeypatch.undo()
    assert snapshot(data) == before
    import_volumes(request)
    assert open_dataset(data).crop("vol/crop3").split == "train"


def test_from_the_command_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = data.parent
    line = f"import {data} --name vnc --em {where}/em.npy --labels {where}/labels.npy --values mito=1,2 pm=3"
    sizes = " --voxel-size-nm 40 8 8"
    assert cli.main([*f"{line}{sizes} --grid 1 2 2 --crops 1,2,3 --json".split()]) == 0
    assert json.loads(capsys.readouterr().out)["crops"] == ["vnc/crop1", "vnc/crop2", "vnc/crop3"]
    assert cli.main([*f"{line} --voxel-size-nm 40 8 -8".split()]) == 2
    out, problem = capsys.readouterr()
    assert not out
    assert problem == "--voxel-size-nm: 40 8 -8: give three positive numbers, in nm, order z y x\n"
