"""What there is: the CellMap layout and datasplit.csv read in place, and everything wrong with them named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import crop_path, em_path, listing, make_dataset, write_label, write_multiscale

from autoseg.data import store
from autoseg.data.dataset import GROUNDTRUTH, Dataset, open_dataset
from autoseg.errors import AutosegError, DataError
from autoseg.geometry import Box, Grid
from autoseg.plan import fingerprint
from autoseg.schema import ClassEntry, ClassTable, encode

SHAPE = (4, 8, 8)
GRID = Grid(SHAPE, (4.0, 4.0, 4.0), (0.0, 0.0, 0.0))
MASK = np.ones(SHAPE, np.uint8)
Edit = Callable[[Path], Any]


def write_data(root: Path, dataset: str = "a", crops: int = 1, classes: tuple[str, ...] = ("er", "mito")) -> Path:
    """Write a data set with crops 1, 2, ... that all annotate these classes; return DATA."""
    write_multiscale(em_path(root, dataset), [(GRID, MASK)])
    for i in range(1, crops + 1):
        for name in classes:
            write_label(crop_path(root, dataset, f"crop{i}"), name, MASK, GRID, unknown=255)
    return root


def row(split: str, crop: str, dataset: str = "a", classes: str = "") -> str:
    zarr = f"{dataset}/{dataset}.zarr"
    return f'"{split}","{zarr}","recon-1/em/fibsem-uint8","{zarr}","{GROUNDTRUTH}/{crop}{classes}"\n'


def names(dataset: Dataset) -> list[str]:
    return [crop.name for crop in dataset.crops]


def refusal(data: Path) -> str:
    """Return the one line that opening this DATA must raise."""
    with pytest.raises(DataError) as caught:
        open_dataset(data)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- layout -------------------------------------------------------------------------------------------------


def test_the_layout_is_scanned_in_natural_order(tmp_path: Path) -> None:
    write_data(tmp_path, "b", crops=1)
    write_data(tmp_path, "a", crops=11, classes=("mito",))
    dataset = open_dataset(tmp_path)
    assert names(dataset) == [f"a/crop{i}" for i in range(1, 12)] + ["b/crop1"]
    assert dataset.volumes == {"a": em_path(tmp_path, "a"), "b": em_path(tmp_path, "b")}
    assert {crop.split for crop in dataset.crops} == {None}
    assert dataset.crop("b/crop1").volume == "b"
    assert [label.name for label in dataset.crop("b/crop1").labels] == ["er", "mito"]
    with pytest.raises(DataError, match="has no crop b/crop2"):
        dataset.crop("b/crop2")


def test_the_fused_volume_all_and_loose_files_are_no_classes(tmp_path: Path) -> None:
    write_data(tmp_path)
    write_label(crop_path(tmp_path, "a", "crop1"), "all", MASK, GRID)
    (crop_path(tmp_path, "a", "crop1") / "notes.txt").write_text("x")
    (crop_path(tmp_path, "a", "crop1").parent / "crop2").write_text("not a folder")
    (crop,) = open_dataset(tmp_path).crops
    assert [label.name for label in crop.labels] == ["er", "mito"]


def test_opening_and_reading_writes_nothing(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", crops=2)
    before = listing(tmp_path / "data")
    for crop in open_dataset(tmp_path / "data").crops:
        for label in crop.labels:
            store.ArrayReader(label.path, store.ChunkCache(0)).read(Box.whole(crop.grid.shape_zyx))
    assert listing(tmp_path / "data") == before


def test_em_without_labels_is_a_data_set_and_nothing_at_all_is_not(tmp_path: Path) -> None:
    assert "holds no crops" in refusal(tmp_path)
    assert "is not a folder" in refusal(tmp_path / "none")
    write_multiscale(em_path(tmp_path, "a"), [(GRID, MASK)])
    dataset = open_dataset(tmp_path)
    assert (dataset.crops, list(dataset.volumes)) == ((), ["a"])


def test_values_mean_what_the_annotation_says(tmp_path: Path) -> None:
    """255 is unknown in a semantic array, an ordinary id in an instance array unless unknown voxels were counted."""
    crop = crop_path(write_data(tmp_path, classes=()), "a", "crop1")
    write_label(crop, "pm", MASK, GRID, unknown=255)
    write_label(crop, "er", MASK, GRID)
    write_label(crop, "mito", MASK, GRID, unknown=255, instance=True)
    write_label(crop, "nuc", MASK, GRID, unknown=255, instance=True, counted_unknown=4)
    write_multiscale(crop / "ecs", [(GRID, MASK)])
    found = {
        label.name: (label.instance, label.absent, label.unknown) for label in open_dataset(tmp_path).crops[0].labels
    }
    assert found == {
        "pm": (False, 0, 255),
        "er": (False, 0, None),
        "mito": (True, 0, None),
        "nuc": (True, 0, 255),
        "ecs": (False, 0, None),
    }


# ---- datasplit.csv ------------------------------------------------------------------------------------------


def test_a_datasplit_fixes_crops_sides_and_classes(tmp_path: Path) -> None:
    write_data(tmp_path, crops=4)
    three = f'"validate","a/a.zarr/recon-1/em/fibsem-uint8","a/a.zarr/{GROUNDTRUTH}/crop4/[mito]"\n'
    csv = row("train", "crop2", classes="/[mito, er]") + "\n" + row("train", "crop1", classes="[er]") + three
    (tmp_path / "datasplit.csv").write_text(csv)
    for data in (tmp_path, tmp_path / "datasplit.csv"):
        dataset = open_dataset(data)
        assert [(crop.name, crop.split) for crop in dataset.crops] == [
            ("a/crop2", "train"),
            ("a/crop1", "train"),
            ("a/crop4", "validate"),
        ]
        assert [[label.name for label in crop.labels] for crop in dataset.crops] == [["er", "mito"], ["er"], ["mito"]]
        assert {crop.em for crop in dataset.crops} == {em_path(tmp_path, "a")}


def test_a_datasplit_elsewhere_may_name_zarrs_by_absolute_paths(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    zarr = tmp_path / "data/a/a.zarr"
    (tmp_path / "split.csv").write_text(f"train,{zarr},recon-1/em/fibsem-uint8,{zarr},{GROUNDTRUTH}/crop1\n")
    (crop,) = open_dataset(tmp_path / "split.csv").crops
    assert (crop.name, len(crop.labels)) == ("a/crop1", 2)


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        (row("train", "crop1") * 2, ":2: a/crop1 is listed twice (see line 1): keep one line"),
        (row("train", "crop1") + row("validate", "crop1"), "a/crop1 is listed on both sides (see line 1)"),
        (row("train", "crop1", classes="/[er]") + row("validate", "crop1", classes="/[mito]"), "on both sides"),
        (row("test", "crop1"), ":1: split 'test': write train or validate"),
        ("train,a\n", ":1: has 2 columns"),
        ('"train","a","b","c"\n', "has 4 columns"),
        (row("train", "crop7"), "crop7: does not exist"),
        (row("train", "crop1", "z"), "1 of 1 crops cannot be used"),
        (row("train", "crop1", classes="/[nuc]"), "annotates no class"),
        ("", "holds no crops"),
    ],
)
def test_a_wrong_datasplit_is_named(tmp_path: Path, csv: str, message: str) -> None:
    if csv:
        write_data(tmp_path)
    (tmp_path / "datasplit.csv").write_text(csv)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'train,"a\x00b"\n'])
def test_a_datasplit_that_is_no_text_is_named(tmp_path: Path, content: bytes) -> None:
    write_data(tmp_path)
    (tmp_path / "datasplit.csv").write_bytes(content)
    assert "datasplit.csv" in refusal(tmp_path)
    assert "none.csv: cannot be read" in refusal(tmp_path / "none.csv")


def test_a_datasplit_saved_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "datasplit.csv").write_text(row("train", "crop1"), "utf-8-sig")
    assert names(open_dataset(tmp_path)) == ["a/crop1"]


def test_a_listed_class_that_a_crop_does_not_hold_is_named(tmp_path: Path) -> None:
    write_data(tmp_path, crops=2)
    csv = row("train", "crop1", classes="/[mitoo,er,nuc]") + row("train", "crop2", classes="/[er,nuc]")
    (tmp_path / "datasplit.csv").write_text(csv)
    dataset = open_dataset(tmp_path)
    assert [[label.name for label in crop.labels] for crop in dataset.crops] == [["er"], ["er"]]
    listed = "is listed in the datasplit, but has no folder"
    assert [(item.name, item.why) for item in dataset.foreign] == [
        ("a/crop1/mitoo", f"a/crop1/mitoo: {listed}: did you mean 'mito'?"),
        ("a/crop1/nuc", f"a/crop1/nuc and in 1 more crop: {listed}: restore it, or remove it from the list"),
    ]
    assert fingerprint(tmp_path, tmp_path / "cache").left_out == dataset.foreign


def test_two_em_volumes_of_one_name_are_refused(tmp_path: Path) -> None:
    """One's grey values would stand for both."""
    write_data(tmp_path, crops=2)
    write_multiscale(em_path(tmp_path, "a").with_name("other"), [(GRID, 2 * MASK)])
    lines = row("train", "crop1") + row("train", "crop2").replace("fibsem-uint8", "other")
    (tmp_path / "datasplit.csv").write_text(lines)
    message = refusal(tmp_path)
    assert f"em/other: is called a, and so is {em_path(tmp_path, 'a')}: " in message
    (tmp_path / "datasplit.csv").write_text(row("train", "crop1"))
    assert names(open_dataset(tmp_path)) == ["a/crop1"]


