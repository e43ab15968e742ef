"""The benchmarks run: on tiny data, so that they cannot rot. Their numbers mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from strategies import child_environment, crop_path, em_path, listing

from autoseg.data.dataset import open_dataset
from autoseg.data.em import EmReader, read_input
from autoseg.data.store import ArrayReader, ChunkCache, open_multiscale
from autoseg.geometry import Box
from autoseg.schema import Normalization

FOLDER = Path(__file__).parent / "benchmarks"
CLASSES = 18  # mito, er and golgi among them, composites of the first fourteen


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a generated data set: three crops of 32³ in two volumes, chunks of 16³."""
    out = tmp_path_factory.mktemp("bench") / "crops"
    options = ["--crops", "3", "--edge", "32", "--classes", "18", "--chunk", "16", "--per-volume", "2", "--seed", "5"]
    run("make_crops.py", str(out), *options)
    return out


def run(script: str, *arguments: str) -> str:
    """Run a benchmark as its README says; return stdout."""
    command = [sys.executable, str(FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the benchmarks on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))


def voxels(root: Path, crop: str, name: str) -> np.ndarray:
    volume = "bench-1" if crop in ("crop1", "crop2") else "bench-2"
    array = ArrayReader(crop_path(root, volume, crop) / name / "s0", ChunkCache(2**24))
    return array.read(Box.whole(array.shape_zyx))


# ---- generated data -----------------------------------------------------------------------------------------


def test_generated_crops_are_read_in_place_and_lie_on_fetched_em(crops: Path) -> None:
    data = open_dataset(crops)
    assert [crop.name for crop in data.crops] == ["bench-1/crop1", "bench-1/crop2", "bench-2/crop3"]
    for crop in data.crops:
        assert crop.grid.shape_zyx == (32, 32, 32)
        assert len(crop.labels) == CLASSES
        em = EmReader(crop.em, crop.grid.voxel_size_nm, Normalization(kind="dtype", volumes=()), ChunkCache(2**24))
        image, valid = read_input(em, crop.grid, Box.whole(crop.grid.shape_zyx), 1)
        assert valid is None or valid.all()
        assert image.std() > 0.02
        assert image.min() > 0, "0 is what was never fetched"
    multiscale = open_multiscale(em_path(crops, "bench-1"))
    assert [level.grid.origin_nm[0] for level in multiscale.levels] == [0.0, 4.0], "translations are voxel centres"
    assert not ArrayReader(multiscale.levels[0].path, ChunkCache(0)).stored_chunks.all(), "a gap between the crops"


def test_generated_classes_nest_and_are_counted(crops: Path) -> None:
    for crop in ("crop1", "crop2", "crop3"):
        for composite, parts in (
            ("mito", ("mito_mem", "mito_lum", "mito_ribo")),
            ("golgi", ("golgi_mem", "golgi_lum")),
        ):
            union = np.any([voxels(crops, crop, part) for part in parts], axis=0)
            assert np.array_equal(voxels(crops, crop, composite) == 1, union)
        assert np.all(voxels(crops, crop, "er") >= voxels(crops, crop, "er_mem"))
        assert not np.any(voxels(crops, crop, "ecs") & voxels(crops, crop, "cyto"))
        counted = json.loads(
            (crop_path(crops, "bench-2" if crop == "crop3" else "bench-1", crop) / "cyto/s0/.zattrs").read_text()
        )
        absent = counted["cellmap"]["annotation"]["complement_counts"]["absent"]
        assert absent == int((voxels(crops, crop, "cyto") == 0).sum())


@pytest.mark.usefixtures("scripts")
def test_the_same_seed_makes_the_same_voxels_and_nothing_is_overwritten(tmp_path: Path) -> None:
    import make_crops

    def digest(seed: int, name: str) -> list[bytes]:
        made = make_crops.make_crops(tmp_path / name, crops=1, edge=16, classes=2, seed=seed, chunk=8)
        return [path.read_bytes() for path in sorted(made.rglob("*")) if path.is_file()]

    first = digest(1, "a")
    assert digest(1, "b") == first
    assert digest(2, "c") != first
    before = listing(tmp_path / "a")
    with pytest.raises(FileExistsError):
        make_crops.make_crops(tmp_path / "a", crops=1, edge=16, classes=2, chunk=8)
    assert listing(tmp_path / "a") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "no debris"


