"""Machines and plans that come with autoseg: complete, sound, and found wherever it is installed."""

from __future__ import annotations

import importlib.metadata
import math
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_planner import facts

from autoseg.errors import PlanError
from autoseg.plan import make_plan, shipped
from autoseg.schema import Fingerprint, Plan, load_as, save

ROOT = Path(__file__).parents[1]
MACHINES = {
    "shenron": (4, 10.75, 32, 126),
    "rocinante": (2, 23.68, 32, 252),
    "rtx4090": (1, 23.64, 16, 64),
    "l40s": (1, 44.39, 16, 128),
    "a100-40": (1, 39.38, 16, 128),
    "a100-80": (1, 79.14, 16, 128),
    "h100-80": (1, 79.1, 16, 128),
    "v100-16": (1, 15.77, 8, 64),
    "laptop": (0, 0, 8, 16),
    "two-core": (0, 0, 2, 24),
}


def test_every_machine_is_shipped_as_it_is_known() -> None:
    files = shipped.shipped_files("hardware")
    assert set(files) == set(MACHINES)
    for name, (num_gpus, gib, threads, ram_gb) in MACHINES.items():
        found = shipped.read_hardware(name)
        assert found.name == name
        assert len(found.gpus) == num_gpus
        assert all(gpu.memory_bytes == int(gib * 2**30) for gpu in found.gpus)
        assert (found.cpu_threads, found.ram_bytes) == (threads, ram_gb * 10**9)


@pytest.mark.parametrize(("name", "precision"), [("shenron", "fp16"), ("v100-16", "fp16"), ("h100-80", "bf16")])
def test_a_plan_for_a_shipped_machine_fits_it(name: str, precision: str) -> None:
    hardware = shipped.read_hardware(name)
    plan = make_plan(name, facts(), hardware, {})
    assert plan.precision == precision
    assert plan.predicted_memory_bytes < 0.9 * hardware.gpus[0].memory_bytes
    assert plan.predicted_ram_bytes < hardware.ram_bytes


SHIPPED_PLANS = ("rocinante", "shenron", "rtx4090", "l40s", "a100-40", "a100-80", "h100-80", "v100-16")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("rocinante", "shenron") else pytest.mark.slow) for n in SHIPPED_PLANS]
)
def test_a_shipped_plan_is_what_the_planner_makes_of_the_shipped_fingerprint_and_machine(name: str) -> None:
    """After a wanted change run with AUTOSEG_WRITE_GOLDEN=1 (`-m ''` for all) and look at `autoseg plan --diff`."""
    found = load_as(shipped.shipped_files("fingerprints")["cellmap"], Fingerprint)
    hardware = shipped.read_hardware(name)
    plan = make_plan(name, found, hardware, {})
    path = ROOT / f"plans/{name}.json"
    if os.environ.get("AUTOSEG_WRITE_GOLDEN"):
        save(plan, path)
    before = load_as(path, Plan)
    for field in ("predicted_memory_bytes", "predicted_ram_bytes"):
        assert getattr(plan, field) == pytest.approx(getattr(before, field), rel=0.02), field
    quiet: dict[str, Any] = {"predicted_memory_bytes": 0, "predicted_ram_bytes": 0, "reasons": ()}
    assert msgspec.structs.replace(plan, **quiet) == msgspec.structs.replace(before, **quiet)
    assert [(r.field, r.source) for r in plan.reasons] == [(r.field, r.source) for r in before.reasons]
    used = plan.predicted_memory_bytes / hardware.gpus[0].memory_bytes
    assert 0.5 <= used <= 0.9 or "would not help" in next(r.because for r in plan.reasons if r.field == "batch_size")
    assert plan.predicted_ram_bytes < 0.6 * hardware.ram_bytes


def test_the_plan_of_two_cores_is_what_the_planner_makes_of_its_data_and_machine() -> None:
    found = load_as(ROOT / "tests/golden/fingerprint-vnc.json", Fingerprint)
    path = ROOT / "plans/vnc-two-cores.json"
    before = load_as(path, Plan)
    plan = make_plan("vnc-two-cores", found, before.hardware, {"budget_s": 240.0})
    if os.environ.get("AUTOSEG_WRITE_GOLDEN"):
        save(plan, path)
        before = plan
    assert plan.predicted_memory_bytes == pytest.approx(before.predicted_memory_bytes, rel=0.02)
    quiet: dict[str, Any] = {"predicted_memory_bytes": 0, "predicted_ram_bytes": 0, "reasons": ()}
    assert msgspec.structs.replace(plan, **quiet) == msgspec.structs.replace(before, **quiet)


def test_the_shipped_fingerprint_is_the_challenge_s_and_says_what_it_does_not_know() -> None:
    found = load_as(shipped.shipped_files("fingerprints")["cellmap"], Fingerprint)
    assert (len(found.crops), len(found.volumes), len(found.classes)) == (289, 22, 48)
    assert sum(math.prod(crop.shape_zyx) for crop in found.crops) == pytest.approx(42.3e9, rel=0.01)
    assert found.source is not None
    assert "not counted" in found.source
    assert all(not crop.counts for crop in found.crops)
    assert all(volume.intensity is None for volume in found.volumes)
    assert {name for name, reported in found.frequencies.items() if reported.share > 0.3} == {"nuc", "ecs"}
    assert all(reported.source for reported in found.frequencies.values())


def test_a_name_that_is_no_machine_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlanError, match="did you mean 'rocinante'"):
        shipped.read_hardware("rosinante")
    with pytest.raises(PlanError, match="pass a file, or one of local, a100-40"):
        shipped.read_hardware("a-mainframe")


def test_a_file_of_ones_own_wins_over_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = Path("plans/vnc-two-cores.json")
    assert shipped.own_or_shipped(wanted, "plans") == shipped.shipped_files("plans")["vnc-two-cores"]
    wanted.parent.mkdir()
    wanted.write_text("{}")
    assert shipped.own_or_shipped(wanted, "plans") == wanted
    for mistyped in ("plans/none.json", "some/where/rocinante.json", "rocinante.txt"):
        assert shipped.own_or_shipped(Path(mistyped), "plans") == Path(mistyped)
    shown = Path("plans/fingerprints/cellmap.json")
    assert shipped.own_or_shipped(shown, "fingerprints") == shipped.shipped_files("fingerprints")["cellmap"]


def test_an_installed_package_finds_its_files_by_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "share/autoseg/hardware/box.json"
    installed.parent.mkdir(parents=True)
    installed.write_text("{}")

    class File(str):
        __slots__ = ()

        def as_posix(self) -> str:
            return str(self)

        def locate(self) -> Path:
            return tmp_path / str(self)

    listed = [File("share/autoseg/hardware/box.json"), File("lib/autoseg/cli.py")]
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "lib/autoseg/plan/shipped.py"))
    monkeypatch.setattr(importlib.metadata, "files", lambda name: listed if name == shipped.DISTRIBUTION else None)
    assert shipped.shipped_files("hardware") == {"box": installed.resolve()}
    assert shipped.shipped_files("plans") == {}
