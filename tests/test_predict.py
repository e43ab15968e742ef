"""Prediction: the exact grid of the input, the same labels however often and however interrupted it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from strategies import em_path, make_dataset, write_multiscale
from test_planner import tiny_plan

from autoseg.data import store
from autoseg.data.classes import cellmap_table
from autoseg.data.dataset import open_dataset
from autoseg.errors import CheckpointError, DataError, PlanError
from autoseg.geometry import Box, Grid
from autoseg.model import windows
from autoseg.predict import (
    Region,
    Trained,
    blocks,
    check_finished,
    crop_regions,
    cut_roi,
    drop_copy,
    export,
    export_labels,
    file_region,
    open_run,
    predict_regions,
    volume_regions,
)
from autoseg.predict.decode import count_shown, covered, label_map, to_labels
from autoseg.recipes.training import train_on
from autoseg.schema import ClassEntry, Plan, load_as, save
from autoseg.train.loop import device_of

NAMES = tuple(entry.name for entry in cellmap_table().classes if entry.name in ("mito", "er_mem", "pm"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `data`, `cache`, and `run`, trained for a moment."""
    folder = tmp_path_factory.mktemp("predict")
    data = make_dataset(folder / "data", shape=(4, 64, 64))
    changes = {"optimizer.num_steps": 40, "optimizer.learning_rate": 0.01, "validation.num_rounds": 1}
    changes |= {"sliding_window.tile_zyx": (1, 32, 32), "augmentation.preset": "flips"}
    train_on(tiny_plan(data, folder / "cache", changes), data, folder / "run", cache=folder / "cache")
    return folder


@pytest.fixture
def trained(place: Path) -> Trained:
    """Return the run, ready to predict."""
    return open_run(place / "run", "last", "cpu")


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut regions into blocks of one tile, so that there are many."""
    monkeypatch.setattr(windows, "BLOCK_BYTES", 1)


def labels(out: Path, kind: str = "") -> NDArray[np.uint8]:
    """Return the labels (or probabilities) of every class, (class, z, y, x)."""
    return np.stack([_whole(out / kind / name / "s0") for name in NAMES])


def _whole(path: Path) -> NDArray[Any]:
    reader = store.ArrayReader(path, store.ChunkCache(0))
    return reader.read(Box.whole(reader.shape_zyx))


def snapshot(out: Path) -> dict[str, bytes]:
    """Return every file of a zarr but the ledger."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and ".autoseg" not in str(p)}


def region(place: Path, number: int = 1) -> Region:
    return crop_regions(open_run(place / "run", "last").plan.split, open_dataset(place / "data"), str(number))[0]


