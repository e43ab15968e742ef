"""Machine -> hardware record: what this process may really use, and one run's share of it."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import msgspec
import psutil
import torch

from autoseg.errors import PlanError
from autoseg.limits import usable_ram_bytes, usable_threads
from autoseg.schema import Gpu, Hardware


def probe_hardware() -> Hardware:
    """Return the local machine; threads by affinity and cgroup quota, RAM by cgroup, GPUs as CUDA reports them."""
    gpus = tuple(_gpu(i) for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    return Hardware(
        name=platform.node().split(".")[0] or "local",
        gpus=gpus,
        cpu_name=_cpu_name(),
        cpu_threads=usable_threads(),
        cpu_bf16=_cpu_has_bf16(),
        ram_bytes=usable_ram_bytes(),
        disk_free_bytes=psutil.disk_usage(".").free,
        shm_bytes=psutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
    )


def runs_on_one(hardware: Hardware, num_runs: int) -> int:
    """Return how many of the runs one GPU computes; 1 on a CPU, of which each has threads of its own."""
    return max(1, math.ceil(num_runs / len(hardware.gpus))) if hardware.gpus else 1


def gpus_of_run(hardware: Hardware, num_runs: int, run: int) -> list[int]:
    """Return the numbers of the GPUs of one of several runs side by side, counted from 0."""
    each = max(1, len(hardware.gpus) // num_runs)
    return [(run * each + i) % len(hardware.gpus) for i in range(each)]


def share_hardware(hardware: Hardware, num_runs: int) -> Hardware:
    """Return what each of several runs side by side may use: its GPUs or part of one, threads, RAM and /dev/shm."""
    if num_runs < 1:
        raise PlanError("--side-by-side", f"{num_runs} runs", "use at least 1")
    num_gpus = len(hardware.gpus)
    on_one = runs_on_one(hardware, num_runs) if num_gpus else num_runs
    return msgspec.structs.replace(
        hardware,
        gpus=tuple(
            msgspec.structs.replace(gpu, memory_bytes=gpu.memory_bytes // on_one, free_bytes=gpu.free_bytes // on_one)
            for gpu in hardware.gpus[: max(1, num_gpus // num_runs)]
        ),
        cpu_threads=max(1, hardware.cpu_threads // num_runs),
        ram_bytes=hardware.ram_bytes // num_runs,
        shm_bytes=hardware.shm_bytes // num_runs,
        disk_free_bytes=hardware.disk_free_bytes and hardware.disk_free_bytes // num_runs,
        step_gflops=hardware.step_gflops and {name: speed / on_one for name, speed in hardware.step_gflops.items()},
    )


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(
        name=properties.name,
        memory_bytes=int(total),
        free_bytes=int(free),
        bf16=properties.major >= 8,
        fp16=properties.major >= 7,
        compute_capability=(properties.major, properties.minor),
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