@pytest.mark.usefixtures("scripts")
def test_all_48_tested_classes_can_be_made() -> None:
    import make_crops

    assert len(make_crops.NAMES) == len(set(make_crops.NAMES)) == 48
    for name, lookup in make_crops.members(make_crops.NAMES).items():
        assert lookup.any(), name


# ---- measurements -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("scripts")
def test_the_loader_benchmark_runs_without_a_peer(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import loader

    out = tmp_path / "loader.json"
    monkeypatch.setenv("PYTHONPATH", child_environment().get("PYTHONPATH", ""))
    options = ["--tiny", "--repeats", "2", "--seconds", "0.1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["loader.py", str(crops), *options])
    loader.main()
    text = capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert len(result["autoseg"]["rounds"]) == 2
    assert result["autoseg"]["samples_per_cpu"] > 0
    assert "| 2D 16² |" in text
    assert "cellmap_data" not in result


@pytest.mark.usefixtures("scripts")
def test_rounds_count_samples_and_both_clocks() -> None:
    import rounds

    found = rounds.measure(iter([3] * 100), 0.0)
    assert found["samples"] == 3
    assert found["wall_s"] >= 0
    with pytest.raises(StopIteration):
        rounds.measure(iter([1, 1]), 60.0)


@pytest.mark.usefixtures("scripts")
def test_a_slope_is_told_from_a_level() -> None:
    memory = _memory()
    flat = [(n, memory.Memory(1000, 500, 100 + n)) for n in range(0, 100, 10)]
    found = memory.summary(memory.Memory(900, 450, 90), flat)
    assert found["rss"] == {
        "peak_beyond_torch": 100,
        "slope": pytest.approx(0, abs=1e-9),
        "slope_of_second_half": pytest.approx(0, abs=1e-9),
    }
    assert found["anonymous"]["slope"] == pytest.approx(1)
    assert found["anonymous"]["peak_beyond_torch"] == 100


def _memory() -> ModuleType:
    import memory

    return memory


@pytest.mark.usefixtures("scripts")
def test_the_memory_benchmark_watches_a_worker(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "memory.json"
    options = ["--samples", "32", "--points", "4", "--patch", "1", "16", "16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["memory.py", str(crops), *options])
    _memory().main()
    assert "| rss |" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["points"][-1][0] == 32
    assert found["import_torch"]["rss"] > 2**25
    assert all(rss >= uss > 0 for _, rss, uss, _ in found["points"])


@pytest.mark.usefixtures("scripts")
def test_the_loss_benchmark_compares_three_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import losses

    monkeypatch.setattr(losses, "stay_on_one_core", lambda: None)
    monkeypatch.setattr(sys, "argv", ["losses.py", "--edge", "8", "--repeats", "2", "--out", str(tmp_path / "l.json")])
    losses.main()
    assert "| dice_bce | 2D (2, 1, 8, 8) | 48 |" in capsys.readouterr().out
    results = json.loads((tmp_path / "l.json").read_text())["results"]
    assert len(results) == 8
    for result in results:
        assert len(result["rounds"]["autoseg"]) == 2
        assert all(peak > 1 for peak in result["peak"].values()), "a gradient at least"


@pytest.mark.usefixtures("scripts")
def test_the_plain_loss_of_the_benchmark_is_ours() -> None:
    import losses

    for kind in ("dice_bce", "focal_dice"):
        found = losses.sides(kind, 5, (2, 1, 16, 16))
        ours, plain = (found[side][2]().detach() for side in ("autoseg", "plain"))
        assert float(ours) == pytest.approx(float(plain), rel=1e-4)
