"""`autoseg profile`: real batches, real steps, a recommendation that follows from them, and nothing left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import listing, make_dataset, valid_plan
from test_planner import tiny_plan

from autoseg.cli import main
from autoseg.errors import PlanError
from autoseg.recipes import profile
from autoseg.schema import Plan, Profile, Region, Split, WorkerTrial, save

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan]:
    """Return (DATA, cache, a tiny plan for it)."""
    folder = tmp_path_factory.mktemp("profile")
    data = make_dataset(folder / "data", shape=(4, 64, 64))
    return data, folder / "cache", tiny_plan(data, folder / "cache")


def trial(workers: int, step_s: float, waiting: float = 0.5) -> WorkerTrial:
    return WorkerTrial(num_workers=workers, step_s=step_s, batch_wait_fraction=waiting, worker_rss_bytes=None)


# ---- the whole command --------------------------------------------------------------------------------------


def test_the_command_measures_and_leaves_nothing_behind(
    place: tuple[Path, Path, Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, cache, plan = place
    save(plan, tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile.profile_plan, "__kwdefaults__", profile.profile_plan.__kwdefaults__ | {"trial_s": 0.2})
    monkeypatch.setattr(profile, "usable_threads", lambda: 1)
    before, threads = listing(data), torch.get_num_threads()
    assert main(["profile", "--plan", "plan.json", "--data", str(data), "--cache", str(cache), "--json"]) == 0
    out, err = capsys.readouterr()
    found = msgspec.convert(json.loads(out), Profile)
    assert listing(data) == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert torch.get_num_threads() == threads
    assert [t.num_workers for t in found.trials] == [0, 1]
    assert found.batch_wait_fraction == found.trials[0].batch_wait_fraction
    assert 0 < found.batch_wait_fraction < 1
    assert found.trials[0].worker_rss_bytes is None
    assert found.worker_rss_bytes == found.trials[1].worker_rss_bytes
    assert found.worker_rss_bytes > 50 * MIB, "a Python process with torch"
    assert found.samples_per_s > 0
    assert found.predicted_memory_bytes == plan.predicted_memory_bytes
    assert f"num_workers={found.recommended_workers}" in err
    assert "recommended" in err


def test_what_train_refuses_is_refused(place: tuple[Path, Path, Plan], tmp_path: Path) -> None:
    data, cache, plan = place
    elsewhere = Split(train=(Region(crop="demo/crop9"),), validate=(), rule="user")
    with pytest.raises(PlanError, match="no crop demo/crop9"):
        profile.profile_plan(msgspec.structs.replace(plan, split=elsewhere), data, cache)
    with pytest.raises(PlanError, match="--device tpu"):
        profile.profile_plan(plan, data, cache, device="tpu")


# ---- memory -------------------------------------------------------------------------------------------------


def test_the_peak_is_what_was_held_at_once() -> None:
    def action() -> None:
        kept = torch.zeros(MIB)  # 4 MiB
        for _ in range(3):
            gone = [torch.zeros(MIB) for _ in range(2)]
            del gone
        del kept

    before = torch.zeros(8 * MIB)
    assert profile.peak_bytes(action, CPU) == 12 * MIB
    del before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_slices": 3},
        {"patch_size_zyx": (4, 32, 32), "network.kind": "rsunet", "network.norm": "group"},
        {"batch_size": 3, "accumulate_batches": 2, "network.features": (16, 32)},
    ],
)
def test_the_trace_predicts_what_the_allocator_measures(
    place: tuple[Path, Path, Plan], changes: dict[str, Any]
) -> None:
    data, cache, _ = place
    plan = tiny_plan(data, cache, changes)
    batch = next(profile.batches(plan, data, cache=cache))
    measured = profile.peak_bytes(lambda: profile._two_steps(plan, [batch], CPU), CPU)
    assert 0.6 < plan.predicted_memory_bytes / measured < 1.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_counts_only_the_action() -> None:
    device = torch.device("cuda")
    before = torch.zeros(8 * MIB, device=device)
    assert profile.peak_bytes(lambda: torch.zeros(MIB, device=device).sum().item() and None, device) >= 4 * MIB
    assert profile.peak_bytes(lambda: None, device) == 0
    del before


# ---- waiting and workers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_s", "step_s", "waits"), [(0.02, 0.0, True), (0.0, 0.02, False)])
def test_waiting_is_the_time_until_a_batch_is_there(
    monkeypatch: pytest.MonkeyPatch, batch_s: float, step_s: float, waits: bool
) -> None:
    def slow_batches(*_: Any, **__: Any) -> Iterator[int]:
        while True:
            time.sleep(batch_s)
            yield 0

    monkeypatch.setattr(profile, "batches", slow_batches)
    monkeypatch.setattr(profile, "make_step", lambda *_: lambda batch: time.sleep(step_s))
    found = profile._trial(valid_plan(), Path("data"), Path("cache"), CPU, 0.1)
    assert (found.batch_wait_fraction > 0.5) == waits
    assert found.step_s >= max(batch_s, step_s)


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    st.floats(0.1, 1e3),
)
def test_the_fewest_workers_that_are_nearly_as_quick_as_any(times: list[float], rate: float) -> None:
    trials = [trial(n, s) for n, s in enumerate(times)]
    chosen, because = profile.recommend(valid_plan(), trials, rate, 0.1)
    enough = [n for n, s in enumerate(times) if s <= 1.05 * min(times)]
    assert chosen == enough[0]
    assert f"{times[chosen]:.3f} s" in because


def test_the_reason_compares_with_fewer_and_with_more() -> None:
    trials = [trial(0, 0.4), trial(1, 0.21), trial(2, 0.205)]
    chosen, because = profile.recommend(valid_plan(batch_size=2, accumulate_batches=2), trials, 8.0, 0.2)
    assert chosen == 1
    for part in ("makes 8.0 patches/s", "takes 20.0", "with 1 worker", "with no worker 0.400 s", "less than 5%"):
        assert part in because


@pytest.mark.parametrize(
    ("threads", "planned", "counts"),
    [
        (1, 0, [0, 1]),
        (2, 0, [0, 1, 2]),
        (8, 3, [0, 1, 2, 3, 4, 8]),
        (6, 6, [0, 1, 2, 4, 6]),
        (1, 4, [0, 1, 4]),
        (2, 1, [0, 1, 2]),
        (2, 2, [0, 1, 2]),
        (8, 4, [0, 1, 2, 4, 8]),
        (10, 8, [0, 1, 2, 4, 8]),
    ],
)
def test_worker_counts_double_up_to_the_threads_whatever_is_planned(
    threads: int, planned: int, counts: list[int]
) -> None:
    assert profile.worker_counts(threads, planned) == counts
