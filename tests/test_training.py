"""Training: it learns, it repeats itself bit for bit, and no interruption costs more than a step."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from strategies import child_environment, em_path, make_dataset
from test_planner import tiny_plan
from torch import Tensor

from autoseg.data.dataset import open_dataset
from autoseg.data.store import ArrayReader, ChunkCache, create_array, open_multiscale
from autoseg.errors import CheckpointError, PlanError
from autoseg.geometry import Box
from autoseg.model import checkpoint
from autoseg.model.groups import groups_of
from autoseg.model.networks import build_network
from autoseg.plan import fingerprint
from autoseg.predict import crop_regions, open_run, predict_regions
from autoseg.recipes.training import data_of, split_of, train_on
from autoseg.recipes.validate import evaluate_run
from autoseg.schema import (
    Observer,
    Plan,
    Region,
    Schedule,
    Split,
    StepResult,
    TunedDecode,
    ValidationScore,
    load_as,
    read_json_lines,
    save,
)
from autoseg.train import batches, budget, journal, loader, loop, make_step, thresholds, train, validation
from autoseg.train.loader import StepDataset
from autoseg.train.schedule import rate_factor
from autoseg.train.step import Learner
from autoseg.train.validation import Validator


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (DATA, cache)."""
    folder = tmp_path_factory.mktemp("training")
    return make_dataset(folder / "data", shape=(4, 64, 64)), folder / "cache"


class StopAt(Observer):
    """Sends this process a signal after some step, as a user or a scheduler would."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.at, self.number = step, number
        self.steps: list[int] = []
        self.scores: list[ValidationScore] = []
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        """Note the warning."""
        self.warnings.append(text)

    def stepped(self, step: int, result: StepResult) -> None:
        """Note the step, and stop there."""
        self.steps.append(step)
        if step == self.at:
            os.kill(os.getpid(), self.number)

    def validated(self, step: int, score: ValidationScore) -> None:
        """Note the score."""
        self.scores.append(score)


def everything(run: Path, name: str = "last") -> dict[str, Tensor]:
    """Return every tensor of a checkpoint: averaged weights, weights, optimizer."""
    folder = run / "checkpoints" / name
    weights = checkpoint.load_tensors(folder / checkpoint.WEIGHTS)
    return {f"averaged.{k}": v for k, v in weights.items()} | checkpoint.load_tensors(folder / checkpoint.STATE)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert {name for name in a if not torch.equal(a[name], b[name])} == set()


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the lines of steps, without what time they took."""
    lines = [line for line in read_json_lines(run / "log.jsonl") if "event" not in line]
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


# ---- what it says -------------------------------------------------------------------------------------------


def test_a_class_that_no_voxel_to_train_on_shows_is_named(place: tuple[Path, Path], tmp_path: Path) -> None:
    """Crop 2 does not annotate pm: the network would learn nothing of it without a word."""
    plan = tiny_plan(*place)
    for crop, warnings in (
        ("demo/crop2", ["no voxel to train on shows pm: such classes learn nothing"]),
        ("demo/crop1", []),
    ):
        split = Split(train=(Region(crop=crop),), validate=(), rule="user")
        observer = StopAt(1)
        train(msgspec.structs.replace(plan, split=split), place[0], tmp_path / crop, cache=place[1], observer=observer)
        assert observer.warnings == warnings


# ---- it learns ----------------------------------------------------------------------------------------------


def test_training_overfits_one_tiny_crop_within_seconds(tmp_path: Path) -> None:
    data, cache = make_dataset(tmp_path / "data", shape=(2, 64, 64), crops=1), tmp_path / "cache"
    changes = {
        "network.features": (8, 16),
        "optimizer.num_steps": 90,
        "optimizer.learning_rate": 0.01,
        "augmentation.preset": "none",
        "validation.num_rounds": 1,
    }
    plan = tiny_plan(data, cache, changes)
    began = time.process_time()
    outcome = train(plan, data, tmp_path / "run", cache=cache)
    assert time.process_time() - began < 30
    steps = logged(tmp_path / "run")
    assert sum(s["loss"] for s in steps[-10:]) < 0.5 * sum(s["loss"] for s in steps[:10])
    assert outcome.best_mean_dice is not None
    assert outcome.best_mean_dice > 0.8, "on a box of the crop that it never learnt from"


