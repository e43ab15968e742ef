"""Machine -> hardware record: what this process may really use, and how fast a convolution runs on it."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from autoseg.schema import Gpu, Hardware

PROBE_SECONDS = 0.4


def probe_hardware(*, measure_speed: bool = True) -> Hardware:
    """Return the local machine; threads by affinity and cgroup quota, RAM by cgroup, GPUs as CUDA reports them."""
    gpus = tuple(_gpu(i) for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    threads = usable_threads()
    bf16 = _cpu_has_bf16()
    return Hardware(
        name=platform.node().split(".")[0] or "local",
        gpus=gpus,
        cpu_name=_cpu_name(),
        cpu_threads=threads,
        cpu_bf16=bf16,
        ram_bytes=usable_ram_bytes(),
        shm_bytes=psutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        conv_gflops=measure_conv_gflops(torch.device("cuda" if gpus else "cpu"), threads) if measure_speed else None,
    )


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


def measure_conv_gflops(device: torch.device, threads: int) -> dict[str, float]:
    """Return the measured speed of a 3x3 convolution of 32 channels, forward and backward, by precision."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {name: _conv_gflops(device, dtype) for name, dtype in _precisions(device).items()}
    finally:
        torch.set_num_threads(before)


def _precisions(device: torch.device) -> dict[str, torch.dtype]:
    if device.type == "cpu":
        return {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if _cpu_has_bf16() else {})
    bf16 = {"bf16": torch.bfloat16} if torch.cuda.is_bf16_supported(including_emulation=False) else {}
    return {"fp32": torch.float32, "fp16": torch.float16} | bf16


def _conv_gflops(device: torch.device, dtype: torch.dtype) -> float:
    layout = torch.channels_last
    weight = torch.randn(32, 32, 3, 3).to(device, dtype, memory_format=layout).requires_grad_()
    image = torch.randn(8, 32, 128, 128).to(device, dtype, memory_format=layout).requires_grad_()
    gradient = torch.randn(8, 32, 128, 128).to(device, dtype, memory_format=layout)
    flops = 3 * 2 * 9 * 32 * 32 * 8 * 128 * 128

    def once() -> None:
        torch.nn.functional.conv2d(image, weight, padding=1).backward(gradient)  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize()

    once()
    once()
    times: list[float] = []
    while sum(times) < PROBE_SECONDS or len(times) < 3:
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return float(flops / sorted(times)[len(times) // 2] / 1e9)


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(
        name=properties.name,
        memory_bytes=int(total),
        free_bytes=int(free),
        bf16=properties.major >= 8,
        fp16=properties.major >= 7,
    )


def _cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 natively; elsewhere autocast to bf16 is emulated and slow."""
    flags = _cpuinfo("flags") or _cpuinfo("Features")
    return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