def test_two_zarrs_of_one_name_are_refused_unless_one_alone_is_used(tmp_path: Path) -> None:
    write_data(tmp_path, crops=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one = row("train", "crop1").replace("a/a.zarr", "b/a.zarr")
    (tmp_path / "datasplit.csv").write_text(one)
    assert names(open_dataset(tmp_path)) == ["a/crop1"]
    (tmp_path / "datasplit.csv").write_text(one + row("train", "crop2"))
    assert "a/a.zarr/recon-1/em/fibsem-uint8: is called a, and so is" in refusal(tmp_path)
    (tmp_path / "datasplit.csv").unlink()
    for folder in ("a", "b"):
        shutil.rmtree(tmp_path / folder / "a.zarr/recon-1/labels")
    assert "b/a.zarr/recon-1/em/fibsem-uint8: is called a, and so is" in refusal(tmp_path)


# ---- crops that cannot be used ------------------------------------------------------------------------------


def test_few_bad_crops_are_left_out_and_named_many_are_refused(tmp_path: Path) -> None:
    write_data(tmp_path, crops=10)
    for i in (3, 7):
        (crop_path(tmp_path, "a", f"crop{i}") / "er/.zattrs").write_text("{")
    dataset = open_dataset(tmp_path)
    assert names(dataset) == [f"a/crop{i}" for i in (1, 2, 4, 5, 6, 8, 9, 10)]
    assert [item.name for item in dataset.left_out] == ["a/crop3", "a/crop7"]
    assert all("er/.zattrs: is not readable JSON" in item.why for item in dataset.left_out)
    (crop_path(tmp_path, "a", "crop9") / "er/.zattrs").write_text("{")
    message = refusal(tmp_path)
    assert "3 of 10 crops cannot be used, first: " in message
    assert "crop3/er/.zattrs" in message
    assert message.endswith(": restore the file"), "what to do is said once"
    assert message.count("restore") == 1


def edit_scale(scale: Any) -> Edit:
    def edit(label: Path) -> None:
        content = json.loads((label / ".zattrs").read_text())
        content["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"] = scale
        (label / ".zattrs").write_text(json.dumps(content))

    return edit


def edit_multiscale(**changes: Any) -> Edit:
    def edit(label: Path) -> None:
        content = json.loads((label / ".zattrs").read_text())
        content["multiscales"][0] |= changes
        (label / ".zattrs").write_text(json.dumps(content))

    return edit


def edit_array(**changes: Any) -> Edit:
    def edit(label: Path) -> None:
        content = json.loads((label / "s0/.zarray").read_text())
        (label / "s0/.zarray").write_text(json.dumps(content | changes))

    return edit


def axes(*axis_names: str) -> list[dict[str, str]]:
    return [{"name": name, "type": "space", "unit": "nanometer"} for name in axis_names]


def moved(label: Path) -> None:
    write_label(label.parent, "er", MASK, Grid(SHAPE, (4.0, 4.0, 4.0), (0.0, 2.0, 0.0)))


def longer(label: Path) -> None:
    write_label(label.parent, "er", np.ones((5, 8, 8), np.uint8), GRID._replace(shape_zyx=(5, 8, 8)))


def emptied(label: Path) -> None:
    (label / "s0/.zarray").unlink()


def without_scale(label: Path) -> None:
    edit_multiscale(datasets=[{"path": "s0", "coordinateTransformations": []}])(label)


BAD_LABELS: list[Any] = [
    pytest.param(edit_scale([4.0, -4.0, 4.0]), "scale [4.0, -4.0, 4.0]: a voxel size is", id="negative scale"),
    pytest.param(edit_scale([4.0, 0.0, 4.0]), "a voxel size is three positive numbers", id="zero scale"),
    pytest.param(edit_scale([4.0, 4.0]), "scale [4.0, 4.0]: it is three finite numbers", id="scale of two numbers"),
    pytest.param(edit_scale("444"), "scale 444: it is three finite numbers", id="scale of text"),
    pytest.param(edit_scale(None), "er: ", id="scale null"),
    pytest.param(edit_multiscale(datasets=[]), "lists no arrays", id="no levels"),
    pytest.param(edit_multiscale(datasets=[{"path": "s0"}]), "malformed multiscales", id="no transformations"),
    pytest.param(edit_multiscale(datasets=7), "malformed multiscales", id="levels are a number"),
    pytest.param(edit_multiscale(axes=axes("x", "y", "z")), "axes are ['x', 'y', 'z']", id="axes order"),
    pytest.param(edit_multiscale(axes=axes("c", "z", "y", "x")), "axes are ['c', 'z', 'y', 'x']", id="four axes"),
    pytest.param(edit_multiscale(axes=[{"name": n, "unit": "furlong"} for n in "zyx"]), "unit 'furlong'", id="unit"),
    pytest.param(edit_array(shape=[1, *SHAPE], chunks=[1, *SHAPE]), "er/s0: has 4 axes", id="array of four axes"),
    pytest.param(edit_array(shape=[2**20] * 3, chunks=[2**20] * 3), "smaller chunks", id="chunk bomb"),
    pytest.param(edit_array(chunks=[2**12, 2**12, 2**12]), "smaller chunks", id="chunk beyond the array"),
    pytest.param(edit_array(dtype="|O"), "er/s0: ", id="pickled objects"),
    pytest.param(emptied, "er/s0: is not a readable zarr array", id="no array"),
    pytest.param(moved, "mito: lies on another grid than er", id="half a voxel aside"),
    pytest.param(longer, "mito: lies on another grid than er", id="another shape"),
    pytest.param(
        without_scale,
        "scale",
        id="no scale",
    ),
]


@pytest.mark.parametrize(("edit", "message"), BAD_LABELS)
def test_a_label_that_cannot_be_used_is_named(tmp_path: Path, edit: Edit, message: str) -> None:
    write_data(tmp_path)
    edit(crop_path(tmp_path, "a", "crop1") / "er")
    found = refusal(tmp_path)
    assert message in found
    assert "crop1" in found


def test_an_annotation_encoding_that_is_not_integers_is_named(tmp_path: Path) -> None:
    write_data(tmp_path)
    label = crop_path(tmp_path, "a", "crop1") / "er"
    kind = {"type": "semantic_segmentation", "encoding": {"absent": "zero"}}
    store.write_attributes(label, {"cellmap": {"annotation": {"annotation_type": kind}}})
    assert "values of absent, present and unknown are integers" in refusal(tmp_path)


@pytest.mark.parametrize("damage", ["cellmap", "annotation", "annotation_type", "encoding"])
def test_a_missing_or_odd_annotation_block_means_the_usual_encoding(tmp_path: Path, damage: str) -> None:
    write_data(tmp_path)
    label = crop_path(tmp_path, "a", "crop1") / "er"
    odd: Any = "odd"
    for key in ["encoding", "annotation_type", "annotation", "cellmap"]:
        odd = {key: odd} if key == damage or isinstance(odd, dict) else odd
    for group in (label, label / "s0"):
        store.write_attributes(group, odd)
    found = open_dataset(tmp_path).crops[0].labels[0]
    assert (found.instance, found.absent, found.unknown) == (False, 0, None)


def test_a_crop_without_em_is_named(tmp_path: Path) -> None:
    write_data(tmp_path, "b", crops=9)
    write_label(crop_path(tmp_path, "a", "crop1"), "er", MASK, GRID)
    dataset = open_dataset(tmp_path)
    (item,) = dataset.left_out
    assert item.name == "a/crop1"
    assert "no EM" in item.why
    assert list(dataset.volumes) == ["b"]


@pytest.mark.parametrize("place", ["x", "x/x.zarr", "x/x.zarr/recon-1/labels", f"x/x.zarr/{GROUNDTRUTH}/crop1"])
def test_links_that_lead_nowhere_are_left_out_and_named(tmp_path: Path, place: str) -> None:
    write_data(tmp_path, crops=6)
    link = tmp_path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "gone")
    dataset = open_dataset(tmp_path)
    assert len(dataset.crops) == 6
    (item,) = dataset.left_out
    assert item.name == place
    assert item.why == f"{place}: is a link to {tmp_path}/gone, which is not there: restore that, or remove the link"
    for i in (1, 2, 3):
        shutil.rmtree(crop_path(tmp_path, "a", f"crop{i}"))
    found = refusal(tmp_path)
    assert "1 of 4 crops cannot be used: " in found
    assert found.endswith("which is not there: restore that, or remove the link")
    (tmp_path / "datasplit.csv").write_text(row("train", "crop4"))
    assert open_dataset(tmp_path).left_out == (), "what no line lists is not meant"


