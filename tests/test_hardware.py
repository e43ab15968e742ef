"""What a process may use of a machine: limits of control groups, of either version, in a folder made for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from autoseg import limits
from autoseg.plan import hardware

GIB = 2**30
V1 = ["4:memory:/pod/job", "2:cpu,cpuacct:/pod/job", "0::/"]
V2 = ["0::/pod/job"]


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))


def machine_of(root: Path, groups: list[str], files: dict[str, str]) -> Path:
    """Write what /proc and /sys/fs/cgroup of a machine say; return its root."""
    for name, text in {f"sys/fs/cgroup/{name}": text for name, text in files.items()}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    if groups:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text("\n".join(groups) + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "threads"),
    [
        (V2, {"pod/job/cpu.max": "300000 100000"}, 3),
        (V2, {"pod/job/cpu.max": "max 100000", "pod/cpu.max": "500000 100000"}, 5),
        (V2, {"pod/job/cpu.max": "50000 100000"}, 1),
        (V2, {"cpu.max": "200000 100000"}, 2),
        (V2, {}, 16),
        ([], {"cpu.max": "200000 100000"}, 2),
        (V1, {"cpu/pod/job/cpu.cfs_quota_us": "400000", "cpu/pod/job/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "150000", "cpu/pod/cpu.cfs_period_us": "50000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "700000", "cpu/cpu.cfs_period_us": "100000"}, 7),
        (V1, {"cpu/pod/job/cpu.cfs_quota_us": "-1", "cpu/pod/job/cpu.cfs_period_us": "100000"}, 16),
        (["0::/"], {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ([], {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_threads_are_cut_by_the_smallest_quota(
    tmp_path: Path, groups: list[str], files: dict[str, str], threads: int
) -> None:
    assert limits.usable_threads(machine_of(tmp_path, groups, files)) == threads


@pytest.mark.parametrize(
    ("groups", "files", "ram_gib"),
    [
        (V2, {"pod/job/memory.max": str(8 * GIB), "memory.max": "max"}, 8),
        (V2, {"pod/job/memory.max": "max", "pod/memory.max": str(4 * GIB)}, 4),
        (V1, {"memory/pod/job/memory.limit_in_bytes": str(6 * GIB)}, 6),
        (V1, {"memory/pod/memory.limit_in_bytes": str(5 * GIB), "memory/memory.limit_in_bytes": str(2**63 - 4096)}, 5),
        (V1, {"memory/memory.limit_in_bytes": str(7 * GIB)}, 7),
        (V1, {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 64),
        ([], {"memory/memory.limit_in_bytes": str(7 * GIB)}, 7),
        ([], {}, 64),
    ],
)
def test_ram_is_cut_by_the_smallest_limit(
    tmp_path: Path, groups: list[str], files: dict[str, str], ram_gib: int
) -> None:
    assert limits.usable_ram_bytes(machine_of(tmp_path, groups, files)) == ram_gib * GIB


@pytest.mark.parametrize(
    ("flags", "native"),
    [("avx2 avx_ne_convert", False), ("avx512_bf16", True), ("amx_tile amx_bf16", True), ("asimd bf16", True)],
)
def test_bf16_is_native_where_it_is_multiplied_not_where_it_is_only_converted(
    monkeypatch: pytest.MonkeyPatch, flags: str, native: bool
) -> None:
    monkeypatch.setattr(hardware, "_cpuinfo", lambda _: flags)
    assert hardware._cpu_has_bf16() == native
