"""The door: answers at once, says in one line what is wrong, prints JSON for programs, and leaves no debris."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tifffile
from strategies import child_environment, em_path, make_dataset
from test_planner import cheap_trace, tiny_plan

from autoseg import __version__
from autoseg.arguments import to_seconds
from autoseg.cli import main
from autoseg.commands import running, showing
from autoseg.commands.planning import difference
from autoseg.data.dataset import open_dataset
from autoseg.data.store import ArrayReader, ChunkCache, open_multiscale
from autoseg.errors import DataError, PlanError
from autoseg.geometry import Box
from autoseg.model import windows
from autoseg.plan import rules_machine
from autoseg.predict import blocks, export
from autoseg.recipes import speed
from autoseg.recipes.training import train_on
from autoseg.report import terminal
from autoseg.schema import Plan, Reason, load_as, save

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
COMMANDS = ("demo", "import", "fingerprint", "plan", "profile", "train", "predict", "evaluate", "report")
HEAVY = ("torch", "monai", "numpy", "zarr", "matplotlib", "h5py", "tifffile", "scipy")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `data`, `cache`, `plan.json` and a finished `run`, which no test changes."""
    folder = tmp_path_factory.mktemp("cli")
    data = make_dataset(folder / "data", shape=(2, 64, 64))
    plan = tiny_plan(data, folder / "cache", {"optimizer.num_steps": 2})
    save(plan, folder / "plan.json")
    train_on(plan, data, folder / "run", cache=folder / "cache")
    rng = np.random.default_rng(0)
    for name, shape in (("em", (2, 32, 32)), ("labels", (2, 32, 32)), ("wide", (2, 32, 48))):
        values = rng.integers(0, 2 if name == "labels" else 255, shape).astype(np.uint8)
        tifffile.imwrite(folder / f"{name}.tif", values, photometric="minisblack")
    (folder / "a-mito-probability.tif").write_bytes(b"precious")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


def files(folder: Path) -> dict[str, bytes]:
    """Return every file and folder below, but the cache."""
    found = (p for p in sorted(folder.rglob("*")) if "xdg" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in found}


def call(*arguments: object) -> int:
    """Run a command; argparse leaves by SystemExit."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as leave:
        return int(leave.code or 0)


# ---- help ---------------------------------------------------------------------------------------------------


def test_help_answers_in_half_a_second_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from autoseg.cli import main\n"
        "try: main(['--help'])\n"
        f"finally: print('loaded', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    environment = child_environment()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=60
        )
        times.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        assert "loaded []" in done.stderr
        assert "evaluate" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_the_golden_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After a wanted change run with AUTOSEG_WRITE_GOLDEN=1. Line breaks are argparse's, so words are compared."""
    assert call(*([command] if command else []), "--help") == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in text, "NO_COLOR"
    assert max(len(line) for line in text.splitlines() if not line.startswith("example:")) <= 100
    path = GOLDEN / f"help{'-' if command else ''}{command}.txt"
    if os.environ.get("AUTOSEG_WRITE_GOLDEN"):
        path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
    assert text.split() == path.read_text().split()
    if command:
        assert "example:" in text