def test_a_class_folder_that_is_a_link_to_nowhere_takes_its_crop_along(tmp_path: Path) -> None:
    """It was annotated: that it is unknown would be wrong."""
    write_data(tmp_path, crops=6)
    mito = crop_path(tmp_path, "a", "crop2") / "mito"
    shutil.rmtree(mito)
    mito.symlink_to(tmp_path / "gone")
    dataset = open_dataset(tmp_path)
    (item,) = dataset.left_out
    assert item.name == "a/crop2"
    assert "crop2/mito: is a link to" in item.why
    assert len(dataset.crops) == 5


def test_crops_of_a_zarr_that_is_called_other_than_its_folder_are_left_out_and_named(tmp_path: Path) -> None:
    write_data(tmp_path, crops=8)
    write_data(tmp_path, "b", crops=2)
    (tmp_path / "b/b.zarr").rename(tmp_path / "b/volume.zarr")
    dataset = open_dataset(tmp_path)
    inner = f"b/volume.zarr/{GROUNDTRUTH}"
    assert [item.name for item in dataset.left_out] == [f"{inner}/crop1", f"{inner}/crop2"]
    assert dataset.left_out[0].why.endswith("lies in volume.zarr of the folder b: name both alike, or move it away")
    shutil.rmtree(crop_path(tmp_path, "a", "crop8"))
    assert "2 of 9 crops cannot be used" in refusal(tmp_path)


