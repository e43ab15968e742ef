"""The main job through the front door: TIFF in, plan, train, predict, score, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from scipy import ndimage
from test_planner import machine

from autoseg.cli import main
from autoseg.schema import Fingerprint, Plan, Scores, load_as, read_json_lines, save

SETTINGS = (
    "network.features=8,16",
    "patch_size_zyx=1,32,32",
    "batch_size=4",
    "num_threads=1",
    "optimizer.num_steps=120",
    "optimizer.learning_rate=0.01",
    "precision=fp32",
    "validation.num_rounds=2",
    "augmentation.preset=flips",
    "sliding_window.mirror_axes=",
    "sliding_window.transpose_yx=false",
)


def write_volume(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write (EM, labels) as TIFF: bright mito (2), dark membranes (1) and background."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((4, 64, 128)), (1, 4, 4))
    labels = np.digitize(field / field.std(), [-0.7, 0.7]).astype(np.uint8)
    labels = np.array([1, 0, 2], dtype=np.uint8)[labels]
    em = np.array([120, 50, 190])[labels] + rng.normal(0, 15, labels.shape)
    paths = folder / f"em-{seed}.tif", folder / f"labels-{seed}.tif"
    tifffile.imwrite(paths[0], np.clip(em, 1, 255).astype(np.uint8), photometric="minisblack")
    tifffile.imwrite(paths[1], labels, photometric="minisblack")
    return paths


def test_from_tiff_to_scores_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")
    save(machine(threads=1), tmp_path / "machine.json")

    def run(*arguments: str) -> Any:
        code = main([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    for name, seed in (("data", 0), ("unseen", 1)):
        em, labels = write_volume(tmp_path, seed)
        cut = ("--grid", "1", "1", "2") if name == "data" else ()
        values = ("--values", "pm=1", "mito=2", "--voxel-size-nm", "40", "8", "8")
        imported = run("import", name, "--name", "vol", "--em", str(em), "--labels", str(labels), *values, *cut)
        assert len(imported["crops"]) == (2 if cut else 1)

    facts = run("fingerprint", "data", "--out", "f.json")
    assert {entry["name"] for entry in facts["classes"]} == {"pm", "mito"}
    assert load_as(tmp_path / "f.json", Fingerprint).crops[0].counts["mito"].present > 0

    settings = [word for text in SETTINGS for word in ("--set", text)]
    run("plan", "--fingerprint", "f.json", "--hardware", "machine.json", "--out", "plans/p.json", *settings)
    plan = load_as(tmp_path / "plans/p.json", Plan)
    assert plan.name == "p"
    assert plan.optimizer.num_steps == 120

    outcome = run("train", "--plan", "plans/p.json")
    assert outcome["run"] == "runs/p"
    assert outcome["step"] == 120
    steps = [line["step"] for line in read_json_lines(tmp_path / "runs/p/log.jsonl") if "loss" in line]
    assert steps == list(range(1, 121))

    predicted = run("predict", "--run", "runs/p", "--volume", str(tmp_path / "em-1.tif"), "--out", "labels.tif")
    assert predicted["out"] == "labels.tif"
    found = tifffile.imread(tmp_path / "labels.tif")
    truth = tifffile.imread(tmp_path / "labels-1.tif")
    assert found.shape == truth.shape
    number = {name: k for k, name in enumerate(plan.class_names, start=1)}
    assert ((found == number["mito"]) == (truth == 2)).mean() > 0.85
    assert not list(tmp_path.glob(".labels*")), "the zarr in between is gone"

    scores = run("evaluate", "--run", "runs/p", "--data", "unseen", "--per-class", "--out", "scores.json")
    assert scores["mean_dice"] > 0.7
    assert load_as(tmp_path / "scores.json", Scores).per_class["mito"].dice == scores["per_class"]["mito"]["dice"]
    assert {row["crop"] for row in scores["rows"]} == {"vol/crop1"}

    run("predict", "--run", "runs/p", "--data", "unseen", "--out", "unseen.zarr")
    again = run("evaluate", "--run", "runs/p", "--data", "unseen", "--pred", "unseen.zarr", "--against", "scores.json")
    assert [row | {"crop": 0} for row in again["rows"]] == [row | {"crop": 0} for row in scores["rows"]]

    report = run("report", "runs/p", "--scores", "scores.json")
    page = (tmp_path / report["report"]).read_text()
    assert "<html" in page.lower()
    assert "mito" in page
    assert not [word for word in ('src="http', "src='http", 'href="http') if word in page], "self-contained"