def test_every_example_in_the_help_is_a_command_that_parses() -> None:
    from autoseg.cli import build_parser

    for command in COMMANDS:
        text = " ".join((GOLDEN / f"help-{command}.txt").read_text().split())
        example = text.split("example:")[1].split()
        assert example[0] == "autoseg"
        assert build_parser().parse_args(example[1:]).command == command


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"autoseg {__version__}"
    assert call() == 0
    assert "evaluate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "meant"), [("trian", "train"), ("evalute", "evaluate"), ("fingerprnt", "fingerprint")]
)
def test_a_mistyped_command_is_told_the_near_one(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(typed) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"did you mean '{meant}'" in err


def test_shell_completion_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--print-completion", "bash") == 0
    assert "autoseg" in capsys.readouterr().out


# ---- bad input ----------------------------------------------------------------------------------------------

IMPORT = ("import", "{new}/data", "--name", "v", "--em", "{old}/em.tif")
SIZE = ("--voxel-size-nm", "40", "8", "8")
PREDICT = ("predict", "--run", "{old}/run")
LABELS = ("--labels", "{old}/labels.tif", "--values")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "import-missing-file": ((*IMPORT[:5], "{old}/none.tif", *SIZE), r"none\.tif: .*"),
    "import-voxel-size-word": (
        (*IMPORT, "--voxel-size-nm", "40", "x", "8"),
        r"--voxel-size-nm: 'x' is not a number: give",
    ),
    "import-voxel-size-zero": (
        (*IMPORT, "--voxel-size-nm", "40", "0", "8"),
        r"--voxel-size-nm: .*three positive numbers",
    ),
    "import-voxel-size-negative": ((*IMPORT, "--voxel-size-nm", "40", "8", "-8"), r"(--voxel-size-nm).*"),
    "import-voxel-size-nan": (
        (*IMPORT, "--voxel-size-nm", "nan", "8", "8"),
        r"--voxel-size-nm: .*three positive numbers",
    ),
    "import-two-voxel-sizes": ((*IMPORT, "--voxel-size-nm", "40", "8"), r"--voxel-size-nm: expected 3 arguments"),
    "import-shapes-differ": (
        (*IMPORT, "--labels", "{old}/wide.tif", "--values", "mito=1", *SIZE),
        r"wide\.tif: labels has shape \(2, 32, 48\), the EM .*\(2, 32, 32\)",
    ),
    "import-unknown-value": (
        (*IMPORT, *LABELS, "mito=7", *SIZE),
        r"labels\.tif: .*value 7.* class mito: it holds 0, 1",
    ),
    "import-value-word": ((*IMPORT, *LABELS, "mito=one", *SIZE), r"--values: 'one' is not a list of integers"),
    "import-value-without-class": ((*IMPORT, *LABELS, "1", *SIZE), r"--values: '1' is not NAME=VALUE"),
    "import-labels-without-values": ((*IMPORT, "--labels", "{old}/labels.tif", *SIZE), r"--labels: .*--values"),
    "import-cell-outside": ((*IMPORT, *SIZE, "--crops", "2"), r"--crops: cell 2: .*1 to 1"),
    "import-not-an-image": ((*IMPORT[:5], "{old}/plan.json", *SIZE), r"plan\.json: .*"),
    "plan-missing-data": (("plan", "{new}/none", "--out", "{new}/p.json"), r"none: is not a folder: pass"),
    "plan-unreadable-zarr": (("plan", "{broken}", "--out", "{new}/p.json"), r".*crops cannot be used.*"),
    "plan-budget": (
        ("plan", "{old}/data", "--budget", "soon", "--out", "{new}/p.json"),
        r"--budget: 'soon' is not a duration",
    ),
    "plan-set-unknown": (
        ("plan", "{old}/data", "--set", "bacth_size=1", "--out", "{new}/p.json"),
        r"--set bacth_size: .*'batch_size'",
    ),
    "plan-class-unknown": (
        ("plan", "{old}/data", "--classes", "mit", "--out", "{new}/p.json"),
        r"--classes mit: .*'mito'",
    ),
    "plan-hardware-missing": (
        ("plan", "{old}/data", "--hardware", "{new}/hal9000", "--out", "{new}/p.json"),
        r"hal9000: is neither a file nor the name of a machine",
    ),
    "plan-both-sources": (
        ("plan", "{old}/data", "--fingerprint", "{old}/plan.json"),
        r"--fingerprint: and DATA are both given",
    ),
    "train-misspelt-key": (
        ("train", "--plan", "{typo}", "--data", "{old}/data", "--run", "{new}/r"),
        r"typo\.json: .*unknown field 'bach_size': did you mean 'batch_size'",
    ),
    "train-missing-plan": (("train", "--plan", "{new}/none.json", "--run", "{new}/r"), r"none\.json: No such file"),
    "train-no-json": (("train", "--plan", "{old}/em.tif", "--run", "{new}/r"), r"em\.tif: is not valid JSON"),
    "train-wrong-artifact": (
        ("train", "--plan", "{old}/run/fingerprint.json", "--run", "{new}/r"),
        r"fingerprint\.json: .*",
    ),
    "train-run-of-another-plan": (
        ("train", "--plan", "{other}", "--data", "{old}/data", "--run", "{old}/run"),
        r"run: holds a run of another plan",
    ),
    "train-missing-data": (
        ("train", "--plan", "{old}/plan.json", "--data", "{new}/none", "--run", "{new}/r"),
        r"none: is not a folder",
    ),
    "train-device": (
        ("train", "--plan", "{old}/plan.json", "--data", "{old}/data", "--run", "{new}/r", "--device", "tpu"),
        r"--device tpu: is not a device",
    ),
    "predict-no-run": (
        ("predict", "--run", "{new}/r", "--volume", "{old}/em.tif", "--out", "{new}/o.tif"),
        r"r: is not a run",
    ),
    "predict-ending": (
        ("predict", "--run", "{old}/run", "--volume", "{old}/em.tif", "--out", "{new}/o.jpg"),
        r"o\.jpg: has no known ending",
    ),
    "predict-missing-volume": (
        ("predict", "--run", "{old}/run", "--volume", "{old}/none.tif", "--out", "{new}/o.tif"),
        r"none\.tif: .*",
    ),
    "predict-no-crop": (
        ("predict", "--run", "{old}/run", "--data", "{old}/data", "--crops", "9", "--out", "{new}/o.zarr"),
        r"--crops 9: no crop9",
    ),
    "predict-roi": (
        (
            "predict",
            "--run",
            "{old}/run",
            "--volume",
            "{old}/em.tif",
            "--out",
            "{new}/o.tif",
            "--roi-nm",
            "0",
            "0:9",
            "0:9",
        ),
        r"--roi-nm: '0' is not start:stop",
    ),
    "predict-voxel-size-word": (
        (*PREDICT, "--volume", "{old}/em.tif", "--out", "{new}/o.tif", "--voxel-size-nm", "40", "x", "8"),
        r"--voxel-size-nm: 'x' is not a number: give three positive numbers",
    ),
    "predict-voxel-size-zero": (
        (*PREDICT, "--volume", "{old}/em.tif", "--out", "{new}/o.tif", "--voxel-size-nm", "40", "0", "8"),
        r"--voxel-size-nm: 40 0 8: give three positive numbers",
    ),
    "predict-voxel-size-of-data": (
        (*PREDICT, "--data", "{old}/data", "--out", "{new}/o.zarr", *SIZE),
        r"--voxel-size-nm: belongs to --volume FILE: leave it out",
    ),
    "predict-voxel-size-of-a-zarr": (
        (*PREDICT, "--volume", "{old}/data/demo/demo.zarr", "--out", "{new}/o.tif", *SIZE),
        r"--voxel-size-nm: .*demo\.zarr is a zarr, which says its own: correct its \.zattrs",
    ),
    "predict-checkpoint": (
        (
            "predict",
            "--run",
            "{old}/run",
            "--volume",
            "{old}/em.tif",
            "--out",
            "{new}/o.tif",
            "--checkpoint",
            "{new}/c",
        ),
        r"c: there is no such checkpoint",
    ),
    "predict-two-runs": (
        ("predict", "--run", "a", "--run", "b", "--volume", "v.tif", "--out", "o.tif"),
        r"argument --run: is given twice, and takes one run at a time: see autoseg predict --help",
    ),
    "evaluate-two-runs": (("evaluate", "--run=a", "--ru", "b"), r"argument --run: is given twice"),
    "plan-two-budgets": (("plan", "--budget", "1m", "--budget", "1m"), r"argument --budget: is given twice"),
    "predict-onto-the-input": (
        ("predict", "--run", "{old}/run", "--volume", "{old}/em.tif", "--out", "{old}/em.tif"),
        r"em\.tif: is the input: choose another --out",
    ),
    "predict-onto-a-file": (
        ("predict", "--run", "{old}/run", "--volume", "{old}/em.tif", "--out", "{old}/labels.tif"),
        r"labels\.tif: exists: choose another --out, or remove it",
    ),
    "predict-onto-a-companion": (
        ("predict", "--run", "{old}/run", "--volume", "{old}/em.tif", "--out", "{old}/a.tif", "--probabilities"),
        r"a-mito-probability\.tif: exists",
    ),
    "predict-crops-without-crops": (
        ("predict", "--run", "{old}/run", "--data", "{bare}", "--crops", "1", "--out", "{new}/o.zarr"),
        r"--crops: .* has no crops: leave it out",
    ),
    "evaluate-checkpoint-of-given-labels": (
        ("evaluate", "--run", "{old}/run", "--pred", "{new}/p.zarr", "--checkpoint", "last"),
        r"--pred: is scored as it is: leave out --checkpoint and --device",
    ),
    "evaluate-device-of-given-labels": (
        ("evaluate", "--run", "{old}/run", "--pred", "{new}/p.zarr", "--device", "cpu"),
        r"--pred: is scored as it is",
    ),
    "demo-other-budget": (("demo", "{demo}", "--budget", "7s"), r"plan\.json: was planned for .*, not 7: leave out"),
    "evaluate-no-run": (("evaluate",), r"runs: holds no run: train one first"),
    "evaluate-other-classes": (("evaluate", "--run", "{old}/run", "--data", "{new}/none"), r"none: is not a folder"),
    "report-no-run": (("report", "{new}/r"), r"r: .*"),
}


