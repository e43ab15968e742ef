"""What this process may use of its machine, and how many threads its libraries start.

The pools of OpenMP, MKL and OpenBLAS are made when they are first imported, as large as the machine and blind to the
quota of a container: so their sizes are set before.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

THREAD_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def size_thread_pools(plan: Path | None = None) -> None:
    """Let the libraries start as many threads as the plan says, or as this process may use; what is set stays.

    To be called before any of them is imported. A plan that cannot be read is for its reader to refuse.
    """
    threads = usable_threads()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        threads = min(threads, int(json.loads(plan.read_bytes())["num_threads"])) if plan else threads
    for name in THREAD_POOLS:
        os.environ.setdefault(name, str(max(1, threads)))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Let processes that are started meanwhile have one thread in each pool."""
    before = {name: os.environ.get(name) for name in THREAD_POOLS}
    os.environ.update(dict.fromkeys(THREAD_POOLS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def usable_threads(root: Path = Path("/")) -> int:
    """Return the CPU threads this process may use: affinity, cut by the quota of its cgroups in the files of `root`."""
    try:
        threads = len(os.sched_getaffinity(0))
    except AttributeError:
        threads = os.cpu_count() or 1
    for folder in _cgroups(root, "cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max", which is no limit
                quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
                threads = min(threads, max(1, quota // period)) if quota > 0 else threads
    return threads


def usable_ram_bytes(root: Path = Path("/")) -> int:
    """Return the RAM this process may use: the machine's, cut by the limit of its cgroups in the files of `root`."""
    limits = [psutil.virtual_memory().total]
    for folder in _cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / name).read_text()))
    return int(min(limits))


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of every one above it, in version 2 and in version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    # a container may not see its own path: the top of either version is looked at, too
    for line in ["0::/", f"1:{controller}:/", *lines]:
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top / own.lstrip("/")
        yield from (folder, *(parent for parent in folder.parents if parent.is_relative_to(top)))
