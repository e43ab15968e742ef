"""What is said, and when: a late run, a busy machine, a plan for other data, GPUs of runs side by side."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from test_planner import TINY, cheap, facts, gpu, machine, reason

from autoseg.commands import planning
from autoseg.errors import PlanError
from autoseg.plan import make_plan
from autoseg.recipes import dev_run, speed
from autoseg.recipes.training import _check_classes
from autoseg.report.data_tables import class_table
from autoseg.report.terminal import make_console
from autoseg.schema import Hardware, Intensity, Observer, Outcome, Plan, decode, encode, save
from autoseg.train.loop import _Session


class Heard(Observer):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warned(self, text: str) -> None:
        self.said.append(text)


@cheap
@pytest.mark.parametrize(
    ("step", "elapsed_s", "settings", "warned"),
    [
        pytest.param(20, 4.0, {}, False, id="in-time"),
        pytest.param(20, 40.0, {}, True, id="four-times-late"),
        pytest.param(21, 40.0, {}, False, id="said-once"),
        pytest.param(20, 40.0, {"optimizer.num_steps": 200}, False, id="no-budget-to-keep"),
    ],
)
def test_a_run_that_will_be_late_says_so_once(
    step: int, elapsed_s: float, settings: dict[str, int], warned: bool
) -> None:
    plan = make_plan(
        "a", facts(), machine(threads=1), {k: v for k, v in TINY.items() if "num_steps" not in k} | settings
    )
    if not settings:
        plan = msgspec.structs.replace(plan, budget_s=100.0)
    heard = Heard()
    session = SimpleNamespace(plan=plan, length=SimpleNamespace(num_steps=200), _from=0)
    _Session._warn_late(session, step, elapsed_s, heard)  # type: ignore[arg-type]
    assert bool(heard.said) == warned
    assert all("takes 400 s, its budget is 100 s" in text for text in heard.said)


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(planning.os, "getloadavg", lambda: (5.9, 0, 0), raising=False)
    assert "load 5.9 on 2 threads" in (planning.load_of_others(machine()) or "")
    monkeypatch.setattr(planning.os, "getloadavg", lambda: (1.2, 0, 0), raising=False)
    assert planning.load_of_others(machine()) is None


@cheap
def test_a_plan_for_other_data_is_named_before_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    plan, other = (make_plan("a", facts(crops=n), machine(), {}) for n in (2, 3))
    assert planning._other_data(path, plan) is None, "nothing there"
    save(plan, path)
    assert planning._other_data(path, plan) is None, "the same data"
    assert planning._other_data(path, other) == "v0"
    path.write_text("{}")
    assert planning._other_data(path, plan) is None, "no plan"


@cheap
def test_gpus_of_runs_side_by_side_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoseg.cli import main

    monkeypatch.chdir(tmp_path)
    save(facts(), Path("f.json"))
    asked = ["--fingerprint", "f.json", "--hardware", "shenron", "--side-by-side", "2", "--out", "p.json"]
    assert main(["plan", *asked, "--cache", "cache"]) == 0
    said = capsys.readouterr().err
    assert "run 1 of 2: CUDA_VISIBLE_DEVICES=0,1 " in said
    assert "run 2 of 2: CUDA_VISIBLE_DEVICES=2,3 " in said


@cheap
def test_volumes_of_the_other_polarity_are_named() -> None:
    found = facts(volumes=3)

    def stained(skewness: float, grey: Intensity | None) -> Intensity:
        assert grey is not None
        return msgspec.structs.replace(grey, local_skewness=skewness)

    skewness = (-0.2, -0.1, 0.3)
    volumes = tuple(
        msgspec.structs.replace(v, intensity=stained(s, v.intensity))
        for v, s in zip(found.volumes, skewness, strict=True)
    )
    plan = make_plan("a", msgspec.structs.replace(found, volumes=volumes), machine(), {})
    assert "stain is dark in most volumes, but not in v2" in reason(plan, "normalization.kind")
    assert "stain" not in reason(make_plan("a", found, machine(), {}), "normalization.kind")


@cheap
def test_a_step_that_does_not_fit_leaves_the_speed_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_: Plan) -> float:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(speed, "measure_step_gflops", no_room)
    plan = speed.plan_here("a", facts(), msgspec.structs.replace(machine(), step_gflops=None), {})
    assert plan.predicted_step_s is None


@cheap
def test_a_part_of_a_gpu_has_a_part_of_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_step_gflops", lambda _: 90.0)
    plan = speed.plan_here("a", facts(), machine(), {}, runs_on_one=3)
    assert plan.hardware.step_gflops == {plan.precision: 30.0}


def test_a_trial_that_is_stopped_is_not_said_to_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped = Outcome(tmp_path, 0, 1, None, None, "SIGTERM")
    monkeypatch.setattr(dev_run, "train_on", lambda *_, **__: stopped)
    plan = make_plan("a", facts(), machine(threads=1), TINY)
    with pytest.raises(KeyboardInterrupt):
        next(dev_run.dev_run(plan, tmp_path, device="cpu", cache=tmp_path))


@cheap
def test_all_classes_that_are_missing_are_counted_with_the_command_that_plans_anew() -> None:
    plan = make_plan("big", facts(classes=("a", "b", "c", "d", "mito")), machine(), {})
    with pytest.raises(PlanError, match=r"annotate a, b, c, \.\.\. \(4 of the 5 classes of big\).*--hardware bench"):
        _check_classes(plan, facts(classes=("mito",)), Path("data"))


def test_the_share_of_a_sampled_class_is_shown_with_its_interval() -> None:
    found = facts(crops=1)
    count = msgspec.structs.replace(found.crops[0].counts["mito"], share_interval=(0.06, 0.14))
    crop = msgspec.structs.replace(found.crops[0], counts=found.crops[0].counts | {"mito": count})
    console = make_console(stdout=True)
    with console.capture() as text:
        console.print(class_table(msgspec.structs.replace(found, crops=(crop,))), width=120)
    lines = {line.split()[0]: line for line in text.get().splitlines() if line.startswith(("mito", "pm"))}
    assert "10.00% ± 4.00%" in lines["mito"]
    assert "±" not in lines["pm"]


def test_a_speed_of_an_earlier_version_is_not_taken_for_this_one() -> None:
    content = encode(machine(gpu())).replace(b"step_gflops", b"conv_gflops")
    with pytest.raises(PlanError, match="held another speed: write it anew"):
        decode(content, Hardware, "hardware.json")


@cheap
def test_disk_is_counted_and_too_little_is_said() -> None:
    plan = make_plan("a", facts(), msgspec.structs.replace(machine(), disk_free_bytes=10**6), {})
    voxels = 3 * 20 * 512 * 512
    assert plan.predicted_disk_bytes >= voxels, "a byte a voxel, and checkpoints"
    assert reason(plan, "predicted_disk_bytes").endswith("too few")
    roomy = make_plan("a", facts(), msgspec.structs.replace(machine(), disk_free_bytes=10**13), {})
    assert "too few" not in reason(roomy, "predicted_disk_bytes")