def test_an_annotation_that_stands_only_on_the_array_is_read(tmp_path: Path) -> None:
    mito = crop_path(write_data(tmp_path), "a", "crop1") / "mito"
    attributes = json.loads((mito / ".zattrs").read_text())
    del attributes["cellmap"]
    (mito / ".zattrs").write_text(json.dumps(attributes))
    label = open_dataset(tmp_path).crops[0].labels[1]
    assert (label.name, label.absent, label.unknown, label.present) == ("mito", 0, 255, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path: Path, dtype: Any) -> None:
    """NaN, or 0.3 of a resampled mask, would be present."""
    write_data(tmp_path)
    shutil.rmtree(crop_path(tmp_path, "a", "crop1") / "mito")
    write_label(crop_path(tmp_path, "a", "crop1"), "mito", MASK.astype(dtype), GRID)
    assert f"mito/s0: holds {np.dtype(dtype)}: store labels as whole numbers" in refusal(tmp_path)


def test_a_crop_number_of_two_volumes_is_told_once_and_is_no_alarm(tmp_path: Path) -> None:
    write_data(tmp_path, crops=2)
    write_data(tmp_path, "b", crops=3)
    (item,) = [item for item in fingerprint(tmp_path, tmp_path / "cache").findings if item.kind == "shared-number"]
    assert item.what == "2 numbers are of several crops: a/crop1 and b/crop1; a/crop2 and b/crop2"
    assert not item.alarm


