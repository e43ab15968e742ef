"""Scores: the counts of a brute-force loop, over voxels that the run has not learnt from and that are known."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from strategies import crop_path, em_path, make_dataset
from test_planner import tiny_plan
from test_training import StopAt

from autoseg.data import store
from autoseg.data.classes import ABSENT, PRESENT, UNKNOWN, Logic
from autoseg.data.codes import open_codes
from autoseg.data.dataset import open_dataset
from autoseg.data.em import EmReader, valid_voxels
from autoseg.errors import DataError, PlanError
from autoseg.evaluate import Scored, score_labels, summarize
from autoseg.geometry import Box
from autoseg.model import windows
from autoseg.predict import Region, open_run, predict_regions
from autoseg.recipes.training import split_of, train_on
from autoseg.recipes.validate import evaluate_run
from autoseg.schema import Normalization, ScoreRow, Scores, load, save

NAMES = ("mito", "er_mem", "pm")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `data`, `cache`, and `run`."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = make_dataset(folder / "data", shape=(4, 64, 64))
    train_on(tiny_plan(data, folder / "cache"), data, folder / "run", cache=folder / "cache")
    return folder


def write_prediction(out: Path, crop: str, masks: dict[str, NDArray[np.uint8]]) -> None:
    for name, mask in masks.items():
        z, y, x = mask.shape
        array = store.create_array(out / crop / name / "s0", (z, y, x), np.uint8, (1, 32, 32))
        array[:] = mask


def truth_of(data: Path, crop: str, cache: Path) -> dict[str, NDArray[np.uint8]]:
    """Return the state of every voxel for each class, voxel by voxel from the raw arrays and the class table."""
    dataset = open_dataset(data)
    found = dataset.crop(crop)
    codes = open_codes(found, found.grid.voxel_size_nm, cache)
    logic = Logic(dataset.table)
    states, _ = logic.complete(logic.rows(codes.states_CK, codes.names))
    return {name: states[codes.codes_ZYX, k] for name, k in zip(NAMES, logic.columns(NAMES), strict=True)}


def test_counts_and_ratios_are_those_of_a_brute_force_loop(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.evaluate.scores.BLOCK", (2, 20, 30))  # several blocks a crop
    rng = np.random.default_rng(0)
    dataset = open_dataset(place / "data")
    box = Box((1, 3, 5), (4, 50, 61))
    targets, expected = [], {}
    for crop in dataset.crops:
        masks = {name: rng.integers(0, 2, crop.grid.shape_zyx).astype(np.uint8) for name in NAMES}
        write_prediction(tmp_path / "out", crop.name, masks)
        targets.append(Scored(crop, box, tmp_path / "out" / crop.name))
        for name, states in truth_of(place / "data", crop.name, place / "cache").items():
            tp = fp = fn = 0
            for truth, mask in zip(
                states[box.slices].ravel().tolist(), masks[name][box.slices].ravel().tolist(), strict=True
            ):
                tp += truth == PRESENT and mask == 1
                fp += truth == ABSENT and mask == 1
                fn += truth == PRESENT and mask == 0
            expected[crop.name, name] = (tp, fp, fn)
    scores = score_labels(dataset, targets, NAMES, place / "cache")
    assert {(row.crop, row.class_): (row.tp, row.fp, row.fn) for row in scores.rows} == expected
    dice = []
    for name in NAMES:
        tp, fp, fn = (sum(expected[crop.name, name][i] for crop in dataset.crops) for i in range(3))
        score = scores.per_class[name]
        assert score.dice == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert score.iou == pytest.approx(tp / (tp + fp + fn))
        assert score.precision == pytest.approx(tp / (tp + fp))
        assert score.recall == pytest.approx(tp / (tp + fn))
        dice.append(score.dice)
    assert scores.mean_dice == pytest.approx(np.mean(dice))


def test_raw_label_values_agree_with_what_is_counted(place: Path, tmp_path: Path) -> None:
    """Predicting the annotation itself scores 1, its inverse 0, whatever stands in unknown voxels."""
    dataset = open_dataset(place / "data")
    crop = dataset.crop("demo/crop1")
    for level, expected in ((1, 1.0), (0, 0.0)):
        masks = {}
        for name in NAMES:
            reader = store.ArrayReader(crop_path(place / "data", "demo", "crop1") / name / "s0", store.ChunkCache(0))
            raw = reader.read(Box.whole(reader.shape_zyx))
            masks[name] = np.where(raw == 255, 1, (raw == 1) == bool(level)).astype(np.uint8)
            assert (raw == 255).any()
        write_prediction(tmp_path / str(level), crop.name, masks)
        target = Scored(crop, Box.whole(crop.grid.shape_zyx), tmp_path / str(level) / crop.name)
        scores = score_labels(dataset, [target], NAMES, place / "cache")
        assert [scores.per_class[name].dice for name in NAMES] == [expected] * 3


def test_a_class_with_nothing_to_measure_is_null_and_not_in_the_mean() -> None:
    rows = [
        ScoreRow(crop="a/crop1", class_="mito", tp=5, fp=5, fn=0),
        ScoreRow(crop="a/crop1", class_="pm", tp=0, fp=0, fn=0),
        ScoreRow(crop="a/crop1", class_="er", tp=0, fp=3, fn=0),
    ]
    scores = summarize(rows, "m")
    assert scores.per_class["pm"].dice is None
    assert scores.per_class["pm"].precision is None
    assert scores.per_class["er"].dice == 0
    assert scores.per_class["er"].recall is None
    assert scores.mean_dice == pytest.approx((10 / 15 + 0) / 2)
    assert summarize([], "m").mean_dice is None


def test_counts_are_pooled_over_crops_before_dividing() -> None:
    rows = [
        ScoreRow(crop=f"a/crop{i}", class_="mito", tp=tp, fp=0, fn=fn) for i, (tp, fn) in enumerate([(90, 10), (0, 10)])
    ]
    assert summarize(rows, "m").per_class["mito"].dice == pytest.approx(180 / 200)


# ---- what a run may be judged on ----------------------------------------------------------------------------


def test_data_that_the_run_has_seen_scores_only_on_validation_boxes(place: Path) -> None:
    judged = evaluate_run(place / "run", place / "data", cache=place / "cache")
    (region,) = split_of(place / "run").validate
    assert {row.crop for row in judged.scores.rows} == {region.crop}
    shape = open_dataset(place / "data").crop(region.crop).grid.shape_zyx
    box = region.box(shape)
    assert box.num_voxels < math.prod(shape)
    states = truth_of(place / "data", region.crop, place / "cache")
    for row in judged.scores.rows:
        assert row.tp + row.fn == (states[row.class_][box.slices] == PRESENT).sum()
    assert "the validation regions (1)" in judged.on
    assert judged.scores.run == str(place / "run")
    assert judged.scores.checkpoint is not None
    assert judged.scores.checkpoint.startswith("best")


def test_a_run_that_does_not_say_what_it_learnt_from_is_not_scored(place: Path, tmp_path: Path) -> None:
    """Without its fingerprint every crop would look unseen, the training crops too."""
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    (run / "fingerprint.json").unlink()
    with pytest.raises(PlanError, match=r"no fingerprint\.json"):
        evaluate_run(run, place / "data", cache=place / "cache")


def test_more_em_fetched_into_the_runs_own_data_does_not_make_it_unseen(place: Path, tmp_path: Path) -> None:
    """Grey values are measured on the chunks that are there; in the run's own folder the name decides."""
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    text = (run / "fingerprint.json").read_text()
    other = json.loads(text)
    for volume in other["volumes"]:
        volume["intensity"]["mean"] *= 1.3
    (run / "fingerprint.json").write_text(json.dumps(other))
    judged = evaluate_run(run, place / "data", cache=place / "cache")
    assert "validation regions" in judged.on