@pytest.fixture
def fill(place: Path, tmp_path: Path) -> Callable[[str], str]:
    """Return a function that puts paths into a command."""
    work = tmp_path / "work"
    work.mkdir()
    made = tmp_path / "made"
    made.mkdir()

    def paths() -> Iterator[tuple[str, Path]]:
        yield "old", place
        yield "new", work
        yield "broken", made / "broken"
        yield "typo", made / "typo.json"
        yield "other", made / "other.json"
        yield "bare", made / "bare"
        yield "demo", made / "demo"

    places = dict(paths())

    def put(text: str) -> str:
        if "{broken}" in text and not places["broken"].exists():
            shutil.copytree(place / "data", places["broken"])
            for attributes in places["broken"].rglob("crop*/*/.zattrs"):
                attributes.write_text("{")
        if "{bare}" in text:
            shutil.copytree(place / "data", places["bare"])
            shutil.rmtree(places["bare"] / "demo/demo.zarr/recon-1/labels")
        if "{demo}" in text:
            for name in ("data", "unseen"):
                (places["demo"] / name).mkdir(parents=True)
            plan = msgspec.structs.replace(load_as(place / "plan.json", Plan), budget_s=100.0)
            save(plan, places["demo"] / "plan.json")
        if "{typo}" in text:
            places["typo"].write_text((place / "plan.json").read_text().replace('"batch_size"', '"bach_size"', 1))
        if "{other}" in text:
            plan = load_as(place / "plan.json", Plan)
            save(msgspec.structs.replace(plan, seed=9), places["other"])
        return re.sub(r"\{(\w+)\}", lambda m: str(places[m[1]]), text)

    return put


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_left_behind(
    case: str,
    place: Path,
    tmp_path: Path,
    fill: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(speed, "TRIAL_S", 0.0)
    arguments, message = BAD[case]
    command = [fill(text) for text in arguments]
    monkeypatch.chdir(tmp_path / "work")
    before = files(place)
    assert call(*command, "--quiet") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert files(tmp_path / "work") == {}, "something was left behind"
    assert files(place) == before, "something that was there has changed"


# ---- JSON for programs --------------------------------------------------------------------------------------


def test_json_is_one_object_on_stdout_and_nothing_else(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules_machine, "trace_step", cheap_trace)
    monkeypatch.setattr(speed, "TRIAL_S", 0.0)
    run = shutil.copytree(place / "run", tmp_path / "run")

    def json_of(*arguments: object) -> Any:
        assert call(*arguments, "--json") == 0
        out, _ = capsys.readouterr()
        assert out.count("\n") == 1
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    try:
        assert json_of("fingerprint", place / "data")["kind"] == "fingerprint"
        assert json_of("plan", place / "data", "--out", "p.json")["kind"] == "plan"
    finally:
        rules_machine._cached_cost.cache_clear()
    assert json_of("plan", "--diff", place / "plan.json", place / "plan.json") == {}
    assert json_of("train", "--plan", place / "plan.json", "--data", place / "data", "--run", run)["step"] == 2
    assert json_of("train", "--plan", place / "plan.json", "--data", place / "data", "--fast-dev-run") == {
        "works": True
    }
    assert json_of("predict", "--run", run, "--volume", place / "em.tif", "--out", "o.tif")["out"] == "o.tif"
    assert json_of("evaluate", "--run", run, "--data", place / "data")["kind"] == "scores"
    imported = json_of("import", "d", "--name", "v", "--em", place / "em.tif", *SIZE)
    assert imported == {"datasets": ["v"], "crops": [], "remarks": [], "cells": []}


# ---- what predict leaves behind ------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["zarr", "tif", "h5"])
def test_predict_never_removes_the_users_em_though_it_lies_in_the_cache(
    place: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(em_path(place / "data", "demo"), "mine/vol")
    before = files(tmp_path / "mine")
    assert call("predict", "--run", place / "run", "--volume", "mine/vol", "--out", f"o.{ending}", "--cache", ".") == 0
    assert files(tmp_path / "mine") == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "xdg") == sorted(["mine", f"o.{ending}"])


@pytest.mark.parametrize("ending", ["zarr", "tif"])
def test_the_copy_of_a_file_is_gone_after_success_failure_and_a_stop_and_the_same_command_goes_on(
    place: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["predict", "--run", place / "run", "--volume", place / "em.tif", "--out", tmp_path / f"o.{ending}"]
    copies = tmp_path / "xdg/autoseg/em"
    assert call(*command, "--roi-nm", "9:9", "0:9", "0:9") == 2
    assert list(copies.iterdir()) == []
    for error, code in ((KeyboardInterrupt(), 143), (DataError("a", "b", "c"), 2)):
        with monkeypatch.context() as patch:

            def fail(*_: object, error: BaseException = error) -> str:
                raise error

            patch.setattr(blocks._RegionWriter, "write", fail)
            assert call(*command) == code
        assert list(copies.iterdir()) == []
    assert call(*command) == 0
    assert list(copies.iterdir()) == []
    shutil.rmtree(tmp_path / "xdg")
    again = call(*command)
    assert again == (0 if ending == "zarr" else 2), "a zarr is checked and left, a file is not replaced"


def test_sigterm_stops_a_prediction_cleanly_and_the_same_command_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(windows, "BLOCK_BYTES", 1)
    command = ["predict", "--run", place / "run", "--volume", place / "em.tif", "--out", tmp_path / "o.tif"]
    genuine, drop, written = blocks._RegionWriter.write, running.drop_copy, list[Box]()
    is_first_run = True

    def write(self: Any, block: Box) -> str:
        if is_first_run and written:
            os.kill(os.getpid(), signal.SIGTERM)
        written.append(block)
        return genuine(self, block)

    def drop_though_told_again(region: Any) -> None:
        if is_first_run:
            os.kill(os.getpid(), signal.SIGTERM)  # timeout(1) sends it to the process and to its group
        drop(region)

    def survive(*_: object) -> None:
        raise AssertionError("the handler of the command was not there")

    monkeypatch.setattr(blocks._RegionWriter, "write", write)
    monkeypatch.setattr(running, "drop_copy", drop_though_told_again)
    before = signal.signal(signal.SIGTERM, survive)
    try:
        assert call(*command) == 143
        assert signal.getsignal(signal.SIGTERM) is survive, "what was there before is there again"
    finally:
        signal.signal(signal.SIGTERM, before)
    err = capsys.readouterr().err
    assert err.endswith("autoseg: interrupted: run the same command to go on\n")
    assert f"what is done so far is kept in {tmp_path / '.o.tif.zarr'}" in " ".join(err.split())
    assert list((tmp_path / "xdg/autoseg/em").iterdir()) == []
    (first,), is_first_run = written, False
    assert call(*command) == 0
    assert written.count(first) == 1, "what is done is kept"
    assert len(written) > 1
    assert not (tmp_path / ".o.tif.zarr").exists()


@pytest.mark.parametrize("ending", ["tif", "h5"])
def test_what_a_label_map_means_and_covers_is_printed(
    place: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every class is called everywhere, the last with the highest probability: the map shows that alone."""
    names = load_as(place / "plan.json", Plan).class_names

    def probability(_: object, block: Box) -> Any:
        rising = np.linspace(0.9, 0.99, len(names), dtype=np.float32)
        return np.broadcast_to(rising[:, None, None, None], (len(names), *block.shape_zyx))

    monkeypatch.setattr(blocks._RegionWriter, "_probability", probability)
    out = tmp_path / f"o.{ending}"
    assert call("predict", "--run", place / "run", "--volume", place / "em.tif", "--out", out, "--quiet") == 0
    first, *covered, wrote = capsys.readouterr().out.splitlines()
    numbers = ", ".join(f"{k} {name}" for k, name in enumerate(names, start=1))
    rule = "where several are called, a part shows before what it is part of, else the more probable"
    assert first == f"values of the label map: 0 none, {numbers}; {rule}"
    assert covered == [f"{name}: 2,048 voxels, all covered by {names[-1]}" for name in names[:-1]]
    assert wrote.startswith(f"wrote {out}")
    left = {path.name for path in tmp_path.iterdir()} - {"xdg"}
    assert left == {out.name}, "probabilities decide, and are not written unasked"


def test_a_stop_between_two_files_of_an_export_does_not_lock_the_command_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["predict", "--run", place / "run", "--volume", place / "em.tif", "--out", tmp_path / "o.tif"]
    command.append("--probabilities")
    genuine, calls = export.write_tiff, list[Path]()

    def write_tiff(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        genuine(path, *rest)

    monkeypatch.setattr(export, "write_tiff", write_tiff)
    assert call(*command) == 143
    assert (tmp_path / "o.tif").exists()
    assert call(*command) == 0
    assert (tmp_path / "o-pm-probability.tif").exists()
    assert call(*command) == 2


def test_predict_says_where_grey_values_are_not_the_plans(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another volume is measured, which is said; the planned one is known, also as a file of another name."""
    dataset = open_dataset(place / "data")
    level = open_multiscale(dataset.volumes["demo"]).levels[0]
    own = ArrayReader(level.path, ChunkCache(0)).read(Box.whole(level.grid.shape_zyx))
    tifffile.imwrite(tmp_path / "own.tif", own, photometric="minisblack")
    for volume, known in ((place / "em.tif", False), (tmp_path / "own.tif", True), (dataset.volumes["demo"], True)):
        out = tmp_path / f"{volume.stem}.zarr"
        assert call("predict", "--run", place / "run", "--volume", volume, "--out", out) == 0
        said = f"{volume}: no EM that the plan measured, so its own grey values are used" in capsys.readouterr().err
        assert said != known, volume


def test_predict_says_where_a_voxel_size_is_from_and_takes_a_corrected_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    em = tifffile.imread(place / "em.tif")
    for size in (8.0, 8.07, 16.0):
        sizes = {f"PhysicalSize{axis}": v for axis, v in zip("ZYX", (40.0, size, size), strict=True)}
        units = {f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"}
        tifffile.imwrite(tmp_path / f"em{size:g}.ome.tif", em, metadata={"axes": "ZYX", **sizes, **units})

    def said(volume: Path, *more: str) -> str:
        out = tmp_path / "o.zarr"
        assert call("predict", "--run", place / "run", "--volume", volume, "--out", out, *more) == 0
        (grid,) = {open_multiscale(path.parent).levels[0].grid for path in out.glob("*/s0")}
        shutil.rmtree(out)
        voxels = " x ".join(f"{v:g}" for v in grid.voxel_size_nm)
        err = " ".join(capsys.readouterr().err.split())
        assert f"EM of {voxels} nm" in err
        note = re.search(r"note: (.*) EM of [\d. x]+ nm(?: as planned|, resampled)", err)
        return f"{voxels}: {note[1].replace(f'{volume}', volume.name) if note else ''}"

    corrected = ("--voxel-size-nm", "40", "8", "8")
    plain, good, near, wrong = place / "em.tif", *(tmp_path / f"em{v}.ome.tif" for v in ("8", "8.07", "16"))
    assert said(plain) == "40 x 8 x 8: em.tif declares no voxel size: 40 x 8 x 8 nm assumed, as in training"
    assert said(plain, *corrected) == said(good) == said(good, *corrected) == "40 x 8 x 8: "
    assert said(plain, "--voxel-size-nm", "40", "16", "16") == "40 x 16 x 16: "
    assert said(near) == "40 x 8.07 x 8.07: "
    learnt = "the run learnt from EM of 40 x 8 x 8 nm: pass --voxel-size-nm if the file is wrong"
    assert said(wrong) == f"40 x 16 x 16: em16.ome.tif declares 40 x 16 x 16 nm, {learnt}"
    assert said(wrong, *corrected) == "40 x 8 x 8: em16.ome.tif declares 40 x 16 x 16 nm; --voxel-size-nm was taken"


def test_quiet_prints_results_only(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(place / "run", tmp_path / "run")

    def said(*arguments: object) -> str:
        assert call(*arguments, "--quiet") == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert "code cache" not in out
        return out

    assert "thickness nm" in said("fingerprint", place / "data")
    assert "0 fields differ" in said("plan", "--diff", place / "plan.json", place / "plan.json")
    plan = ("--plan", place / "plan.json", "--data", place / "data")
    assert "done: 2 steps" in said("train", *plan, "--run", run)
    assert "wrote o.tif" in said("predict", "--run", run, "--volume", place / "em.tif", "--out", "o.tif")
    table = said("evaluate", "--run", run, "--data", place / "data", "--per-class")
    assert "precision" in table
    assert "er_mem" in table
    assert "imported v" in said("import", "d", "--name", "v", "--em", place / "em.tif", *SIZE)


def test_train_says_at_once_that_it_prepares(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before: list[str] = []

    def stops(*_: object, **__: object) -> None:
        before.append(capsys.readouterr().err)
        raise DataError("data", "is not looked at", "nothing")

    monkeypatch.setattr(running, "train_on", stops)
    assert call("train", "--plan", place / "plan.json", "--data", place / "data", "--run", tmp_path / "r") == 2
    assert before == [f"preparing to train {load_as(place / 'plan.json', Plan).name} on {place / 'data'}\n"]


def test_import_says_which_cell_became_which_crop_and_what_comes_next(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = ("--labels", place / "labels.tif", "--values", "mito=1")
    command = ("import", "d", "--em", place / "em.tif", *labels, *SIZE)
    assert call(*command, "--name", "v", "--grid", "1", "2", "2", "--crops", "4,2") == 0
    out, err = capsys.readouterr()
    assert "imported v into d: crops v/crop1 (cell 4), v/crop2 (cell 2)\n" in out
    assert "next: autoseg plan d\n" in err
    assert call(*command, "--name", "w") == 0
    assert "imported w into d: crops w/crop3\n" in capsys.readouterr().out
    assert call("import", "d", "--name", "bare", "--em", place / "em.tif", *SIZE) == 0
    assert "next" not in capsys.readouterr().err, "EM alone cannot be planned for"


def test_the_size_of_the_cache_is_of_all_that_autoseg_keeps_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("codes", "checksums", "em", "of-the-user"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "x").write_bytes(bytes(2**20))
    showing.tell_cache(argparse.Namespace(cache=tmp_path), terminal.make_console())
    assert f"code cache {tmp_path}, 3 MiB" in capsys.readouterr().err


# ---- the three bare commands --------------------------------------------------------------------------------


def test_plan_train_and_evaluate_work_bare_in_a_folder_with_data(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules_machine, "trace_step", cheap_trace)
    monkeypatch.setattr(speed, "TRIAL_S", 0.0)
    monkeypatch.setattr("platform.node", lambda: "rocinante.local")
    try:
        assert call("plan") == 0
    finally:
        rules_machine._cached_cost.cache_clear()
    path = tmp_path / "plans/rocinante.json"
    plan = load_as(path, Plan)
    assert plan.name == "rocinante"
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("patch_size_zyx", "learning_rate", "because", "next: autoseg train"))
    # shortened by hand, as a user may: a bare plan trains for half an hour
    tiny = tiny_plan(place / "data", place / "cache", {"optimizer.num_steps": 2})
    save(msgspec.structs.replace(tiny, name="rocinante"), path)
    assert call("train", "--plan", "plans/rocinante.json") == 0
    assert (tmp_path / "runs/rocinante/plan.json").is_file()
    capsys.readouterr()
    assert call("evaluate", "--per-class") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in plan.class_names)
    assert (tmp_path / "runs/rocinante/scores.json").is_file()
    shutil.copytree(tmp_path / "runs/rocinante", tmp_path / "runs/second")
    capsys.readouterr()
    assert call("evaluate", "--per-class", "--quiet") == 2
    err = capsys.readouterr().err
    assert "2 runs" in err
    assert "runs/rocinante" in err
    assert "runs/second" in err


# ---- small things -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1.5h", 5400)]
)
def test_durations_have_units(text: str, expected: float) -> None:
    assert to_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0m", "-5m", "10 minutes", "m", "1e3"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is not a duration: write 90s, 10m or 2h"):
        to_seconds(text)


def test_the_difference_of_two_plans_names_nested_fields() -> None:
    a, b = {"x": 1, "n": {"p": 1, "q": 2}}, {"x": 1, "n": {"p": 3, "q": 2}, "z": 0}
    assert difference(a, b) == [("n.p", 1, 3), ("z", None, 0)]
    assert difference(a, a) == []


def test_the_difference_of_two_plans_reads_as_the_plan_does_and_marks_what_the_user_set(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    a = load_as(place / "plan.json", Plan)
    probed = msgspec.structs.replace(a.hardware, step_gflops={"fp32": 18.390146720778258}, ram_bytes=3 * 2**29)
    network = msgspec.structs.replace(a.network, strides_zyx=((1, 2, 2), (1, 2, 2)))
    reasons = [r for r in a.reasons if r.field not in ("seed", "network.strides_zyx")]
    b = msgspec.structs.replace(
        a,
        hardware=probed,
        network=network,
        seed=7,
        predicted_step_s=0.123456789,
        fingerprint_sha256="f" * 64,
        reasons=(*reasons, Reason(field="seed", because="set", source="user")),
    )
    save(b, tmp_path / "b.json")
    assert call("plan", "--diff", place / "plan.json", tmp_path / "b.json", "--cache", tmp_path) == 0
    out = capsys.readouterr().out
    rows = {words[0]: words for line in out.splitlines() if len(words := re.findall(r"[^│┃ ]+", line)) > 1}
    assert "5 fields differ" in out
    assert rows["seed"][-2:] == ["7", "(user)"]
    assert rows["hardware.ram_bytes"][-2:] == ["1.50", "GiB"]
    assert rows["network.strides_zyx"][-2:] == ["1x2x2", "1x2x2"]
    assert rows["predicted_step_s"][-1] == "0.1235"
    assert rows["fingerprint_sha256"][-1] == "f" * 12
    assert "hardware.step_gflops differs too: it is measured anew for each plan" in out
    assert "18.39" not in out


def test_ctrl_c_before_a_run_begins_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoseg.commands.run_fingerprint", interrupted)
    with contextlib.suppress(SystemExit):
        assert main(["fingerprint", "data"]) == 143
    assert capsys.readouterr().err.count("\n") == 1