def test_a_composite_of_composites_is_known_where_all_its_parts_are(tmp_path: Path) -> None:
    """Even if the table names the whole before its parts."""
    write_data(tmp_path, classes=("golgi_mem", "golgi_lum", "er"))
    own = (ClassEntry(name="inside", components=("stack", "er")), ClassEntry(name="stack", components=("golgi",)))
    (tmp_path / "classes.json").write_bytes(encode(ClassTable(classes=own)))
    found = {entry.name for entry in fingerprint(tmp_path, tmp_path / "cache").classes}
    assert found == {"golgi_mem", "golgi_lum", "er", "golgi", "stack", "inside"}


def test_a_crop_outside_its_em_is_named(tmp_path: Path) -> None:
    """It would train on nothing but padding, without a word."""
    write_data(tmp_path)
    for origin, fits in ((31.9, True), (32.1, False)):
        grid = Grid(SHAPE, (4.0, 4.0, 4.0), (0.0, 0.0, origin))
        for name in ("er", "mito"):
            write_label(crop_path(tmp_path, "a", "crop1"), name, MASK, grid)
        if fits:
            assert open_dataset(tmp_path).crops[0].grid == grid
        else:
            assert "crop1: lies outside its EM" in refusal(tmp_path)


def test_a_huge_chunk_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """A few bytes of metadata must not make the reader allocate an exbibyte, also where the EM is damaged."""
    write_data(tmp_path)
    em = em_path(tmp_path, "a")
    edit_array(shape=[2**20] * 3, chunks=[2**20] * 3)(em)
    message = refusal(tmp_path)
    assert f"{em.relative_to(tmp_path)}/s0" in message
    assert "GiB" in message