def test_a_second_data_set_with_the_same_names_but_other_content_scores_whole(place: Path, tmp_path: Path) -> None:
    second = make_dataset(tmp_path / "data", seed=9, shape=(4, 64, 64))
    judged = evaluate_run(place / "run", second, cache=place / "cache")
    assert {row.crop for row in judged.scores.rows} == {"demo/crop1", "demo/crop2"}
    assert "which the run has not seen" in judged.on
    assert f"EM that the plan did not measure, with its own grey values: {second}" in judged.on
    for row in judged.scores.rows:
        states = truth_of(second, row.crop, place / "cache")[row.class_]
        assert row.tp + row.fn == (states == PRESENT).sum()
    path = tmp_path / "scores.json"
    save(judged.scores, path)
    assert load(path) == judged.scores


def test_a_copy_of_the_training_data_counts_as_seen(place: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(place / "data", tmp_path / "copy"))
    judged = evaluate_run(place / "run", copy, cache=place / "cache")
    assert "validation regions" in judged.on
    assert "did not measure" not in judged.on


def test_crops_renamed_so_that_a_taught_one_has_the_name_of_a_validated_one_do_not_count(
    place: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(place / "data", tmp_path / "copy"))
    (region,) = split_of(place / "run").validate
    validated, taught = region.crop.split("/")[1], {"crop1": "crop2", "crop2": "crop1"}[region.crop.split("/")[1]]
    shutil.rmtree(crop_path(copy, "demo", validated))
    crop_path(copy, "demo", taught).rename(crop_path(copy, "demo", validated))
    with pytest.raises(PlanError, match="trained on every crop"):
        evaluate_run(place / "run", copy, cache=place / "cache")


