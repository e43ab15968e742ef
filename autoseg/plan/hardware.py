"""Machine -> hardware record: what this process may really use, and how fast a convolution runs on it."""

from __future__ import annotations

import math
import platform
import time
from pathlib import Path

import msgspec
import psutil
import torch

from autoseg.errors import PlanError
from autoseg.limits import usable_ram_bytes, usable_threads
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
        disk_free_bytes=psutil.disk_usage(".").free,
        shm_bytes=psutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        conv_gflops=measure_conv_gflops(torch.device("cuda" if gpus else "cpu"), threads) if measure_speed else None,
    )


def share_hardware(hardware: Hardware, num_runs: int) -> Hardware:
    """Return what each of several runs side by side may use: its GPUs or part of one, threads, RAM and /dev/shm."""
    if num_runs < 1:
        raise PlanError("--side-by-side", f"{num_runs} runs", "use at least 1")
    num_gpus = len(hardware.gpus)
    on_one = max(1, math.ceil(num_runs / num_gpus)) if num_gpus else num_runs  # runs that one device computes
    return msgspec.structs.replace(
        hardware,
        gpus=tuple(
            msgspec.structs.replace(gpu, memory_bytes=gpu.memory_bytes // on_one, free_bytes=gpu.free_bytes // on_one)
            for gpu in hardware.gpus[: max(1, num_gpus // num_runs)]
        ),
        cpu_threads=max(1, hardware.cpu_threads // num_runs),
        ram_bytes=hardware.ram_bytes // num_runs,
        shm_bytes=hardware.shm_bytes // num_runs,
        conv_gflops=hardware.conv_gflops and {name: speed / on_one for name, speed in hardware.conv_gflops.items()},
    )


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
