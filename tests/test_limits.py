"""Thread pools are sized before the libraries that make them are imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from strategies import child_environment

from autoseg import limits


@pytest.fixture(autouse=True)
def _no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in limits.THREAD_POOLS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(limits, "usable_threads", lambda: 6)


def pools() -> set[str | None]:
    return {os.environ.get(name) for name in limits.THREAD_POOLS}


def test_pools_are_as_large_as_the_plan_says_and_the_machine_has(tmp_path: Path) -> None:
    for planned, expected in ((4, "4"), (40, "6")):
        plan = tmp_path / f"{planned}.json"
        plan.write_text(json.dumps({"num_threads": planned}))
        with pytest.MonkeyPatch.context() as patch:
            for name in limits.THREAD_POOLS:
                patch.delenv(name, raising=False)
            limits.size_thread_pools(plan)
            assert pools() == {expected}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_threads": "many"}', '{"num_threads": null}', "\x00"])
def test_a_plan_that_cannot_be_read_is_left_to_its_reader(tmp_path: Path, content: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(content)
    limits.size_thread_pools(plan)
    assert pools() == {"6"}
    limits.size_thread_pools(tmp_path / "none.json")


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    limits.size_thread_pools()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["MKL_NUM_THREADS"] == "6"


def test_workers_start_with_one_thread_each_and_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with limits.one_thread_each():
        assert pools() == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert "MKL_NUM_THREADS" not in os.environ


def test_the_door_sizes_pools_before_torch_is_imported(tmp_path: Path) -> None:
    """A plan of one thread that names no data fails late enough to have set what torch then reads."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"num_threads": 1}))
    code = (
        "import sys, os; from autoseg.cli import main;"
        f"assert main(['train', '--plan', {str(plan)!r}, '--data', {str(tmp_path)!r}]) == 2;"
        "import torch; print(os.environ['OPENBLAS_NUM_THREADS'], torch.get_num_threads())"
    )
    environment = {k: v for k, v in child_environment().items() if k not in limits.THREAD_POOLS}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