def test_the_same_em_with_fewer_classes_counts_as_seen(place: Path, tmp_path: Path) -> None:
    """Its label counts differ, but its voxels were learnt from."""
    copy = Path(shutil.copytree(place / "data", tmp_path / "copy"))
    for crop in ("crop1", "crop2"):
        shutil.rmtree(crop_path(copy, "demo", crop) / "er_mem")
    judged = evaluate_run(place / "run", copy, cache=place / "cache")
    (region,) = split_of(place / "run").validate
    assert {row.crop for row in judged.scores.rows} == {region.crop}
    assert "validation regions" in judged.on


def test_a_run_without_validation_on_its_own_data_has_nothing_to_be_judged_on(place: Path, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", seed=3, shape=(2, 64, 64))
    plan = tiny_plan(data, place / "cache", {"optimizer.num_steps": 2, "split.validate": ()})
    train_on(plan, data, tmp_path / "run", cache=place / "cache")
    with pytest.raises(PlanError, match=r"trained on every crop .*second DATA"):
        evaluate_run(tmp_path / "run", data, cache=place / "cache")


def test_scoring_twice_predicts_once_and_changed_data_is_predicted_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoseg.predict import blocks

    genuine, calls = blocks._RegionWriter.write, list[Box]()

    def write(self: blocks._RegionWriter, block: Box) -> str:
        calls.append(block)
        return genuine(self, block)

    monkeypatch.setattr(blocks._RegionWriter, "write", write)
    data = make_dataset(tmp_path / "data", seed=11, shape=(2, 64, 64))
    first = evaluate_run(place / "run", data, cache=place / "cache").scores
    assert calls
    calls.clear()
    assert evaluate_run(place / "run", data, cache=place / "cache").scores == first
    assert calls == []
    shutil.rmtree(data)
    make_dataset(data, seed=12, shape=(2, 64, 64))
    assert evaluate_run(place / "run", data, cache=place / "cache").scores.rows != first.rows
    assert calls, "the labels of the data that was there before must not be scored"


def test_given_labels_are_scored_as_they_are_and_missing_ones_are_named(place: Path, tmp_path: Path) -> None:
    second = make_dataset(tmp_path / "data", seed=9, shape=(2, 64, 64))
    for crop in ("demo/crop1", "demo/crop2"):
        write_prediction(tmp_path / "out", crop, {name: np.ones((2, 64, 64), dtype=np.uint8) for name in NAMES})
    judged = evaluate_run(place / "run", second, prediction=tmp_path / "out", cache=place / "cache")
    assert all(score.recall == 1 for score in judged.scores.per_class.values())
    assert judged.scores.checkpoint == "given labels"
    shutil.rmtree(tmp_path / "out/demo/crop2/pm")
    with pytest.raises(DataError, match="has no prediction of pm"):
        evaluate_run(place / "run", second, prediction=tmp_path / "out", cache=place / "cache")
    write_prediction(tmp_path / "out", "demo/crop2", {"pm": np.ones((2, 32, 64), dtype=np.uint8)})
    with pytest.raises(DataError, match=r"shape \(2, 32, 64\), the crop has \(2, 64, 64\)"):
        evaluate_run(place / "run", second, prediction=tmp_path / "out", cache=place / "cache")


def test_an_unfinished_or_gutted_prediction_is_not_scored(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "BLOCK_BYTES", 1)
    second, out = make_dataset(tmp_path / "data", seed=9, shape=(2, 64, 64)), tmp_path / "out"
    trained = open_run(place / "run", "last", "cpu")
    regions = [Region(crop.name, crop.em, crop.grid) for crop in open_dataset(second).crops]

    def evaluate() -> Scores:
        return evaluate_run(place / "run", second, prediction=out, cache=place / "cache").scores

    predict_regions(trained, regions, out)
    expected = evaluate()
    ledger = out / ".autoseg/ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=f"1 of {len(lines) // 2} blocks of demo/crop2 are missing"):
        evaluate()
    predict_regions(trained, regions, out)
    assert evaluate() == expected
    for chunk in (out / "demo/crop1").glob("*/s0/[0-9]*"):
        shutil.rmtree(chunk)
    with pytest.raises(DataError, match=r"blocks of demo/crop1 are missing.*run the same `autoseg predict` again"):
        evaluate()
    shutil.rmtree(out / ".autoseg")
    assert evaluate() != expected, "labels without a ledger are the user's, and scored as they are"


def test_voxels_under_em_that_was_never_fetched_do_not_count(place: Path, tmp_path: Path) -> None:
    """Training masks them and prediction writes 0 there, so they would all be false negatives."""
    second = make_dataset(tmp_path / "data", seed=9, shape=(70, 64, 64))
    for level in em_path(second, "demo").glob("s*"):
        shutil.rmtree(level / "0", ignore_errors=True)
    evaluated = evaluate_run(place / "run", second, cache=place / "cache")
    assert "; 524,288 voxels do not count: the EM under them was never fetched" in evaluated.on  # 2 crops of 64^3
    for row in evaluated.scores.rows:
        states = truth_of(second, row.crop, place / "cache")[row.class_][64:]
        assert row.tp + row.fn == (states == PRESENT).sum()
    assert sum(row.tp + row.fn for row in evaluated.scores.rows) > 0
    whole = make_dataset(tmp_path / "whole", seed=9, shape=(2, 64, 64))
    assert "never fetched" not in evaluate_run(place / "run", whole, cache=place / "cache").on


def test_which_voxels_have_em_is_what_the_reader_of_em_says(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", shape=(8, 130, 130), crops=1)
    shutil.rmtree(em_path(data, "demo") / "s0/0/1")
    for level in list(em_path(data, "demo").glob("s[1-9]")):
        shutil.rmtree(level)
    (crop,) = open_dataset(data).crops
    for size in ((40.0, 8.0, 8.0), (40.0, 16.0, 16.0)):
        grid = crop.grid.at_voxel_size(size)
        levels = [
            (level.grid, store.ArrayReader(level.path, store.ChunkCache(0)))
            for level in store.open_multiscale(crop.em).levels_for(size)
        ]
        found = valid_voxels(levels, grid)
        _, expected = EmReader(crop.em, size, Normalization(kind="dtype", volumes=()), store.ChunkCache(0)).read(grid)
        assert found is not None
        assert expected is not None
        assert np.array_equal(found, expected)
        assert 0.3 < found.mean() < 0.7


def test_data_without_any_class_of_the_plan_is_refused(place: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "data", classes=("nuc",))
    with pytest.raises(DataError, match="annotates none of"):
        evaluate_run(place / "run", other, cache=place / "cache")


def test_a_stopped_run_is_judged_by_the_checkpoint_it_has(place: Path, tmp_path: Path) -> None:
    plan = tiny_plan(place / "data", place / "cache", {"validation.num_rounds": 1})
    train_on(plan, place / "data", tmp_path / "run", cache=place / "cache", observer=StopAt(3))
    judged = evaluate_run(tmp_path / "run", place / "data", which="last", cache=place / "cache")
    assert judged.scores.checkpoint == "last (step 3)"
    assert UNKNOWN == 2