def test_a_truncated_chunk_is_named_with_its_path_when_it_is_read(tmp_path: Path) -> None:
    write_data(tmp_path)
    (crop,) = open_dataset(tmp_path).crops
    chunk = crop.labels[0].path / "0/0/0"
    for content in (chunk.read_bytes()[:9], b"", b"\x00" * 100):
        chunk.write_bytes(content)
        reader = store.ArrayReader(crop.labels[0].path, store.ChunkCache(0))
        with pytest.raises(AutosegError, match=r"crop1/er/s0: .*cannot be decoded") as caught:
            reader.read(Box.whole(SHAPE))
        assert len(str(caught.value).splitlines()) == 1


# ---- names, numbers, sides ----------------------------------------------------------------------------------


def test_a_class_that_is_in_no_table_is_named_with_the_nearest_and_the_others_stay(tmp_path: Path) -> None:
    write_data(tmp_path, crops=3)
    for i in (1, 3):
        write_label(crop_path(tmp_path, "a", f"crop{i}"), "mitoo", MASK, GRID)
    write_label(crop_path(tmp_path, "a", "crop2"), "zzz", MASK, GRID)
    dataset = open_dataset(tmp_path)
    assert names(dataset) == ["a/crop1", "a/crop2", "a/crop3"]
    assert dataset.left_out == ()
    assert [(item.name, item.why) for item in dataset.foreign] == [
        (
            "a/crop1/mitoo",
            "a/crop1/mitoo and in 1 more crop: is not a class of the table: did you mean 'mito'?",
        ),
        ("a/crop2/zzz", "a/crop2/zzz: is not a class of the table: add it to classes.json"),
    ]
    facts = fingerprint(tmp_path, tmp_path / "cache")
    assert facts.left_out == dataset.foreign
    assert {crop.annotated for crop in facts.crops} == {("er", "mito")}
    own = ClassTable(classes=(ClassEntry(name="mitoo"), ClassEntry(name="zzz")))
    (tmp_path / "classes.json").write_bytes(encode(own))
    assert open_dataset(tmp_path).foreign == ()
    assert fingerprint(tmp_path, tmp_path / "cache").crops[0].annotated == ("er", "mito", "mitoo")
    assert len(list((tmp_path / "cache/codes").iterdir())) == 3, "naming a class rebuilds no code volume"