def test_one_step_function_takes_a_batch_through_everything(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place, {"augmentation.preset": "none"})
    step = make_step(plan, "cpu", num_steps=30)
    batch = next(iter(batches(plan, place[0], cache=place[1])))
    results = [step(batch) for _ in range(30)]
    assert results[-1].loss < results[0].loss
    assert all(math.isfinite(r.loss) and r.gradient_norm > 0 and not r.skipped for r in results)


@pytest.mark.parametrize("kind", ["dice_topk", "unified_focal", "balanced_softmax", "seesaw", "focal_dice"])
def test_losses_with_a_softmax_or_several_parts_learn_to_find_classes(tmp_path: Path, kind: str) -> None:
    data, cache = make_dataset(tmp_path / "data", shape=(2, 64, 64), crops=1), tmp_path / "cache"
    changes: dict[str, Any] = {
        "optimizer.num_steps": 60,
        "optimizer.learning_rate": 0.01,
        "augmentation.preset": "none",
        "validation.num_rounds": 1,
        "loss.kind": kind,
    } | ({"loss.activation": "softmax"} if kind == "focal_dice" else {})
    plan = tiny_plan(data, cache, changes)
    if plan.loss.activation == "softmax":
        assert len(groups_of(plan.classes, plan.disjoint).members) == 1
    outcome = train(plan, data, tmp_path / "run", cache=cache)
    steps = logged(tmp_path / "run")
    assert sum(s["loss"] for s in steps[-10:]) < 0.9 * sum(s["loss"] for s in steps[:10])
    assert (outcome.best_mean_dice or 0) > 0.5


# ---- it repeats itself --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(place: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """Return (plan, run) of a run that nothing interrupted."""
    plan = tiny_plan(*place, {"augmentation.preset": "sstem", "accumulate_batches": 2, "sampling.crops_per_step": 4})
    run = tmp_path_factory.mktemp("straight") / "run"
    outcome = train(plan, place[0], run, cache=place[1])
    assert (outcome.step, outcome.num_steps, outcome.stopped_by) == (8, 8, None)
    return plan, run