# ---- the same labels ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_blocks")
def test_a_second_prediction_has_the_same_bytes(place: Path, trained: Trained, tmp_path: Path) -> None:
    for name in ("a", "b"):
        predict_regions(trained, [region(place)], tmp_path / name, probabilities=True)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert 0 < labels(tmp_path / "a" / "demo/crop1").mean() < 1


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("killed_at", [0, 1, 5])
def test_a_prediction_killed_at_any_block_is_finished_by_the_same_command(
    place: Path, trained: Trained, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_regions(trained, [region(place)], tmp_path / "straight")
    genuine, calls = blocks._RegionWriter.write, list[Box]()

    def write(self: Any, block: Box) -> str:
        calls.append(block)
        if len(calls) == killed_at + 1:
            self.arrays["mito"][block.slices] = 9  # half written when the power goes
            raise KeyboardInterrupt
        return genuine(self, block)

    monkeypatch.setattr(blocks._RegionWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        predict_regions(trained, [region(place)], tmp_path / "resumed")
    done = len(calls) - 1
    with (tmp_path / "resumed/.autoseg/ledger.jsonl").open("a") as ledger:
        ledger.write('{"block": "demo/crop1 (2, 3')  # torn by the kill
    calls.clear()
    killed_at = 10**6
    predict_regions(trained, [region(place)], tmp_path / "resumed")
    total = len(list(blocks._RegionWriter(trained, region(place), tmp_path / "scratch", False).blocks()))
    assert len(calls) == total - done, "what the ledger lists is not done again"
    assert snapshot(tmp_path / "resumed") == snapshot(tmp_path / "straight")


@pytest.mark.usefixtures("_small_blocks")
def test_every_line_of_the_ledger_is_the_checksum_of_its_block(place: Path, trained: Trained, tmp_path: Path) -> None:
    import hashlib

    predict_regions(trained, [region(place)], tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/.autoseg/ledger.jsonl").read_text().splitlines()]
    found = labels(tmp_path / "out/demo/crop1")
    writer = blocks._RegionWriter(trained, region(place), tmp_path / "out/demo/crop1", False)
    expected = [
        hashlib.sha256(np.ascontiguousarray(found[:, *b.slices]).tobytes()).hexdigest() for b in writer.blocks()
    ]
    assert [line["sha256"] for line in lines] == expected
    assert len(expected) > 4


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("kind", ["labels", "probabilities", "damaged", "cut"])
def test_what_is_no_longer_on_disk_is_predicted_again(
    place: Path, trained: Trained, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, one = tmp_path / "out", region(place)
    predict_regions(trained, [one], out, probabilities=True)
    check_finished(out, one.name)
    before, genuine, calls = snapshot(out), blocks._RegionWriter.write, list[Box]()

    def write(self: Any, block: Box) -> str:
        calls.append(block)
        return genuine(self, block)

    monkeypatch.setattr(blocks._RegionWriter, "write", write)
    predict_regions(trained, [one], out, probabilities=True)
    assert calls == []
    array = out / one.name / ("probabilities/pm" if kind == "probabilities" else "mito") / "s0"
    chunks = sorted(p for p in array.rglob("*") if p.is_file() and not p.name.startswith("."))
    hit = chunks[:1] if kind in ("damaged", "cut") else chunks
    for chunk in hit:
        if kind == "damaged":
            chunk.write_bytes(b"not a chunk")
        elif kind == "cut":
            chunk.write_bytes(chunk.read_bytes()[:-5])
        else:
            chunk.unlink()
    with pytest.raises(DataError, match=rf"out: {len(hit)} of \d+ blocks of demo/crop1 are missing.*autoseg predict"):
        check_finished(out, one.name)
    predict_regions(trained, [one], out, probabilities=True)
    assert len(calls) == len(hit) > 0
    assert snapshot(out) == before
    check_finished(out, one.name)


def test_chunks_of_resampled_outputs_are_near_64_cubed_and_blocks_fit_the_memory(
    place: Path, trained: Trained, tmp_path: Path
) -> None:
    em = region(place).em
    for shape, size in (
        ((49, 592, 1184), (40.0, 6.0, 6.0)),
        ((300, 700, 700), (16.0, 4.0, 4.0)),
        ((300, 700, 700), (80.0, 16.0, 16.0)),
        ((1, 5000, 5000), (40.0, 4.0, 4.0)),
    ):
        grid = Grid(shape, size, (0.0, 0.0, 0.0))
        writer = blocks._RegionWriter(trained, Region("", em, grid), tmp_path, False)
        chunk = blocks._chunk_shape(writer.block_zyx, shape)
        assert 2**16 <= np.prod(chunk) <= 2**20, (shape, chunk)
        assert 4 * len(NAMES) * np.prod(writer.block_zyx) <= windows.BLOCK_BYTES
        assert min(writer.block_zyx[1:]) >= 64, "no smaller than the tile that it needs"


def test_blocks_never_share_a_chunk(place: Path, trained: Trained, tmp_path: Path) -> None:
    for size in ((40.0, 8.0, 8.0), (50.0, 6.0, 7.0), (40.0, 16.0, 16.0)):
        grid = Grid((3, 150, 130), size, (0.0, 0.0, 0.0))
        writer = blocks._RegionWriter(trained, Region("", region(place).em, grid), tmp_path / str(size), False)
        writer.open_arrays()
        for block in writer.blocks():
            for start, edge, whole, chunk in zip(
                block.start, block.shape_zyx, grid.shape_zyx, writer.arrays["mito"].chunks, strict=True
            ):
                assert start % chunk == 0
                assert edge % chunk == 0 or start + edge == whole


# ---- the grid of the input ----------------------------------------------------------------------------------


def test_a_crop_comes_back_on_its_own_grid_as_ome_zarr(place: Path, trained: Trained, tmp_path: Path) -> None:
    regions = crop_regions(trained.plan.split, open_dataset(place / "data"), "all")
    predict_regions(trained, regions, tmp_path / "out")
    for one in regions:
        for name in NAMES:
            multiscale = store.open_multiscale(tmp_path / "out" / one.name / name)
            assert multiscale.levels[0].grid == one.grid
    assert regions[0].grid.origin_nm != regions[1].grid.origin_nm


@pytest.mark.parametrize("voxel", [(40.0, 4.0, 4.0), (40.0, 11.0, 7.0), (40.0, 16.0, 16.0)], ids=str)
def test_em_of_another_voxel_size_comes_back_on_the_exact_grid_of_the_input(
    place: Path, trained: Trained, tmp_path: Path, voxel: tuple[float, float, float]
) -> None:
    """The same tissue at another voxel size must get nearly the labels it gets at the plan's."""
    source = region(place)
    reader = store.ArrayReader(source.em / "s0", store.ChunkCache(0))
    wide = Grid(reader.shape_zyx, (40.0, 8.0, 8.0), (0.0, 0.0, 0.0))
    grid = wide.at_voxel_size(voxel)
    from autoseg.data.resample import resample

    values = resample(reader.read(Box.whole(reader.shape_zyx)).astype(np.float32), wide, grid, area=False)
    em = write_multiscale(tmp_path / "em", [(grid, np.rint(values).astype(np.uint8))])
    found_region = Region("", em, store.open_multiscale(em).levels[0].grid)
    predict_regions(trained, [found_region], tmp_path / "out", probabilities=True)
    found = labels(tmp_path / "out")
    assert found.shape[1:] == grid.shape_zyx
    assert store.open_multiscale(tmp_path / "out/mito").levels[0].grid == grid
    native = Region("", source.em, wide)
    predict_regions(trained, [native], tmp_path / "native", probabilities=True)
    there = labels(tmp_path / "native", "probabilities")
    back = np.stack(
        [resample(p.astype(np.float32), grid, wide, area=False) for p in labels(tmp_path / "out", "probabilities")]
    )
    assert np.abs(back - there).mean() < 25, "of 255"
    assert np.corrcoef(back.ravel(), there.ravel())[0, 1] > 0.6


def test_probabilities_are_bytes_that_agree_with_the_labels(place: Path, trained: Trained, tmp_path: Path) -> None:
    predict_regions(trained, [region(place)], tmp_path / "out", probabilities=True)
    probability, found = labels(tmp_path / "out/demo/crop1", "probabilities"), labels(tmp_path / "out/demo/crop1")
    assert probability.dtype == np.uint8
    assert len(np.unique(probability)) > 20
    writer = blocks._RegionWriter(trained, region(place), tmp_path / "again", False)
    exact = np.concatenate([writer._probability(block).ravel() for block in writer.blocks()])
    assert np.array_equal(np.rint(exact * 255), probability.ravel()), "255 is 1, and one block holds this crop"
    cuts = [trained.plan.decode.thresholds[name] * 255 for name in trained.plan.class_names]
    for cut, graded, mask in zip(cuts, probability, found, strict=True):
        assert (mask[graded > cut + 1] == 1).all()
        assert (mask[graded < cut - 1] == 0).all()


def test_a_box_in_nm_is_cut_to_voxels_and_keeps_its_place(place: Path, trained: Trained, tmp_path: Path) -> None:
    whole = region(place)
    cut = cut_roi(whole, [(0 - 20, 60), (100, 300), (100, 10**6)])
    assert cut.grid.shape_zyx == (2, 25, 64 - 13)
    assert cut.grid.origin_nm == (0.0, 13 * 8.0, 13 * 8.0)
    predict_regions(trained, [cut], tmp_path / "out")
    assert labels(tmp_path / "out/demo/crop1").shape == (3, 2, 25, 51)
    for box, message in (([(0, 1), (5, 5), (0, 9)], "start below stop"), ([(9e6, 1e7), (0, 9), (0, 9)], "outside")):
        with pytest.raises(DataError, match=message):
            cut_roi(whole, box)


@pytest.mark.parametrize("first", [0, 4, 5])
def test_a_box_of_n_voxels_lengths_holds_n_voxels_wherever_it_begins(first: int) -> None:
    """Its ends lie half way between corners of voxels, where rounding to even would take one more or less."""
    whole = Region("", Path("em"), Grid((20, 1024, 1024), (50.0, 4.6, 4.6), (0.0, 0.0, 0.0)))
    cut = cut_roi(whole, [(50.0 * first, 50.0 * (first + 5)), (2355.2, 3532.8), (2355.2, 3532.8)])
    assert cut.grid.shape_zyx == (5, 256, 256)
    assert cut.grid.origin_nm == pytest.approx((50.0 * first, 2355.2, 2355.2))


@pytest.mark.parametrize("ending", [".tif", ".h5"])
@pytest.mark.parametrize("source", [".tif", ".h5"])
def test_a_file_goes_in_and_a_file_of_the_same_shape_comes_out(
    place: Path, trained: Trained, tmp_path: Path, source: str, ending: str
) -> None:
    reader = store.ArrayReader(region(place).em / "s0", store.ChunkCache(0))
    em = reader.read(Box((0, 0, 0), (3, 50, 70)))
    spec = str(tmp_path / f"em{source}")
    if source == ".tif":
        tifffile.imwrite(spec, em, photometric="minisblack")
    else:
        with h5py.File(spec, "w") as file:
            file["raw"] = em
        spec += ":raw"
    one = file_region(trained.plan, spec, tmp_path / "scratch")
    assert one.copy_of is not None
    assert one.grid.shape_zyx == em.shape
    assert one.grid.voxel_size_nm == trained.plan.em_voxel_size_nm, "a file that declares none has the plan's"
    predict_regions(trained, [one], tmp_path / "z", probabilities=True)
    out = tmp_path / f"labels{ending}"
    export_labels(tmp_path / "z", one.grid, trained.plan, out, probabilities=True)
    masks = labels(tmp_path / "z")
    expected = label_map(masks, labels(tmp_path / "z", "probabilities"), trained.plan.classes)
    if ending == ".tif":
        found = tifffile.imread(out)
        graded = tifffile.imread(tmp_path / f"labels-{NAMES[0]}-probability.tif")
    else:
        with h5py.File(out) as file:
            found, graded = file["labels"][:], file[f"{NAMES[0]}_probability"][:]
            assert all(np.array_equal(file[name][:], masks[k]) for k, name in enumerate(NAMES))
            assert list(file["labels"].attrs["class_names"]) == ["none", *NAMES], "its value is its place"
            assert file["labels"].attrs["resolution"].tolist() == list(one.grid.voxel_size_nm)
    assert found.shape == em.shape
    assert np.array_equal(found, expected)
    assert len(np.unique(found)) > 1
    assert np.array_equal(graded, labels(tmp_path / "z", "probabilities")[0])


def test_a_network_of_coarser_voxels_takes_a_plain_file_at_the_size_of_its_em(place: Path, tmp_path: Path) -> None:
    changes = {"optimizer.num_steps": 2, "validation.num_rounds": 1, "voxel_size_nm": (40.0, 16.0, 16.0)}
    changes |= {"patch_size_zyx": (1, 32, 32), "sliding_window.tile_zyx": (1, 32, 32)}
    plan = tiny_plan(place / "data", place / "cache", changes)
    train_on(plan, place / "data", tmp_path / "run", cache=place / "cache")
    em = np.random.default_rng(0).integers(1, 255, (3, 50, 71), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "em.tif", em, photometric="minisblack")
    trained = open_run(tmp_path / "run", "last", "cpu")
    one = file_region(trained.plan, str(tmp_path / "em.tif"), tmp_path / "scratch")
    assert one.grid.voxel_size_nm == (40.0, 8.0, 8.0)
    predict_regions(trained, [one], tmp_path / "z", probabilities=True)
    fine = labels(tmp_path / "z", "probabilities").astype(int)
    assert fine.shape[1:] == em.shape
    assert (fine[..., 0:70:2] != fine[..., 1:70:2]).any(), "interpolated, not repeated"


def test_em_without_crops_is_predicted_whole(place: Path, trained: Trained, tmp_path: Path) -> None:
    data = shutil.copytree(place / "data", tmp_path / "bare")
    shutil.rmtree(data / "demo/demo.zarr/recon-1/labels")
    dataset = open_dataset(data)
    (one,) = volume_regions(dataset)
    assert one.grid.shape_zyx == (4, 64, 128)
    predict_regions(trained, [one], tmp_path / "out")
    whole = labels(tmp_path / "out/demo")
    predict_regions(trained, [region(place)], tmp_path / "crop")
    agree = whole[..., :64] == labels(tmp_path / "crop/demo/crop1")
    assert agree.mean() > 0.97, "the voxels of a crop do not depend on where the region ends, but for tile layout"


# ---- whose output is it -------------------------------------------------------------------------------------


def test_an_output_of_another_run_option_or_hand_is_refused_and_left_alone(
    place: Path, trained: Trained, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict_regions(trained, [region(place)], out)
    before = snapshot(out)
    other = trained._replace(identity="another run")
    for attempt, probabilities in ((other, False), (trained, True)):
        with pytest.raises(CheckpointError, match=r"begun by another run, checkpoint or option: choose another --out"):
            predict_regions(attempt, [region(place)], out, probabilities=probabilities)
    assert snapshot(out) == before
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_bytes(b"meow")
    with pytest.raises(CheckpointError, match="is not a prediction of autoseg"):
        predict_regions(trained, [region(place)], photos)
    assert [p.name for p in photos.iterdir()] == ["cat.png"]


def test_an_output_of_other_em_or_another_box_is_refused(place: Path, trained: Trained, tmp_path: Path) -> None:
    """Its blocks have the same places, so the ledger alone would call them done."""
    em = em_path(place / "data", "demo")
    first = Region("", em, Grid((1, 32, 32), (40.0, 8.0, 8.0), (0.0, 0.0, 0.0)))
    predict_regions(trained, [first], tmp_path / "out")
    before = snapshot(tmp_path / "out")
    shifted = first._replace(grid=first.grid._replace(origin_nm=(40.0, 80.0, 80.0)))
    copied = Path(shutil.copytree(em, tmp_path / "other-em"))
    for other in (shifted, first._replace(em=copied)):
        with pytest.raises(CheckpointError, match=r"begun from other EM or for another box: choose another --out"):
            predict_regions(trained, [other], tmp_path / "out")
    assert snapshot(tmp_path / "out") == before
    predict_regions(trained, [first], tmp_path / "out")


def test_an_output_of_a_file_is_finished_after_its_copy_is_gone_and_refused_after_the_file_changed(
    trained: Trained, tmp_path: Path
) -> None:
    file, out = tmp_path / "em.tif", tmp_path / "out"
    tifffile.imwrite(file, np.full((2, 32, 40), 90, dtype=np.uint8), photometric="minisblack")
    first, second = (file_region(trained.plan, str(file), tmp_path / name) for name in ("a", "b"))
    predict_regions(trained, [first], out)
    drop_copy(first)
    assert list((tmp_path / "a").iterdir()) == []
    predict_regions(trained, [second], out)
    tifffile.imwrite(file, np.full((2, 32, 40), 91, dtype=np.uint8), photometric="minisblack")
    with pytest.raises(CheckpointError, match="begun from other EM"):
        predict_regions(trained, [file_region(trained.plan, str(file), tmp_path / "a")], out)
    own = file_region(trained.plan, str(second.em), tmp_path / "a")
    drop_copy(own)
    assert own.em.is_dir(), "a zarr is the user's own, wherever it lies"


def test_more_crops_can_be_added_to_an_output(place: Path, trained: Trained, tmp_path: Path) -> None:
    predict_regions(trained, [region(place, 1)], tmp_path / "out")
    predict_regions(trained, [region(place, 1), region(place, 2)], tmp_path / "out")
    assert labels(tmp_path / "out/demo/crop2").shape == (3, 4, 64, 64)


# ---- runs, crops, decoding ----------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_or_has_no_such_checkpoint_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run"):
        open_run(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_run(place / "run", str(tmp_path / "x"))
    broken = Path(shutil.copytree(place / "run", tmp_path / "broken"))
    weights = broken / "checkpoints/best/weights.safetensors"
    weights.unlink()
    weights.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        open_run(broken, "best")
    assert open_run(broken, "last").checkpoint.startswith("last (step 40")


@pytest.mark.parametrize("device", ["quantum", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(place: Path, device: str) -> None:
    with pytest.raises(PlanError, match=f"--device {device}: .*use "):
        open_run(place / "run", "last", device)


def test_a_run_of_a_gpu_in_fp16_predicts_on_a_cpu_but_does_not_train_there(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    half = msgspec.structs.replace(load_as(run / "plan.json", Plan), precision="fp16", device="cuda")
    save(half, run / "plan.json")
    with pytest.raises(PlanError, match="fp16, which the CPU lacks"):
        device_of("cpu", half)
    trained = open_run(run, "last", "cpu")
    assert (trained.predictor.device.type, trained.plan.precision) == ("cpu", "fp32")
    if not torch.cuda.is_available():
        assert open_run(run, "last").predictor.device.type == "cpu"
        with pytest.raises(PlanError, match="planned for a GPU, and there is none here: use --device cpu"):
            device_of("auto", half)


def test_prediction_uses_the_averaged_weights(place: Path, trained: Trained) -> None:
    from autoseg.model.checkpoint import load_tensors

    averaged = load_tensors(place / "run/checkpoints/last/weights.safetensors")
    assert all(torch.equal(v, averaged[k]) for k, v in trained.predictor.network.state_dict().items())
    assert not trained.predictor.network.training


def test_crops_are_chosen_by_number_or_by_side(place: Path, trained: Trained) -> None:
    dataset = open_dataset(place / "data")
    assert [r.name for r in crop_regions(trained.plan.split, dataset, "all")] == ["demo/crop1", "demo/crop2"]
    assert [r.name for r in crop_regions(trained.plan.split, dataset, "2")] == ["demo/crop2"]
    assert [r.name for r in crop_regions(trained.plan.split, dataset, "1, 2")] == ["demo/crop1", "demo/crop2"]
    validating = {r.crop for r in trained.plan.split.validate}
    assert {r.name for r in crop_regions(trained.plan.split, dataset, "validate")} == validating
    with pytest.raises(DataError, match="no crop9"):
        crop_regions(trained.plan.split, dataset, "1,9")


def test_a_number_of_two_crops_is_refused_and_a_name_tells_which(place: Path, trained: Trained) -> None:
    dataset = open_dataset(place / "data")
    twin = dataset.crops[0]._replace(name="other/crop1")
    dataset = dataset._replace(crops=(*dataset.crops, twin))
    with pytest.raises(DataError, match="--crops 2,1: 1 is demo/crop1 and other/crop1: name the one, such as demo"):
        crop_regions(trained.plan.split, dataset, "2,1")
    assert [r.name for r in crop_regions(trained.plan.split, dataset, "2, other/crop1")] == [
        "demo/crop2",
        "other/crop1",
    ]


def maps_of(classes: tuple[ClassEntry, ...], probability_KX: list[list[int]]) -> tuple[list[int], list[str]]:
    """Return the map where a class is called from 100 on, and what is said of covered classes."""
    probability = np.array(probability_KX, dtype=np.uint8)[:, None, None]
    masks = (probability >= 100).astype(np.uint8)
    found = label_map(masks, probability, classes)
    return found.ravel().tolist(), covered(count_shown(masks, found), classes)


def test_a_label_map_shows_a_part_before_its_composites_then_the_most_probable() -> None:
    classes = (
        ClassEntry(name="cell", components=("nuc", "b", "c")),
        ClassEntry(name="b"),
        ClassEntry(name="a"),
        ClassEntry(name="nuc", components=("a",)),
    )
    cell, b = [250, 250, 250, 0, 0, 0, 250], [0, 0, 140, 0, 130, 0, 0]
    a, nuc = [0, 0, 130, 0, 130, 120, 0], [0, 120, 250, 0, 110, 250, 0]
    found, said = maps_of(classes, [cell, b, a, nuc])
    assert found == [1, 4, 2, 0, 2, 3, 1], "of equal ones the first in plan order"
    assert said == ["a: 3 voxels, 67% covered by b"]
    stranger = (ClassEntry(name="ecs"), ClassEntry(name="nuc", components=("a",)))
    assert maps_of(stranger, [[110, 200], [120, 120]])[0] == [2, 1], "a stranger is no part"


def test_a_class_that_the_label_map_covers_is_named() -> None:
    classes = (ClassEntry(name="pm"), ClassEntry(name="mito"), ClassEntry(name="ecs"))
    assert maps_of(classes, [[0, 0, 0], [120, 110, 0], [200, 200, 200]])[1] == ["mito: 2 voxels, all covered by ecs"]
    assert maps_of(classes, [[0, 0, 0], [120, 110, 0], [0, 200, 200]])[1] == [], "half of it is there"
    pm, mito, ecs = [200, 200, 0, 0], [110, 110, 110, 110], [0, 0, 200, 0]
    assert maps_of(classes, [pm, mito, ecs])[1] == ["mito: 4 voxels, 75% covered, most by pm"]
    assert maps_of(classes, [[0], [0], [0]])[1] == []
    nested = (ClassEntry(name="nuc", components=("a", "b")), ClassEntry(name="a"), ClassEntry(name="b"))
    assert maps_of(nested, [[200, 200, 200], [110, 110, 0], [0, 0, 0]])[1] == [], "its parts belong to it"
    assert maps_of(nested, [[200, 200], [110, 0], [0, 110]])[1] == ["nuc: 2 voxels, all shown as its parts"]


def test_a_label_map_does_not_depend_on_the_tiles_it_is_made_of(
    place: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = region(place)._replace(name="")
    predict_regions(trained, [one], tmp_path / "z", probabilities=True)
    said = export_labels(tmp_path / "z", one.grid, trained.plan, tmp_path / "a.tif", probabilities=False)
    monkeypatch.setattr(export, "TILE_EDGE", 24)
    monkeypatch.setattr(export, "SLAB_DEPTH", 3)
    assert export_labels(tmp_path / "z", one.grid, trained.plan, tmp_path / "b.tif", probabilities=False) == said
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), tifffile.imread(tmp_path / "b.tif"))


def test_the_threshold_counts_as_present() -> None:
    probability = np.array([0.49, 0.5, 0.51], dtype=np.float32).reshape(1, 1, 1, 3)
    assert to_labels(probability, np.array([0.5])).ravel().tolist() == [0, 1, 1]


def test_a_volume_in_a_zarr_is_found_by_its_container_or_its_group(
    place: Path, trained: Trained, tmp_path: Path
) -> None:
    group = em_path(place / "data", "demo")
    by_group = file_region(trained.plan, str(group), tmp_path)
    by_container = file_region(trained.plan, str(place / "data/demo/demo.zarr"), tmp_path)
    assert by_group == by_container
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(DataError, match=r"empty\.zarr: holds no OME-Zarr image: .*: pass the folder of one, such as"):
        file_region(trained.plan, str(tmp_path / "empty.zarr"), tmp_path)
    assert msgspec.structs.asdict(trained.plan)["name"] == "tiny"


def test_a_zarr_that_is_no_image_is_told_what_it_lacks(place: Path, trained: Trained, tmp_path: Path) -> None:
    def fault(folder: Path) -> str:
        with pytest.raises(DataError) as caught:
            file_region(trained.plan, str(folder), tmp_path)
        return str(caught.value)

    group = em_path(place / "data", "demo")
    assert fault(group / "s0") == f"{group}/s0: is one resolution of an image: pass the folder around it: {group}"
    bare = Path(shutil.copytree(group / "s0", tmp_path / "bare.zarr/raw"))
    assert "bare.zarr: holds voxels, but not how large they are" in fault(bare.parent)
    for junk in (bare, bare.parent):
        (junk / ".zarray").write_text("{junk")
        assert fault(junk).startswith(f"{junk}/.zarray: is not readable JSON")
    twins = tmp_path / "twins.zarr"
    for name in ("a", "b"):
        shutil.copytree(group, twins / name)
    assert fault(twins) == f"{twins}: holds 2 images: a, b: pass one of them, such as {twins}/a"


def test_the_only_image_of_a_zarr_of_format_3_is_found(trained: Trained, tmp_path: Path) -> None:
    group = write_multiscale(
        tmp_path / "v3.zarr/raw", [(Grid((2, 8, 8), (40.0, 8.0, 8.0), (0.0, 0.0, 0.0)), np.ones((2, 8, 8), np.uint8))]
    )
    attributes = json.loads((group / ".zattrs").read_text())
    (group / ".zattrs").unlink()
    (group / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"ome": attributes}})
    )
    assert file_region(trained.plan, str(tmp_path / "v3.zarr"), tmp_path).em == group