def test_a_crop_of_unknown_classes_alone_is_left_out(tmp_path: Path) -> None:
    write_data(tmp_path, classes=("mitoo",))
    message = refusal(tmp_path)
    assert "crop1: annotates no class" in message
    assert "did you mean 'mito'?" in message


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    (crop_path(write_data(tmp_path), "a", "crop1") / ".ipynb_checkpoints").mkdir()
    assert open_dataset(tmp_path).foreign == ()


def test_two_crops_of_one_number_are_refused(tmp_path: Path) -> None:
    """A submission and an option such as --crops 7 know the number only."""
    write_data(tmp_path, crops=2)
    write_label(crop_path(tmp_path, "a", "crop02"), "er", MASK, GRID)
    message = refusal(tmp_path)
    assert "crop2: is the same crop as" in message
    assert "crop02: keep one of them" in message
    write_data(tmp_path / "other", "a", crops=1)
    write_data(tmp_path / "other", "b", crops=1)
    assert names(open_dataset(tmp_path / "other")) == ["a/crop1", "b/crop1"], "volumes count on their own"


def test_one_crop_under_two_names_on_both_sides_is_refused(tmp_path: Path) -> None:
    """A link to a zarr would be a leak that no comparison of names finds."""
    write_data(tmp_path, crops=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/b.zarr").symlink_to(tmp_path / "a/a.zarr")
    (tmp_path / "datasplit.csv").write_text(row("train", "crop1") + row("validate", "crop1", "b"))
    message = refusal(tmp_path)
    assert "b/b.zarr" in message
    assert "is the same crop as" in message
    assert "on both sides of the split" in message


def test_two_crops_of_one_name_in_different_folders_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_data(tmp_path / folder)
    lines = [row("train", "crop1").replace("a/a.zarr", f"{folder}/a/a.zarr") for folder in ("x", "y")]
    (tmp_path / "datasplit.csv").write_text("".join(lines))
    assert ":2: a/crop1 is listed twice (see line 1)" in refusal(tmp_path)


def test_a_crop_that_was_left_out_says_why_when_it_is_asked_for(tmp_path: Path) -> None:
    write_data(tmp_path, crops=6)
    (crop_path(tmp_path, "a", "crop3") / "er/.zattrs").unlink()
    with pytest.raises(DataError, match=r"a/crop3: was left out: .*er: has no OME-NGFF multiscales"):
        open_dataset(tmp_path).crop("a/crop3")


# ---- chunks -------------------------------------------------------------------------------------------------


def test_labels_that_fill_with_a_value_are_refused_and_null_is_0(tmp_path: Path) -> None:
    write_data(tmp_path)
    label = crop_path(tmp_path, "a", "crop1") / "er"
    edit_array(fill_value=7)(label)
    assert "er/s0: fill_value 7: chunks that are not stored would read as that" in refusal(tmp_path)
    edit_array(fill_value=None)(label)
    (label / "s0/0/0/0").unlink()
    (crop,) = open_dataset(tmp_path).crops
    assert not store.ArrayReader(crop.labels[0].path, store.ChunkCache(0)).read(Box.whole(SHAPE)).any()


def test_a_crop_under_which_no_em_was_fetched_is_left_out(tmp_path: Path) -> None:
    """Its fill of 0 would be trained on as black tissue."""
    write_data(tmp_path, "b", crops=9)
    write_data(tmp_path, "a", crops=1)
    chunk = em_path(tmp_path, "a") / "s0/0/0/0"
    chunk.unlink()
    (item,) = open_dataset(tmp_path).left_out
    assert item.name == "a/crop1"
    assert "nothing was fetched: fetch the EM under it" in item.why


def test_a_label_group_without_arrays_is_named(tmp_path: Path) -> None:
    write_data(tmp_path)
    label = crop_path(tmp_path, "a", "crop1") / "er"
    shutil.rmtree(label / "s0")
    assert "er/s0: is not a readable zarr array" in refusal(tmp_path)
    shutil.rmtree(label)
    label.mkdir()
    assert "er: has no OME-NGFF multiscales metadata" in refusal(tmp_path)


def test_labels_are_read_at_their_finest_level_whatever_the_order_of_the_list(tmp_path: Path) -> None:
    crop = crop_path(write_data(tmp_path, classes=()), "a", "crop1")
    coarse = GRID.at_voxel_size((8.0, 8.0, 8.0))
    write_multiscale(crop / "er", [(coarse, np.zeros(coarse.shape_zyx, np.uint8)), (GRID, MASK)])
    (found,) = open_dataset(tmp_path).crops
    assert (found.labels[0].path.name, found.grid) == ("s1", GRID)


def test_one_geometry_serves_ground_truth_finer_than_em(tmp_path: Path) -> None:
    """The challenge's crop 557: translations are voxel centres, 23837.13 = 6850 * 3.48 - 0.87."""
    em = Grid((6900, 8, 8), (3.48, 4.0, 4.0), (0.0, 0.0, 0.0))
    array = store.create_array(em_path(tmp_path, "a") / "s0", em.shape_zyx, "u1", (64, 8, 8))
    array[6800:] = 1
    store.write_attributes(em_path(tmp_path, "a"), store.multiscale_attributes("em", [em]))
    truth = Grid((20, 16, 16), (1.74, 2.0, 2.0), (23837.13, -1.0, -1.0))
    write_label(crop_path(tmp_path, "a", "crop557"), "er", np.ones(truth.shape_zyx, np.uint8), truth)
    (crop,) = open_dataset(tmp_path).crops
    assert em.covering(crop.grid) == Box((6850, 0, 0), (6860, 8, 8))