def test_two_runs_of_one_plan_have_the_same_bits(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, run = straight
    torch.manual_seed(99)
    train(plan, place[0], tmp_path / "again", cache=place[1])
    assert_same_bits(everything(tmp_path / "again"), everything(run))
    assert_same_bits(everything(tmp_path / "again", "best"), everything(run, "best"))
    assert logged(tmp_path / "again") == logged(run)
    other = msgspec.structs.replace(plan, seed=1)
    train(other, place[0], tmp_path / "other", cache=place[1])
    assert logged(tmp_path / "other") != logged(run)


@pytest.mark.parametrize("stops", [(1,), (4,), (7,), (2, 3, 5)], ids=str)
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    plan, run = straight
    resumed = tmp_path / "resumed"
    for at in stops:
        outcome = train(plan, place[0], resumed, cache=place[1], observer=StopAt(at))
        reached = at - (at == 4)  # step 4 is validated, and stopping does not wait for that
        assert (outcome.step, outcome.stopped_by) == (reached, "SIGTERM")
        torch.rand(at)  # the generators of a new process are elsewhere
    last = StopAt(0)
    outcome = train(plan, place[0], resumed, cache=place[1], observer=last)
    assert last.steps == list(range(reached + 1, 9)), "no step is done twice"
    assert (outcome.stopped_by, last.warnings) == (None, [])
    assert_same_bits(everything(resumed), everything(run))
    assert_same_bits(everything(resumed, "best"), everything(run, "best"))
    lines = logged(resumed)
    assert [line["step"] for line in lines] == list(range(1, 9)), "every step stands in the log once"
    assert lines == logged(run)
    headers = [checkpoint.verify(folder / "checkpoints/last") for folder in (resumed, run)]
    assert msgspec.structs.replace(headers[0], sha256={}) == msgspec.structs.replace(headers[1], sha256={})


def test_a_resumed_run_of_seesaw_goes_on_with_the_voxels_it_had_seen(place: tuple[Path, Path], tmp_path: Path) -> None:
    plan = tiny_plan(*place, {"loss.kind": "seesaw"})
    for name, stops in (("straight", ()), ("resumed", (3, 6))):
        for at in stops:
            assert train(plan, place[0], tmp_path / name, cache=place[1], observer=StopAt(at)).step == at
        train(plan, place[0], tmp_path / name, cache=place[1])
    straight, resumed = everything(tmp_path / "straight"), everything(tmp_path / "resumed")
    assert_same_bits(resumed, straight)
    assert straight["loss.counts"].dtype == torch.float64
    assert (straight["loss.counts"] > 1).all()
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")


def test_steps_after_the_last_checkpoint_are_dropped_from_the_log_and_done_again(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path
) -> None:
    """A kill between checkpoints leaves lines, maybe half a line, of steps that are not in any checkpoint."""
    plan, run = straight
    resumed = tmp_path / "resumed"
    train(plan, place[0], resumed, cache=place[1], observer=StopAt(3))
    with (resumed / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 77.0}\n{"step": 5, "lo')
    train(plan, place[0], resumed, cache=place[1])
    assert logged(resumed) == logged(run)
    assert_same_bits(everything(resumed), everything(run))


def test_the_same_command_on_a_finished_run_changes_nothing(
    straight: tuple[Plan, Path], place: tuple[Path, Path]
) -> None:
    plan, run = straight
    before = everything(run), logged(run), (run / "plan.json").read_bytes()
    watch = StopAt(0)
    assert train(plan, place[0], run, cache=place[1], observer=watch).step == 8
    assert watch.steps == []
    assert logged(run) == before[1]
    assert_same_bits(everything(run), before[0])
    assert (run / "plan.json").read_bytes() == before[2]


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, run = straight
    resumed = tmp_path / "resumed"
    for at in (3, 5):
        train(plan, place[0], resumed, cache=place[1], observer=StopAt(at))
    (resumed / "checkpoints/last" / checkpoint.STATE).write_bytes(b"torn")
    watch = StopAt(0)
    train(plan, place[0], resumed, cache=place[1], observer=watch)
    assert watch.steps[0] == 5, "step 4 validated and is in `previous`"
    assert len(watch.warnings) == 1
    assert "last is not whole: going on from previous, step 4" in watch.warnings[0]
    assert_same_bits(everything(resumed), everything(run))


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_alone(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, run = straight
    ruined = tmp_path / "run"
    shutil.copytree(run, ruined)
    for header in ruined.glob("checkpoints/*/header.json"):
        header.write_bytes(b"")
    before = {path: path.read_bytes() for path in ruined.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train(plan, place[0], ruined, cache=place[1])
    assert {path: path.read_bytes() for path in ruined.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place_of_stop", [0, 1, 2])
def test_a_stop_does_not_wait_for_a_validation_which_is_done_again(
    straight: tuple[Plan, Path],
    place: tuple[Path, Path],
    tmp_path: Path,
    place_of_stop: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal comes while some tile of the validation at step 4 is read."""
    plan, run = straight
    resumed, genuine, read = tmp_path / "resumed", validation.read_input, list[Any]()

    def read_input(*args: Any) -> Any:
        read.append(args)
        if len(read) == place_of_stop + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return genuine(*args)

    monkeypatch.setattr(validation, "read_input", read_input)
    outcome = train(plan, place[0], resumed, cache=place[1])
    assert (outcome.step, outcome.stopped_by) == (3, "SIGTERM")
    assert len(read) <= place_of_stop + 1, "no tile is read after the signal"
    assert checkpoint.verify(resumed / "checkpoints/last").step == 3
    assert not (resumed / "checkpoints/best").exists()
    train(plan, place[0], resumed, cache=place[1])
    assert logged(resumed) == logged(run)
    for name in ("last", "best"):
        assert_same_bits(everything(resumed, name), everything(run, name))
        headers = [checkpoint.verify(folder / "checkpoints" / name) for folder in (resumed, run)]
        assert headers[0] == headers[1]


def test_a_kill_in_a_validation_costs_one_step(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = straight

    def killed(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(validation, "read_input", killed)
    with pytest.raises(MemoryError):
        train(plan, place[0], tmp_path / "run", cache=place[1])
    monkeypatch.undo()
    watch = StopAt(0)
    train(plan, place[0], tmp_path / "run", cache=place[1], observer=watch)
    assert watch.steps == [4, 5, 6, 7, 8]
    assert logged(tmp_path / "run") == logged(run)
    assert_same_bits(everything(tmp_path / "run"), everything(run))


# ---- one process at a time ----------------------------------------------------------------------------------


def test_a_second_process_on_a_run_is_refused_until_the_first_is_gone(place: tuple[Path, Path], tmp_path: Path) -> None:
    plan, run = tiny_plan(*place), tmp_path / "run"
    train(plan, place[0], run, cache=place[1], observer=StopAt(2))
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    command = [sys.executable, "-c", f"{hold}; time.sleep(600)", str(run / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(CheckpointError, match="is being trained by another process"):
            train(plan, place[0], run, cache=place[1])
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        child.kill()
    assert train(plan, place[0], run, cache=place[1]).step == 8, "the lock died with its process"


def test_a_file_system_without_locks_trains_all_the_same(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(journal.fcntl, "flock", no_locks)
    with journal.only_process(tmp_path), journal.only_process(tmp_path):
        pass


# ---- it can be stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_training_saves_and_exits_with_143(
    place: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    save(tiny_plan(*place, {"optimizer.num_steps": 10**6}), tmp_path / "plan.json")
    run = tmp_path / "run"
    command = ["train", "--plan", tmp_path / "plan.json", "--data", place[0], "--run", run, "--cache", place[1]]
    environment = child_environment(OMP_NUM_THREADS="1")
    child = subprocess.Popen(
        [sys.executable, "-m", "autoseg.cli", *map(str, command), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 120
        while "steps of" not in _so_far(child):
            assert time.monotonic() < deadline
        time.sleep(0.3)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 143, err
    report = json.loads(out)
    assert report["stopped_by"] == number.name
    assert checkpoint.verify(run / "checkpoints/last").step == report["step"] == logged(run)[-1]["step"] > 0
    assert f"stopped by {number.name} at step {report['step']}" in " ".join(err.split())
    assert "the same command goes on" in " ".join(err.split())


def _so_far(child: subprocess.Popen[str]) -> str:
    assert child.stderr is not None
    line = child.stderr.readline()
    assert line or child.poll() is None, "the training ended by itself"
    return line


# ---- the learning rate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["warmup_cosine", "one_cycle", "poly", "constant"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0.05), (2, 0.5), (7, 0.05), (100, 0.05), (1000, 0.3), (9, 0.99)])
def test_the_peak_rate_is_reached_and_the_end_is_near_zero(kind: str, num_steps: int, warmup: float) -> None:
    schedule = Schedule(kind=kind, warmup_fraction=warmup)  # type: ignore[arg-type]
    rates = [rate_factor(schedule, step, num_steps) for step in range(num_steps)]
    assert max(rates) == 1.0
    assert min(rates) > 0, "no step is wasted"
    top = rates.index(1.0)
    assert rates[:top] == sorted(rates[:top])
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))
    assert top == min(num_steps - 1, round(warmup * num_steps))
    if kind == "constant":
        assert rates[-1] == 1.0
    elif num_steps >= 100:
        assert rates[-1] < 0.02


def test_the_rate_that_is_logged_is_the_one_of_the_schedule(straight: tuple[Plan, Path]) -> None:
    plan, run = straight
    expected = [plan.optimizer.learning_rate * rate_factor(plan.schedule, step, 8) for step in range(8)]
    assert [line["learning_rate"] for line in logged(run)] == pytest.approx(expected)


# ---- what the plan leaves open, and what goes wrong ---------------------------------------------------------


def test_a_budget_becomes_a_number_of_steps_once(place: tuple[Path, Path], tmp_path: Path) -> None:
    plan = tiny_plan(*place, {"optimizer.num_steps": None, "budget_s": 2.0})
    run = tmp_path / "run"
    first = train(plan, place[0], run, cache=place[1], observer=StopAt(2))
    (event,) = [e for e in read_json_lines(run / "adaptations.jsonl") if "num_steps" in e]
    assert first.num_steps == event["num_steps"] > 2
    assert event["step_s"] > 0
    # a slower machine must not change what was fixed
    second = train(plan, place[0], run, cache=place[1], observer=StopAt(4))
    assert second.num_steps == first.num_steps
    assert len(read_json_lines(run / "adaptations.jsonl")) == 1


def test_timing_steps_takes_a_share_of_the_budget_at_most(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine a dozen timed steps once ate most of the budget."""
    times = iter(range(10**6))
    monkeypatch.setattr(budget.time, "perf_counter", lambda: float(next(times)))  # a step seems to take a second
    plan = tiny_plan(*place, {"optimizer.num_steps": None, "budget_s": 40.0})
    source = StepDataset(plan, *place)
    validator = Validator(plan, open_dataset(place[0]), place[1], 2**20)
    source.first()
    length = budget.fit_length(source, tmp_path, validator, torch.device("cpu"))
    assert 15 < length.num_steps < 40
    assert length.remark is not None
    assert re.match(rf"only {length.num_steps} steps fit into 40 s, a step takes 1 s .*busy.*too few", length.remark)


def test_steps_are_timed_for_three_percent_of_a_long_budget_and_slow_first_ones_do_not_count(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first dozen steps, which read every chunk for the first time, once told 20 % too much."""
    clock, steps = [0.0], [0]

    def step(self: Learner, number: int, batch: Any) -> None:
        steps[0] += 1
        clock[0] += 3.0 if steps[0] <= 10 else 1.0

    monkeypatch.setattr(budget.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(Validator, "seconds", lambda *_: 0.0)
    source = StepDataset(tiny_plan(*place, {"optimizer.num_steps": None, "budget_s": 1000.0}), *place)
    validator = Validator(source.plan, open_dataset(place[0]), place[1], 2**20)
    source.first()
    length = budget.fit_length(source, tmp_path, validator, torch.device("cpu"))
    assert budget.WARM_UP_STEPS + budget.USUAL_TIMED < steps[0] < 40
    spent = clock[0]
    assert 30 < spent < 45
    assert length.num_steps == int(0.97 * 1000 - spent), "at one second a step"


def test_a_run_long_enough_and_as_fast_as_planned_has_no_remark(place: tuple[Path, Path]) -> None:
    plan = tiny_plan(*place, {"optimizer.num_steps": None, "budget_s": 40.0})
    plan = msgspec.structs.replace(plan, predicted_step_s=0.4)
    assert budget._remark(plan, 100, 0.5) is None
    assert "busy" in (budget._remark(plan, 100, 0.9) or "")
    few = budget._remark(plan, 20, 0.5)
    assert few is not None
    assert "busy" not in few
    assert "longer --budget" in few


def test_a_run_folder_of_another_plan_is_refused_and_left_alone(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, run = straight
    other = msgspec.structs.replace(plan, seed=5)
    before = (run / "plan.json").read_bytes(), everything(run)
    with pytest.raises(PlanError, match="holds a run of another plan"):
        train(other, place[0], run, cache=place[1])
    assert (run / "plan.json").read_bytes() == before[0]
    assert_same_bits(everything(run), before[1])
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.png").write_bytes(b"meow")
    with pytest.raises(PlanError, match="is not empty and holds no run"):
        train(plan, place[0], foreign, cache=place[1])
    assert [p.name for p in foreign.iterdir()] == ["cat.png"]


def test_a_checkpoint_of_another_plan_inside_a_run_is_refused(
    straight: tuple[Plan, Path], place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, run = straight
    other = tmp_path / "other"
    save(msgspec.structs.replace(plan, seed=5), other / "plan.json")
    (other / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(CheckpointError, match="belongs to another plan"):
        train(load_as(other / "plan.json", Plan), place[0], other, cache=place[1])


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = tiny_plan(*place)
    for device, message in (("quantum", "is not a device"), ("meta", "is not supported")):
        with pytest.raises(PlanError, match=message):
            train(plan, place[0], tmp_path / "run", device=device, cache=place[1])
    if not torch.cuda.is_available():
        with pytest.raises(PlanError, match="there is none here"):
            train(plan, place[0], tmp_path / "run", device="cuda", cache=place[1])
    assert not (tmp_path / "run").exists()


def test_a_step_without_finite_gradients_is_skipped_counted_and_leaves_no_trace(
    place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = tiny_plan(*place)
    learner = Learner(plan, 8, torch.device("cpu"))
    batch = next(iter(batches(plan, place[0], cache=place[1])))
    learner.step(0, batch)
    before = {k: v.clone() for k, v in learner.state().items()} | {k: v.clone() for k, v in learner.averaged.items()}
    image = batch.image_BCZYX.clone()
    image[0, 0, 0, 0, 0] = math.nan
    result = learner.step(1, batch._replace(image_BCZYX=image))
    assert result.skipped
    assert_same_bits(learner.state() | learner.averaged, before)
    assert not learner.step(2, batch).skipped

    genuine = loader.StepDataset.batches

    def poisoned(*args: Any, **rest: Any) -> Any:
        for step, item in enumerate(genuine(*args, **rest)):
            yield item._replace(image_BCZYX=item.image_BCZYX * math.nan) if step in (2, 3) else item

    monkeypatch.setattr(loader.StepDataset, "batches", poisoned)
    outcome = train(plan, place[0], tmp_path / "run", cache=place[1])
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 4]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False, False, False]
    assert outcome.mean_dice is not None
    assert all(torch.isfinite(v).all() for v in everything(tmp_path / "run").values())


def test_a_run_that_only_skips_stops_with_advice(
    place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    genuine = loader.StepDataset.batches

    def poisoned(*args: Any, **rest: Any) -> Any:
        for item in genuine(*args, **rest):
            yield item._replace(image_BCZYX=item.image_BCZYX * math.nan)

    monkeypatch.setattr(loader.StepDataset, "batches", poisoned)
    plan = tiny_plan(*place, {"optimizer.num_steps": 40})
    with pytest.raises(PlanError, match=r"20 steps in a row without finite gradients .*learning_rate"):
        train(plan, place[0], tmp_path / "run", cache=place[1])


def test_accumulated_micro_batches_are_one_step_of_the_whole_batch(place: tuple[Path, Path]) -> None:
    """Without batch statistics and with a loss that is a mean over patches the gradients are the same."""
    changes = {"network.norm": "group", "loss.kind": "bce", "augmentation.preset": "none", "sampling.crops_per_step": 4}
    data = place[0]
    together = tiny_plan(data, place[1], changes | {"batch_size": 4, "accumulate_batches": 1})
    apart = tiny_plan(data, place[1], changes | {"batch_size": 1, "accumulate_batches": 4})
    batch = next(iter(batches(together, data, cache=place[1])))
    table = torch.where(batch.states_CK == 2, 0, batch.states_CK)  # all known: equal weights for every patch
    batch = batch._replace(states_CK=table.to(torch.uint8))
    one, four = (Learner(plan, 8, torch.device("cpu")) for plan in (together, apart))
    a, b = one.step(0, batch), four.step(0, batch)
    assert b.loss == pytest.approx(a.loss, rel=1e-5)
    assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-4)


# ---- other data than the plan's -----------------------------------------------------------------------------


def test_other_data_gets_a_split_of_its_own_which_is_recorded_once(place: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", seed=5, shape=(3, 64, 64), crops=3)
    plan, warnings = tiny_plan(*place), list[str]()
    run = tmp_path / "run"
    train_on(plan, other, run, cache=place[1], warn=warnings.append)
    derived = split_of(run)
    assert {r.crop for r in derived.train} == {"demo/crop1", "demo/crop2", "demo/crop3"}
    assert derived != plan.split
    assert load_as(run / "plan.json", Plan) == plan, "the plan never changes"
    assert data_of(run) == other.resolve()
    assert any("fingerprint differs" in text for text in warnings)
    assert sum("was derived again" in text for text in warnings) == 1
    assert sum("no EM that tiny measured; its own grey values are used" in text for text in warnings) == 1
    events = [e["event"] for e in read_json_lines(run / "adaptations.jsonl")]
    train_on(plan, other, run, cache=place[1])
    assert [e["event"] for e in read_json_lines(run / "adaptations.jsonl")] == events == ["split", "data"]


def test_the_data_of_the_plan_moves_without_a_warning(place: tuple[Path, Path], tmp_path: Path) -> None:
    plan, warnings = tiny_plan(*place), list[str]()
    moved = tmp_path / "moved"
    moved.symlink_to(place[0])
    train_on(plan, moved, tmp_path / "run", cache=place[1], warn=warnings.append)
    assert warnings == []
    assert split_of(tmp_path / "run") == plan.split


def test_data_that_lacks_a_class_of_the_plan_is_refused(place: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", classes=("mito", "er_mem"))
    with pytest.raises(PlanError, match="does not annotate pm"):
        train_on(tiny_plan(*place), other, tmp_path / "run", cache=place[1])
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_data_it_began_with_and_no_other(place: tuple[Path, Path], tmp_path: Path) -> None:
    """Else a score on the second data would be one on voxels that were learnt, and nobody would know."""
    plan, run = tiny_plan(*place), tmp_path / "run"
    train_on(plan, place[0], run, cache=place[1], observer=StopAt(3))
    other = make_dataset(tmp_path / "other", seed=5, shape=(4, 64, 64))
    before = everything(run)
    with pytest.raises(PlanError, match=r"began with other data .*another --run"):
        train_on(plan, other, run, cache=place[1])
    assert_same_bits(everything(run), before)
    assert load_as(run / "fingerprint.json", type(fingerprint(place[0], place[1]))) == fingerprint(*place)


def test_validation_counts_the_same_voxels_every_time(straight: tuple[Plan, Path], place: tuple[Path, Path]) -> None:
    from autoseg.train.validation import Validator

    plan, _ = straight
    validator = Validator(plan, open_dataset(place[0]), place[1], 2**24)
    learner = Learner(plan, 8, torch.device("cpu"))
    scores = [validator.score(learner.averaged_network(), torch.device("cpu"), 1).score for _ in range(2)]
    assert scores[0] == scores[1]
    assert set(scores[0].dice) == set(plan.class_names)


def test_validation_does_not_count_voxels_whose_em_was_never_fetched(tmp_path: Path) -> None:
    from autoseg.train.validation import Validator

    data, cache = make_dataset(tmp_path / "data", shape=(4, 64, 64), partial=False, validate=(2,)), tmp_path / "cache"
    plan, cpu = tiny_plan(data, cache), torch.device("cpu")
    level = em_path(data, "demo") / "s0"
    grid = open_multiscale(em_path(data, "demo")).levels[0].grid
    grey = ArrayReader(level, ChunkCache(0)).read(Box.whole(grid.shape_zyx))
    shutil.rmtree(level)
    create_array(level, grid.shape_zyx, np.uint8, (4, 32, 32))[:] = grey
    network = Learner(plan, 8, cpu).averaged_network()

    def known() -> int:
        found: list[Any] = []
        validator = Validator(plan, open_dataset(data), cache / "other", 2**24)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(validation, "dice_at", lambda counts, _: found.append(counts.sum()))
            validator.score(network, cpu, 1)
        return int(sum(found))

    whole = known()
    assert whole == 3 * 4 * 64 * 64
    chunks = sorted(p for p in level.rglob("*") if p.is_file() and not p.name.startswith((".", "zarr.json")))
    assert len(chunks) == 8
    chunks[-1].unlink()
    assert known() == whole - 3 * 4 * 32 * 32


def test_validation_chooses_thresholds_for_the_best_weights_and_says_how_long_it_takes(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    from autoseg.train.validation import Validator

    plan = tiny_plan(*place, {"decode.tune_thresholds": True})
    train(plan, place[0], tmp_path / "run", cache=place[1])
    best = checkpoint.find(tmp_path / "run" / "checkpoints", "best")
    header = checkpoint.verify(best)
    kept = load_as(tmp_path / "run" / "decode.json", TunedDecode)
    assert kept.step == header.step
    assert header.decode == kept
    validator, cpu = Validator(plan, open_dataset(place[0]), place[1], 2**24), torch.device("cpu")
    network = build_network(plan)
    checkpoint.load_weights(network, best / checkpoint.WEIGHTS)
    found = validator.score(network.eval(), cpu, header.step)
    assert found.tuned == kept
    assert found.score.dice == kept.dice_before
    assert validator.seconds(network, cpu) > 0


def test_the_gradient_scale_of_fp16_halves_on_overflow_and_grows_again(place: tuple[Path, Path]) -> None:
    """A plan for the CPU is never fp16, so the scaler is switched on by hand."""
    plan, cpu = tiny_plan(*place), torch.device("cpu")
    batch = next(iter(batches(plan, place[0], cache=place[1])))

    class Enabled(Learner):
        def __init__(self) -> None:
            super().__init__(plan, 8, cpu)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2, enabled=True)

    learner = Enabled()
    image = torch.full_like(batch.image_BCZYX, math.inf)
    assert learner.step(0, batch._replace(image_BCZYX=image)).skipped
    assert learner.scaler.get_scale() == 32, "a skipped step halves the scale"
    assert [learner.step(step, batch).skipped for step in (1, 2)] == [False, False]
    assert learner.scaler.get_scale() == 64, "two good steps double it"


def test_the_gradient_scale_of_fp16_goes_through_a_checkpoint(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(*place)

    class Enabled(Learner):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3, enabled=True)

    monkeypatch.setattr(loop, "Learner", Enabled)
    train(plan, place[0], tmp_path / "straight", cache=place[1])
    train(plan, place[0], tmp_path / "resumed", cache=place[1], observer=StopAt(5))
    header = checkpoint.verify(tmp_path / "resumed/checkpoints/last")
    assert (header.step, header.grad_scale, header.grad_scale_growth) == (5, 128, 2)
    train(plan, place[0], tmp_path / "resumed", cache=place[1])
    assert_same_bits(everything(tmp_path / "resumed"), everything(tmp_path / "straight"))
    headers = [checkpoint.verify(tmp_path / run / "checkpoints/last") for run in ("resumed", "straight")]
    assert headers[0] == headers[1]
    assert (headers[0].grad_scale, headers[0].grad_scale_growth) == (256, 2)


def test_the_data_is_opened_once_at_the_start_of_a_run(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, genuine = list[Any](), loader.PatchSampler
    monkeypatch.setattr(loader, "PatchSampler", lambda *args: opened.append(args) or genuine(*args))
    plan = tiny_plan(*place, {"optimizer.num_steps": None, "budget_s": 2.0})
    train(plan, place[0], tmp_path / "run", cache=place[1], observer=StopAt(2))
    assert len(opened) == 1


def test_evaluation_calls_present_what_reaches_the_tuned_thresholds_of_its_own_checkpoint(
    place: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where prediction averages over mirrored copies, without which thresholds are tuned."""
    monkeypatch.setattr(thresholds, "MIN_POSITIVE_VOXELS", 1)
    changes = {"decode.tune_thresholds": True, "validation.tolerance": 0.0, "sliding_window.mirror_axes": ("y", "x")}
    plan, run = tiny_plan(*place, changes | {"optimizer.num_steps": 20}), tmp_path / "run"
    train_on(plan, place[0], run, cache=place[1])
    (run / "decode.json").unlink()  # what people read; nothing depends on it
    trained = open_run(run, "best", "cpu")
    header = checkpoint.verify(run / "checkpoints/best")
    assert header.decode is not None
    assert trained.plan.decode.thresholds == header.decode.thresholds != plan.decode.thresholds
    judged = evaluate_run(run, place[0], cache=place[1])
    regions = crop_regions(plan.split, open_dataset(place[0]), "all")
    predict_regions(trained, regions, tmp_path / "out", probabilities=True)
    assert judged.scores.prediction is not None
    for region in regions:
        folder = Path(judged.scores.prediction) / region.name
        if not folder.exists():
            continue
        for name, threshold in header.decode.thresholds.items():
            whole = Box.whole(region.grid.shape_zyx)
            label = ArrayReader(folder / name / "s0", ChunkCache(0)).read(whole)
            probability = tmp_path / "out" / region.name / "probabilities" / name / "s0"
            above = ArrayReader(probability, ChunkCache(0)).read(whole) - 255 * threshold
            clear = np.abs(above) > 1
            assert clear.mean() > 0.9
            assert np.array_equal(label[clear] > 0, above[clear] > 0)
